package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// tree is what a directory holds, as far as it is verified: its regular files,
// sorted by name, and how many there are of each other type.
type tree struct {
	Files  []file         `json:"files"`
	Others map[string]int `json:"others,omitempty"`
}

// file is a regular file.
type file struct {
	Name filename `json:"name"`
	Size int64    `json:"size"`
	// MTime in nanoseconds since 1970.
	MTime int64  `json:"mtime"`
	CRC   uint32 `json:"crc32c"`
}

// types of what is only counted.
var types = map[uint32]string{
	unix.S_IFDIR: "directory", unix.S_IFLNK: "symlink", unix.S_IFCHR: "character device",
	unix.S_IFBLK: "block device", unix.S_IFIFO: "fifo", unix.S_IFSOCK: "socket",
}

const (
	// block is what each entry takes at least: the file systems' usual unit.
	block = 4 << 10
	// maxNames bounds what the names of one tree take together, with nameCost
	// for each: a manifest is read whole, and stays in memory.
	maxNames = 16 << 20
	nameCost = 64
)

var (
	errTooLarge = errors.New("it is too large")
	castagnoli  = crc32.MakeTable(crc32.Castagnoli)
)

// footprint is what a file of that size takes.
func footprint(size int64) int64 { return (max(size, 1) + block - 1) / block * block }

// size is what a tree takes of a disk, whatever the file system.
func (t *tree) size() fleet.Bytes {
	var sum int64
	for _, f := range t.Files {
		sum += footprint(f.Size)
	}
	for _, n := range t.Others {
		sum += int64(n) * block
	}
	return fleet.Bytes(sum)
}

// differs says in what other is not the same as t, or nil.
func (t *tree) differs(other *tree) error {
	there := make(map[filename]file, len(other.Files))
	for _, f := range other.Files {
		there[f.Name] = f
	}
	for _, want := range t.Files {
		got, ok := there[want.Name]
		switch {
		case !ok:
			return fmt.Errorf("%q is missing", want.Name)
		case got.Size != want.Size:
			return fmt.Errorf("the size of %q is %d, not %d", want.Name, got.Size, want.Size)
		case got.CRC != want.CRC:
			return fmt.Errorf("the content of %q is not what was saved", want.Name)
		case got != want:
			return fmt.Errorf("%q was written to", want.Name)
		}
		delete(there, want.Name)
	}
	for name := range there {
		return fmt.Errorf("%q was added", name)
	}
	if !maps.Equal(t.Others, other.Others) {
		return fmt.Errorf("beside files it has %v, not %v", other.Others, t.Others)
	}
	return nil
}

// look compares sizes and times only. It opens no file.
func (t *tree) look(dir string) error {
	root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", dir, err)
	}
	defer unix.Close(root)
	// Neighbours in the list are mostly neighbours on the disk: one descriptor
	// is enough, and the kernel walks no path twice.
	parent, at := "", root
	leave := func() {
		if at != root {
			_ = unix.Close(at)
		}
		parent, at = "", root
	}
	defer leave()
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS}
	for i := range t.Files {
		f := &t.Files[i]
		up, base := path.Split(string(f.Name))
		if up != parent {
			leave()
			if up != "" {
				fd, err := unix.Openat2(root, up, &how)
				if err != nil {
					return fmt.Errorf("open %q: %w", up, err)
				}
				parent, at = up, fd
			}
		}
		var st unix.Stat_t
		if err := unix.Fstatat(at, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fmt.Errorf("look at %q: %w", f.Name, err)
		}
		switch {
		case st.Mode&unix.S_IFMT != unix.S_IFREG:
			return fmt.Errorf("%q is no file any more", f.Name)
		case st.Size != f.Size:
			return fmt.Errorf("the size of %q is %d, not %d", f.Name, st.Size, f.Size)
		case st.Mtim.Nano() != f.MTime:
			return fmt.Errorf("%q was written to", f.Name)
		}
	}
	return nil
}

// reading is one read through a directory.
type reading struct {
	limit int64 // of its size; past it nothing more is read
	sync  bool  // each file and directory to the disk, too
	buf   []byte

	tree  tree
	size  int64
	names int
}

