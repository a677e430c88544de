package oci

import (
	"errors"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/sandbox"
)

// process is one that we watch by its pidfd.
type process struct {
	pid   int
	pidfd *os.File
}

// openProcess begins to watch a process. Where started is not 0, it must be
// the one that started then; another one's, or one that has ended, is ErrGone.
// A child of ours that ended is still there until it is collected.
func openProcess(pid int, started uint64) (*process, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, sandbox.ErrGone
	}
	p := &process{pid: pid, pidfd: os.NewFile(uintptr(fd), "pidfd")}
	if started == 0 {
		return p, nil
	}
	// Only now the number cannot be reused any more: look whose it is.
	if at, err := startTime(pid); err != nil || at != started {
		_ = p.pidfd.Close()
		return nil, sandbox.ErrGone
	}
	if _, ended := collect(pid, fd); ended {
		_ = p.pidfd.Close()
		return nil, sandbox.ErrGone
	}
	return p, nil
}

// wait returns how it ended; false if the watch was closed before.
func (p *process) wait() (exit sandbox.Exit, ended bool) {
	conn, err := p.pidfd.SyscallConn()
	if err != nil {
		return exit, false
	}
	_ = conn.Read(func(fd uintptr) bool {
		exit, ended = collect(p.pid, int(fd))
		return ended
	})
	_ = p.pidfd.Close()
	return exit, ended
}

// kill ends the process, unless it was waited for already.
func (p *process) kill() {
	if conn, err := p.pidfd.SyscallConn(); err == nil {
		_ = conn.Control(func(fd uintptr) { _ = unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) })
	}
}

// collect takes the exit status of a child that has ended. Of a process that
// is no child of ours it tells only that it has ended.
func collect(pid, pidfd int) (sandbox.Exit, bool) {
	var ws unix.WaitStatus
	got, err := unix.Wait4(pid, &ws, unix.WNOHANG, nil)
	for errors.Is(err, unix.EINTR) {
		got, err = unix.Wait4(pid, &ws, unix.WNOHANG, nil)
	}
	exit := sandbox.Exit{Code: -1, At: time.Now()}
	switch {
	case errors.Is(err, unix.ECHILD):
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 0) //nolint:gosec // a descriptor
		return exit, err == nil && n > 0
	case err != nil || got != pid:
		return exit, false
	case ws.Signaled():
		exit.Code, exit.Signal = 128+int(ws.Signal()), unix.SignalName(ws.Signal())
	default:
		exit.Code = ws.ExitStatus()
	}
	return exit, true
}

// collectGroup takes the children of ours in a process group that have ended.
func collectGroup(group int) {
	for group > 0 {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-group, &ws, unix.WNOHANG, nil)
		if pid <= 0 && !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// startTime is field 22 of /proc/PID/stat: when the process started, in clock
// ticks since boot. With the pid it names a process for good.
func startTime(pid int) (uint64, error) {
	fields, err := statFields(pid)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(fields[19], 10, 64)
}
