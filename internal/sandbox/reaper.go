package sandbox

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// reaper notices the end of processes by their pidfds, all of them with one
// goroutine, and collects the exit status of those that are children.
type reaper struct {
	log   *slog.Logger
	epoll int
	wake  int // an eventfd that ends the loop
	wg    sync.WaitGroup

	mu      sync.Mutex
	watched map[int32]func(status, bool)
}

// status of a process that ended; known is false for one that was no child.
type status struct {
	code   int
	signal unix.Signal
}

func newReaper(log *slog.Logger) (*reaper, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make epoll: %w", err)
	}
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		_ = unix.Close(epoll)
		return nil, fmt.Errorf("make eventfd: %w", err)
	}
	r := &reaper{log: log, epoll: epoll, wake: wake, watched: map[int32]func(status, bool){}}
	if err := unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, wake, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(wake)}); err != nil { //nolint:gosec // a descriptor
		r.closeFDs()
		return nil, fmt.Errorf("watch eventfd: %w", err)
	}
	r.wg.Go(r.loop)
	return r, nil
}

// watch calls ended once, from the reaper's goroutine, when the process behind
// the pidfd has ended; ended must not block. The reaper owns the pidfd.
func (r *reaper) watch(pidfd int, ended func(s status, known bool)) error {
	r.mu.Lock()
	r.watched[int32(pidfd)] = ended //nolint:gosec // a descriptor
	r.mu.Unlock()
	err := unix.EpollCtl(r.epoll, unix.EPOLL_CTL_ADD, pidfd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(pidfd)}) //nolint:gosec // a descriptor
	if err != nil {
		r.mu.Lock()
		delete(r.watched, int32(pidfd)) //nolint:gosec // a descriptor
		r.mu.Unlock()
		return fmt.Errorf("watch process: %w", err)
	}
	return nil
}

func (r *reaper) loop() {
	events := make([]unix.EpollEvent, 64)
	for {
		n, err := unix.EpollWait(r.epoll, events, -1)
		if err != nil {
			if errors.Is(err, unix.EINTR) {
				continue
			}
			r.log.Error("reaper stopped", "error", err)
			return
		}
		for _, e := range events[:n] {
			if int(e.Fd) == r.wake {
				return
			}
			r.reap(e.Fd)
		}
	}
}

func (r *reaper) reap(pidfd int32) {
	r.mu.Lock()
	ended := r.watched[pidfd]
	delete(r.watched, pidfd)
	r.mu.Unlock()
	s, known := collect(int(pidfd))
	// Closing takes it out of the epoll set, too.
	_ = unix.Close(int(pidfd))
	if ended != nil {
		ended(s, known)
	}
}

// collect takes the exit status of an ended child.
func collect(pidfd int) (status, bool) {
	var info unix.Siginfo
	if err := waitid(pidfd, &info); err != nil {
		return status{code: -1}, false // not a child: adopted
	}
	return exitStatus(&info), true
}

func (r *reaper) close() {
	one := [8]byte{1}
	_, _ = unix.Write(r.wake, one[:])
	r.wg.Wait()
	r.closeFDs()
}

func (r *reaper) closeFDs() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for fd := range r.watched {
		_ = unix.Close(int(fd))
	}
	clear(r.watched)
	_ = unix.Close(r.epoll)
	_ = unix.Close(r.wake)
}

// exit makes the public form of a status.
func (s status) exit(at time.Time) Exit {
	e := Exit{Code: s.code, At: at}
	if s.signal != 0 {
		e.Code = 128 + int(s.signal)
		e.Signal = unix.SignalName(s.signal)
	}
	return e
}
