package criu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	ghost "github.com/checkpoint-restore/go-criu/v8/crit/images/ghost-file"
	remap "github.com/checkpoint-restore/go-criu/v8/crit/images/remap-file-path"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

const (
	remapMagic = 0x59133954
	ghostMagic = 0x52583605
)

// Ghost is a file that was deleted while a process of the image had it open.
// It has to be there, under its name in the root directory, while the processes are
// restored, and to be removed before they go on.
type Ghost struct {
	Name     string `json:"name"`
	UID, GID int
	Mode     uint32
}

// TakeGhosts takes the deleted files of an image into the directory into, under
// their new names, and gives the other names that have to be removed after a
// restore: of files that were deleted under one name, and have another one.
//
// CRIU would make and remove them itself, but removes them from the root
// directory that it sees, which is not that of processes which enter other mounts.
func TakeGhosts(dir, into string) (ghosts []Ghost, links []string, err error) {
	name := filepath.Join(dir, "remap-fpath.img")
	if _, err := os.Stat(name); errors.Is(err, os.ErrNotExist) {
		return nil, nil, nil
	}
	files := filepath.Join(dir, "files.img")
	// The names of files by their numbers, as far as they are needed.
	names := map[uint32]string{}
	err = edit(files, filesMagic, look(func(e *fdinfo.FileEntry) error {
		if e.Reg != nil {
			names[e.GetId()] = e.Reg.GetName()
		}
		return nil
	}))
	if err != nil {
		return nil, nil, err
	}
	renamed, taken := map[uint32]string{}, map[uint32]string{}
	err = edit(name, remapMagic, func(b []byte) ([]byte, error) {
		e := &remap.RemapFilePathEntry{}
		if err := proto.Unmarshal(b, e); err != nil {
			return nil, err
		}
		id := e.GetRemapId()
		switch e.GetRemapType() {
		case remap.RemapType_LINKED:
			link, ok := names[id]
			if !ok {
				return nil, errors.New("it names a file that is not there")
			}
			if taken[id] == "" {
				taken[id] = link
				links = append(links, link)
			}
			renamed[e.GetOrigId()] = link
		case remap.RemapType_GHOST:
			if taken[id] == "" {
				g, err := takeGhost(dir, into, id)
				if err != nil {
					return nil, err
				}
				taken[id] = "/" + g.Name
				ghosts = append(ghosts, g)
			}
			renamed[e.GetOrigId()] = taken[id]
		default:
			return b, nil
		}
		return nil, nil // it is gone
	})
	if err != nil {
		return nil, nil, err
	}
	return ghosts, links, edit(files, filesMagic, change(func(e *fdinfo.FileEntry) error {
		if to, ok := renamed[e.GetId()]; ok && e.Reg != nil {
			e.Reg.Name = &to
		}
		return nil
	}))
}

// takeGhost writes the content of a deleted file to the directory into.
func takeGhost(dir, into string, id uint32) (g Ghost, err error) {
	image := fmt.Sprintf("ghost-file-%x.img", id)
	f, err := os.Open(filepath.Join(dir, image)) //nolint:gosec // ours
	if err != nil {
		return g, fmt.Errorf("read image: %w", err)
	}
	defer func() { _ = f.Close() }()
	var words [2]uint32
	e := &ghost.GhostFileEntry{}
	err = binary.Read(f, binary.LittleEndian, &words)
	if err == nil && (words[0] != imageMagic || words[1] != ghostMagic) {
		err = errors.New("it is damaged")
	}
	if err == nil {
		err = readEntry(f, e)
	}
	if err != nil {
		return g, fmt.Errorf("read %s: %w", image, err)
	}
	g = Ghost{Name: fmt.Sprintf(".restored-%x", id), UID: int(e.GetUid()), GID: int(e.GetGid()), Mode: e.GetMode() & 0o7777}
	if e.GetMode()&unix.S_IFMT != unix.S_IFREG {
		return g, errors.New("a process uses a deleted directory or special file")
	}
	out, err := os.OpenFile(filepath.Join(into, g.Name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600) //nolint:gosec // ours
	if err != nil {
		return g, fmt.Errorf("save deleted file: %w", err)
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	if !e.GetChunks() {
		_, err := io.Copy(out, f)
		return g, err
	}
	if err := out.Truncate(int64(e.GetSize())); err != nil { //nolint:gosec // CRIU's own
		return g, fmt.Errorf("save deleted file: %w", err)
	}
	for {
		c := &ghost.GhostChunkEntry{}
		switch err := readEntry(f, c); {
		case errors.Is(err, io.EOF):
			return g, nil
		case err != nil:
			return g, fmt.Errorf("read %s: %w", image, err)
		}
		if _, err := io.CopyN(io.NewOffsetWriter(out, int64(c.GetOff())), f, int64(c.GetLen())); err != nil { //nolint:gosec // the same
			return g, fmt.Errorf("read %s: %w", image, err)
		}
	}
}

// entryMax is more than an entry takes that stands before raw data.
const entryMax = 1 << 20

// readEntry reads one message with its size before it.
func readEntry(r io.Reader, e proto.Message) error {
	var size uint32
	if err := binary.Read(r, binary.LittleEndian, &size); err != nil {
		return err
	}
	if size > entryMax {
		return errors.New("it is damaged")
	}
	b := make([]byte, size)
	if _, err := io.ReadFull(r, b); err != nil {
		return errors.New("it is damaged")
	}
	return proto.Unmarshal(b, e)
}
