package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// machine is one process that runs the init program, seen from the daemon.
// It ends when it is closed, unless a tape made it something else by execve.
type machine struct {
	pid  int
	conn *net.UnixConn
	// started is its start time, which stays what it is when it executes a
	// program; 0: not read yet.
	started uint64
}

// firstFD is the number of the first descriptor that a machine receives; the
// next ones follow. 0 to 2 are /dev/null and 3 is its socket.
const firstFD = 4

// newMachineConn makes the two ends of a machine's socket.
func newMachineConn() (ours *net.UnixConn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make socket: %w", err)
	}
	theirs = os.NewFile(uintptr(fds[1]), "init")
	f := os.NewFile(uintptr(fds[0]), "sandbox")
	defer func() { _ = f.Close() }()
	c, err := net.FileConn(f)
	if err != nil {
		_ = theirs.Close()
		return nil, nil, fmt.Errorf("make socket: %w", err)
	}
	ours = c.(*net.UnixConn) //nolint:forcetypeassert // it is one
	// The largest tape must fit in one message; the kernel doubles the number
	// for its own needs.
	if err := ours.SetWriteBuffer(initTapeMax); err != nil {
		_ = ours.Close()
		_ = theirs.Close()
		return nil, nil, fmt.Errorf("make socket: %w", err)
	}
	return ours, theirs, nil
}

// startMachine starts the first machine of a daemon, in the namespaces of the
// calling thread. The others are its children: forking the daemon itself
// into a user namespace would copy its page tables each time.
func startMachine(program *os.File) (*machine, error) {
	ours, theirs, err := newMachineConn()
	if err != nil {
		return nil, err
	}
	defer func() { _ = theirs.Close() }()
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		_ = ours.Close()
		return nil, fmt.Errorf("start init program: %w", err)
	}
	defer func() { _ = null.Close() }()
	// By our number, not through /proc/self: ForkExec may lay its own pipe over
	// the program's descriptor in the child.
	path := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), program.Fd())
	pid, err := syscall.ForkExec(path, []string{"fastcontainer-init"}, &syscall.ProcAttr{
		Env:   []string{},
		Files: []uintptr{null.Fd(), null.Fd(), null.Fd(), theirs.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		_ = ours.Close()
		return nil, fmt.Errorf("start init program: %w", err)
	}
	return &machine{pid: pid, conn: ours}, nil
}

// send gives the machine a tape and descriptors and does not wait.
func (m *machine) send(ctx context.Context, t *tape, fds ...int) error {
	msg, err := t.seal()
	if err != nil {
		return err
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	_ = m.conn.SetDeadline(deadline(ctx))
	if _, _, err := m.conn.WriteMsgUnix(msg, oob, nil); err != nil {
		return fmt.Errorf("send to init program: %w", err)
	}
	return nil
}

// receive waits for the machine's answer to a tape: the result of a fork, nil
// at the end of file (execve happened, or the machine ended).
func (m *machine) receive(ctx context.Context, t *tape) (int, error) {
	// A canceled caller must not wait for the deadline.
	stop := context.AfterFunc(ctx, func() { _ = m.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	var buf [16]byte
	n, err := m.conn.Read(buf[:])
	switch {
	case ctx.Err() != nil:
		return 0, context.Cause(ctx)
	case errors.Is(err, io.EOF) || err == nil && n == 0:
		return 0, nil
	case err != nil:
		return 0, fmt.Errorf("read from init program: %w", err)
	case n == 1: // the tape's own word that it is done, see done
		return 0, nil
	}
	return t.report(buf[:n])
}

// play sends a tape that ends with done, and waits for it.
func (m *machine) play(ctx context.Context, t *tape, fds ...int) error {
	if err := m.send(ctx, t, fds...); err != nil {
		return err
	}
	_, err := m.receive(ctx, t)
	return err
}

// done ends a tape with a word to the daemon.
func (t *tape) done() {
	t.call("report", unix.SYS_WRITE, num(3), t.bytes([]byte{1}), num(1))
}

// errBroken: a machine does not do as it is told.
var errBroken = errors.New("init program does not answer")

// forkTimeout is far more than a fork takes.
const forkTimeout = 10 * time.Second

// spawn makes the machine fork a child machine into new namespaces. The child
// is the daemon's child (CLONE_PARENT), so that the daemon sees its end.
// cgroup is the directory of a v2 group to be born in, or -1.
//
// A fork that has begun is not given up, or its answer would be taken for that
// of the next. errBroken: the machine did not answer, and is of no use any more.
func (m *machine) spawn(ctx context.Context, namespaces uint64, cgroup int) (*machine, error) {
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), forkTimeout)
	defer cancel()
	ours, theirs, err := newMachineConn()
	if err != nil {
		return nil, err
	}
	defer func() { _ = theirs.Close() }()
	fds := []int{int(theirs.Fd())}
	t := &tape{}
	flags := namespaces | unix.CLONE_PARENT
	group := word{}
	if cgroup >= 0 {
		fds = append(fds, cgroup)
		flags |= unix.CLONE_INTO_CGROUP
		group = num(firstFD + 1)
	}
	// struct clone_args, as of Linux 5.7: flags, pidfd, child_tid, parent_tid,
	// exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup. The
	// parent's SIGCHLD is what CLONE_PARENT takes over, so none is named.
	args := t.words(num(flags), word{}, word{}, word{}, word{}, word{}, word{}, word{}, word{}, word{}, group)
	t.call("fork", unix.SYS_CLONE3|opFork, args, num(88))
	// Only the child comes here.
	t.call("take socket", unix.SYS_DUP3, num(firstFD), num(3), num(unix.O_CLOEXEC))
	t.call("close descriptors", unix.SYS_CLOSE_RANGE, num(firstFD), num(^uint32(0)), num(0))

	if err := m.send(ctx, t, fds...); err != nil {
		_ = ours.Close()
		return nil, fmt.Errorf("fork: %w: %w", errBroken, err)
	}
	pid, err := m.receive(ctx, t)
	if err == nil && pid == 0 {
		err = errors.New("init program ended")
	}
	if err != nil {
		_ = ours.Close()
		if _, told := errors.AsType[*callError](err); !told {
			err = fmt.Errorf("%w: %w", errBroken, err)
		}
		return nil, fmt.Errorf("fork: %w", err)
	}
	closing := &tape{}
	closing.call("close descriptors", unix.SYS_CLOSE_RANGE, num(firstFD), num(^uint32(0)), num(0))
	if err := m.send(ctx, closing); err != nil {
		_ = ours.Close()
		_ = unix.Kill(pid, unix.SIGKILL)
		return nil, fmt.Errorf("fork: %w: %w", errBroken, err)
	}
	return &machine{pid: pid, conn: ours}, nil
}

// close lets the machine end.
func (m *machine) close() { _ = m.conn.Close() }

func deadline(ctx context.Context) time.Time {
	d, ok := ctx.Deadline()
	if !ok {
		return time.Time{}
	}
	return d
}
