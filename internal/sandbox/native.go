package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/sandbox/cgroup"
)

// Network connects the network namespaces of sandboxes.
type Network interface {
	// Attach connects a namespace, given as a descriptor, under a name that is
	// unique on the host.
	Attach(ctx context.Context, name string, netns int) (Link, error)
	// Detach ends it. It may be repeated.
	Detach(ctx context.Context, l Link) error
	// Adopt takes over a link that an earlier process made.
	Adopt(l Link) error
	// Clean removes every link whose name is not in keep, and names them.
	Clean(ctx context.Context, keep []string) ([]string, error)
	// ResolvConf is the content of /etc/resolv.conf inside.
	ResolvConf() []byte
}

// Link is a sandbox's connection to the network.
type Link struct {
	Name    string     `json:"name"`
	Address netip.Addr `json:"address"`
	// State is the network's own.
	State json.RawMessage `json:"state,omitempty"`
}

// Config of the native runtime. It is one daemon's: two daemons on one host
// need different Cgroup paths, uid ranges and networks.
type Config struct {
	Logger *slog.Logger
	// Cgroup is the path of the group under which containers live, below
	// the cgroup mount points. Default "/fastcontainer".
	Cgroup string
	// UIDBase and UIDCount: sandbox i has the host ids UIDBase+65536*i and up.
	// Default 536870912 and 16384.
	UIDBase, UIDCount uint32
	// Network; nil: containers have loopback only.
	Network Network
	// Pool is the least number of sandboxes prepared ahead; twice the starts
	// of the last second are kept if that is more, up to PoolMax.
	// Default 4 and 64. A negative Pool prepares none ahead.
	Pool, PoolMax int
	// CRIU is the program that saves and restores processes, as a name or a
	// path; "": there are no checkpoints.
	CRIU string
}

// Native is the runtime of this package's own: see the package comment.
type Native struct {
	log     *slog.Logger
	saver   *saver
	cgroups *cgroup.Root
	uids    *uidRanges
	network Network
	reaper  *reaper
	logs    *logKeeper
	program *os.File
	// mother is the machine that all others are born from; one fork at a time.
	mother     *machine
	motherGone <-chan struct{} // closed once it was waited for
	spawning   sync.Mutex
	// workshop is where root filesystems are put together on kernels that
	// cannot do so with descriptors alone; nil on others.
	workshop    *stage
	overlayByFD bool
	pool        *pool
	usual       atomic.Pointer[usual] // nil before the first start
	// background is what goes on after a start, off its path.
	background sync.WaitGroup
	// allCaps are this kernel's capabilities, usualCaps what containers get.
	allCaps, usualCaps uint64
	// filters are compiled seccomp programs by capability set.
	filters sync.Map

	mu sync.Mutex
	// names are the sandboxes of this daemon, from before they exist until
	// nothing is left of them; whatever else is found on the host is an orphan.
	names map[string]bool
}

// destroyTimeout bounds the wait for killed processes to be gone.
const destroyTimeout = 20 * time.Second

