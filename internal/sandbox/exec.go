package sandbox

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// Exec implements Sandbox. The program is forked from the daemon's first
// machine, enters the container's cgroup and namespaces, and is as confined as
// the container's own program. Until its execve nothing of the daemon is in it
// but the init program: /proc/PID/exe leads to a sealed memory file.
func (c *container) Exec(ctx context.Context, proc Process) (int, error) {
	select {
	case <-c.done:
		return -1, &fleet.Error{Op: "exec in", Subject: string(c.spec.ID), Kind: fleet.ErrNotFound, Err: ErrGone}
	default:
	}
	one := &container{n: c.n, p: c.p, spec: c.spec, started: c.started}
	one.spec.Stdio = &proc.Stdio
	if err := one.inherit(&proc); err != nil {
		return -1, fmt.Errorf("exec in %s: %w", c.spec.ID, err)
	}
	spec := Spec{ID: c.spec.ID, Args: proc.Args}
	if err := validate(&spec); err != nil {
		return -1, err
	}
	code, err := one.exec(ctx, proc)
	if err != nil {
		return -1, one.explain(err)
	}
	return code, nil
}

// inherit fills what the caller left open from the container's own program.
func (c *container) inherit(proc *Process) error {
	if proc.Dir == "" {
		proc.Dir = c.spec.Dir
	}
	if proc.Dir == "" {
		proc.Dir = "/"
	}
	if proc.User == "" {
		proc.User = c.spec.User
	}
	if proc.Env != nil {
		return nil
	}
	// What the program may have written over there harms nobody but its
	// own container.
	raw, err := readBounded("/proc/"+strconv.Itoa(c.p.machine.pid)+"/environ", initTapeMax/2)
	if err != nil {
		return err
	}
	for _, v := range bytes.Split(bytes.TrimRight(raw, "\x00"), []byte{0}) {
		if bytes.IndexByte(v, '=') > 0 {
			proc.Env = append(proc.Env, string(v))
		}
	}
	return nil
}

func (c *container) exec(ctx context.Context, proc Process) (_ int, err error) {
	p := c.p
	base := "/proc/" + strconv.Itoa(p.machine.pid)
	top, err := os.OpenFile(base+"/root", unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return -1, fmt.Errorf("open root: %w", err)
	}
	defer func() { _ = top.Close() }()
	who, err := root(top.Fd()).lookup(proc.User)
	if err != nil {
		return -1, err
	}
	program, err := root(top.Fd()).executable(proc.Args[0], proc.Dir, proc.Env)
	if err != nil {
		return -1, err
	}

	// A helper enters the namespaces; entering a PID namespace counts for its
	// children only, so the program is a child of it.
	helper, err := c.n.spawnInto(ctx, p.group, 0, func(status, bool) {})
	if helper != nil {
		defer helper.close()
	}
	if err != nil {
		return -1, err
	}
	pidfd, err := unix.PidfdOpen(p.machine.pid, 0)
	if err != nil {
		return -1, fmt.Errorf("open container: %w", err)
	}
	defer func() { _ = unix.Close(pidfd) }()
	if started, err := startTime(p.machine.pid); err != nil || started != c.started {
		return -1, ErrGone
	}
	enter := &tape{}
	namespaces := unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWNET | unix.CLONE_NEWCGROUP
	if p.uids.size > 0 {
		namespaces |= unix.CLONE_NEWUSER
	}
	enter.call("enter namespaces", unix.SYS_SETNS, num(firstFD), num(namespaces))
	enter.call("close descriptors", unix.SYS_CLOSE_RANGE, num(firstFD), num(^uint32(0)), num(0))
	enter.call("drop groups", unix.SYS_SETGROUPS, num(0), num(0))
	enter.call("become root", unix.SYS_SETRESGID, num(0), num(0), num(0))
	enter.call("become root", unix.SYS_SETRESUID, num(0), num(0), num(0))
	enter.done()
	if err := helper.play(ctx, enter, pidfd); err != nil {
		return -1, err
	}
	end := &prepared{ended: make(chan struct{})}
	m, err := c.n.spawn(ctx, helper, 0, -1, end.end)
	if err != nil {
		return -1, err
	}
	helper.close()
	defer m.close()

	t, fds := &tape{}, []int{}
	stdio, err := c.openStdio(who)
	if err != nil {
		return -1, err
	}
	defer func() { closeAll(stdio.theirs) }()
	defer stdio.abort()
	t.call("new session", unix.SYS_SETSID)
	stdio.attach(t, func(fd int) int {
		fds = append(fds, fd)
		return firstFD + len(fds) - 1
	})
	if err := c.identity(t, who, c.n.allCaps); err != nil {
		return -1, err
	}
	t.call("enter working directory "+proc.Dir, unix.SYS_CHDIR, t.str(proc.Dir))
	if err := c.confine(t); err != nil {
		return -1, err
	}
	t.call("execute "+program, unix.SYS_EXECVE, t.str(program), t.strs(proc.Args), t.strs(proc.Env))
	if err := execute(ctx, m, t, stdio, fds); err != nil {
		return -1, err
	}
	closeAll(stdio.theirs)
	stdio.theirs = nil
	stdio.run()
	select {
	case <-end.ended:
	case <-ctx.Done():
		_ = unix.Kill(m.pid, unix.SIGKILL) // our child, not waited for: the number is its own
		<-end.ended
	}
	stdio.wait()
	if err := ctx.Err(); err != nil {
		return -1, context.Cause(ctx)
	}
	return end.status.exit(c.exit.At).Code, nil
}

func readBounded(name string, most int) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	buf := make([]byte, most)
	n := 0
	for n < most {
		m, err := f.Read(buf[n:])
		n += m
		if err != nil || m == 0 {
			break
		}
	}
	return buf[:n], nil
}
