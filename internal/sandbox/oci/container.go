package oci

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	runc "github.com/containerd/go-runc"
	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/sandbox"
	"github.com/fastcontainer/fastcontainer/internal/sandbox/cgroup"
)

// container is one that a runtime runs. Its name is that of its bundle, its
// cgroup, its link and what the runtime knows it by.
type container struct {
	r     *Runtime
	name  string
	spec  sandbox.Spec
	group *cgroup.Group

	ids     idRange
	link    sandbox.Link
	pid     int // 0: not born
	started uint64
	family  family // of runsc
	timings sandbox.Timings
	streams *streams

	mu   sync.Mutex
	proc *process

	done    chan struct{}
	exit    sandbox.Exit
	destroy sync.Mutex
}

func (r *Runtime) newContainer(name string, spec sandbox.Spec) *container {
	return &container{r: r, name: name, spec: spec, group: r.cgroups.Group(name), done: make(chan struct{})}
}

func (c *container) dir() string { return filepath.Join(c.r.bundles(), c.name) }

// start makes the container and runs its program. What is there after an error
// is removed by the caller.
func (c *container) start(ctx context.Context, caps []string) (err error) {
	began := time.Now()
	step := func(d *time.Duration) {
		now := time.Now()
		*d = now.Sub(began)
		began = now
	}
	if err := os.Mkdir(c.dir(), 0o700); err != nil {
		return fmt.Errorf("make bundle: %w", err)
	}
	if err := c.group.Create(); err != nil {
		return err
	}
	if err := c.Resize(c.spec.Limits); err != nil {
		return err
	}
	if c.spec.UserNS {
		if c.ids, err = c.r.uids.take(); err != nil {
			return err
		}
	}
	ns, err := newNamespaces(c.ids)
	if err != nil {
		return err
	}
	defer ns.close()
	step(&c.timings.Claim)

	var resolvConf []byte
	if c.r.network != nil {
		resolvConf = c.r.network.ResolvConf()
		if c.link, err = c.r.network.Attach(ctx, c.name, int(ns.net.Fd())); err != nil {
			return err
		}
	}
	step(&c.timings.Network)

	err = onStage(c.r.hidden, func() error {
		a := &assembly{spec: &c.spec, owner: int(c.ids.Base), userns: ns.user, flags: unix.MS_NODEV}
		if c.r.kind == "runsc" {
			// From a user namespace it could not make a nodev mount read-only
			// without naming the flag, which it does not do. Its programs never
			// see a device of the host.
			a.flags = 0
		}
		defer a.close()
		if err := c.furnish(a, ns, caps, resolvConf); err != nil {
			return err
		}
		step(&c.timings.Rootfs)
		return c.run()
	})
	if err != nil {
		return err
	}
	if err := c.watch(); err != nil {
		return fmt.Errorf("start %s: %w", c.spec.ID, err)
	}
	step(&c.timings.Exec)
	// A caller that has given up while the runtime worked gets no container.
	return context.Cause(ctx)
}

// furnish puts root filesystem, streams and bundle together.
func (c *container) furnish(a *assembly, ns *namespaces, caps []string, resolvConf []byte) error {
	spec := &c.spec
	hosts := "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
	if c.link.Address.IsValid() && spec.Hostname != "" {
		hosts += c.link.Address.String() + "\t" + spec.Hostname + "\n"
	}
	rootfs, volumes, err := a.mount([]byte(hosts), resolvConf)
	if err != nil {
		return err
	}
	who, err := rootfs.lookup(spec.User)
	if err != nil {
		return err
	}
	program, err := rootfs.executable(spec.Args[0], spec.Dir, spec.Env)
	if err != nil {
		return err
	}
	if spec.Dir != "" && spec.Dir != "/" {
		fd, err := rootfs.place(spec.Dir, true, a.owner)
		if err != nil {
			return err
		}
		_ = unix.Close(fd)
	}
	b, err := c.newBundle(ns, who, program, caps, volumes)
	if err != nil {
		return err
	}
	if err := b.write(c.dir()); err != nil {
		return err
	}
	uid := a.owner + who.Uid
	if spec.Stdio != nil {
		c.streams, err = openStdio(spec.Stdio, uid, c.dir())
	} else {
		c.streams, err = openLog(spec.Log, uid)
	}
	return err
}

// run makes the runtime create the container and execute its program. Its
// single command for both would be no faster, and crun's leaves a child of its
// own behind. A call that has begun is never cut off for the same reason.
func (c *container) run() error {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	pidFile, log := filepath.Join(c.dir(), "pid"), filepath.Join(c.dir(), "log")
	opts := &runc.CreateOpts{IO: c.streams, PidFile: pidFile}
	if c.streams.console != nil {
		opts.ConsoleSocket = c.streams.console
	}
	client := c.r.client(log)
	err := client.Create(ctx, c.name, c.dir(), opts)
	_ = c.streams.Close()
	if c.pid, _ = readPID(pidFile); c.pid != 0 {
		c.started, _ = startTime(c.pid)
	}
	if err == nil && c.pid == 0 {
		err = fmt.Errorf("%s told no pid", c.r.kind)
	}
	if err == nil && c.r.kind == "runsc" {
		err = c.enlist()
	}
	if err == nil {
		err = client.Start(ctx, c.name)
	}
	if err != nil {
		c.streams.abort()
		return c.explain(err, log)
	}
	return c.streams.run(ctx)
}