// readTree reads all of a directory, which must not take more than limit, and
// with sync has it written to the disk: file by file, because a flush of the
// whole file system would wait for everybody's.
func readTree(ctx context.Context, dir string, limit fleet.Bytes, sync bool) (*tree, error) {
	r := &reading{limit: int64(limit), sync: sync, buf: make([]byte, 256<<10), tree: tree{Others: map[string]int{}}}
	if err := r.directory(ctx, unix.AT_FDCWD, dir, ""); err != nil {
		return nil, err
	}
	slices.SortFunc(r.tree.Files, func(a, b file) int { return strings.Compare(string(a.Name), string(b.Name)) })
	return &r.tree, nil
}

// directory reads the directory base of parent; prefix is for its entries'
// names.
func (r *reading) directory(ctx context.Context, parent int, base, prefix string) error {
	d, err := openAt(parent, base, unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer d.Close()
	entries, err := d.Readdirnames(-1)
	if err != nil {
		return err
	}
	for _, base := range entries {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if err := r.entry(ctx, int(d.Fd()), base, prefix+base); err != nil {
			return err
		}
	}
	if r.sync {
		return d.Sync()
	}
	return nil
}

func (r *reading) entry(ctx context.Context, parent int, base, name string) error {
	var st unix.Stat_t
	if err := unix.Fstatat(parent, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("look at %q: %w", name, err)
	}
	if r.names += len(name) + nameCost; r.names > maxNames {
		return fmt.Errorf("%w: more than %d MiB of names", fleet.ErrInvalid, maxNames>>20)
	}
	// One that is longer could not be looked at by name any more.
	if len(name) >= unix.PathMax {
		return fmt.Errorf("%w: the name %q... is too long", fleet.ErrInvalid, name[:64])
	}
	kind, regular := st.Mode&unix.S_IFMT, st.Mode&unix.S_IFMT == unix.S_IFREG
	// Before it is read: a sparse file is large, too.
	if !regular {
		st.Size = 0
	}
	if left := r.limit - r.size; st.Size > left || footprint(st.Size) > left {
		return errTooLarge
	}
	r.size += footprint(st.Size)
	if regular {
		return r.file(ctx, parent, base, name)
	}
	r.tree.Others[types[kind]]++
	if kind == unix.S_IFDIR {
		return r.directory(ctx, parent, base, name+"/")
	}
	return nil
}

func (r *reading) file(ctx context.Context, parent int, base, name string) error {
	// It was a regular file a moment ago. If it is a fifo now, opening it must
	// not wait.
	f, err := openAt(parent, base, unix.O_NONBLOCK)
	if err != nil {
		return err
	}
	defer f.Close()
	if r.sync {
		if err := f.Sync(); err != nil {
			return err
		}
	}
	before, err := stat(f)
	if err != nil {
		return err
	}
	sum, n, err := r.sum(ctx, f, before.Size)
	if err != nil {
		return err
	}
	after, err := stat(f)
	if err != nil {
		return err
	}
	if n != before.Size || before.Size != after.Size || before.Mtim != after.Mtim {
		return fmt.Errorf("%q is still being written to", name)
	}
	r.tree.Files = append(r.tree.Files, file{Name: filename(name), Size: n, MTime: after.Mtim.Nano(), CRC: sum})
	return nil
}

// sum reads f, but not much further than size.
func (r *reading) sum(ctx context.Context, f *os.File, size int64) (sum uint32, n int64, err error) {
	for n <= size {
		if err := context.Cause(ctx); err != nil {
			return 0, 0, err
		}
		k, err := f.Read(r.buf)
		sum = crc32.Update(sum, castagnoli, r.buf[:k])
		n += int64(k)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return 0, 0, err
		}
	}
	return sum, n, nil
}

// openAt opens a file or directory for reading, but no link.
func openAt(parent int, base string, flags int) (*os.File, error) {
	fd, err := unix.Openat(parent, base, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC|flags, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: base, Err: err}
	}
	return os.NewFile(uintptr(fd), base), nil
}

func stat(f *os.File) (st unix.Stat_t, err error) {
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return st, &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return st, fmt.Errorf("%q is no file any more", f.Name())
	}
	return st, nil
}
