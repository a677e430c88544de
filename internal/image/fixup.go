package image

import (
	"archive/tar"
	"bytes"
	"context"
	"os"
	"path"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/image/unpack"
)

// fixup gives directories the owner and mode that their image means.
//
// A layer may hold etc/motd without an entry for etc itself. Unpacked alone,
// its etc has to get some mode, and on top of a stack it hides the right one
// of the layer below: /tmp would lose its sticky bit, a home its owner. Layers
// are shared by content and cannot know what is below them; so where it
// matters, the image gets one more small layer on top with nothing but these
// directories. "": it does not matter.
func (s *Store) fixup(ctx context.Context, lowestFirst []string) (id string, release func(), err error) {
	none := func() {}
	s.mu.Lock()
	infos := make([]layerInfo, len(lowestFirst))
	wanted := map[string]bool{}
	for i, id := range lowestFirst {
		infos[i] = s.layers[id]
		if i > 0 { // below the lowest there is nothing to hide
			for _, p := range infos[i].Implicit {
				wanted[p] = true
			}
		}
	}
	s.mu.Unlock()
	var entries []tar.Header
	for p := range wanted {
		if hdr, ok, err := s.meant(lowestFirst, infos, p); err != nil {
			return "", nil, err
		} else if ok {
			entries = append(entries, hdr)
		}
	}
	if len(entries) == 0 {
		return "", none, nil
	}
	// Directories above must not become implicit in turn.
	have := map[string]bool{}
	for _, e := range entries {
		have[path.Clean(e.Name)] = true
	}
	for _, e := range slices.Clone(entries) {
		for p := path.Dir(path.Clean(e.Name)); !have[p]; p = path.Dir(p) {
			hdr, err := s.visible(lowestFirst, p)
			if err != nil {
				return "", nil, err
			}
			have[p] = true
			entries = append(entries, hdr)
		}
	}
	if !have["."] {
		hdr, err := s.visible(lowestFirst, ".")
		if err != nil {
			return "", nil, err
		}
		entries = append(entries, hdr)
	}
	slices.SortFunc(entries, func(a, b tar.Header) int { return bytes.Compare([]byte(a.Name), []byte(b.Name)) })
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for i := range entries {
		if err := w.WriteHeader(&entries[i]); err != nil {
			return "", nil, err
		}
	}
	if err := w.Close(); err != nil {
		return "", nil, err
	}
	return s.unpack(ctx, &buf, "", unpack.NewBudget(int64(s.opts.MaxSize), int64(s.opts.MaxEntries)))
}

// meant looks down the stack from the topmost layer that has p as a directory.
// If that one did not say what p is like, the first below that did decides; ok
// says whether that makes a difference.
func (s *Store) meant(lowestFirst []string, infos []layerInfo, p string) (hdr tar.Header, ok bool, err error) {
	var seen *unix.Stat_t
	for i := len(lowestFirst) - 1; i >= 0; i-- {
		dir := s.layerDir(lowestFirst[i])
		st, hidden, err := lookup(dir, p)
		if err != nil {
			return hdr, false, err
		}
		if st != nil && st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return hdr, false, nil // a file or a whiteout ends the stack
		}
		if st != nil {
			_, implicit := slices.BinarySearch(infos[i].Implicit, p)
			if !implicit {
				if seen == nil || st.Mode == seen.Mode && st.Uid == seen.Uid && st.Gid == seen.Gid {
					return hdr, false, nil
				}
				return dirHeader(p, st), true, nil
			}
			if seen == nil {
				seen = st
			}
		}
		if hidden {
			return hdr, false, nil
		}
	}
	return hdr, false, nil
}

// visible is p as the stack shows it: from the topmost layer that has it.
func (s *Store) visible(lowestFirst []string, p string) (tar.Header, error) {
	for _, id := range slices.Backward(lowestFirst) {
		st, _, err := lookup(s.layerDir(id), p)
		if err != nil {
			return tar.Header{}, err
		}
		if st != nil {
			return dirHeader(p, st), nil
		}
	}
	return tar.Header{}, &os.PathError{Op: "find", Path: p, Err: os.ErrNotExist}
}

// lookup finds p in one layer without following links. hidden says that the
// layer hides what is below at p: p or a directory above it is opaque, or
// something above it is no directory.
func lookup(dir, p string) (st *unix.Stat_t, hidden bool, err error) {
	steps := []string{"."}
	for q := p; q != "."; q = path.Dir(q) {
		steps = append(steps, q)
	}
	slices.Sort(steps[1:]) // from the root down
	for i, q := range steps {
		var now unix.Stat_t
		full := filepath.Join(dir, q)
		if err := unix.Lstat(full, &now); err != nil {
			if err == unix.ENOENT {
				return nil, hidden, nil
			}
			return nil, false, &os.PathError{Op: "stat", Path: full, Err: err}
		}
		last := i == len(steps)-1
		if now.Mode&unix.S_IFMT != unix.S_IFDIR {
			if last {
				return &now, true, nil
			}
			return nil, true, nil
		}
		var mark [1]byte
		if n, err := unix.Lgetxattr(full, unpack.OpaqueXattr, mark[:]); err == nil && n == 1 && mark[0] == 'y' {
			hidden = true
		}
		if last {
			return &now, hidden, nil
		}
	}
	return nil, hidden, nil
}

func dirHeader(p string, st *unix.Stat_t) tar.Header {
	return tar.Header{
		Format: tar.FormatPAX, Typeflag: tar.TypeDir, Name: p + "/", Mode: int64(st.Mode & 0o7777),
		Uid: int(st.Uid), Gid: int(st.Gid), ModTime: time.Unix(st.Mtim.Sec, st.Mtim.Nsec),
	}
}
