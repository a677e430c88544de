// Package unpack turns the tar stream of one image layer into a directory that
// overlayfs can use as a lower layer.
//
// It promises: nothing outside the given directory is ever touched, whatever
// the stream says; the stream's size, its number of entries and its names are
// bounded; whiteouts and opaque markers become what overlayfs understands;
// owners, modes, times, extended attributes, hard links, devices and holes come
// out as in the image. It leaves removing a half-written directory to its
// caller, who made it.
//
// Every path is walked by the kernel with openat2(RESOLVE_BENEATH), so a
// symbolic link that an earlier entry planted cannot lead out, not even for the
// blink of an eye.
package unpack

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// ErrRefused: the layer itself is damaged or hostile; trying again will not help.
var ErrRefused = errors.New("layer refused")

// ErrTooLarge is the ErrRefused of a layer that exceeds its budget.
var ErrTooLarge = fmt.Errorf("%w: it is too large", ErrRefused)

// OpaqueXattr marks a directory that hides what lower layers have in its place.
const OpaqueXattr = "trusted.overlay.opaque"

const (
	whiteoutPrefix = ".wh."
	whiteoutMeta   = ".wh..wh."
	opaqueMarker   = ".wh..wh..opq"

	maxPath      = unix.PathMax - 1
	maxName      = 255
	maxXattr     = 64 << 10
	maxXattrs    = 256 << 10
	maxDeferred  = 16 << 20
	entryCost    = 512
	streamSlack  = 64 << 20
	holeGrain    = 4096
	copyBuffer   = 256 << 10
	xattrPAX     = "SCHILY.xattr."
	aclDefault   = "system.posix_acl_default"
	implicitMode = 0o755
)

// Budget bounds what all layers of one image may cost together. It is safe for
// several layers at once.
type Budget struct {
	maxBytes, maxEntries         int64
	bytes, entries, stream       atomic.Int64
	tooLong, tooMany, tooMuchTar error
}

// NewBudget allows that many unpacked bytes and entries.
func NewBudget(maxBytes, maxEntries int64) *Budget {
	b := &Budget{
		maxBytes: maxBytes, maxEntries: maxEntries,
		tooLong:    fmt.Errorf("%w: more than %d bytes unpacked", ErrTooLarge, maxBytes),
		tooMany:    fmt.Errorf("%w: more than %d entries", ErrTooLarge, maxEntries),
		tooMuchTar: fmt.Errorf("%w: its tar stream is longer than anything of %d bytes needs", ErrTooLarge, maxBytes),
	}
	b.bytes.Store(maxBytes)
	b.entries.Store(maxEntries)
	// Headers are part of the stream but not of the files.
	b.stream.Store(min(maxBytes, math.MaxInt64/4)*2 + streamSlack)
	return b
}

// Charge takes n bytes and one entry.
func (b *Budget) charge(n int64) error {
	if b.entries.Add(-1) < 0 {
		return b.tooMany
	}
	return b.Take(n)
}

// Take takes n bytes of files.
func (b *Budget) Take(n int64) error {
	if n < 0 || n > b.maxBytes || b.bytes.Add(-n) < 0 {
		return b.tooLong
	}
	return nil
}

// Reader bounds a decompressed stream: what it expands to costs time and disk
// even if it holds no file.
func (b *Budget) Reader(r io.Reader) io.Reader { return &boundedReader{r, b} }

type boundedReader struct {
	r io.Reader
	b *Budget
}

func (r *boundedReader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	if r.b.stream.Add(-int64(n)) < 0 {
		return 0, r.b.tooMuchTar
	}
	return n, err
}

// Result describes an unpacked layer.
type Result struct {
	// Size of all files, as if they had no holes.
	Size int64 `json:"size"`
	// Entries is the number of entries in the stream.
	Entries int64 `json:"entries"`
	// Implicit are the directories that have no entry of their own: their
	// owner and mode are unknown to this layer. "." is its root.
	Implicit []string `json:"implicit,omitempty"`
}

