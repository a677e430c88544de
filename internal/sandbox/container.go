package sandbox

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// container is a prepared sandbox that became something.
type container struct {
	n       *Native
	p       *prepared
	spec    Spec
	timings Timings
	started uint64 // start time of the first process, in clock ticks
	trap    *trap  // stops it when it listens; nil: there is none
	asking  sync.Mutex

	done    chan struct{}
	exit    Exit
	destroy sync.Mutex
}

// outfit is what a sandbox gets before a program: its root filesystem, and the
// tape that takes its first process there.
type outfit struct {
	rootfs root
	who    Identity
	tape   *tape
	fds    []int // what goes along: the first becomes firstFD
	mine   []int // to be closed here once it was sent
	stdio  *stdio
}

// pass has a descriptor go along and gives its number there.
func (o *outfit) pass(fd int) int {
	o.fds = append(o.fds, fd)
	return firstFD + len(o.fds) - 1
}

func (o *outfit) close() {
	closeAll(o.mine)
	if o.stdio != nil {
		o.stdio.abort()
	}
}

// limit sets the limits that the container begins with.
func (c *container) limit(limits Limits) error {
	c.n.usual.Store(&usual{limits, int64(c.spec.Disk)})
	return c.Resize(limits)
}

// fit makes the root filesystem of the container's spec.
func (c *container) fit() (_ *outfit, err error) {
	p, spec := c.p, &c.spec
	o := &outfit{tape: &tape{}}
	defer func() {
		if err != nil {
			o.close()
		}
	}()
	if o.rootfs, err = c.n.mountRoot(spec, p); err != nil {
		return nil, err
	}
	o.mine = append(o.mine, int(o.rootfs))
	if o.who, err = o.rootfs.lookup(spec.User); err != nil {
		return nil, err
	}
	owner := int(p.uids.base)
	if spec.Dir != "" && spec.Dir != "/" {
		fd, err := o.rootfs.place(spec.Dir, true, owner)
		if err != nil && !errors.Is(err, unix.EROFS) {
			return nil, err
		}
		_ = unix.Close(fd)
	}
	t := o.tape
	t.call("attach root filesystem", unix.SYS_MOVE_MOUNT, num(o.pass(int(o.rootfs))), t.str(""), num(unix.AT_FDCWD), t.str("/root"), num(unix.MOVE_MOUNT_F_EMPTY_PATH))
	for _, m := range spec.Mounts {
		source, target, err := c.volume(m, o.rootfs, owner)
		o.mine = append(o.mine, source, target)
		if err != nil {
			return nil, err
		}
		t.call("mount "+m.Target, unix.SYS_MOVE_MOUNT, num(o.pass(source)), t.str(""), num(o.pass(target)), t.str(""),
			num(unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH))
	}
	t.call("enter root filesystem", unix.SYS_CHDIR, t.str("/root"))
	for _, dir := range []string{"proc", "sys", "dev"} {
		t.call("move /"+dir, unix.SYS_MOUNT, t.str("/new/"+dir), t.str(dir), num(0), num(unix.MS_MOVE), num(0))
	}
	t.call("pivot root", unix.SYS_PIVOT_ROOT, t.str("."), t.str("."))
	t.call("leave the old root", unix.SYS_UMOUNT2, t.str("."), num(unix.MNT_DETACH))
	t.call("enter /", unix.SYS_CHDIR, t.str("/"))
	host := spec.Hostname
	t.call("set host name", unix.SYS_SETHOSTNAME, t.str(host), num(len(host)))
	if o.stdio, err = c.openStdio(o.who); err != nil {
		return nil, err
	}
	o.mine = append(o.mine, o.stdio.theirs...)
	return o, nil
}

// usual is what starts want as a rule: what the last one wanted. A sandbox that
// is prepared gets it already, and its start changes only what differs.
type usual struct {
	limits Limits
	disk   int64
}