// Open makes the native runtime ready: it builds the init program, makes the
// root cgroup, and ends what an earlier daemon left that writes checkpoints.
// Sandboxes are prepared ahead from the first Clean or Start on: what is to be
// adopted must have its addresses and uids first.
func Open(ctx context.Context, c Config) (*Native, error) {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Cgroup == "" {
		c.Cgroup = "/fastcontainer"
	}
	if c.UIDBase == 0 {
		c.UIDBase, c.UIDCount = 536870912, 16384
	}
	if c.Pool == 0 {
		c.Pool = 4
	}
	if c.PoolMax == 0 {
		c.PoolMax = 64
	}
	n := &Native{
		log: c.Logger, network: c.Network, uids: newUIDRanges(c.UIDBase, c.UIDCount),
		allCaps: 2<<lastCap() - 1, names: map[string]bool{},
	}
	var err error
	defer func() {
		if err != nil {
			_ = n.Close()
		}
	}()
	if n.usualCaps, err = capMask(defaultCaps); err != nil {
		return nil, err
	}
	if n.cgroups, err = cgroup.Open(c.Cgroup); err != nil {
		return nil, err
	}
	ending, cancel := context.WithTimeout(ctx, destroyTimeout)
	defer cancel()
	if eerr := n.endSavers(ending); eerr != nil {
		n.log.Warn("end CRIU of an earlier daemon", "error", eerr)
	}
	if n.reaper, err = newReaper(c.Logger); err != nil {
		return nil, err
	}
	if n.logs, err = newLogKeeper(c.Logger); err != nil {
		return nil, err
	}
	if n.program, err = newInitProgram(); err != nil {
		return nil, err
	}
	if n.mother, n.motherGone, err = n.newMother(); err != nil {
		return nil, err
	}
	if n.overlayByFD = canOverlayByFD(); !n.overlayByFD {
		if n.workshop, err = newWorkshop(); err != nil {
			return nil, err
		}
	}
	n.pool = newPool(n, c.Pool, c.PoolMax)
	n.saver = newSaver(c.CRIU)
	return n, nil
}

