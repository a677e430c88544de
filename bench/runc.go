package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// checkpointed is a container that runc has saved. It shares the host's
// network, has no user namespace, and its root filesystem is a directory: that
// favours it.
type checkpointed struct {
	b         *bench
	dir, addr string
	want      string
	count     int
}

const runcState = "/run/runc"

// command of runc. What is started detached gets /dev/null for its own files,
// which CRIU can save.
func (c *checkpointed) command(name string, args ...string) *exec.Cmd {
	return exec.CommandContext(c.b.ctx, "runc", append([]string{"--root", runcState, "--log", filepath.Join(c.dir, "log"), "--criu", criuProgram, name}, args...)...) //nolint:gosec // a benchmark
}

// failed is why a command of runc did.
func (c *checkpointed) failed(name string, err error) error {
	if err == nil {
		return nil
	}
	said, _ := os.ReadFile(filepath.Join(c.dir, "log"))
	return fmt.Errorf("runc %s: %w: %s", name, err, said)
}

func (c *checkpointed) runc(name string, args ...string) error {
	return c.failed(name, c.command(name, args...).Run())
}

// images is where the saved processes are, given to runc's commands.
func (c *checkpointed) images() []string {
	return []string{"--image-path", filepath.Join(c.dir, "images"), "--work-path", filepath.Join(c.dir, "work")}
}

// checkpoint runs a program with runc, asks it once, and saves it.
func (b *bench) checkpoint(p program, tar string) (*checkpointed, error) {
	dir, err := os.MkdirTemp(b.dir, "runc")
	if err != nil {
		return nil, err
	}
	addr, err := free()
	if err != nil {
		return nil, err
	}
	c := &checkpointed{b: b, dir: dir, addr: addr, want: p.Want}
	root := filepath.Join(dir, "root")
	if err := os.Mkdir(root, 0o755); err != nil { //nolint:gosec // a root filesystem
		return nil, err
	}
	if out, err := exec.CommandContext(b.ctx, "tar", "-xf", tar, "-C", root).CombinedOutput(); err != nil { //nolint:gosec // ours
		return nil, fmt.Errorf("unpack: %w\n%s", err, out)
	}
	for _, v := range p.Volumes {
		if err := os.CopyFS(filepath.Join(root, v.Mount), os.DirFS(v.Bind)); err != nil {
			return nil, fmt.Errorf("copy %s: %w", v.Bind, err)
		}
	}
	_, port, _ := net.SplitHostPort(addr)
	// CRIU makes a directory in the root filesystem, so that has to be writable.
	err = b.bundle("runc", dir, content{root: root, args: p.Command, env: []string{"PORT=" + port, "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}})
	if err != nil {
		return nil, err
	}
	const id = "bench-saved"
	if err := c.runc("run", "-d", "--bundle", dir, id); err != nil {
		return nil, err
	}
	if err := answer(addr, p.Want); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", p.Name, err), c.runc("delete", "-f", id))
	}
	time.Sleep(time.Second) // no connection is left
	if err := c.runc("checkpoint", append(c.images(), id)...); err != nil {
		return nil, errors.Join(err, c.runc("delete", "-f", id))
	}
	return c, c.runc("delete", "-f", id)
}

// restore starts it until it answers, which may be before runc ends, and
// removes it.
func (c *checkpointed) restore() (time.Duration, error) {
	c.count++
	id := fmt.Sprintf("bench-restored-%d", c.count)
	cmd := c.command("restore", append(c.images(), "-d", "--bundle", c.dir, id)...)
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	err := answer(c.addr, c.want)
	took := time.Since(began)
	return took, errors.Join(c.failed("restore", cmd.Wait()), err, c.runc("delete", "-f", id))
}

// besideRunc: restoring with runc, and here.
func (b *bench) besideRunc() error {
	rounds := 30
	if b.quick {
		rounds = 5
	}
	p, err := b.node()
	if err != nil {
		return err
	}
	saved, err := b.checkpoint(p, strings.TrimPrefix(p.image, "tar:"))
	if err != nil {
		return err
	}
	n, err := b.start("", saves)
	if err != nil {
		return err
	}
	defer n.end()
	const name = "saved"
	if err := n.cast(name, p, fleet.StartCheckpoint, nil); err != nil {
		return err
	}
	if _, err := ask(n.http, name+".localhost", p.Want); err != nil {
		return err
	}
	if _, err := n.saved(name); err != nil {
		return err
	}
	var ours, theirs times
	for round := range rounds + 1 {
		if err := n.asleep(name); err != nil {
			return err
		}
		here, err := ask(n.http, name+".localhost", p.Want)
		if err != nil {
			return err
		}
		if err := n.asleep(name); err != nil {
			return err
		}
		there, err := saved.restore()
		if err != nil {
			return err
		}
		if round > 0 {
			ours, theirs = append(ours, here), append(theirs, there)
		}
	}
	if err := n.were(name, fleet.CheckpointStart, rounds+1); err != nil {
		return err
	}
	cache := "had"
	if !exists("/run/criu.kdat") {
		cache = "did not have"
	}
	b.say("## Beside `runc restore`\n")
	b.say("Node with express, saved by the same CRIU after it was asked once, %d rounds in turn. *runc restore*: `runc restore -d` until the port answers; of the", rounds)
	b.say("same root filesystem, unpacked into a directory, with the host's network and no user namespace, which favours it; it %s CRIU's cache of what", cache)
	b.say("this kernel can (`/run/criu.kdat`). Ours: a request through the front door, to an instance with all that it always has.\n")
	b.say("| | p50 ms | p99 ms | p50 beside runc |\n|---|---|---|---|")
	for _, who := range []struct {
		name string
		t    times
	}{{"fastcontainer", ours}, {"runc restore", theirs}} {
		b.say("| %s | %s | %s | %.2f |", who.name, ms(who.t.at(.5)), ms(who.t.at(.99)), who.t.beside(theirs, .5))
	}
	b.say("")
	return nil
}