// become turns the prepared sandbox into the container of its spec: limits,
// root filesystem, identity and program.
func (c *container) become(ctx context.Context, began time.Time) error {
	p, spec := c.p, &c.spec
	if err := c.limit(spec.Limits); err != nil {
		return err
	}
	o, err := c.fit()
	if err != nil {
		return err
	}
	defer o.close()
	program, err := o.rootfs.executable(spec.Args[0], spec.Dir, spec.Env)
	if err != nil {
		return err
	}
	mounted := time.Now()
	c.timings.Rootfs = mounted.Sub(began)

	t := o.tape
	o.stdio.attach(t, o.pass)
	if err := c.identity(t, o.who, p.bounding); err != nil {
		return err
	}
	dir := spec.Dir
	if dir == "" {
		dir = "/"
	}
	t.call("enter working directory "+dir, unix.SYS_CHDIR, t.str(dir))
	if err := c.confine(t); err != nil {
		return err
	}
	t.call("execute "+program, unix.SYS_EXECVE, t.str(program), t.strs(spec.Args), t.strs(spec.Env))

	if err := execute(ctx, p.machine, t, o.stdio, o.fds); err != nil {
		return c.explain(err)
	}
	c.timings.Exec = time.Since(mounted)
	c.lives(o.stdio)
	return nil
}

// lives begins to watch over the container's first process.
func (c *container) lives(s *stdio) {
	if c.started = c.p.machine.started; c.started == 0 {
		// It may have ended already; then nothing needs its start time any more.
		c.started, _ = startTime(c.p.machine.pid)
	}
	s.run()
	c.p.whenEnded(func(st status) { s.after(func() { c.finish(st) }) })
}

// finish publishes the end of the container's first process.
func (c *container) finish(s status) {
	c.exit = s.exit(time.Now())
	c.exit.OOM = c.p.group.OOMKills() > 0
	close(c.done)
}

// execute sends a tape that ends with execve and waits until the program runs.
func execute(ctx context.Context, m *machine, t *tape, s *stdio, fds []int) error {
	if err := m.send(ctx, t, fds...); err != nil {
		return err
	}
	if err := s.take(ctx, m, t); err != nil {
		return err
	}
	if _, err := m.receive(ctx, t); err != nil {
		return err
	}
	m.close()
	return nil
}

// volume opens a volume's source and makes its target. Both descriptors are
// the caller's to close, also after an error (then they may be -1).
func (c *container) volume(m Mount, r root, owner int) (source, target int, err error) {
	st, err := os.Stat(m.Source)
	if err != nil {
		return -1, -1, &fleet.Error{Op: "mount volume", Subject: m.Source, Kind: fleet.ErrInvalid, Err: err, Hint: "make it on the host first"}
	}
	source, err = cloneMount(m.Source, c.p, m.Readonly)
	if err != nil {
		return -1, -1, err
	}
	target, err = r.place(m.Target, st.IsDir(), owner)
	return source, target, err
}

// identity drops to the capabilities and the user that the program gets.
// bounding is the set of capabilities that the tape's process may have so far.
func (c *container) identity(t *tape, who Identity, bounding uint64) error {
	keep, err := c.capabilities()
	if err != nil {
		return err
	}
	dropCaps(t, bounding, keep)
	var groups []byte
	for _, g := range who.Groups {
		groups = append(groups, byte(g), byte(g>>8), 0, 0) // at most 65535, see lookup
	}
	t.call("set groups", unix.SYS_SETGROUPS, num(len(who.Groups)), t.bytes(groups))
	t.call("set group", unix.SYS_SETRESGID, num(who.GID), num(who.GID), num(who.GID))
	t.call("set user", unix.SYS_SETRESUID, num(who.UID), num(who.UID), num(who.UID))
	t.call("set umask", unix.SYS_UMASK, num(0o022))
	return nil
}

// capabilities that the container's programs may have.
func (c *container) capabilities() (uint64, error) {
	names, err := Capabilities(c.spec.CapAdd, c.spec.CapDrop)
	if err != nil {
		return 0, err
	}
	return capMask(names)
}