// Tar unpacks the tar stream r into dir, which must exist and be empty, and
// which nobody else may write to. It reads r up to the end of the archive, not
// what follows it.
func Tar(ctx context.Context, r io.Reader, dir string, b *Budget) (Result, error) {
	root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return Result{}, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	remover, err := os.OpenRoot(dir)
	if err != nil {
		_ = unix.Close(root)
		return Result{}, err
	}
	u := &unpacker{
		ctx: ctx, root: root, remover: remover, budget: b, parentFD: -1,
		buf:       make([]byte, copyBuffer),
		explicit:  map[string]*dirMeta{},
		implicit:  map[string]bool{".": true},
		whiteouts: map[string]bool{},
	}
	defer u.close()
	if err := u.run(tar.NewReader(r)); err != nil {
		return Result{}, err
	}
	return Result{Size: u.size, Entries: u.entries, Implicit: slices.Sorted(maps.Keys(u.implicit))}, nil
}

// dirMeta is what can be set on a directory only when it is complete.
type dirMeta struct {
	mtime unix.Timespec
	acl   string
}

type unpacker struct {
	ctx      context.Context // of this one call; the unpacker does not outlive it
	root     int
	remover  *os.Root
	budget   *Budget
	buf      []byte
	size     int64
	entries  int64
	deferred int64

	// One directory is kept open: tar streams come directory by directory.
	parentPath string
	parentFD   int

	explicit  map[string]*dirMeta
	implicit  map[string]bool
	whiteouts map[string]bool
}

func (u *unpacker) close() {
	u.forget()
	_ = unix.Close(u.root)
	_ = u.remover.Close()
}

// forget closes the open directory, because the tree above it may change.
func (u *unpacker) forget() {
	if u.parentFD >= 0 {
		_ = unix.Close(u.parentFD)
	}
	u.parentFD, u.parentPath = -1, ""
}

func (u *unpacker) run(tr *tar.Reader) error {
	for {
		if err := context.Cause(u.ctx); err != nil {
			return err
		}
		hdr, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) { // names are checked here
			return streamError(err)
		}
		u.entries++
		size := hdr.Size
		switch hdr.Typeflag {
		case tar.TypeLink, tar.TypeSymlink, tar.TypeDir, tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
			size = 0 // some writers repeat the target's
		}
		if err := u.budget.charge(size + entryCost); err != nil {
			return err
		}
		u.size += size
		if err := u.entry(hdr, tr); err != nil {
			return fmt.Errorf("entry %s: %w", quote(hdr.Name), err)
		}
	}
	return u.finish()
}

// streamError tells a damaged archive from a disk or a caller that failed.
func streamError(err error) error {
	if _, ok := errors.AsType[unix.Errno](err); ok || errors.Is(err, ErrRefused) ||
		errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return fmt.Errorf("%w: damaged archive: %w", ErrRefused, err)
}

// quote shortens a name for a message.
func quote(name string) string {
	if len(name) > 200 {
		name = name[:200] + "…"
	}
	return strconv.Quote(name)
}

func refuse(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrRefused}, args...)...)
}

// clean gives a name relative to the layer's root, "." for the root itself. A
// leading slash is usual in old archives and means the root.
func clean(name string) (string, error) {
	if strings.ContainsRune(name, 0) {
		return "", refuse("its name holds a zero byte")
	}
	if len(name) > maxPath {
		return "", refuse("its name is longer than %d bytes", maxPath)
	}
	p := path.Clean(strings.TrimLeft(name, "/"))
	if p == ".." || strings.HasPrefix(p, "../") {
		return "", refuse("it points outside of the layer")
	}
	for c := range strings.SplitSeq(p, "/") {
		if len(c) > maxName {
			return "", refuse("a part of its name is longer than %d bytes", maxName)
		}
	}
	return p, nil
}

