package sandbox

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// trap stops a container's program when it is about to listen on its port: a
// seccomp filter hands each listen(2) over to the daemon (seccomp_unotify(2)),
// which answers when it wants to. Until then the caller stands still inside of it.
type trap struct {
	file *os.File // the filter's listener
	port int
}

// trapFilter hands listen(2) over and allows everything else.
func trapFilter() ([]byte, error) {
	info, err := arch.GetInfo(runtime.GOARCH)
	if err != nil {
		return nil, fmt.Errorf("compile seccomp: %w", err)
	}
	raw, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: 4, Size: 4},                                   // architecture
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(info.ID), SkipFalse: 3}, //nolint:gosec // an AUDIT_ARCH number
		bpf.LoadAbsolute{Off: 0, Size: 4},                                   // number
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.SYS_LISTEN, SkipFalse: 1},
		bpf.RetConstant{Val: unix.SECCOMP_RET_USER_NOTIF},
		bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW},
	})
	if err != nil {
		return nil, fmt.Errorf("compile seccomp: %w", err)
	}
	return filterBytes(raw), nil
}

// setTrap sets the filter on a machine, for it and what it executes.
func setTrap(ctx context.Context, m *machine, port int) (*trap, error) {
	filter, err := trapFilter()
	if err != nil {
		return nil, err
	}
	t := &tape{}
	fprog := t.words(num(len(filter)/8), t.bytes(filter))
	t.call("set trap", unix.SYS_SECCOMP, num(unix.SECCOMP_SET_MODE_FILTER), num(unix.SECCOMP_FILTER_FLAG_NEW_LISTENER), fprog)
	t.done()
	if err := m.play(ctx, t); err != nil {
		return nil, err
	}
	// Nothing else was open, so it is the machine's first free descriptor. The
	// machine is our child that nobody has waited for: the number is its own.
	fd, err := takeFD(m.pid, firstFD)
	if err != nil {
		return nil, fmt.Errorf("set trap: %w", err)
	}
	shut := &tape{}
	shut.call("close descriptors", unix.SYS_CLOSE_RANGE, num(firstFD), num(^uint32(0)), num(0))
	shut.done()
	if err := errors.Join(unix.SetNonblock(fd, true), m.play(ctx, shut)); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("set trap: %w", err)
	}
	return &trap{file: os.NewFile(uintptr(fd), "seccomp"), port: port}, nil
}

// takeFD gives a duplicate of another process's descriptor.
func takeFD(pid, fd int) (int, error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, err
	}
	defer func() { _ = unix.Close(pidfd) }()
	return unix.PidfdGetfd(pidfd, fd, 0)
}

// notification is struct seccomp_notif.
type notification struct {
	id    uint64
	pid   uint32
	flags uint32
	nr    int32
	arch  uint32
	ip    uint64
	args  [6]uint64
}

// verdict is struct seccomp_notif_resp.
type verdict struct {
	id    uint64
	value int64
	errno int32
	flags uint32
}

const continueFlag = 1 // SECCOMP_USER_NOTIF_FLAG_CONTINUE

// wait returns when the program is about to listen on its port, and stands
// still. The socket listens then already: what is saved of it (package criu)
// would otherwise be a socket that has an address and no state, which CRIU
// does not find; and the system call, which is made again when the process goes on,
// only sets its queue's length again. Other sockets are let through.
func (t *trap) wait(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = t.file.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	raw, err := t.file.SyscallConn()
	if err != nil {
		return fmt.Errorf("wait for listen: %w", err)
	}
	for {
		var n notification
		var errno unix.Errno
		err := raw.Read(func(fd uintptr) bool {
			poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}} //nolint:gosec // a descriptor
			if !pollNow(poll) {
				return false
			}
			n = notification{} // the kernel refuses one that is not empty
			_, _, errno = unix.Syscall(unix.SYS_IOCTL, fd, unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&n)))
			return true
		})
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil:
			return fmt.Errorf("wait for listen: %w", err)
		case errno == unix.ENOENT || errno == unix.EINTR:
			continue // whoever called was killed or interrupted meanwhile
		case errno != 0:
			return fmt.Errorf("wait for listen: %w", errno)
		}
		caught, err := t.mine(&n)
		if err != nil || caught {
			return err
		}
		answer := verdict{id: n.id, flags: continueFlag}
		err = raw.Control(func(fd uintptr) {
			_, _, errno = unix.Syscall(unix.SYS_IOCTL, fd, unix.SECCOMP_IOCTL_NOTIF_SEND, uintptr(unsafe.Pointer(&answer)))
		})
		if err != nil || errno != 0 && errno != unix.ENOENT {
			return fmt.Errorf("wait for listen: %w", errors.Join(err, errno))
		}
	}
}

// mine looks whether the call is the one that is waited for, and if it is
// carries it out.
func (t *trap) mine(n *notification) (bool, error) {
	group, err := threadGroup(int(n.pid))
	if err != nil {
		return false, nil //nolint:nilerr // it is gone, and nobody waits for an answer
	}
	fd, err := takeFD(group, int(int32(n.args[0]))) //nolint:gosec // as the kernel reads it
	if err != nil {
		return false, nil //nolint:nilerr // the kernel will tell the caller
	}
	defer func() { _ = unix.Close(fd) }()
	addr, err := unix.Getsockname(fd)
	if err != nil {
		return false, nil //nolint:nilerr // the same
	}
	port := 0
	switch a := addr.(type) {
	case *unix.SockaddrInet4:
		port = a.Port
	case *unix.SockaddrInet6:
		port = a.Port
	}
	if port != t.port {
		return false, nil
	}
	if err := unix.Listen(fd, int(int32(n.args[1]))); err != nil { //nolint:gosec // the same
		return false, nil //nolint:nilerr // the same
	}
	return true, nil
}

func (t *trap) close() { _ = t.file.Close() }

// threadGroup is the process that a thread belongs to.
func threadGroup(tid int) (int, error) {
	f, err := os.Open("/proc/" + strconv.Itoa(tid) + "/status")
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close() }()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if v, ok := strings.CutPrefix(lines.Text(), "Tgid:"); ok {
			return strconv.Atoi(strings.TrimSpace(v))
		}
	}
	return 0, errors.New("it has no thread group")
}
