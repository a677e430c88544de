package image

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"regexp"
	"strings"
	"syscall"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/image/unpack"
)

// tarSource is tar:FILE: what `docker save` writes, an OCI layout in a tar, or
// the tarball of a root filesystem.
type tarSource struct {
	s    *Store
	path string
}

func (t *tarSource) ref() string { return "tar:" + t.path }

func (t *tarSource) openFile() (*os.File, error) {
	f, err := os.OpenFile(t.path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = invalid("dir:ROOTFS takes a directory", "%s is not a file", t.path)
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

func (t *tarSource) fingerprint(context.Context) (string, error) {
	f, err := t.openFile()
	if err != nil {
		return "", err
	}
	defer f.Close()
	var st syscall.Stat_t
	if err := syscall.Fstat(int(f.Fd()), &st); err != nil {
		return "", err
	}
	return printOf(&st), nil
}

// printOf is everything about a file that changes when its content does.
func printOf(st *syscall.Stat_t) string {
	return fmt.Sprintf("%d:%d:%d:%d.%09d:%d.%09d", st.Dev, st.Ino, st.Size, st.Mtim.Sec, st.Mtim.Nsec, st.Ctim.Sec, st.Ctim.Nsec)
}

func (t *tarSource) resolve(ctx context.Context) (fleet.Digest, error) {
	pl, err := t.plan(ctx)
	if err != nil {
		return "", err
	}
	defer pl.close()
	if pl.digest != "" {
		return pl.digest, nil
	}
	in, err := pl.layers[0].open(ctx, func(int64) {})
	if err != nil {
		return "", err
	}
	defer in.finish(nil)
	plain, done, err := decompress(&ctxReader{ctx, in})
	if err != nil {
		return "", err
	}
	defer done()
	return rootfsDigest(t.s, plain)
}

// rootfsDigest is the digest of the image whose only layer is the tar stream.
func rootfsDigest(s *Store, r io.Reader) (fleet.Digest, error) {
	sum := sha256.New()
	b := unpack.NewBudget(int64(s.opts.MaxSize), int64(s.opts.MaxEntries))
	if _, err := io.Copy(sum, b.Reader(r)); err != nil {
		return "", refuseStream(err)
	}
	c := s.rootfsConfig()
	c.RootFS.DiffIDs = []v1.Hash{{Algorithm: "sha256", Hex: hex.EncodeToString(sum.Sum(nil))}}
	return configDigest(c), nil
}

// rootfsConfig is the config of what comes without one.
func (s *Store) rootfsConfig() v1.ConfigFile {
	return v1.ConfigFile{OS: s.platform.OS, Architecture: s.platform.Architecture, RootFS: v1.RootFS{Type: "layers"}}
}

func (t *tarSource) plan(ctx context.Context) (_ *plan, err error) {
	f, err := t.openFile()
	if err != nil {
		return nil, err
	}
	closers := []func(){func() { _ = f.Close() }}
	closeAll := func() {
		for _, c := range closers {
			c()
		}
	}
	defer func() {
		if err != nil {
			closeAll()
		}
	}()
	plain, done, err := decompress(&ctxReader{ctx, f})
	if err != nil {
		return nil, err
	}
	closers = append(closers, done)
	var members *tarFiles
	if _, own := plain.(*bufio.Reader); own {
		// decompress gave the file's own bytes: index it where it lies.
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return nil, err
		}
		members, err = indexTar(ctx, f, nil, t.s.opts.MaxEntries)
	} else {
		// Members of a compressed archive are needed in any order: spool it.
		// A root filesystem shows itself with its first entry, long before.
		spool, serr := os.CreateTemp(t.s.path("tmp"), "spool-")
		if serr != nil {
			return nil, serr
		}
		closers = append(closers, func() { _ = spool.Close() })
		if err := os.Remove(spool.Name()); err != nil {
			return nil, err
		}
		b := unpack.NewBudget(int64(t.s.opts.MaxSize), int64(t.s.opts.MaxEntries))
		members, err = indexTar(ctx, spool, b.Reader(plain), t.s.opts.MaxEntries)
	}
	if err != nil {
		return nil, err
	}
	var pl *plan
	switch {
	case members == nil:
		pl = &plan{config: t.s.rootfsConfig(), layers: []planLayer{t.rootfs()}}
	case members.has("manifest.json"):
		pl, err = t.s.planDocker(members)
	default:
		pl, err = t.s.planLayout(ctx, members, "")
	}
	if err != nil {
		return nil, err
	}
	pl.close = closeAll
	return pl, nil
}

func (t *tarSource) rootfs() planLayer {
	return planLayer{open: func(context.Context, func(int64)) (blob, error) {
		f, err := t.openFile()
		if err != nil {
			return nil, err
		}
		return &localBlob{f, func() { _ = f.Close() }}, nil
	}}
}

// tarFiles are the members of an archive by name.
type tarFiles struct {
	file    *os.File
	members map[string]member
}

type member struct {
	offset, size int64
	link         string
}

func (t *tarFiles) has(name string) bool { _, ok := t.members[name]; return ok }

func (t *tarFiles) open(name string) (io.ReadCloser, int64, error) {
	name = path.Clean(name)
	for range 4 { // old docker archives have links between layers
		m, ok := t.members[name]
		switch {
		case !ok:
			return nil, 0, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
		case m.link == "":
			return io.NopCloser(io.NewSectionReader(t.file, m.offset, m.size)), m.size, nil
		}
		name = m.link
	}
	return nil, 0, invalid("", "%s is a link to a link", name)
}

// archiveMember is every name that docker and OCI archives have. The first
// entry of another name shows that a tar is a root filesystem.
var archiveMember = regexp.MustCompile(`^(blobs(/.*)?|oci-layout|index\.json|manifest\.json|repositories|(sha256:)?[0-9a-f]{64}(\.json|\.tar|\.tar\.gz)?(/(VERSION|json|layer\.tar)?)?|[0-9a-f]{12,64}\.(json|tar\.gz|tar))$`)

// indexTar reads the headers of the archive in file; with from, file is first
// filled from it along the way. nil: it is no archive of images.
func indexTar(ctx context.Context, file *os.File, from io.Reader, limit int) (*tarFiles, error) {
	var in io.Reader = file
	pos := func() (int64, error) { return file.Seek(0, io.SeekCurrent) }
	if from != nil {
		// TeeReader hides Seek, so that the tar reader reads every byte.
		in = io.TeeReader(from, file)
	}
	t := &tarFiles{file: file, members: map[string]member{}}
	tr := tar.NewReader(in)
	for {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		hdr, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
			return nil, refuseStream(err)
		}
		name := path.Clean(hdr.Name)
		if !archiveMember.MatchString(name) {
			return nil, nil
		}
		if len(t.members) >= min(limit, 10_000) {
			return nil, invalid("", "the archive has too many members")
		}
		switch hdr.Typeflag {
		case tar.TypeReg:
			for key := range hdr.PAXRecords {
				if strings.HasPrefix(key, "GNU.sparse.") {
					return nil, invalid("", "the member %s is sparse", name)
				}
			}
			at, err := pos()
			if err != nil {
				return nil, err
			}
			t.members[name] = member{offset: at, size: hdr.Size}
		case tar.TypeSymlink:
			t.members[name] = member{link: path.Join(path.Dir(name), hdr.Linkname)}
		case tar.TypeLink:
			t.members[name] = member{link: path.Clean(hdr.Linkname)}
		case tar.TypeDir, tar.TypeXGlobalHeader:
		default:
			return nil, invalid("", "the member %s has the type %q", name, hdr.Typeflag)
		}
	}
	if !t.has("manifest.json") && !t.has("index.json") {
		if len(t.members) == 0 {
			return nil, invalid("", "the archive is empty")
		}
		return nil, nil
	}
	return t, nil
}