func (u *unpacker) entry(hdr *tar.Header, r io.Reader) error {
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	p, err := clean(hdr.Name)
	if err != nil {
		return err
	}
	dir, base := path.Split(p)
	dir = path.Clean(dir)
	if p != "." && strings.HasPrefix(base, whiteoutPrefix) {
		return u.whiteout(dir, base)
	}
	// What lies below a name with the meta prefix is bookkeeping of old tools.
	if strings.HasPrefix(p, whiteoutMeta) {
		return nil
	}
	m, err := metaOf(hdr)
	if err != nil {
		return err
	}
	if p == "." {
		if hdr.Typeflag != tar.TypeDir {
			return refuse("the root of a layer must be a directory")
		}
		return u.setDir(u.root, ".", p, m)
	}
	fd, err := u.parent(dir)
	if err != nil {
		return err
	}
	switch hdr.Typeflag {
	case tar.TypeDir:
		return u.directory(fd, base, p, m)
	case tar.TypeReg, tar.TypeRegA, tar.TypeCont, tar.TypeGNUSparse: //nolint:staticcheck // old archives have TypeRegA
		return u.regular(fd, base, p, m, r, hdr.Size)
	case tar.TypeLink:
		return u.hardlink(fd, base, p, hdr.Linkname)
	case tar.TypeSymlink:
		if len(hdr.Linkname) == 0 || len(hdr.Linkname) > maxPath || strings.ContainsRune(hdr.Linkname, 0) {
			return refuse("the target of the symbolic link is empty or too long")
		}
		err = u.make(p, func() error { return unix.Symlinkat(hdr.Linkname, fd, base) })
	case tar.TypeFifo:
		err = u.make(p, func() error { return unix.Mknodat(fd, base, unix.S_IFIFO|0o600, 0) })
	case tar.TypeChar, tar.TypeBlock:
		kind := uint32(unix.S_IFCHR)
		if hdr.Typeflag == tar.TypeBlock {
			kind = unix.S_IFBLK
		}
		if hdr.Devmajor < 0 || hdr.Devmajor > 0xfff || hdr.Devminor < 0 || hdr.Devminor > 0xfffff {
			return refuse("device %d:%d does not exist", hdr.Devmajor, hdr.Devminor)
		}
		dev := unix.Mkdev(uint32(hdr.Devmajor), uint32(hdr.Devminor))
		err = u.make(p, func() error { return unix.Mknodat(fd, base, kind|0o600, int(dev)) })
	default:
		return refuse("unknown type %q", hdr.Typeflag)
	}
	if err != nil {
		return err
	}
	if err := unix.Fchownat(fd, base, m.uid, m.gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return sysError("chown", err)
	}
	if hdr.Typeflag != tar.TypeSymlink {
		if err := unix.Fchmodat(fd, base, m.mode, 0); err != nil {
			return sysError("chmod", err)
		}
	}
	if err := u.xattrs(fd, base, m, false); err != nil {
		return err
	}
	return u.times(fd, base, m.mtime)
}

// meta is the checked part of a header.
type meta struct {
	uid, gid int
	mode     uint32
	mtime    unix.Timespec
	xattrs   map[string]string
}

func metaOf(hdr *tar.Header) (meta, error) {
	// The all-ones id means "leave it" to chown and is nobody's.
	if hdr.Uid < 0 || int64(hdr.Uid) >= math.MaxUint32 || hdr.Gid < 0 || int64(hdr.Gid) >= math.MaxUint32 {
		return meta{}, refuse("owner %d:%d does not exist", hdr.Uid, hdr.Gid)
	}
	m := meta{uid: hdr.Uid, gid: hdr.Gid, mode: uint32(hdr.Mode & 0o7777)}
	if !hdr.ModTime.IsZero() {
		m.mtime = unix.Timespec{Sec: hdr.ModTime.Unix(), Nsec: int64(hdr.ModTime.Nanosecond())}
	}
	total := 0
	for key, value := range hdr.PAXRecords {
		name, ok := strings.CutPrefix(key, xattrPAX)
		if !ok || !kept(name) {
			continue
		}
		total += len(name) + len(value)
		if len(name) > maxName || len(value) > maxXattr || total > maxXattrs {
			return meta{}, refuse("its extended attributes are too large")
		}
		if m.xattrs == nil {
			m.xattrs = map[string]string{}
		}
		m.xattrs[name] = value
	}
	return m, nil
}

// kept says which extended attributes belong to an image. Labels of the host
// that built it do not, and overlayfs's own marks would let a layer reach into
// another.
func kept(name string) bool {
	switch {
	case strings.HasPrefix(name, "user.overlay."):
		return false
	case strings.HasPrefix(name, "user."), name == "security.capability",
		name == "system.posix_acl_access", name == aclDefault:
		return true
	}
	return false
}