// confine is the last thing before execve: no core files, no new privileges,
// no descriptors, the seccomp filter.
func (c *container) confine(t *tape) error {
	t.call("forbid core files", unix.SYS_SETRLIMIT, num(unix.RLIMIT_CORE), t.words(num(0), num(0)))
	t.call("close descriptors on exec", unix.SYS_CLOSE_RANGE, num(3), num(^uint32(0)), num(unix.CLOSE_RANGE_CLOEXEC))
	t.call("forbid new privileges", unix.SYS_PRCTL, num(unix.PR_SET_NO_NEW_PRIVS), num(1), num(0), num(0), num(0))
	if c.spec.Seccomp == "unconfined" {
		return nil
	}
	prog, err := c.n.filter(c.spec.CapAdd, c.spec.CapDrop)
	if err != nil {
		return err
	}
	// struct sock_fprog: the number of instructions, and where they are.
	fprog := t.words(num(len(prog)/8), t.bytes(prog))
	t.call("set seccomp filter", unix.SYS_SECCOMP, num(unix.SECCOMP_SET_MODE_FILTER), num(0), fprog)
	return nil
}

// filter is the compiled default profile for a capability set.
func (n *Native) filter(add, drop []string) ([]byte, error) {
	key := strings.Join(add, ",") + "-" + strings.Join(drop, ",")
	if f, ok := n.filters.Load(key); ok {
		return f.([]byte), nil //nolint:forcetypeassert // only these are stored
	}
	caps, err := Capabilities(add, drop)
	if err != nil {
		return nil, err
	}
	profile, err := SeccompProfile(caps)
	if err != nil {
		return nil, err
	}
	f, err := compileSeccomp(profile)
	if err != nil {
		return nil, err
	}
	n.filters.Store(key, f)
	return f, nil
}

// explain turns the failure of a tape into a sentence for its user.
func (c *container) explain(err error) error {
	e, ok := errors.AsType[*callError](err)
	switch {
	case errors.Is(err, errTapeFull):
		return &fleet.Error{Op: "start", Subject: string(c.spec.ID), Kind: fleet.ErrInvalid, Err: err, Hint: "shorten env, entrypoint or command: pass large values in a file on a volume"}
	case !ok || !strings.HasPrefix(e.op, "execute ") && !strings.HasPrefix(e.op, "enter working"):
		return fmt.Errorf("start %s: %w", c.spec.ID, err)
	}
	hint := "look into the image with fastcontainer run IMAGE ls -l"
	switch e.errno {
	case unix.ENOENT:
		hint = "the program exists, but its interpreter (the #! line, or the dynamic loader) does not: is it made for this image's libc?"
		if strings.HasPrefix(e.op, "enter working") {
			hint = "set workdir to a directory of the image"
		}
	case unix.ENOEXEC:
		hint = "it is neither a program for this machine's architecture nor a script that begins with #!"
	case unix.EACCES:
		hint = "the user it runs as may not execute or enter it"
	}
	return &fleet.Error{Op: "start", Subject: string(c.spec.ID), Kind: fleet.ErrInvalid, Err: err, Hint: hint}
}

func (c *container) ID() fleet.InstanceID  { return c.spec.ID }
func (c *container) PID() int              { return c.p.machine.pid }
func (c *container) Address() netip.Addr   { return c.p.link.Address }
func (c *container) Timings() Timings      { return c.timings }
func (c *container) Done() <-chan struct{} { return c.done }
func (c *container) Exit() Exit            { return c.exit }

func (c *container) State() json.RawMessage {
	raw, err := json.Marshal(state{
		ID: c.spec.ID, Name: c.p.name, PID: c.p.machine.pid, Started: c.started,
		UIDBase: c.p.uids.base, UIDSize: c.p.uids.size, Link: c.p.link,
		Log: c.spec.Log, LogMax: c.spec.LogMax, Dir: c.spec.Dir, User: c.spec.User,
		Seccomp: c.spec.Seccomp, CapAdd: c.spec.CapAdd, CapDrop: c.spec.CapDrop,
	})
	if err != nil { // cannot happen: every field is plain
		c.n.log.Error("encode container state", "instance", c.spec.ID, "error", err)
	}
	return raw
}

