package criu

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fown"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/regfile"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/seccomp"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// write makes an image file.
func write(t testing.TB, name string, words []uint32, entries ...proto.Message) {
	t.Helper()
	var out []byte
	for _, w := range words {
		out = binary.LittleEndian.AppendUint32(out, w)
	}
	for _, e := range entries {
		b, err := proto.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		out = append(binary.LittleEndian.AppendUint32(out, uint32(len(b))), b...)
	}
	if err := os.WriteFile(name, out, 0o600); err != nil {
		t.Fatal(err)
	}
}

func filters(t *testing.T, dir string) *seccomp.SeccompEntry {
	t.Helper()
	got := &seccomp.SeccompEntry{}
	err := edit(filepath.Join(dir, "seccomp.img"), seccompMagic, func(b []byte) ([]byte, error) { return b, proto.Unmarshal(b, got) })
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestDropFilter(t *testing.T) {
	trap, other, outer := []byte("trap"), []byte("other"), []byte("outer")
	for name, c := range map[string]struct {
		have []*seccomp.SeccompFilter
		want []string
		prev []int // -1: none
	}{
		"between others":       {[]*seccomp.SeccompFilter{{Filter: outer}, {Filter: other, Prev: new(uint32(0))}, {Filter: trap, Prev: new(uint32(1))}}, []string{"outer", "other", "other"}, []int{-1, 0, 0}},
		"of several processes": {[]*seccomp.SeccompFilter{{Filter: other}, {Filter: trap, Prev: new(uint32(0))}, {Filter: other}, {Filter: trap, Prev: new(uint32(2))}}, []string{"other", "other", "other", "other"}, []int{-1, -1, -1, -1}},
		"alone":                {[]*seccomp.SeccompFilter{{Filter: trap}}, []string{string(allowAll())}, []int{-1}},
		"not there":            {[]*seccomp.SeccompFilter{{Filter: other}}, nil, nil},
		"damaged":              {[]*seccomp.SeccompFilter{{Filter: trap, Prev: new(uint32(9))}}, nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, filepath.Join(dir, "seccomp.img"), []uint32{imageMagic, seccompMagic}, &seccomp.SeccompEntry{SeccompFilters: c.have})
			err := DropFilter(dir, trap)
			if (err == nil) != (c.want != nil) {
				t.Fatal(err)
			}
			if err != nil {
				return
			}
			got := filters(t, dir).SeccompFilters
			for i, f := range got {
				prev := -1
				if f.Prev != nil {
					prev = int(f.GetPrev())
				}
				if string(f.Filter) != c.want[i] || prev != c.prev[i] {
					t.Errorf("filter %d is %q after %d, want %q after %d", i, f.Filter, prev, c.want[i], c.prev[i])
				}
			}
		})
	}
}

func TestShare_RefusesWhatIsNoImage(t *testing.T) {
	dir := t.TempDir()
	if err := Share(dir, 1); err == nil {
		t.Error("nothing is shared")
	}
	write(t, filepath.Join(dir, "ids-1.img"), []uint32{imageMagic, seccompMagic}, &core.TaskKobjIdsEntry{VmId: new(uint32(1)), FilesId: new(uint32(1)), FsId: new(uint32(1)), SighandId: new(uint32(1))})
	if err := Share(dir, 1); err == nil {
		t.Error("another file's magic is taken")
	}
}

func TestLost(t *testing.T) {
	file := func(name string) *fdinfo.FileEntry {
		return &fdinfo.FileEntry{Type: new(fdinfo.FdTypes_REG), Id: new(uint32(1)), Reg: &regfile.RegFileEntry{
			Id: new(uint32(1)), Flags: new(uint32(0)), Pos: new(uint64(0)), Fown: &fown.FownEntry{Uid: new(uint32(0)), Euid: new(uint32(0)), Signum: new(uint32(0)), PidType: new(uint32(0)), Pid: new(uint32(0))}, Name: &name,
		}}
	}
	for name, c := range map[string]struct {
		more string // a file beside
		open string
		want string
	}{
		"usual":             {"ipcns-var-11.img", "/var/log/x", ""},
		"shared memory":     {"ipcns-shm-11.img", "/x", "System V shared memory"},
		"semaphores":        {"ipcns-sem-11.img", "/x", "System V semaphores"},
		"message queues":    {"ipcns-msg-11.img", "/x", "System V message queues"},
		"a file of memory":  {"pages-1.img", "/dev/shm/x", "/dev/shm/x"},
		"one that was gone": {"pages-1.img", "/.restored-1", ""},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, filepath.Join(dir, c.more), nil)
			write(t, filepath.Join(dir, "files.img"), []uint32{imageMagic, filesMagic}, file(c.open), &fdinfo.FileEntry{Type: new(fdinfo.FdTypes_PIPE), Id: new(uint32(2))})
			err := Lost(dir)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}

// FuzzEdit: whatever is in a file, an edit that changes nothing fails or leaves it as it was.
func FuzzEdit(f *testing.F) {
	f.Add([]byte{})
	f.Add(binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, imageMagic), filesMagic))
	f.Add(append(binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, imageMagic), filesMagic), 2, 0, 0, 0, 8, 1, 0xff, 0xff, 0xff, 0xff))
	name := filepath.Join(f.TempDir(), "image")
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := edit(name, filesMagic, func(e []byte) ([]byte, error) { return e, nil }); err != nil {
			return
		}
		got, err := os.ReadFile(name)
		if err != nil || string(got) != string(b) {
			t.Errorf("%x became %x, %v", b, got, err)
		}
	})
}

func TestFailed(t *testing.T) {
	for log, want := range map[string]error{
		"": ErrRefused,
		"(00.1) Error (criu/a.c:1): Head magic doesn't match\n":                                                              ErrRefused,
		"(00.1) Warn  (criu/a.c:1): Can't allocate: Cannot allocate memory\n(00.2) Error (criu/b.c:2): bad size\n":           ErrRefused,
		"(00.1) Error (criu/a.c:1): Can't fork for 9: Resource temporarily unavailable\n(00.2) Error (criu/b.c:2): failed\n": unix.EAGAIN,
		"(00.1) Error (criu/a.c:1): Can't open x: Too many open files\n":                                                     unix.EMFILE,
		"(00.1) Error (criu/a.c:1): first\n(00.2) Error (criu/b.c:2): Can't write: No space left on device\n":                unix.ENOSPC,
		"(00.1) Error (criu/a.c:1): Can't map: Cannot allocate memory\n":                                                     unix.ENOMEM,
	} {
		err := failed(log)
		if !errors.Is(err, want) || errors.Is(err, ErrRefused) != errors.Is(want, ErrRefused) {
			t.Errorf("%q: %v, want %v", log, err, want)
		}
	}
}

func TestBecause(t *testing.T) {
	for log, want := range map[string]string{
		"": "",
		"(00.1) Warn  (criu/a.c:1): small\n(00.2) Error (criu/b.c:2): files: it broke\n(00.3) Error (criu/c.c:3): Restoring FAILED.\n": ": files: it broke",
		"Error (no end": ": no end",
		"(00.1) Error (criu/rlimit.c:37): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n(00.2) Error (criu/b.c:2): it broke\n": ": it broke",
	} {
		if got := because(log); got != want {
			t.Errorf("%q: %q, want %q", log, got, want)
		}
	}
}