// parent opens the directory dir beneath the root, making what is missing.
func (u *unpacker) parent(dir string) (int, error) {
	if dir == "." {
		return u.root, nil
	}
	if u.parentFD >= 0 && u.parentPath == dir {
		return u.parentFD, nil
	}
	fd, err := u.open(dir)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		fd, err = u.makeParents(dir)
	}
	if err != nil {
		return -1, err
	}
	u.forget()
	u.parentPath, u.parentFD = dir, fd
	return fd, nil
}

// open opens a directory beneath the root. The kernel refuses every step out.
func (u *unpacker) open(dir string) (int, error) {
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	}
	for range 100 {
		fd, err := unix.Openat2(u.root, dir, &how)
		switch err {
		case nil:
			return fd, nil
		case unix.EAGAIN, unix.EINTR: // a rename elsewhere on the host disturbed the walk
			continue
		case unix.EXDEV, unix.ELOOP:
			return -1, refuse("a symbolic link on the way to it leads out of the layer")
		}
		return -1, sysError("open", err)
	}
	return -1, sysError("open", unix.EAGAIN)
}

func (u *unpacker) makeParents(dir string) (int, error) {
	at := u.root
	done := func() {
		if at != u.root {
			_ = unix.Close(at)
		}
	}
	var prefix string
	for c := range strings.SplitSeq(dir, "/") {
		prefix = path.Join(prefix, c)
		fd, err := u.open(prefix)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
			if err = u.implicitDir(at, c, prefix); err == nil {
				fd, err = u.open(prefix)
			}
		}
		done()
		if err != nil {
			return -1, err
		}
		at = fd
	}
	return at, nil
}

// implicitDir makes a directory that has no entry (yet).
func (u *unpacker) implicitDir(fd int, base, p string) error {
	opaque := false
	if u.whiteouts[p] {
		if err := u.remove(p); err != nil {
			return err
		}
		opaque = true
	}
	switch err := unix.Mkdirat(fd, base, implicitMode); {
	case errors.Is(err, unix.EEXIST):
		return refuse("%s on the way to it is not a directory", quote(p))
	case err != nil:
		return sysError("mkdir", err)
	}
	if err := unix.Fchownat(fd, base, 0, 0, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return sysError("chown", err)
	}
	if err := unix.Fchmodat(fd, base, implicitMode, 0); err != nil {
		return sysError("chmod", err)
	}
	u.implicit[p] = true
	if opaque {
		return setXattr(fd, base, OpaqueXattr, "y")
	}
	return nil
}

// make makes one object, replacing what an earlier entry made under that name.
func (u *unpacker) make(p string, create func() error) error {
	err := create()
	if errors.Is(err, unix.EEXIST) {
		if err := u.remove(p); err != nil {
			return err
		}
		err = create()
	}
	if err != nil {
		return sysError("create", err)
	}
	return nil
}

// remove removes what is at p. The directory that is open stays usable: it is
// not below p, as p's own parent is what was opened last.
func (u *unpacker) remove(p string) error {
	if strings.HasPrefix(u.parentPath+"/", p+"/") {
		u.forget()
	}
	dir, base := path.Split(p)
	fd, err := u.open(path.Clean(dir))
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstatat(fd, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return sysError("stat", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		if err := unix.Unlinkat(fd, base, 0); err != nil {
			return sysError("remove", err)
		}
	} else {
		if err := u.remover.RemoveAll(p); err != nil {
			return fmt.Errorf("replace a directory: %w", err)
		}
		for _, m := range []map[string]bool{u.implicit, u.whiteouts} {
			maps.DeleteFunc(m, func(k string, _ bool) bool { return within(k, p) })
		}
		maps.DeleteFunc(u.explicit, func(k string, _ *dirMeta) bool { return within(k, p) })
	}
	delete(u.whiteouts, p)
	return nil
}

func within(p, dir string) bool { return p == dir || strings.HasPrefix(p, dir+"/") }

func (u *unpacker) directory(fd int, base, p string, m meta) error {
	err := unix.Mkdirat(fd, base, 0o700)
	opaque := false
	if errors.Is(err, unix.EEXIST) {
		var st unix.Stat_t
		if err := unix.Fstatat(fd, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return sysError("stat", err)
		}
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			return u.setDir(fd, base, p, m)
		}
		// Its own layer's whiteout hid the lower directory; the new one must
		// keep hiding it.
		opaque = u.whiteouts[p]
		if err := u.remove(p); err != nil {
			return err
		}
		err = unix.Mkdirat(fd, base, 0o700)
	}
	if err != nil {
		return sysError("mkdir", err)
	}
	if opaque {
		if err := setXattr(fd, base, OpaqueXattr, "y"); err != nil {
			return err
		}
	}
	return u.setDir(fd, base, p, m)
}

