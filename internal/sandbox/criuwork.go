package sandbox

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/sandbox/cgroup"
	"github.com/fastcontainer/fastcontainer/internal/sandbox/criu"
)

// errand is what one process of CRIU is started for.
type errand struct {
	// sandbox that it works for, with root's rights there and nowhere else, in its
	// cgroup; nil: it has the daemon's rights, and a cgroup of its own.
	sandbox *prepared
	// fds go along, the first as criuFD, and stay open in what it restores
	// unless it closes them.
	fds []int
}

// criuFD is the number of the first descriptor that an errand takes along; the
// one before is its socket.
const criuFD = 11

// worker is one process of CRIU that waits for an order.
type worker struct {
	conn  *net.UnixConn
	pid   int
	ended chan struct{}
	said  *os.File // its standard error
	leave func()   // removes its cgroup
}

// ownGroup begins the names of the cgroups of CRIUs that save. What is in them when
// a daemon begins writes for one that was killed, see endSavers.
const ownGroup = "criu-"

// newGroup makes a cgroup for a CRIU that saves; leave ends what is in it, and
// removes it.
func (n *Native) newGroup() (g *cgroup.Group, leave func(), err error) {
	g = n.cgroups.Group(ownGroup + strings.ToLower(rand.Text()[:10]))
	n.own(g.Name())
	leave = func() {
		ctx, cancel := context.WithTimeout(context.Background(), destroyTimeout)
		defer cancel()
		if err := g.Remove(ctx); err != nil {
			n.log.Warn("remove cgroup of CRIU", "error", err)
			return
		}
		n.mu.Lock()
		delete(n.names, g.Name())
		n.mu.Unlock()
	}
	if err := g.Create(); err != nil {
		leave()
		return nil, func() {}, err
	}
	return g, leave, nil
}

// endSavers ends what an earlier daemon started to save processes. When it
// returns none of that writes any more.
func (n *Native) endSavers(ctx context.Context) error {
	groups, err := n.cgroups.List()
	errs := []error{err}
	for _, name := range groups {
		if strings.HasPrefix(name, ownGroup) {
			g := n.cgroups.Group(name)
			errs = append(errs, g.Remove(ctx))
		}
	}
	return errors.Join(errs...)
}

// employ starts a CRIU.
func (n *Native) employ(ctx context.Context, e *errand) (_ *worker, err error) {
	program, err := n.saver.wait(ctx)
	if err != nil {
		return nil, err
	}
	w := &worker{ended: make(chan struct{}), leave: func() {}}
	conn, theirs, err := criu.Pipe()
	if err != nil {
		return nil, err
	}
	w.conn = conn
	defer func() { _ = theirs.Close() }()
	memory, err := unix.MemfdCreate("criu-log", unix.MFD_CLOEXEC)
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("start CRIU: %w", err)
	}
	w.said = os.NewFile(uintptr(memory), "criu-log")
	var m *machine
	defer func() {
		if err == nil {
			return
		}
		if m != nil { // it may be CRIU already
			m.close()
			w.pid = m.pid
			w.kill()
			return
		}
		_ = conn.Close()
		_ = w.said.Close()
		w.leave()
	}()
	var group *cgroup.Group
	if e.sandbox != nil {
		group = e.sandbox.group
	} else if group, w.leave, err = n.newGroup(); err != nil {
		return nil, fmt.Errorf("start CRIU: %w", err)
	}
	m, err = n.spawnInto(ctx, group, 0, func(status, bool) { close(w.ended) })
	if err != nil {
		return nil, fmt.Errorf("start CRIU: %w", err)
	}
	w.pid = m.pid
	t := &tape{}
	fds := []int{int(program.Mounts.Fd()), int(theirs.Fd()), memory}
	t.call("enter CRIU's mounts", unix.SYS_SETNS, num(firstFD), num(unix.CLONE_NEWNS))
	t.call("set standard error", unix.SYS_DUP3, num(firstFD+2), num(2), num(0))
	if p := e.sandbox; p != nil {
		pidfd, err := unix.PidfdOpen(p.machine.pid, 0) // our child, not waited for
		if err != nil {
			return nil, fmt.Errorf("start CRIU: %w", err)
		}
		defer func() { _ = unix.Close(pidfd) }()
		fds = append(fds, pidfd)
		namespaces := unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWNET | unix.CLONE_NEWCGROUP
		if p.uids.size > 0 {
			namespaces |= unix.CLONE_NEWUSER
		}
		t.call("enter namespaces", unix.SYS_SETNS, num(firstFD+3), num(namespaces))
		t.call("drop groups", unix.SYS_SETGROUPS, num(0), num(0))
		t.call("become root", unix.SYS_SETRESGID, num(0), num(0), num(0))
		t.call("become root", unix.SYS_SETRESUID, num(0), num(0), num(0))
	}
	// First out of the way of the numbers they get.
	along := append([]int{fds[1]}, e.fds...)
	if firstFD+len(fds)+len(along) > parkedFD {
		return nil, fmt.Errorf("start CRIU: %d descriptors to take along", len(along))
	}
	for i, fd := range along {
		fds = append(fds, fd)
		t.call("take along", unix.SYS_DUP3, num(firstFD+len(fds)-1), num(parkedFD+i), num(unix.O_CLOEXEC))
	}
	for i := range along {
		t.call("take along", unix.SYS_DUP3, num(parkedFD+i), num(criuFD-1+i), num(0))
	}
	t.call("enter /", unix.SYS_CHDIR, t.str("/"))
	t.call("execute CRIU", unix.SYS_EXECVE, t.str(program.Path), t.strs(program.Args(criuFD-1)), t.strs(criu.Env))
	if err := execute(ctx, m, t, &stdio{}, fds); err != nil {
		return nil, fmt.Errorf("start CRIU: %w", err)
	}
	return w, nil
}

