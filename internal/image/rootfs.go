package image

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// dirSource is dir:ROOTFS: a plain directory, copied as one layer. It goes the
// way of every other layer, as a tar stream, so that the same limits hold.
type dirSource struct {
	s    *Store
	path string
}

func (d *dirSource) ref() string { return "dir:" + d.path }

func (d *dirSource) resolve(ctx context.Context) (fleet.Digest, error) {
	r := d.stream(ctx)
	defer r.finish(nil)
	return rootfsDigest(d.s, r)
}

func (d *dirSource) plan(context.Context) (*plan, error) {
	return &plan{config: d.s.rootfsConfig(), close: func() {}, layers: []planLayer{{
		open: func(ctx context.Context, _ func(int64)) (blob, error) { return d.stream(ctx), nil },
	}}}, nil
}

// fingerprint walks the directory without reading files.
func (d *dirSource) fingerprint(ctx context.Context) (string, error) {
	sum := sha256.New()
	err := d.walk(ctx, func(_ *os.Root, name string, _ fs.FileInfo, st *syscall.Stat_t) error {
		_, err := fmt.Fprintf(sum, "%q %o %d:%d %s\n", name, st.Mode, st.Uid, st.Gid, printOf(st))
		return err
	})
	return "walk:" + hex.EncodeToString(sum.Sum(nil)), err
}

// walk visits the directory in a fixed order. What is mounted inside stays an
// empty directory.
func (d *dirSource) walk(ctx context.Context, visit func(root *os.Root, name string, fi fs.FileInfo, st *syscall.Stat_t) error) error {
	if in, err := filepath.Rel(d.path, d.s.dir); err == nil && in != ".." && !strings.HasPrefix(in, "../") {
		return invalid("copy what is needed to a directory of its own", "the image store itself (%s) is inside", d.s.dir)
	}
	root, err := os.OpenRoot(d.path)
	if err != nil {
		return err
	}
	defer root.Close()
	entries := 0
	var dev uint64
	return fs.WalkDir(root.FS(), ".", func(name string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if entries++; entries > d.s.opts.MaxEntries {
			return invalid("raise the limit of entries in the daemon's configuration", "it has more than %d entries", d.s.opts.MaxEntries)
		}
		fi, err := root.Lstat(name)
		if err != nil {
			return err
		}
		st, ok := fi.Sys().(*syscall.Stat_t)
		if !ok {
			return fmt.Errorf("%s: no file status", name)
		}
		if name == "." {
			dev = st.Dev
		}
		if st.Dev != dev && !fi.IsDir() {
			return nil
		}
		if err := visit(root, name, fi, st); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if st.Dev != dev {
			return fs.SkipDir
		}
		return nil
	})
}

// dirStream is the tar stream of a directory, written by a goroutine that
// finish waits for.
type dirStream struct {
	*io.PipeReader
	wg sync.WaitGroup
}

func (s *dirStream) finish(error) {
	_ = s.PipeReader.Close()
	s.wg.Wait()
}

func (d *dirSource) stream(ctx context.Context) *dirStream {
	r, w := io.Pipe()
	s := &dirStream{PipeReader: r}
	s.wg.Go(func() { _ = w.CloseWithError(d.write(ctx, w)) })
	return s
}

func (d *dirSource) write(ctx context.Context, w io.Writer) error {
	tw := tar.NewWriter(w)
	links := map[uint64]string{}
	if err := d.walk(ctx, func(root *os.Root, name string, fi fs.FileInfo, st *syscall.Stat_t) error {
		return d.add(tw, root, name, fi, st, links)
	}); err != nil {
		return err
	}
	return tw.Close()
}

func (d *dirSource) add(tw *tar.Writer, root *os.Root, name string, fi fs.FileInfo, st *syscall.Stat_t, links map[uint64]string) error {
	hdr := &tar.Header{
		Format: tar.FormatPAX, Name: name, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid),
		ModTime: time.Unix(st.Mtim.Sec, st.Mtim.Nsec),
	}
	first, linked := links[st.Ino]
	switch st.Mode & syscall.S_IFMT {
	case syscall.S_IFDIR:
		hdr.Typeflag = tar.TypeDir
		hdr.Name += "/"
	case syscall.S_IFREG:
		hdr.Typeflag = tar.TypeReg
		hdr.Size = st.Size
	case syscall.S_IFLNK:
		target, err := root.Readlink(name)
		if err != nil {
			return err
		}
		hdr.Typeflag, hdr.Linkname = tar.TypeSymlink, target
	case syscall.S_IFIFO:
		hdr.Typeflag = tar.TypeFifo
	case syscall.S_IFCHR, syscall.S_IFBLK:
		hdr.Typeflag = tar.TypeChar
		if st.Mode&syscall.S_IFMT == syscall.S_IFBLK {
			hdr.Typeflag = tar.TypeBlock
		}
		hdr.Devmajor, hdr.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	default: // a socket is somebody's, not content
		return nil
	}
	if linked {
		return tw.WriteHeader(&tar.Header{Format: tar.FormatPAX, Typeflag: tar.TypeLink, Name: name, Linkname: first})
	}
	if st.Nlink > 1 && hdr.Typeflag != tar.TypeDir {
		links[st.Ino] = name
	}
	attrs, err := xattrsOf(root, name)
	if err != nil {
		return err
	}
	for k, v := range attrs {
		if hdr.PAXRecords == nil {
			hdr.PAXRecords = map[string]string{}
		}
		hdr.PAXRecords["SCHILY.xattr."+k] = v
	}
	if hdr.Typeflag != tar.TypeReg {
		return tw.WriteHeader(hdr)
	}
	f, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if now, err := f.Stat(); err != nil || !os.SameFile(fi, now) {
		return fmt.Errorf("it changed while it was read")
	}
	if err := tw.WriteHeader(hdr); err != nil {
		return err
	}
	if _, err := io.CopyN(tw, f, hdr.Size); err != nil {
		return fmt.Errorf("it changed while it was read: %w", err)
	}
	return nil
}

// xattrsOf reads the extended attributes of name without following it.
func xattrsOf(root *os.Root, name string) (map[string]string, error) {
	dir, base := filepath.Split(name)
	parent, err := root.Open(filepath.Clean(dir))
	if err != nil {
		return nil, err
	}
	defer parent.Close()
	path := "/proc/self/fd/" + strconv.Itoa(int(parent.Fd())) + "/" + base
	buf := make([]byte, 64<<10) // the kernel's own limit, for lists and for values
	n, err := unix.Llistxattr(path, buf)
	if errors.Is(err, unix.ENOTSUP) || n == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for key := range bytes.SplitSeq(bytes.Clone(buf[:n]), []byte{0}) {
		if len(key) == 0 {
			continue
		}
		n, err := unix.Lgetxattr(path, string(key), buf)
		if err == unix.ENODATA {
			continue
		}
		if err != nil {
			return nil, err
		}
		out[string(key)] = string(buf[:n])
	}
	return out, nil
}
