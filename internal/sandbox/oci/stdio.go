package oci

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/sandbox"
)

// streams are the standard input and output of one program: a log file, pipes
// or a terminal. They are go-runc's IO for the call that starts it.
type streams struct {
	spec    *sandbox.Stdio
	theirs  [3]*os.File // some may be the same
	ours    []*os.File
	console *console
	tty     *os.File
	output  sync.WaitGroup
	// input is copied, and the window followed, until the caller's side ends.
	input sync.WaitGroup
	// over ends the following of the caller's window.
	over chan struct{}
}

// openLog connects a program to a log file, which is given to its user: images
// reopen /dev/stdout by name.
func openLog(name string, uid int) (*streams, error) {
	s := &streams{over: make(chan struct{})}
	if err := s.openNull(); err != nil || name == "" {
		return s, err
	}
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		_ = s.Close()
		return nil, fmt.Errorf("open log: %w", err)
	}
	s.theirs[1], s.theirs[2] = f, f
	if err := f.Chown(uid, -1); err != nil {
		_ = s.Close()
		return nil, fmt.Errorf("give log to the container: %w", err)
	}
	return s, nil
}

// openStdio connects a program to its caller; dir is where the socket of a
// terminal may be made.
func openStdio(spec *sandbox.Stdio, uid int, dir string) (_ *streams, err error) {
	s := &streams{spec: spec, over: make(chan struct{})}
	defer func() {
		if err != nil {
			_ = s.Close()
			s.abort()
		}
	}()
	if spec.TTY {
		// The terminal takes their place inside.
		if err := s.openNull(); err != nil {
			return nil, err
		}
		s.console, err = newConsole(dir)
		return s, err
	}
	for i := range s.theirs {
		if i == 2 && sameWriter(spec.Stdout, spec.Stderr) {
			s.theirs[2] = s.theirs[1] // one pipe keeps the order of what is written
			break
		}
		r, w, err := os.Pipe()
		if err != nil {
			return nil, fmt.Errorf("make pipe: %w", err)
		}
		ours, theirs := r, w
		if i == 0 {
			ours, theirs = w, r
		}
		s.ours, s.theirs[i] = append(s.ours, ours), theirs
		if err := theirs.Chown(uid, -1); err != nil {
			return nil, fmt.Errorf("make pipe: %w", err)
		}
	}
	return s, nil
}

func (s *streams) openNull() error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("open stdio: %w", err)
	}
	s.theirs = [3]*os.File{null, null, null}
	return nil
}

// sameWriter compares two writers, whose types may not be comparable.
func sameWriter(a, b io.Writer) bool {
	defer func() { _ = recover() }()
	return a == b
}

// Set gives a command the program's ends.
func (s *streams) Set(cmd *exec.Cmd) {
	cmd.Stdin, cmd.Stdout, cmd.Stderr = s.theirs[0], s.theirs[1], s.theirs[2]
}

// The other methods of go-runc's IO; it does not call them.

func (s *streams) Stdin() io.WriteCloser { return nil }
func (s *streams) Stdout() io.ReadCloser { return nil }
func (s *streams) Stderr() io.ReadCloser { return nil }

// Close closes the program's ends; the program has its own by then. It may be
// repeated.
func (s *streams) Close() error {
	for _, f := range s.theirs {
		if f != nil {
			_ = f.Close() // the same one again is an error of no meaning
		}
	}
	return nil
}

// abort closes our ends.
func (s *streams) abort() {
	for _, f := range s.ours {
		_ = f.Close()
	}
	if s.console != nil {
		s.console.close()
	}
	if s.tty != nil {
		_ = s.tty.Close()
	}
}

// run begins the copying, once the program has its ends.
func (s *streams) run(ctx context.Context) error {
	if s.spec == nil {
		return nil
	}
	var in *os.File
	var out []*os.File
	if s.console != nil {
		tty, err := s.console.take(ctx)
		if err != nil {
			return err
		}
		s.tty, in, out = tty, tty, []*os.File{tty}
		if s.spec.Resize != nil {
			s.input.Go(s.follow)
		}
	} else {
		in, out = s.ours[0], s.ours[1:]
	}
	s.input.Go(func() {
		if s.spec.Stdin != nil {
			_, _ = io.Copy(in, s.spec.Stdin) // the program may stop reading: its right
		}
		if s.console == nil {
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
		s.output.Go(func() { _, _ = io.Copy(w, f) }) // a terminal whose program ended reads as an error
	}
	return nil
}

// outputGrace is how long output is still read after the program has ended: a
// child of it that lives on may hold the pipe for ever.
const outputGrace = time.Second

// wait returns when the output of the program, which has ended, was read.
func (s *streams) wait() {
	close(s.over)
	read := make(chan struct{})
	var last sync.WaitGroup
	last.Go(func() { s.output.Wait(); close(read) })
	select {
	case <-read:
	case <-time.After(outputGrace):
	}
	s.abort()
	last.Wait()
}

// follow keeps the terminal as large as the caller's.
func (s *streams) follow() {
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

// console is the socket to which a runtime sends a new terminal.
type console struct {
	dir      *os.File
	name     string
	listener *net.UnixListener
}

func newConsole(dir string) (*console, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("make console socket: %w", err)
	}
	// The path of a socket has at most 107 bytes, whatever the directory's has.
	c := &console{dir: d, name: newName() + ".sock"}
	c.listener, err = net.ListenUnix("unix", &net.UnixAddr{Name: c.Path(), Net: "unix"})
	if err != nil {
		_ = d.Close()
		return nil, fmt.Errorf("make console socket: %w", err)
	}
	c.listener.SetUnlinkOnClose(false)
	return c, nil
}

// Path implements go-runc's ConsoleSocket.
func (c *console) Path() string { return fdPath(c.dir) + "/" + c.name }

func (c *console) close() {
	_ = c.listener.Close()
	_ = os.Remove(filepath.Join(c.dir.Name(), c.name))
	_ = c.dir.Close()
}

// take receives the terminal. The runtime has sent it before its call ends.
func (c *console) take(ctx context.Context) (*os.File, error) {
	stop := context.AfterFunc(ctx, func() { _ = c.listener.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	conn, err := c.listener.AcceptUnix()
	if err != nil {
		return nil, fmt.Errorf("take terminal: %w", err)
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(callTimeout))
	var buf [4096]byte // the sender tells its name
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := conn.ReadMsgUnix(buf[:], oob)
	if err != nil {
		return nil, fmt.Errorf("take terminal: %w", err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return nil, errors.New("take terminal: none was sent")
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return nil, errors.New("take terminal: none was sent")
	}
	// Non-blocking, so that closing it ends a read that is under way.
	if err := unix.SetNonblock(fds[0], true); err != nil {
		_ = unix.Close(fds[0])
		return nil, fmt.Errorf("take terminal: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "terminal"), nil
}
