package image

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/image/unpack"
)

// maxWindow is what a zstd stream may make its reader keep.
const maxWindow = 128 << 20

func digestOf(data []byte) fleet.Digest {
	sum := sha256.Sum256(data)
	return fleet.Digest("sha256:" + hex.EncodeToString(sum[:]))
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// layer makes sure that a layer is unpacked, and protects it until release is
// called. Whoever else needs the same one meanwhile waits, and then finds it.
func (s *Store) layer(ctx context.Context, l planLayer, b *unpack.Budget, report func(Phase, int64, int64)) (id string, release func(), err error) {
	if l.diffID != "" {
		unlock, err := s.layerLocks.lock(ctx, l.diffID)
		if err != nil {
			return "", nil, err
		}
		defer unlock()
		if release, ok := s.present(l.diffID); ok {
			// A crash may have come between the layer's birth and its blob's end.
			_ = os.Remove(s.path("partial", hexOf(l.blob)))
			report(PhasePresent, l.size, l.size)
			return l.diffID, release, nil
		}
		// Slots are taken after locks. A layer that learns its name, and so its
		// lock, only at the end goes without a slot, else both would wait.
		select {
		case s.slots <- struct{}{}:
			defer func() { <-s.slots }()
		case <-ctx.Done():
			return "", nil, context.Cause(ctx)
		}
	}
	report(PhaseDownloading, 0, l.size)
	in, err := l.open(ctx, func(done int64) { report(PhaseDownloading, done, l.size) })
	if err != nil {
		return "", nil, err
	}
	defer func() { in.finish(err) }()
	report(PhaseUnpacking, 0, l.size)
	counted := &countingReader{r: in, told: func(n int64) { report(PhaseUnpacking, n, l.size) }}
	id, release, err = s.unpack(ctx, counted, l.diffID, b)
	if err == nil {
		report(PhaseDone, l.size, l.size)
	}
	return id, release, err
}

// present says whether a layer is there, and protects it if so.
func (s *Store) present(id string) (release func(), ok bool) {
	s.mu.Lock()
	_, ok = s.layers[id]
	s.mu.Unlock()
	if !ok {
		return nil, false
	}
	release = s.use(id)
	s.mu.Lock()
	_, ok = s.layers[id] // a sweep may have come first
	s.mu.Unlock()
	if !ok || !exists(s.layerDir(id)) {
		release()
		return nil, false
	}
	return release, true
}

// unpack makes layers/ID out of a tar stream: first under tmp, then flushed,
// then renamed.
func (s *Store) unpack(ctx context.Context, r io.Reader, want string, b *unpack.Budget) (id string, release func(), err error) {
	tmp, err := os.MkdirTemp(s.path("tmp"), "layer-")
	if err != nil {
		return "", nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	work := filepath.Join(tmp, "layer")
	if err := os.MkdirAll(filepath.Join(work, "fs"), 0o700); err != nil {
		return "", nil, err
	}
	if err := os.Chmod(filepath.Join(work, "fs"), 0o755); err != nil {
		return "", nil, err
	}
	plain, closePlain, err := decompress(&ctxReader{ctx, r})
	if err != nil {
		return "", nil, err
	}
	defer closePlain()
	sum := sha256.New()
	stream := io.TeeReader(b.Reader(plain), sum)
	res, err := unpack.Tar(ctx, stream, filepath.Join(work, "fs"), b)
	if err != nil {
		return "", nil, err
	}
	// The diff id covers what follows the archive, too.
	if _, err := io.Copy(io.Discard, stream); err != nil {
		return "", nil, refuseStream(err)
	}
	id = hex.EncodeToString(sum.Sum(nil))
	if want == "" {
		unlock, err := s.layerLocks.lock(ctx, id)
		if err != nil {
			return "", nil, err
		}
		defer unlock()
		if release, ok := s.present(id); ok {
			return id, release, nil
		}
	} else if id != want {
		return "", nil, fmt.Errorf("%w: its content has the diff id sha256:%s, its image promises sha256:%s", unpack.ErrRefused, id, want)
	}
	release = s.use(id)
	if err := s.place(work, id, layerInfo{res}); err != nil {
		release()
		return "", nil, err
	}
	return id, release, nil
}

// place moves a finished layer to where it belongs. The layer's lock is held.
func (s *Store) place(work, id string, info layerInfo) error {
	if err := writeJSON(s.path("tmp"), filepath.Join(work, "layer.json"), info); err != nil {
		return err
	}
	if err := s.flusher.sync(); err != nil {
		return err
	}
	dst := s.path("layers", id)
	s.change.Lock()
	defer s.change.Unlock()
	// Only what was damaged by hand can be in the way.
	if exists(dst) {
		if err := s.discard(dst, "not a whole layer"); err != nil {
			return err
		}
	}
	if err := os.Rename(work, dst); err != nil {
		return err
	}
	if err := syncDir(filepath.Dir(dst)); err != nil {
		return err
	}
	s.mu.Lock()
	s.layers[id] = info
	s.mu.Unlock()
	return nil
}

// decompress finds out how a stream is compressed from its first bytes, which
// unlike media types do not lie.
func decompress(r io.Reader) (io.Reader, func(), error) {
	br := bufio.NewReaderSize(r, 64<<10)
	magic, err := br.Peek(6)
	if err != nil && err != io.EOF {
		return nil, nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(br)
		if err != nil {
			return nil, nil, refuseStream(err)
		}
		return z, func() { _ = z.Close() }, nil
	case bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, nil, refuseStream(err)
		}
		return z, z.Close, nil
	case bytes.HasPrefix(magic, []byte("\xfd7zXZ")), bytes.HasPrefix(magic, []byte("BZh")):
		return nil, nil, invalid("compress it with gzip or zstd, or not at all", "xz and bzip2 are not supported")
	}
	return br, func() {}, nil
}

// refuseStream is for errors of decompressors; those of the disk pass.
func refuseStream(err error) error {
	if _, ok := errors.AsType[*os.PathError](err); ok || errors.Is(err, unpack.ErrRefused) || errors.Is(err, context.Canceled) ||
		errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	if _, ok := errors.AsType[*fault](err); ok {
		return err
	}
	return fmt.Errorf("%w: damaged archive: %w", unpack.ErrRefused, err)
}

// countingReader tells how far a stream was read.
type countingReader struct {
	r    io.Reader
	n    int64
	told func(int64)
	last int64
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if c.n-c.last >= 1<<20 {
		c.last = c.n
		c.told(c.n)
	}
	return n, err
}

// verifier is a stream that fails at its end if it was not what was promised.
type verifier struct {
	r    io.Reader
	sum  interface{ Sum([]byte) []byte }
	size int64
	n    int64
	want fleet.Digest
}

func verify(r io.Reader, want fleet.Digest, size int64) *verifier {
	h := sha256.New()
	return &verifier{r: io.TeeReader(io.LimitReader(r, size+1), h), sum: h, size: size, want: want}
}

func (v *verifier) Read(p []byte) (int, error) {
	n, err := v.r.Read(p)
	v.n += int64(n)
	if v.n > v.size {
		return 0, fmt.Errorf("%w: longer than its manifest says (%d bytes)", unpack.ErrRefused, v.size)
	}
	if err == io.EOF {
		if got := "sha256:" + hex.EncodeToString(v.sum.Sum(nil)); fleet.Digest(got) != v.want {
			return n, fmt.Errorf("%w: its content has the digest %s, its manifest promises %s", unpack.ErrRefused, got, v.want)
		}
	}
	return n, err
}