// parkedFD is where an errand's descriptors are on their way.
const parkedFD = 100

// log is what CRIU said so far.
func (w *worker) log() string {
	b, _ := io.ReadAll(io.NewSectionReader(w.said, 0, 1<<20)) // it is told with an error, or not
	return string(b)
}

// parting is how long a CRIU that has done its work may take to end.
const parting = time.Second

// done returns when the worker has ended, after an order that it fulfilled.
func (w *worker) done() {
	_ = w.conn.Close()
	select {
	case <-w.ended:
		_ = w.said.Close()
		w.leave()
	case <-time.After(parting):
		w.kill()
	}
}

// kill ends the worker, whatever it is doing. It is our child, and its number
// its own until w.ended is closed.
func (w *worker) kill() {
	_ = w.conn.Close()
	select {
	case <-w.ended:
	default:
		_ = unix.Kill(w.pid, unix.SIGKILL)
		<-w.ended
	}
	_ = w.said.Close()
	w.leave()
}

// saver is this host's CRIU, once it was looked at.
type saver struct {
	cancel context.CancelFunc
	look   sync.WaitGroup
	looked chan struct{} // closed when what follows is known
	err    error
	*criu.Program
}

// newSaver looks for CRIU, which takes a while, in the background.
func newSaver(path string) *saver {
	s := &saver{looked: make(chan struct{})}
	var ctx context.Context
	ctx, s.cancel = context.WithCancel(context.Background())
	if path == "" {
		s.err = &fleet.Error{Op: "save processes", Kind: fleet.ErrUnavailable, Err: errors.New("there is no CRIU"), Hint: "name it with checkpoint.criu in the configuration"}
		close(s.looked)
		return s
	}
	s.look.Go(func() {
		s.Program, s.err = criu.Open(ctx, path)
		close(s.looked)
	})
	return s
}

// wait gives CRIU, or why there is none. What is known is told also when ctx has
// ended.
func (s *saver) wait(ctx context.Context) (*criu.Program, error) {
	select {
	case <-s.looked:
		return s.Program, s.err
	default:
	}
	select {
	case <-s.looked:
		return s.Program, s.err
	case <-ctx.Done():
		return nil, &fleet.Error{Op: "save processes", Kind: fleet.ErrUnavailable, Err: fmt.Errorf("CRIU is still being looked at: %w", context.Cause(ctx)), Hint: "try again in a second"}
	}
}

func (s *saver) close() {
	s.cancel()
	s.look.Wait()
	if s.Program != nil {
		_ = s.Close()
	}
}

// CheckpointHost implements Checkpointer.
func (n *Native) CheckpointHost(ctx context.Context) (string, error) {
	program, err := n.saver.wait(ctx)
	if err != nil {
		return "", err
	}
	host, err := hostKey()
	if err != nil {
		return "", err
	}
	return host + " CRIU " + program.Version, nil
}

// hostKey names the kernel and the processor's features, which do not change
// while a kernel runs.
var hostKey = sync.OnceValues(func() (string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", fmt.Errorf("ask for the kernel: %w", err)
	}
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "", fmt.Errorf("ask for the processor: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "flags" {
			flags := strings.Fields(value)
			slices.Sort(flags)
			return strings.Join([]string{runtime.GOARCH, unix.ByteSliceToString(u.Release[:]), unix.ByteSliceToString(u.Version[:]), strings.Join(flags, ",")}, " "), nil
		}
	}
	return "", fmt.Errorf("ask for the processor: /proc/cpuinfo does not tell its features")
})
