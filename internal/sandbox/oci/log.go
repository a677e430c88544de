package oci

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// logKeeper bounds the log files of running containers, which write to them
// directly: it is told by inotify, and cuts the oldest part off a file that has
// grown too large. It is as the native body's.
type logKeeper struct {
	log *slog.Logger
	fd  *os.File
	raw int // fd's number: asking the file for it would make it blocking
	wg  sync.WaitGroup

	mu    sync.Mutex
	files map[int32]*keptLog // by watch descriptor
	paths map[string]int32
}

type keptLog struct {
	path string
	most int64
}

const (
	defaultLogMax = 16 << 20
	// logPace bounds how often a file is looked at: a container that floods its
	// log may exceed the bound by what it writes in this time.
	logPace = 50 * time.Millisecond
)

func newLogKeeper(log *slog.Logger) (*logKeeper, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watch logs: %w", err)
	}
	k := &logKeeper{log: log, fd: os.NewFile(uintptr(fd), "inotify"), raw: fd, files: map[int32]*keptLog{}, paths: map[string]int32{}}
	k.wg.Go(k.loop)
	return k, nil
}

// watch begins to bound a file.
func (k *logKeeper) watch(path string, most int64) {
	if most <= 0 {
		most = defaultLogMax
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	wd, err := unix.InotifyAddWatch(k.raw, path, unix.IN_MODIFY)
	if err != nil {
		k.log.Warn("log is not bounded", "path", path, "error", err)
		return
	}
	k.files[int32(wd)] = &keptLog{path: path, most: most} //nolint:gosec // a descriptor
	k.paths[path] = int32(wd)                             //nolint:gosec // a descriptor
}

// forget ends the watch of a file and bounds it a last time.
func (k *logKeeper) forget(path string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	wd, ok := k.paths[path]
	if !ok {
		return
	}
	f := k.files[wd]
	delete(k.paths, path)
	delete(k.files, wd)
	_, _ = unix.InotifyRmWatch(k.raw, uint32(wd)) //nolint:gosec // a descriptor
	k.bound(f)
}

func (k *logKeeper) loop() {
	buf := make([]byte, 16<<10)
	for {
		n, err := k.fd.Read(buf)
		if err != nil {
			if !errors.Is(err, os.ErrClosed) {
				k.log.Error("log keeper stopped", "error", err)
			}
			return
		}
		k.mu.Lock()
		seen := map[int32]bool{}
		for off := 0; off+unix.SizeofInotifyEvent <= n; {
			wd := int32(binary.NativeEndian.Uint32(buf[off:])) //nolint:gosec // a descriptor
			off += unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(buf[off+12:]))
			if f := k.files[wd]; f != nil && !seen[wd] {
				seen[wd] = true
				k.bound(f)
			}
		}
		k.mu.Unlock()
		// Writes meanwhile gather into one event for each file.
		time.Sleep(logPace)
	}
}

// bound cuts the oldest part off a file that is larger than it may be, so that
// three quarters of the bound are left. The writers append, so they go on at
// the new end.
func (k *logKeeper) bound(f *keptLog) {
	fd, err := os.OpenFile(f.path, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return // removed with its instance
	}
	defer func() { _ = fd.Close() }()
	st, err := fd.Stat()
	if err != nil || st.Size() <= f.most {
		return
	}
	const block = 4096
	cut := (st.Size() - f.most*3/4 + block - 1) / block * block
	// Cutting off the head in place loses nothing that is written meanwhile.
	err = unix.Fallocate(int(fd.Fd()), unix.FALLOC_FL_COLLAPSE_RANGE, 0, cut)
	if err == nil {
		return
	}
	// Filesystems without it: keep the tail by copying it to the front.
	tail := make([]byte, min(f.most*3/4, 1<<20))
	n, _ := fd.ReadAt(tail, st.Size()-int64(len(tail)))
	if err = fd.Truncate(0); err == nil {
		_, err = fd.WriteAt(tail[:n], 0)
	}
	if err != nil {
		k.log.Warn("bound log", "path", f.path, "error", err)
	}
}

func (k *logKeeper) close() {
	_ = k.fd.Close()
	k.wg.Wait()
}