// newWorkshop opens a stage with a place to mount on for each of its threads.
func newWorkshop() (*stage, error) {
	threads := min(max(2, runtime.NumCPU()), 16)
	s, err := newStage(threads, func() error {
		for i := range threads {
			if err := mkdirs("slot" + strconv.Itoa(i)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("open workshop: %w", err)
	}
	return s, nil
}

// newMother starts a first machine inside the cradle. The channel is closed
// once it has ended and was waited for.
func (n *Native) newMother() (*machine, <-chan struct{}, error) {
	var mother *machine
	cradle, err := newStage(1, setupCradle)
	if err != nil {
		return nil, nil, fmt.Errorf("open cradle: %w", err)
	}
	defer cradle.close()
	err = cradle.do(func(int) (err error) {
		mother, err = startMachine(n.program)
		return err
	}, nil)
	if err != nil {
		return nil, nil, err
	}
	pidfd, err := unix.PidfdOpen(mother.pid, 0)
	if err != nil {
		mother.close()
		return nil, nil, fmt.Errorf("watch init program: %w", err)
	}
	gone := make(chan struct{})
	if err := n.reaper.watch(pidfd, func(status, bool) { close(gone) }); err != nil {
		mother.close()
		return nil, nil, err
	}
	return mother, gone, nil
}

// closeMother ends the first machine, if there is one, and waits for its end.
func (n *Native) closeMother() {
	if n.mother == nil {
		return
	}
	n.mother.close()
	select {
	case <-n.motherGone:
	case <-time.After(forkTimeout): // it hangs in the kernel
	}
	n.mother = nil
}

// Check reports why containers cannot run on this host.
func (n *Native) Check() error { return nil }

// Memory that all of its containers use, without what the kernel would take
// back at once.
func (n *Native) Memory() (fleet.Bytes, error) {
	m, err := n.cgroups.Memory()
	return fleet.Bytes(m), err
}

// Close ends what was prepared ahead. Containers go on.
func (n *Native) Close() error {
	if n.pool != nil {
		n.pool.close()
	}
	if n.saver != nil {
		n.saver.close()
	}
	n.background.Wait()
	n.closeMother()
	if n.workshop != nil {
		n.workshop.close()
	}
	if n.logs != nil {
		n.logs.close()
	}
	if n.reaper != nil {
		n.reaper.close()
	}
	if n.program != nil {
		_ = n.program.Close()
	}
	return nil
}

// Start implements Runtime.
func (n *Native) Start(ctx context.Context, spec Spec) (Sandbox, error) {
	c, claimed, err := n.claim(ctx, spec)
	if err != nil {
		return nil, err
	}
	if err := c.become(ctx, claimed); err != nil {
		return nil, errors.Join(err, n.discard(c.p))
	}
	n.letGo(c.p)
	n.keep(c)
	return c, nil
}

// claim takes a prepared sandbox for a container that does not run yet.
func (n *Native) claim(ctx context.Context, spec Spec) (*container, time.Time, error) {
	began := time.Now()
	if err := validate(&spec); err != nil {
		return nil, began, err
	}
	c := &container{n: n, spec: spec, done: make(chan struct{})}
	caps, err := c.capabilities()
	if err != nil {
		return nil, began, err
	}
	if spec.UserNS && caps&^n.usualCaps == 0 {
		c.p, err = n.pool.take(ctx)
	} else { // too rare to be prepared ahead
		c.p, err = n.prepare(ctx, spec.UserNS, caps|n.usualCaps)
	}
	claimed := time.Now()
	c.timings.Claim = claimed.Sub(began)
	return c, claimed, err
}

// own enters a sandbox in the books.
func (n *Native) own(name string) {
	n.mu.Lock()
	n.names[name] = true
	n.mu.Unlock()
}

// keep begins what goes on beside a running container.
func (n *Native) keep(c *container) {
	if c.spec.Log != "" && c.spec.Stdio == nil {
		n.logs.watch(c.spec.Log, int64(c.spec.LogMax))
	}
}

func validate(spec *Spec) error {
	if len(spec.Args) == 0 || spec.Args[0] == "" {
		return &fleet.Error{
			Op: "start", Subject: string(spec.ID), Kind: fleet.ErrInvalid,
			Err:  errors.New("there is no program to run"),
			Hint: "the image has neither entrypoint nor command: set entrypoint or command in the app file",
		}
	}
	for _, s := range slices.Concat(spec.Args, spec.Env, []string{spec.Dir, spec.Hostname}) {
		if slices.Contains([]byte(s), 0) {
			return &fleet.Error{Op: "start", Subject: string(spec.ID), Kind: fleet.ErrInvalid, Err: errors.New("an argument or variable holds a NUL byte")}
		}
	}
	if spec.Seccomp != "" && spec.Seccomp != "default" && spec.Seccomp != "unconfined" {
		return &fleet.Error{Op: "start", Subject: string(spec.ID), Kind: fleet.ErrInvalid, Err: fmt.Errorf("seccomp %q", spec.Seccomp), Hint: "use default or unconfined"}
	}
	return nil
}

// remove ends everything that belongs to a sandbox, in the order in which
// nothing can come back: processes, cgroup, address, uid range.
func (n *Native) remove(ctx context.Context, name string, g *cgroup.Group, link Link, uids uidRange, born bool, ended <-chan struct{}) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), destroyTimeout)
	defer cancel()
	errs := []error{g.Remove(ctx)}
	if born {
		select {
		case <-ended:
		case <-ctx.Done():
			errs = append(errs, fmt.Errorf("sandbox %s: its first process does not end", name))
		}
	}
	if n.network != nil && link.Name != "" {
		errs = append(errs, n.network.Detach(ctx, link))
	}
	n.uids.free(uids)
	err := errors.Join(errs...)
	if err == nil {
		n.mu.Lock()
		delete(n.names, name)
		n.mu.Unlock()
	}
	return err
}

// state is what Adopt needs to know.
type state struct {
	ID      fleet.InstanceID `json:"id"`
	Name    string           `json:"name"`
	PID     int              `json:"pid"`
	Started uint64           `json:"started"` // the process's start time in clock ticks: pids come again
	UIDBase uint32           `json:"uid_base"`
	UIDSize uint32           `json:"uid_size"`
	Link    Link             `json:"link"`
	Log     string           `json:"log,omitempty"`
	LogMax  fleet.Bytes      `json:"log_max,omitempty"`
	Dir     string           `json:"dir,omitempty"`
	User    string           `json:"user,omitempty"`
	Seccomp string           `json:"seccomp,omitempty"`
	CapAdd  []string         `json:"cap_add,omitempty"`
	CapDrop []string         `json:"cap_drop,omitempty"`
}

