package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// stdio is the standard input and output of one program: a log file, pipes or
// a terminal.
type stdio struct {
	spec    *Stdio
	theirs  []int // stdin, stdout, stderr; -1: /dev/null
	ours    []*os.File
	tty     *os.File
	copies  sync.WaitGroup // of output
	stdin   sync.WaitGroup // of input and window sizes
	over    chan struct{}
	running bool
}

// logFlags open a container's log, whose directory is the daemon's alone.
const logFlags = unix.O_WRONLY | unix.O_CREAT | unix.O_APPEND | unix.O_CLOEXEC

// openStdio opens what the program's standard input and output will be.
func (c *container) openStdio(who Identity) (*stdio, error) {
	if c.spec.Stdio != nil {
		return newStdio(c.spec.Stdio, c.p.uids, who)
	}
	s := &stdio{over: make(chan struct{})}
	s.theirs = []int{-1, -1, -1}
	if c.spec.Log == "" {
		return s, nil
	}
	fd, err := unix.Open(c.spec.Log, logFlags, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open log %s: %w", c.spec.Log, err)
	}
	// Each of theirs is closed once, so each is a descriptor of its own.
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0) //nolint:gosec // a descriptor
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("open log %s: %w", c.spec.Log, err)
	}
	s.theirs = []int{-1, fd, dup}
	// Images reopen /dev/stdout by name, which needs the right to open the file;
	// and so does a restore, by the container's root, who may if all of its owners are
	// the container's.
	if err := unix.Fchown(fd, int(c.p.uids.base)+who.UID, int(c.p.uids.base)+who.GID); err != nil {
		closeAll(s.theirs)
		return nil, fmt.Errorf("give log to the container: %w", err)
	}
	return s, nil
}