// setDir sets what can be set now; its time and its default ACL wait until
// nothing more is made inside.
func (u *unpacker) setDir(fd int, base, p string, m meta) error {
	if err := unix.Fchownat(fd, base, m.uid, m.gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return sysError("chown", err)
	}
	if err := unix.Fchmodat(fd, base, m.mode, 0); err != nil {
		return sysError("chmod", err)
	}
	d := &dirMeta{mtime: m.mtime, acl: m.xattrs[aclDefault]}
	if u.deferred += int64(len(d.acl)); u.deferred > maxDeferred {
		return refuse("its access lists are too large")
	}
	delete(u.implicit, p)
	u.explicit[p] = d
	return u.xattrs(fd, base, m, true)
}

func (u *unpacker) regular(fd int, base, p string, m meta, r io.Reader, size int64) error {
	var file int
	err := u.make(p, func() (err error) {
		file, err = unix.Openat(fd, base, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		return err
	})
	if err != nil {
		return err
	}
	defer unix.Close(file)
	if err := u.write(file, r, size); err != nil {
		return err
	}
	if err := unix.Fchown(file, m.uid, m.gid); err != nil {
		return sysError("chown", err)
	}
	// After chown, which clears the setuid bits and capabilities.
	if err := unix.Fchmod(file, m.mode); err != nil {
		return sysError("chmod", err)
	}
	if err := u.xattrs(fd, base, m, false); err != nil {
		return err
	}
	return u.times(fd, base, m.mtime)
}

// write copies the content, leaving holes where it is zero.
func (u *unpacker) write(fd int, r io.Reader, size int64) error {
	var off, end int64 // end: up to where something was written
	for off < size {
		if err := context.Cause(u.ctx); err != nil {
			return err
		}
		n, err := io.ReadFull(r, u.buf[:min(int64(len(u.buf)), size-off)])
		if err != nil {
			return streamError(fmt.Errorf("content ends early: %w", err))
		}
		for at := 0; at < n; {
			stop := at
			for stop < n && !zero(u.buf[stop:min(stop+holeGrain, n)]) {
				stop = min(stop+holeGrain, n)
			}
			if stop == at {
				at = min(at+holeGrain, n)
				continue
			}
			for at < stop {
				w, err := unix.Pwrite(fd, u.buf[at:stop], off+int64(at))
				if err == unix.EINTR {
					continue
				}
				if err != nil {
					return sysError("write", err)
				}
				at += w
				end = off + int64(at)
			}
		}
		off += int64(n)
	}
	if end < size {
		if err := unix.Ftruncate(fd, size); err != nil {
			return sysError("truncate", err)
		}
	}
	return nil
}

var zeros [holeGrain]byte

func zero(b []byte) bool { return b[0] == 0 && bytes.Equal(b, zeros[:len(b)]) }

func (u *unpacker) hardlink(fd int, base, p, target string) error {
	t, err := clean(target)
	if err != nil {
		return fmt.Errorf("hard link to %s: %w", quote(target), err)
	}
	if t == p {
		return refuse("a hard link to itself")
	}
	dir, name := path.Split(t)
	from, err := u.open(path.Clean(dir))
	if err == nil {
		defer unix.Close(from)
		var st unix.Stat_t
		if err = unix.Fstatat(from, name, &st, unix.AT_SYMLINK_NOFOLLOW); err == nil &&
			(st.Mode&unix.S_IFMT == unix.S_IFDIR || u.whiteouts[t]) {
			return refuse("hard link to %s, which is not a file", quote(target))
		}
	}
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return refuse("hard link to %s, which is not in this layer before it", quote(target))
	}
	if err != nil {
		return sysError("hard link", err)
	}
	// AT_SYMLINK_FOLLOW is not given: a link to a symbolic link is one too.
	return u.make(p, func() error { return unix.Linkat(from, name, fd, base, 0) })
}

