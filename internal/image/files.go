package image

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// maxRecord bounds every small file that is read whole: manifests, configs,
// records.
const maxRecord = 8 << 20

// writeJSON replaces path by v's JSON, so that a reader or a crash sees the old
// content or the new one. tmp is a directory of the same file system.
func writeJSON(tmp, path string, v any) (err error) {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(tmp, "record-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = f.Close()
			_ = os.Remove(f.Name())
		}
	}()
	if _, err = f.Write(data); err != nil {
		return err
	}
	if err = f.Sync(); err != nil {
		return err
	}
	if err = f.Close(); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

func readJSON(path string, v any) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	data, err := readAll(f, maxRecord)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return nil
}

// readAll reads r to its end, which must come within limit bytes.
func readAll(r io.Reader, limit int64) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = invalid("", "more than %d bytes where a small document was expected", limit)
	}
	return data, err
}

// diskSync flushes a file system. Callers that come while one flush runs share
// the next one: many layers cost few flushes.
type diskSync struct {
	dir   string
	mu    sync.Mutex // orders flushes; held across one, by design of sync
	state sync.Mutex // guards next
	next  *flush
}

type flush struct {
	once sync.Once
	err  error
}

// sync returns once everything written before the call is on disk.
func (d *diskSync) sync() error {
	d.state.Lock()
	if d.next == nil {
		d.next = &flush{}
	}
	mine := d.next
	d.state.Unlock()

	d.mu.Lock()
	defer d.mu.Unlock()
	mine.once.Do(func() {
		// Who comes from here on needs a later flush.
		d.state.Lock()
		d.next = nil
		d.state.Unlock()
		mine.err = syncFS(d.dir)
	})
	return mine.err
}

func syncFS(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("flush %s: %w", dir, err)
	}
	return nil
}

// ctxReader ends with its context.
type ctxReader struct {
	ctx context.Context // of the one read through that it serves
	r   io.Reader
}

func (c *ctxReader) Read(p []byte) (int, error) {
	if err := context.Cause(c.ctx); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}
