package oci

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	runc "github.com/containerd/go-runc"
	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/sandbox"
)

// Exec implements sandbox.Sandbox. The runtime starts the program and ends;
// the program is then ours to wait for.
func (c *container) Exec(ctx context.Context, p sandbox.Process) (int, error) {
	if c.ended() {
		return -1, &fleet.Error{Op: "exec in", Subject: string(c.spec.ID), Kind: fleet.ErrNotFound, Err: sandbox.ErrGone}
	}
	if err := validate(&sandbox.Spec{ID: c.spec.ID, Args: p.Args, Env: p.Env, Dir: p.Dir, Layers: []string{"/"}}); err != nil {
		return -1, err
	}
	if err := ctx.Err(); err != nil {
		return -1, context.Cause(ctx)
	}
	b, err := readBundle(c.dir())
	if err != nil {
		return -1, fmt.Errorf("exec in %s: %w", c.spec.ID, err)
	}
	if p.Env == nil {
		p.Env = b.Process.Env
	}
	if p.Dir == "" {
		p.Dir = b.Process.Cwd
	}
	if p.User == "" {
		p.User = c.spec.User
	}
	inside := c.pid
	if c.family.Gofer != 0 {
		inside = c.family.Gofer
	}
	top, err := os.OpenFile("/proc/"+strconv.Itoa(inside)+"/root", unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return -1, fmt.Errorf("exec in %s: %w", c.spec.ID, err)
	}
	defer func() { _ = top.Close() }()
	who, err := root(top.Fd()).lookup(p.User)
	if err != nil {
		return -1, err
	}
	program, err := root(top.Fd()).executable(p.Args[0], p.Dir, p.Env)
	if err != nil {
		return -1, err
	}
	s, err := openStdio(&p.Stdio, int(c.ids.Base)+who.Uid, c.dir())
	if err != nil {
		return -1, err
	}
	spec := newProcess(who, program, p.Args, p.Env, p.Dir, b.Process.Capabilities.Bounding)
	spec.Terminal = p.Stdio.TTY

	base := filepath.Join(c.dir(), "exec-"+newName())
	pidFile, log := base+".pid", base+".log"
	defer func() { _, _ = os.Remove(pidFile), os.Remove(log) }()
	started := make(chan int, 1)
	opts := &runc.ExecOpts{IO: s, PidFile: pidFile, LogFile: log, Detach: true, Started: started}
	if s.console != nil {
		opts.ConsoleSocket = s.console
	}
	if c.r.kind == "runsc" {
		opts.ExtraArgs = []string{"--internal-pid-file", base + ".inside"}
		defer func() { _ = os.Remove(base + ".inside") }()
	}
	// As in run: a call that has begun is never cut off.
	callCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
	defer cancel()
	err = onStage(c.r.hidden, func() error {
		if err := emptyWorkshop(); err != nil {
			return err
		}
		return c.r.client(log).Exec(callCtx, c.name, *spec, opts)
	})
	_ = s.Close()
	// crun may leave a child in its process group; the program itself is in it,
	// too, so this comes last.
	defer collectGroup(<-started)
	if err != nil {
		s.abort()
		return -1, c.explain(err, log)
	}
	pid, err := readPID(pidFile)
	if err != nil {
		s.abort()
		return -1, fmt.Errorf("exec in %s: %w", c.spec.ID, err)
	}
	// It is our child and nobody has waited for it, so the number is its own.
	proc, err := openProcess(pid, 0)
	if err != nil {
		s.abort()
		return -1, fmt.Errorf("exec in %s: %w", c.spec.ID, err)
	}
	stop := context.AfterFunc(ctx, func() { c.killExec(proc, base+".inside") })
	if err := s.run(callCtx); err != nil {
		proc.kill()
	}
	exit, _ := proc.wait()
	stop()
	s.wait()
	if err := ctx.Err(); err != nil {
		return -1, context.Cause(ctx)
	}
	return exit.Code, nil
}

// killExec ends a program of Exec. runsc's is not a process of the host: what
// stands for it there only waits.
func (c *container) killExec(p *process, inside string) {
	if pid, err := readPID(inside); err == nil {
		ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
		defer cancel()
		log := filepath.Join(c.r.dir, "kill.log")
		err := c.r.client(log).Kill(ctx, c.name, int(unix.SIGKILL), &runc.KillOpts{ExtraArgs: []string{"--pid", strconv.Itoa(pid)}})
		if err == nil {
			return
		}
		c.r.log.Warn("runtime did not kill program", "instance", c.spec.ID, "error", err)
	}
	p.kill()
}