func readPID(name string) (int, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

// explain makes a sentence of a runtime's failure. Runtimes tell their reasons
// as text only, so what is the user's fault is known by its words.
func (c *container) explain(err error, log string) error {
	reason := lastError(log)
	if reason == "" {
		return fmt.Errorf("start %s: %w", c.spec.ID, err)
	}
	err = fmt.Errorf("%s: %s", c.r.kind, reason)
	for words, hint := range map[string]string{
		"no such file":      "the program exists, but its interpreter (the #! line, or the dynamic loader) does not: is it made for this image's libc?",
		"exec format error": "it is neither a program for this machine's architecture nor a script that begins with #!",
		"permission denied": "the user it runs as may not execute or enter it",
	} {
		if strings.Contains(strings.ToLower(reason), words) && strings.Contains(reason, "exec") {
			return &fleet.Error{Op: "start", Subject: string(c.spec.ID), Kind: fleet.ErrInvalid, Err: err, Hint: hint}
		}
	}
	return &fleet.Error{Op: "start", Subject: string(c.spec.ID), Err: err, Hint: "isolation.runtime: native does without " + c.r.kind}
}

// lastError of a runtime's JSON log.
func lastError(log string) string {
	f, err := os.Open(log)
	if err != nil {
		return ""
	}
	defer func() { _ = f.Close() }()
	last := ""
	entries := json.NewDecoder(io.LimitReader(f, 1<<20))
	for {
		var entry struct{ Level, Msg string }
		if entries.Decode(&entry) != nil {
			break
		}
		if entry.Level == "error" || entry.Level == "fatal" {
			last = entry.Msg
		}
	}
	return last
}

// watch waits for the end of the first process, beside everything else.
func (c *container) watch() error {
	started := c.started
	if c.streams != nil {
		started = 0 // it is our child: its number is its own, even if it has ended already
	}
	p, err := openProcess(c.pid, started)
	if err != nil {
		return err
	}
	r := c.r
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		_ = p.pidfd.Close()
		return errors.New("the runtime is closed")
	}
	c.mu.Lock()
	c.proc = p
	c.mu.Unlock()
	r.watches.Go(func() {
		exit, ended := p.wait()
		if !ended {
			return
		}
		if c.streams != nil && c.streams.spec != nil {
			c.streams.wait()
		}
		c.family.collect()
		exit.OOM = c.group.OOMKills() > 0
		c.exit = exit
		close(c.done)
	})
	return nil
}

// unwatch ends the watch.
func (c *container) unwatch() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.proc != nil {
		_ = c.proc.pidfd.Close()
	}
}

// state is what Adopt needs to know.
type state struct {
	ID      fleet.InstanceID `json:"id"`
	Name    string           `json:"name"`
	PID     int              `json:"pid"`
	Started uint64           `json:"started"`
	UIDs    idRange          `json:"uids"`
	Link    sandbox.Link     `json:"link"`
	Log     string           `json:"log,omitempty"`
	LogMax  fleet.Bytes      `json:"log_max,omitempty"`
	Dir     string           `json:"dir,omitempty"`
	User    string           `json:"user,omitempty"`
	Family  family           `json:"family"`
}

func (c *container) ID() fleet.InstanceID     { return c.spec.ID }
func (c *container) PID() int                 { return c.pid }
func (c *container) Address() netip.Addr      { return c.link.Address }
func (c *container) Timings() sandbox.Timings { return c.timings }
func (c *container) Done() <-chan struct{}    { return c.done }
func (c *container) Exit() sandbox.Exit       { return c.exit }

func (c *container) State() json.RawMessage {
	s := state{
		ID: c.spec.ID, Name: c.name, PID: c.pid, Started: c.started, UIDs: c.ids, Link: c.link,
		LogMax: c.spec.LogMax, Dir: c.spec.Dir, User: c.spec.User, Family: c.family,
	}
	if c.spec.Stdio == nil {
		s.Log = c.spec.Log
	}
	raw, err := json.Marshal(s)
	if err != nil { // cannot happen: every field is plain
		c.r.log.Error("encode container state", "instance", c.spec.ID, "error", err)
	}
	return raw
}

func (c *container) Signal(sig os.Signal) error {
	s, ok := sig.(syscall.Signal)
	if !ok {
		return fmt.Errorf("signal %v: not a system signal", sig)
	}
	p, err := openProcess(c.pid, c.started)
	if err != nil || c.ended() {
		return os.ErrProcessDone
	}
	defer func() { _ = p.pidfd.Close() }()
	if err := unix.PidfdSendSignal(int(p.pidfd.Fd()), s, nil, 0); err != nil {
		return fmt.Errorf("signal %s: %w", c.spec.ID, err)
	}
	return nil
}