// newStdio makes pipes to the caller's streams. A terminal is opened by
// openTerminal once the program's namespaces are there.
func newStdio(spec *Stdio, uids uidRange, who Identity) (*stdio, error) {
	s := &stdio{spec: spec, over: make(chan struct{})}
	if spec.TTY {
		return s, nil
	}
	for i := range 3 {
		if i == 2 && sameWriter(spec.Stdout, spec.Stderr) {
			// One pipe keeps the order of what the program writes.
			fd, err := unix.FcntlInt(uintptr(s.theirs[1]), unix.F_DUPFD_CLOEXEC, 0) //nolint:gosec // a descriptor
			if err != nil {
				s.abort()
				closeAll(s.theirs)
				return nil, fmt.Errorf("make pipe: %w", err)
			}
			s.theirs = append(s.theirs, fd)
			break
		}
		r, w, err := os.Pipe()
		if err != nil {
			s.abort()
			closeAll(s.theirs)
			return nil, fmt.Errorf("make pipe: %w", err)
		}
		mine, theirs := r, w
		if i == 0 {
			mine, theirs = w, r
		}
		fd, err := unix.FcntlInt(theirs.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err == nil {
			// For programs that reopen /dev/stdout by name.
			err = unix.Fchown(fd, int(uids.base)+who.UID, -1)
		}
		_ = theirs.Close()
		s.ours = append(s.ours, mine)
		s.theirs = append(s.theirs, fd)
		if err != nil {
			s.abort()
			closeAll(s.theirs)
			return nil, fmt.Errorf("make pipe: %w", err)
		}
	}
	return s, nil
}

// sameWriter compares two writers, whose types may not be comparable.
func sameWriter(a, b io.Writer) bool {
	defer func() { _ = recover() }()
	return a == b
}

// attach adds to the tape what puts the descriptors in place.
func (s *stdio) attach(t *tape, pass func(int) int) {
	if s.spec != nil && s.spec.TTY {
		s.attachTerminal(t)
		return
	}
	for i, fd := range s.theirs {
		if fd >= 0 {
			t.call("set standard streams", unix.SYS_DUP3, num(pass(fd)), num(i), num(0))
			continue
		}
		// The container's own, by a name that it has: what was open before is the host's.
		null := t.call("open /dev/null", unix.SYS_OPENAT, num(unix.AT_FDCWD), t.str("/dev/null"), num(unix.O_RDWR|unix.O_CLOEXEC), num(0))
		set := t.call("set standard streams", unix.SYS_DUP3, num(0), num(i), num(0))
		t.feed(null, set)
	}
}

// terminalFD is where the master of a new terminal is parked on a tape.
const terminalFD = 60

// attachTerminal makes a terminal in the container's own devpts, makes it the
// controlling one, and sends its master to the daemon.
func (s *stdio) attachTerminal(t *tape) {
	open := t.call("open terminal", unix.SYS_OPENAT, num(unix.AT_FDCWD), t.str("/dev/pts/ptmx"), num(unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC), num(0))
	park := t.call("park terminal", unix.SYS_DUP3, num(0), num(terminalFD), num(unix.O_CLOEXEC))
	t.feed(open, park)
	t.call("unlock terminal", unix.SYS_IOCTL, num(terminalFD), num(unix.TIOCSPTLCK), t.words(num(0)))
	peer := t.call("open terminal", unix.SYS_IOCTL, num(terminalFD), num(unix.TIOCGPTPEER), num(unix.O_RDWR|unix.O_NOCTTY))
	stdin := t.call("set standard streams", unix.SYS_DUP3, num(0), num(0), num(0))
	t.feed(peer, stdin)
	t.call("set standard streams", unix.SYS_DUP3, num(0), num(1), num(0))
	t.call("set standard streams", unix.SYS_DUP3, num(0), num(2), num(0))
	t.call("new session", unix.SYS_SETSID|opMayFail)
	t.call("set controlling terminal", unix.SYS_IOCTL, num(0), num(unix.TIOCSCTTY), num(0))
	// struct msghdr: one byte, and the master as SCM_RIGHTS.
	message := t.words(num(0), num(0), t.words(t.bytes([]byte{'t'}), num(1)), num(1),
		t.bytes(unix.UnixRights(terminalFD)), num(unix.CmsgSpace(4)), num(0))
	t.call("hand over terminal", unix.SYS_SENDMSG, num(3), message, num(0))
}

// take receives the terminal, if there is to be one.
func (s *stdio) take(ctx context.Context, m *machine, t *tape) error {
	if s.spec == nil || !s.spec.TTY {
		return nil
	}
	var buf [16]byte
	oob := make([]byte, unix.CmsgSpace(4))
	stop := context.AfterFunc(ctx, func() { _ = m.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	n, oobn, _, _, err := m.conn.ReadMsgUnix(buf[:], oob)
	if err != nil {
		return fmt.Errorf("take terminal: %w", err)
	}
	if n != 1 {
		_, err := t.report(buf[:n])
		return err
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(msgs) != 1 {
		return errors.New("take terminal: none was sent")
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		closeAll(fds)
		return errors.New("take terminal: none was sent")
	}
	// Non-blocking, so that closing it ends a read that is under way.
	if err := unix.SetNonblock(fds[0], true); err != nil {
		closeAll(fds)
		return fmt.Errorf("take terminal: %w", err)
	}
	unix.CloseOnExec(fds[0])
	s.tty = os.NewFile(uintptr(fds[0]), "terminal")
	return nil
}

// run starts the copying between the program and its caller.
func (s *stdio) run() {
	if s.spec == nil {
		return
	}
	s.running = true
	in, out := s.tty, []*os.File{s.tty}
	if s.tty == nil {
		in, out = s.ours[0], s.ours[1:]
	} else if s.spec.Resize != nil {
		s.stdin.Go(s.follow)
	}
	s.stdin.Go(func() {
		if s.spec.Stdin != nil {
			_, _ = io.Copy(in, s.spec.Stdin) // the program may stop reading: its right
		}
		if s.tty == nil {
			_ = in.Close()
		}
	})
	for i, f := range out {
		w := s.spec.Stdout
		if i == 1 {
			w = s.spec.Stderr
		}
		if w == nil {
			w = io.Discard
		}
		s.copies.Go(func() { _, _ = io.Copy(w, f) }) // a terminal whose program ended reads as an error
	}
}

// follow keeps the terminal as large as the caller's.
func (s *stdio) follow() {
	for {
		select {
		case <-s.over:
			return
		case size, ok := <-s.spec.Resize:
			if !ok {
				return
			}
			// Fd would make it blocking, so that closing could not end a read.
			if raw, err := s.tty.SyscallConn(); err == nil {
				_ = raw.Control(func(fd uintptr) {
					_ = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: size.Rows, Col: size.Cols})
				})
			}
		}
	}
}

// outputGrace is how long output is still read after the program has ended:
// a child of it that lives on may hold the pipe for ever.
const outputGrace = time.Second

// wait returns when the program's output has been read to its end. The
// copying of the caller's input ends when the caller's reader does.
func (s *stdio) wait() {
	if !s.running {
		return
	}
	close(s.over)
	read := make(chan struct{})
	var w sync.WaitGroup
	w.Go(func() { s.copies.Wait(); close(read) })
	select {
	case <-read:
	case <-time.After(outputGrace):
	}
	s.close()
	w.Wait()
}

// after calls f when the program, which has ended, has no more output.
func (s *stdio) after(f func()) {
	if !s.running {
		f()
		return
	}
	s.stdin.Go(func() { s.wait(); f() })
}

// abort closes the daemon's ends unless the copying has begun.
func (s *stdio) abort() {
	if !s.running {
		s.close()
	}
}

func (s *stdio) close() {
	for _, f := range s.ours {
		_ = f.Close()
	}
	if s.tty != nil {
		_ = s.tty.Close()
	}
}