// Adopt implements Runtime.
func (n *Native) Adopt(ctx context.Context, raw json.RawMessage) (Sandbox, error) {
	var s state
	if err := json.Unmarshal(raw, &s); err != nil {
		return nil, fmt.Errorf("adopt container: %w", err)
	}
	p := &prepared{
		name: s.Name, group: n.cgroups.Group(s.Name), link: s.Link, ended: make(chan struct{}),
		machine: &machine{pid: s.PID}, uids: uidRange{base: s.UIDBase, size: s.UIDSize},
	}
	n.own(s.Name)
	n.uids.adopt(p.uids)
	if n.network != nil && s.Link.Name != "" {
		if err := n.network.Adopt(s.Link); err != nil {
			return nil, fmt.Errorf("adopt container: %w", err)
		}
	}
	c := &container{n: n, p: p, done: make(chan struct{}), spec: Spec{
		ID: s.ID, App: s.ID.App(), Log: s.Log, LogMax: s.LogMax, Dir: s.Dir, User: s.User,
		UserNS: s.UIDSize > 0, Seccomp: s.Seccomp, CapAdd: s.CapAdd, CapDrop: s.CapDrop,
	}}
	gone := func() (Sandbox, error) {
		close(p.ended)
		return nil, errors.Join(ErrGone, n.remove(ctx, s.Name, p.group, s.Link, p.uids, false, p.ended))
	}
	pidfd, err := unix.PidfdOpen(s.PID, 0)
	if err != nil {
		return gone()
	}
	// Only now the number cannot be reused any more: look whose it is.
	if started, err := startTime(s.PID); err != nil || started != s.Started {
		_ = unix.Close(pidfd)
		return gone()
	}
	if poll := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}; pollNow(poll) { //nolint:gosec // a descriptor
		_, _ = collect(pidfd) // it has ended, and nobody took notice
		_ = unix.Close(pidfd)
		return gone()
	}
	c.started = s.Started
	p.whenEnded(c.finish)
	if err := n.reaper.watch(pidfd, p.end); err != nil {
		_ = unix.Close(pidfd)
		return nil, fmt.Errorf("adopt container: %w", err)
	}
	n.keep(c)
	return c, nil
}

// pollNow tells whether a descriptor is ready at this moment.
func pollNow(fds []unix.PollFd) bool {
	n, err := unix.Poll(fds, 0)
	return err == nil && n > 0
}

// reapAll waits for the processes of a group, which are about to be killed, in
// the background: they may be children of this process.
func (n *Native) reapAll(g *cgroup.Group) {
	pids, err := g.Processes()
	if err != nil {
		return
	}
	for _, pid := range pids {
		pidfd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue
		}
		if n.reaper.watch(pidfd, func(status, bool) {}) != nil {
			_ = unix.Close(pidfd)
		}
	}
}

// Clean implements Runtime: whatever lies under the root cgroup or on the
// network and was neither adopted nor made by this daemon is removed. So what
// is to be kept must have been adopted before.
func (n *Native) Clean(ctx context.Context, _ []fleet.InstanceID) ([]string, error) {
	n.mu.Lock()
	names := slices.Collect(maps.Keys(n.names))
	n.mu.Unlock()
	groups, err := n.cgroups.List()
	errs := []error{err}
	var removed []string
	for _, name := range groups {
		if slices.Contains(names, name) {
			continue
		}
		g := n.cgroups.Group(name)
		n.reapAll(g)
		if err := g.Remove(ctx); err != nil {
			errs = append(errs, err)
			continue
		}
		removed = append(removed, name)
	}
	defer n.pool.open()
	if n.network != nil {
		links, err := n.network.Clean(ctx, names)
		errs = append(errs, err)
		for _, l := range links {
			if !slices.Contains(removed, l) {
				removed = append(removed, l)
			}
		}
	}
	return removed, errors.Join(errs...)
}