func (c *container) ended() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

func (c *container) Kill() error { return c.group.Kill() }

func (c *container) Resize(l sandbox.Limits) error {
	err := c.group.Set(l.Cgroup())
	if err != nil {
		return fmt.Errorf("resize %s: %w", c.spec.ID, err)
	}
	return nil
}

func (c *container) Stats() (sandbox.Stats, error) {
	s, err := c.group.Stats()
	return sandbox.Stats{
		CPUTime: s.CPUTime, Throttled: s.Throttled, Periods: s.Periods, ThrottledPers: s.ThrottledPeriods,
		Memory: fleet.Bytes(s.Memory), MemoryPeak: fleet.Bytes(s.MemoryPeak), PIDs: s.PIDs, OOMKills: s.OOMKills,
	}, err
}

// CPU implements Sandbox.
func (c *container) CPU() (sandbox.Stats, error) {
	s, err := c.group.CPU()
	return sandbox.Stats{CPUTime: s.CPUTime, Throttled: s.Throttled, Periods: s.Periods, ThrottledPers: s.ThrottledPeriods}, err
}

// Alarm implements Sandbox.
func (c *container) Alarm(at fleet.Bytes, f func()) (func(), error) {
	return c.group.Alarm(int64(at), f)
}

// freezing is the longest that a container may take to stand still.
const freezing = 2 * time.Second

// Freeze implements Freezer.
func (c *container) Freeze(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, freezing)
	defer cancel()
	if err := c.group.Freeze(ctx, true); err != nil {
		return fmt.Errorf("freeze %s: %w", c.spec.ID, err)
	}
	return nil
}

// Thaw implements Freezer.
func (c *container) Thaw() error {
	ctx, cancel := context.WithTimeout(context.Background(), freezing)
	defer cancel()
	if err := c.group.Freeze(ctx, false); err != nil {
		return fmt.Errorf("thaw %s: %w", c.spec.ID, err)
	}
	return nil
}

// Reclaim implements Freezer.
func (c *container) Reclaim() error { return c.group.Reclaim() }

// Destroy implements sandbox.Sandbox.
func (c *container) Destroy(ctx context.Context) error {
	if c.spec.Stdio == nil && c.spec.Log != "" {
		c.r.logs.forget(c.spec.Log)
	}
	if err := c.remove(ctx); err != nil {
		return fmt.Errorf("destroy %s: %w", c.spec.ID, err)
	}
	return nil
}

// remove ends everything that belongs to the container, in the order in which
// nothing can come back: processes, what the runtime keeps of it, cgroups,
// address, bundle, uid range.
func (c *container) remove(ctx context.Context) error {
	c.destroy.Lock()
	defer c.destroy.Unlock()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), destroyTimeout)
	defer cancel()
	errs := []error{c.group.Kill()}
	if c.watched() {
		select {
		case <-c.done:
		case <-ctx.Done():
			errs = append(errs, errors.New("its first process does not end"))
		}
	} else if c.pid != 0 {
		// It failed at birth: nobody else takes notice of its end.
		if p, err := openProcess(c.pid, c.started); err == nil {
			_, _ = p.wait()
		}
		c.family.collect()
	}
	errs = append(errs, c.group.Remove(ctx), c.forget(), c.r.removeCgroups(ctx, c.name))
	if c.r.network != nil && c.link.Name != "" {
		errs = append(errs, c.r.network.Detach(ctx, c.link))
	}
	errs = append(errs, os.RemoveAll(c.dir()))
	if err := errors.Join(errs...); err != nil {
		return err
	}
	c.r.uids.free(c.ids)
	c.r.disown(c.name)
	// A second call must neither give the address nor the ids away again.
	c.link, c.ids = sandbox.Link{}, idRange{}
	return nil
}

func (c *container) watched() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.proc != nil
}

// forget drops the runtime's record of the container. That is all that its own
// delete would find to do: processes and cgroups are removed beside it, and it
// would wait for processes whose end only this daemon can take notice of.
func (c *container) forget() error {
	records, err := filepath.Glob(filepath.Join(c.r.states(), c.name+"*"))
	errs := []error{err}
	for _, r := range records {
		errs = append(errs, os.RemoveAll(r))
	}
	return errors.Join(errs...)
}

// removeCgroups removes those that a runtime made beyond the controllers that
// we use.
func (r *Runtime) removeCgroups(ctx context.Context, name string) error {
	var errs []error
	for _, parent := range r.everywhere {
		dir := filepath.Join(parent, name)
		wait := time.Millisecond
		err := syscall.Rmdir(dir)
		for errors.Is(err, unix.EBUSY) && ctx.Err() == nil {
			select { // its processes are ending
			case <-time.After(wait):
			case <-ctx.Done():
			}
			wait = min(wait*2, 50*time.Millisecond)
			err = syscall.Rmdir(dir)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove cgroup %s: %w", dir, err))
		}
	}
	return errors.Join(errs...)
}
