package criu

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/inventory"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/seccomp"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// The first words of an image file: that it is one, and which.
const (
	imageMagic     = 0x54564319
	inventoryMagic = 0x58313116
	idsMagic       = 0x54432030
	seccompMagic   = 0x64413049
	filesMagic     = 0x56303138
)

// Share makes an image forget which namespaces its processes had, except that
// of their PIDs, as if CRIU had been in the others with them: on restore they
// find themselves in those that CRIU is in, or is told to put their first process
// into, and nothing is made anew.
//
// CRIU makes a namespace new if that of the image's first process (pid, as the
// processes see it) is not the one CRIU itself had, which is in inventory.img. And
// without a mount namespace of their own files have no mount.
func Share(dir string, pid int) error {
	ids := &core.TaskKobjIdsEntry{}
	err := edit(filepath.Join(dir, "ids-"+strconv.Itoa(pid)+".img"), idsMagic, func(e []byte) ([]byte, error) {
		return e, proto.Unmarshal(e, ids)
	})
	if err != nil {
		return err
	}
	err = edit(filepath.Join(dir, "inventory.img"), inventoryMagic, change(func(e *inventory.InventoryEntry) error {
		own := e.GetRootIds()
		if own == nil {
			return errors.New("it does not tell CRIU's namespaces")
		}
		own.MntNsId, own.UserNsId, own.NetNsId, own.IpcNsId = ids.MntNsId, ids.UserNsId, ids.NetNsId, ids.IpcNsId
		own.UtsNsId, own.CgroupNsId, own.TimeNsId = ids.UtsNsId, ids.CgroupNsId, ids.TimeNsId
		return nil
	}))
	if err != nil {
		return err
	}
	return edit(filepath.Join(dir, "files.img"), filesMagic, change(func(e *fdinfo.FileEntry) error {
		if e.Reg != nil {
			e.Reg.MntId = nil
		}
		if e.Usk != nil {
			e.Usk.MntId = nil
		}
		return nil
	}))
}

// Lost is an error if processes have what an image does not give back to them,
// because it lies in what a sandbox brings along. Their deleted files were taken
// before (TakeGhosts).
func Lost(dir string) error {
	lost := func(what string) error {
		return fmt.Errorf("its processes use %s, which cannot be saved", what)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("read images: %w", err)
	}
	for _, e := range entries { // CRIU writes these if there are some
		switch name := e.Name(); {
		case strings.HasPrefix(name, "ipcns-shm-"):
			return lost("System V shared memory")
		case strings.HasPrefix(name, "ipcns-sem-"):
			return lost("System V semaphores")
		case strings.HasPrefix(name, "ipcns-msg-"):
			return lost("System V message queues")
		}
	}
	file := ""
	err = edit(filepath.Join(dir, "files.img"), filesMagic, look(func(e *fdinfo.FileEntry) error {
		if name := e.GetReg().GetName(); strings.HasPrefix(name, "/dev/shm/") {
			file = name
		}
		return nil
	}))
	if err == nil && file != "" {
		err = lost(file)
	}
	return err
}

// DropFilter takes a seccomp filter off the processes of an image.
func DropFilter(dir string, filter []byte) error {
	dropped := false
	err := edit(filepath.Join(dir, "seccomp.img"), seccompMagic, change(func(e *seccomp.SeccompEntry) error {
		for i, f := range e.SeccompFilters {
			if !bytes.Equal(f.Filter, filter) {
				continue
			}
			// The processes name the filter that they had first, and that names the
			// next one: its place is taken by the next.
			dropped = true
			switch next := int(f.GetPrev()); {
			case f.Prev == nil: // it was the only one
				e.SeccompFilters[i] = &seccomp.SeccompFilter{Filter: allowAll(), Flags: f.Flags}
			case next >= len(e.SeccompFilters) || next == i:
				return errors.New("it is damaged")
			default:
				e.SeccompFilters[i] = e.SeccompFilters[next]
			}
		}
		return nil
	}))
	if err == nil && !dropped {
		err = errors.New("change seccomp.img: the filter is not there")
	}
	return err
}

// allowAll is a seccomp filter that does nothing.
func allowAll() []byte {
	return binary.NativeEndian.AppendUint32([]byte{unix.BPF_RET | unix.BPF_K, 0, 0, 0}, unix.SECCOMP_RET_ALLOW)
}

// entry of an image file: a message of one kind.
type entry[T any] interface {
	*T
	proto.Message
}

// decode one, and do something with it.
func decode[T any, P entry[T]](b []byte, f func(P) error) (P, error) {
	e := P(new(T))
	if err := proto.Unmarshal(b, e); err != nil {
		return nil, err
	}
	return e, f(e)
}

// change is an edit of one entry of a kind.
func change[T any, P entry[T]](f func(P) error) func([]byte) ([]byte, error) {
	return func(b []byte) ([]byte, error) {
		e, err := decode(b, f)
		if err != nil {
			return nil, err
		}
		return proto.Marshal(e)
	}
}

// look reads one entry of a kind, and leaves it as it is.
func look[T any, P entry[T]](f func(P) error) func([]byte) ([]byte, error) {
	return func(b []byte) ([]byte, error) {
		_, err := decode(b, f)
		return b, err
	}
}

// images are those whose names begin so, without that beginning.
func images(dir, prefix string) (rests []string, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read images: %w", err)
	}
	for _, e := range entries {
		if rest, ok := strings.CutPrefix(e.Name(), prefix); ok {
			rests = append(rests, rest)
		}
	}
	return rests, nil
}

// editAll edits the images whose names begin so.
func editAll(dir, prefix string, magic uint32, f func(entry []byte) ([]byte, error)) error {
	rests, err := images(dir, prefix)
	if err != nil {
		return err
	}
	for _, rest := range rests {
		if err := edit(filepath.Join(dir, prefix+rest), magic, f); err != nil {
			return err
		}
	}
	return nil
}

// edit puts other entries in the place of those of an image file: a list of
// sizes, of four bytes, and messages. Without a message an entry is gone.
func edit(name string, magic uint32, f func(entry []byte) ([]byte, error)) error {
	fail := func(err error) error { return fmt.Errorf("change %s: %w", filepath.Base(name), err) }
	b, err := os.ReadFile(name) //nolint:gosec // ours
	if err != nil {
		return fmt.Errorf("read image: %w", err)
	}
	// The inventory tells the version of all, so it has one word where the others have two.
	le, at := binary.LittleEndian, 8
	if magic == inventoryMagic {
		at = 4
	}
	if len(b) < at || le.Uint32(b[at-4:]) != magic || at == 8 && le.Uint32(b) != imageMagic {
		return fail(errors.New("it is damaged"))
	}
	out := b[:at:at]
	for rest := b[at:]; len(rest) > 0; {
		if len(rest) < 4 || uint64(len(rest)) < 4+uint64(le.Uint32(rest)) {
			return fail(errors.New("it is damaged"))
		}
		size := int(le.Uint32(rest))
		entry, err := f(rest[4:][:size])
		if err != nil {
			return fail(err)
		}
		rest = rest[4+size:]
		if entry != nil {
			out = append(le.AppendUint32(out, uint32(len(entry))), entry...) //nolint:gosec // small
		}
	}
	if bytes.Equal(out, b) { // it was only read
		return nil
	}
	if err := os.WriteFile(name, out, 0o600); err != nil {
		return fmt.Errorf("write image: %w", err)
	}
	return nil
}