func (c *container) Signal(sig os.Signal) error {
	s, ok := sig.(syscall.Signal)
	if !ok {
		return fmt.Errorf("signal %v: not a system signal", sig)
	}
	select {
	case <-c.p.ended:
		return os.ErrProcessDone
	default:
	}
	pidfd, err := unix.PidfdOpen(c.p.machine.pid, 0)
	if err != nil {
		return os.ErrProcessDone
	}
	defer func() { _ = unix.Close(pidfd) }()
	if started, err := startTime(c.p.machine.pid); err != nil || started != c.started {
		return os.ErrProcessDone
	}
	if err := unix.PidfdSendSignal(pidfd, s, nil, 0); err != nil {
		return fmt.Errorf("signal %s: %w", c.spec.ID, err)
	}
	return nil
}

func (c *container) Kill() error { return c.p.group.Kill() }

func (c *container) Resize(l Limits) error {
	err := c.p.group.Set(l.Cgroup())
	if err != nil {
		return fmt.Errorf("resize %s: %w", c.spec.ID, err)
	}
	return nil
}

func (c *container) Stats() (Stats, error) {
	s, err := c.p.group.Stats()
	return Stats{
		CPUTime: s.CPUTime, Throttled: s.Throttled, Periods: s.Periods, ThrottledPers: s.ThrottledPeriods,
		Memory: fleet.Bytes(s.Memory), MemoryPeak: fleet.Bytes(s.MemoryPeak), PIDs: s.PIDs, OOMKills: s.OOMKills,
	}, err
}

// CPU implements Sandbox.
func (c *container) CPU() (Stats, error) {
	s, err := c.p.group.CPU()
	return Stats{CPUTime: s.CPUTime, Throttled: s.Throttled, Periods: s.Periods, ThrottledPers: s.ThrottledPeriods}, err
}

// Alarm implements Sandbox.
func (c *container) Alarm(at fleet.Bytes, f func()) (func(), error) {
	return c.p.group.Alarm(int64(at), f)
}

// freezing is the longest that a container may take to stand still.
const freezing = 2 * time.Second

// Freeze implements Freezer.
func (c *container) Freeze(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, freezing)
	defer cancel()
	if err := c.p.group.Freeze(ctx, true); err != nil {
		return fmt.Errorf("freeze %s: %w", c.spec.ID, err)
	}
	return nil
}

// Thaw implements Freezer.
func (c *container) Thaw() error {
	ctx, cancel := context.WithTimeout(context.Background(), freezing)
	defer cancel()
	if err := c.p.group.Freeze(ctx, false); err != nil {
		return fmt.Errorf("thaw %s: %w", c.spec.ID, err)
	}
	return nil
}

// Reclaim implements Freezer.
func (c *container) Reclaim() error { return c.p.group.Reclaim() }

// Destroy implements Sandbox.
func (c *container) Destroy(ctx context.Context) error {
	c.destroy.Lock()
	defer c.destroy.Unlock()
	c.n.logs.forget(c.spec.Log)
	c.asking.Lock()
	c.p.mute()
	c.asking.Unlock()
	err := c.n.remove(ctx, c.p.name, c.p.group, c.p.link, c.p.uids, true, c.p.ended)
	if err != nil {
		return fmt.Errorf("destroy %s: %w", c.spec.ID, err)
	}
	// A second call must neither give the address nor the ids away again.
	c.p.link, c.p.uids = Link{}, uidRange{}
	<-c.done
	return nil
}

// startTime is field 22 of /proc/PID/stat: when the process started, in clock
// ticks since boot. With the pid it names a process for good.
func startTime(pid int) (uint64, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, err
	}
	// The second field is the program's name in parentheses and may hold anything.
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return 0, fmt.Errorf("read start time of process %d: no name", pid)
	}
	fields := strings.Fields(string(b[i+1:]))
	if len(fields) < 20 {
		return 0, fmt.Errorf("read start time of process %d: too few fields", pid)
	}
	return strconv.ParseUint(fields[19], 10, 64)
}