// whiteout hides something of lower layers. Per OCI it says nothing about what
// its own layer has under that name, before or after.
func (u *unpacker) whiteout(dir, base string) error {
	if base == opaqueMarker {
		fd, err := u.parent(dir)
		if err != nil {
			return err
		}
		if dir == "." {
			return setXattr(u.root, ".", OpaqueXattr, "y")
		}
		return setXattr(fd, ".", OpaqueXattr, "y")
	}
	if strings.HasPrefix(base, whiteoutMeta) {
		return nil
	}
	name := strings.TrimPrefix(base, whiteoutPrefix)
	if name == "" || name == "." || name == ".." {
		return refuse("a whiteout of nothing")
	}
	fd, err := u.parent(dir)
	if err != nil {
		return err
	}
	p := path.Join(dir, name)
	err = unix.Mknodat(fd, name, unix.S_IFCHR, 0)
	if errors.Is(err, unix.EEXIST) {
		var st unix.Stat_t
		if err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return sysError("stat", err)
		}
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			return setXattr(fd, name, OpaqueXattr, "y")
		}
		return nil
	}
	if err != nil {
		return sysError("whiteout", err)
	}
	u.whiteouts[p] = true
	return nil
}

func (u *unpacker) xattrs(fd int, base string, m meta, isDir bool) error {
	for name, value := range m.xattrs {
		if name == aclDefault {
			if isDir {
				continue // finish sets it, else children would inherit it
			}
			return refuse("a default access list on something that is no directory")
		}
		if err := setXattr(fd, base, name, value); err != nil {
			return err
		}
	}
	return nil
}

// setXattr reaches base through the open directory fd without following it.
func setXattr(fd int, base, name, value string) error {
	err := unix.Lsetxattr("/proc/self/fd/"+strconv.Itoa(fd)+"/"+base, name, []byte(value), 0)
	user := strings.HasPrefix(name, "user.")
	switch {
	case err == nil:
		return nil
	case user && (errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOTSUP)):
		// Symbolic links and devices cannot carry them, some file systems
		// have none: nothing depends on a user attribute to be safe.
		return nil
	case errors.Is(err, unix.E2BIG), errors.Is(err, unix.ERANGE), errors.Is(err, unix.EINVAL):
		return refuse("extended attribute %s: %v", quote(name), err)
	case errors.Is(err, unix.ENOSPC) && !full(fd):
		return refuse("its extended attributes are too large for this file system")
	}
	return sysError("set extended attribute "+name, err)
}

// full tells a full disk from an attribute that does not fit into an inode,
// for which ext4 has the same error.
func full(fd int) bool {
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return true
	}
	return st.Bavail*uint64(st.Bsize) < 1<<20
}

func (u *unpacker) times(fd int, base string, mtime unix.Timespec) error {
	ts := []unix.Timespec{mtime, mtime}
	if err := unix.UtimesNanoAt(fd, base, ts, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return sysError("set times", err)
	}
	return nil
}

// finish sets what had to wait for the directories to be complete.
func (u *unpacker) finish() error {
	for p, d := range u.explicit {
		fd, err := u.open(p)
		if err != nil {
			return fmt.Errorf("directory %s: %w", quote(p), err)
		}
		if d.acl != "" {
			err = setXattr(fd, ".", aclDefault, d.acl)
		}
		if err == nil {
			err = u.times(fd, ".", d.mtime)
		}
		_ = unix.Close(fd)
		if err != nil {
			return fmt.Errorf("directory %s: %w", quote(p), err)
		}
	}
	return nil
}

// sysError names what failed; names that the kernel finds too long, and trees
// that it cannot hold, are the layer's fault.
func sysError(op string, err error) error {
	switch {
	case errors.Is(err, ErrRefused):
		return err
	case errors.Is(err, unix.ENAMETOOLONG), errors.Is(err, unix.EMLINK), errors.Is(err, unix.ELOOP),
		errors.Is(err, unix.EINVAL), errors.Is(err, unix.EFBIG), errors.Is(err, unix.EXDEV):
		return refuse("%s: %w", op, err)
	}
	return fmt.Errorf("%s: %w", op, err)
}
