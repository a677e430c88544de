// Package node owns this machine's instances: it starts them from a revision
// and its image, finds out when they are ready, watches them, stops them by
// the ladder of their stop signal, and takes over those that an earlier daemon
// left. It is the only truth about them.
//
// It decides nothing: which instances there should be is control's affair.
package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/fastcontainer/fastcontainer/internal/checkpoint"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/homeostat"
	"github.com/fastcontainer/fastcontainer/internal/image"
	"github.com/fastcontainer/fastcontainer/internal/sandbox"
)

// Images is what a node needs of the image store.
type Images interface {
	// Get gives an image that is whole on this node's disk.
	Get(fleet.Digest) (image.Image, error)
	// Hold keeps an image from being removed until release.
	Hold(fleet.Digest) (release func(), err error)
}

// Config of a node.
type Config struct {
	Name     fleet.NodeName
	Runtimes map[fleet.Runtime]sandbox.Runtime
	Images   Images
	// RunDir keeps what a new daemon needs to adopt the instances; LogDir their
	// logs, VolumeDir the named volumes.
	RunDir, LogDir, VolumeDir string
	// Checkpoints keeps saved processes; nil: none are.
	Checkpoints *checkpoint.Store
	Logger      *slog.Logger
	// Events is told what happens.
	Events func(fleet.Event)
	// Registerer of metrics; may be nil.
	Registerer prometheus.Registerer
	// Gone is called when a ready instance ended by itself. It must not block.
	Gone func(*Instance)
	// Pressed is called when an instance's memory comes near its limit, which
	// is below its peak; it may Resize. May be nil.
	Pressed func(*Instance)
	// Control, if any, is that of the net.Dialer for connections to instances.
	Control func(network, address string, c syscall.RawConn) error
	// Memory and CPU that all instances together may use; 0: the machine's.
	Memory fleet.Bytes
	CPU    float64
	// Used is the memory that they use; may be nil.
	Used func() (fleet.Bytes, error)
}

// Node is this machine's instances.
type Node struct {
	cfg     Config
	metrics *metrics
	closing chan struct{}
	watches sync.WaitGroup
	probing atomic.Int64 // starts that wait for their port
	vitals  *vitals
	alarms  sync.Once     // says that there are none
	saves   chan struct{} // has room for the checkpoints that may be made at once

	mu        sync.Mutex
	instances map[fleet.InstanceID]*Instance
	saving    map[fleet.InstanceID]bool // are started to be saved, and no instances
	unroomed  time.Time                 // when there was no room for a checkpoint
	pauses    map[string]pause          // by the checkpoint's key
}

// New makes a node. The directories are made if they do not exist.
func New(c Config) (*Node, error) {
	for _, dir := range []string{c.RunDir, c.LogDir, c.VolumeDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("make directory of the node: %w", err)
		}
	}
	n := &Node{cfg: c, closing: make(chan struct{}), saves: make(chan struct{}, mostSaves), vitals: newVitals(c), instances: map[fleet.InstanceID]*Instance{}, saving: map[fleet.InstanceID]bool{}, pauses: map[string]pause{}}
	var err error
	if n.metrics, err = newMetrics(c.Registerer, n); err != nil {
		return nil, err
	}
	return n, nil
}

// Instance is one container on this node.
type Instance struct {
	node    *Node
	rev     fleet.Revision
	box     sandbox.Sandbox
	release func() // of the image
	end     sync.Once
	log     string
	saved   string // the key of the checkpoint that it was restored from

	sizing  sync.Mutex // one Resize, Freeze or Thaw at a time
	frozen  bool       // when it was stopped
	mu      sync.Mutex
	info    fleet.Instance
	limits  sandbox.Limits
	stopped chan struct{} // closed when nothing is left of it
	// readyAt with its monotonic part: clocks may jump.
	readyAt time.Time
	// dialed is the connection that found it ready, until somebody takes it.
	dialed atomic.Pointer[net.Conn]

	// arming is held while the memory alarm is turned on or off, which may take
	// the kernel some ms: nobody who waits for the instance waits for it.
	arming sync.Mutex
	disarm func() // nil: the alarm is off
}

// Info is a copy of what is known about the instance.
func (i *Instance) Info() fleet.Instance {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.info
}

// Revision that the instance was made from.
func (i *Instance) Revision() fleet.Revision { return i.rev }

// Done is closed when its first process has ended.
func (i *Instance) Done() <-chan struct{} { return i.box.Done() }

// Ready tells when it became ready, by a clock that does not jump.
func (i *Instance) Ready() time.Time { return i.readyAt }

// Limits that are in force.
func (i *Instance) Limits() sandbox.Limits {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.limits
}

// Stats reads its cgroup.
func (i *Instance) Stats() (sandbox.Stats, error) { return i.box.Stats() }

// become notes what kind of start it was.
func (i *Instance) become(k fleet.StartKind) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.info.Kind = k
}

// move changes its state, or says that it may not.
func (i *Instance) move(to fleet.State) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	state, err := i.info.State.Move(to)
	i.info.State = state
	return err
}

// CPU reads what its cgroup says about the processor.
func (i *Instance) CPU() (sandbox.Stats, error) { return i.box.CPU() }

// OutOfMemory tells of an instance that has ended whether that was why.
func (i *Instance) OutOfMemory() bool {
	select {
	case <-i.box.Done():
		return i.box.Exit().OOM
	default:
		return false
	}
}

// Order is a start that somebody wants.
type Order struct {
	Revision fleet.Revision
	// Kind is CheckpointStart if saved processes may be restored. Where there
	// are none, or they are of no use, the start is a cold one.
	Kind fleet.StartKind
	// Cause and the numbers behind it.
	Cause  string
	Inputs map[string]float64
	// Stages hold what is known of the start so far and get the rest.
	Stages *fleet.Stages
	// Limits once it is ready; a zero stands for what the revision has at rest.
	Limits sandbox.Limits
}

// Start makes an instance and returns when it is ready; the caller makes the
// ready event of the order's stages. If ctx ends the start is given up and
// nothing is left.
func (n *Node) Start(ctx context.Context, o Order) (*Instance, error) {
	rev := o.Revision
	id := fleet.NewInstanceID(rev.App)
	i := &Instance{
		node: n, rev: rev, stopped: make(chan struct{}), release: func() {}, limits: o.Limits.Over(atRest(rev.Spec.Resources)),
		info: fleet.Instance{
			ID: id, App: rev.App, Revision: rev.ID, Image: rev.Image, Node: n.cfg.Name,
			State: fleet.StateStarting, Kind: fleet.ColdStart, StartedAt: time.Now(),
		},
	}
	e := n.newEvent(i, fleet.EventStart, o.Cause)
	e.Inputs = o.Inputs
	n.cfg.Events(e)
	n.mu.Lock()
	n.instances[id] = i
	n.mu.Unlock()
	err := n.start(ctx, i, o.Kind, o.Stages)
	n.metrics.started(err, o.Stages, i.Info().Kind)
	if err != nil {
		n.report(i, "start failed", err)
		_ = n.remove(context.Background(), i) // logged
		return nil, err
	}
	return i, nil
}

func (n *Node) start(ctx context.Context, i *Instance, kind fleet.StartKind, stages *fleet.Stages) error {
	spec := i.rev.Spec
	rt, ok := n.cfg.Runtimes[spec.Isolation.Runtime]
	if !ok {
		return &fleet.Error{Op: "start", Subject: string(i.rev.App), Kind: fleet.ErrInvalid, Err: fmt.Errorf("runtime %q is not available on this node", spec.Isolation.Runtime), Hint: "fastcontainer doctor says what is missing"}
	}
	img, err := n.cfg.Images.Get(i.rev.Image)
	if err != nil {
		return fmt.Errorf("start: %w", err)
	}
	if i.release, err = n.cfg.Images.Hold(i.rev.Image); err != nil {
		i.release = func() {}
		return fmt.Errorf("start: %w", err)
	}
	want, err := n.sandboxSpec(i.info.ID, i.rev, img)
	if err != nil {
		return err
	}
	i.log = want.Log
	// A start may use all that it will ever be given: it is soon over, and
	// somebody waits for it.
	resting := i.Limits()
	want.Limits = resting
	want.Limits.CPU = max(resting.CPU, spec.Resources.CPU.Peak)
	want.Limits.Memory = max(resting.Memory, spec.Resources.Memory.Peak)
	ctx, cancel := context.WithTimeoutCause(ctx, spec.Ready.Timeout.Std(), errNotReady)
	defer cancel()
	if kind == fleet.CheckpointStart {
		if err := n.restore(ctx, i, want, stages); err != nil {
			return err
		}
	}
	if i.box == nil {
		if i.box, err = rt.Start(ctx, want); err != nil {
			return err
		}
		if err := n.settle(ctx, i, stages); err != nil {
			return err
		}
	}
	if resting != want.Limits {
		resting = n.rest(i, resting, want.Limits)
	}
	i.mu.Lock()
	i.limits = resting
	i.readyAt = time.Now()
	i.info.ReadyAt = i.readyAt
	if l := homeostat.Lifetime(homeostat.Policy{Lifetime: spec.Lifetime.Std()}, rand.Float64()); l > 0 { //nolint:gosec // spread, not secrecy
		i.info.ExpiresAt = i.readyAt.Add(l)
	}
	i.mu.Unlock()
	if err := i.move(fleet.StateReady); err != nil {
		return err
	}
	n.note(i)
	n.watch(i)
	return nil
}

// note writes a ready instance's state down and turns its memory alarm on.
// Somebody waits for the instance, not for this, so it goes on beside. A daemon
// that is killed before it is done leaves an instance that the next one removes,
// as any that it killed while it was starting it.
func (n *Node) note(i *Instance) {
	n.watches.Go(func() {
		i.sizing.Lock()
		defer i.sizing.Unlock()
		if i.Info().State != fleet.StateReady {
			return
		}
		if err := n.save(i); err != nil {
			n.cfg.Logger.Warn("a new daemon would not know the instance", "instance", i.info.ID, "error", err)
		}
		n.arm(i)
	})
}

// settle takes note of where an instance runs, and waits until it is ready.
func (n *Node) settle(ctx context.Context, i *Instance, stages *fleet.Stages) error {
	t := i.box.Timings()
	stages.Claim, stages.Rootfs = t.Claim.Microseconds(), t.Rootfs.Microseconds()
	stages.Network, stages.Exec = t.Network.Microseconds(), t.Exec.Microseconds()
	i.mu.Lock()
	i.info.PID = i.box.PID()
	i.info.Address = addrPort(i.box.Address(), i.rev.Spec.Port)
	i.mu.Unlock()
	executed := time.Now()
	if err := i.awaitReady(ctx); err != nil {
		return err
	}
	stages.Listen = time.Since(executed).Microseconds()
	return nil
}

// rest takes from a ready instance what it had for its start alone, but leaves
// it the memory that it uses, with air. It returns what is in force.
func (n *Node) rest(i *Instance, rest, now sandbox.Limits) sandbox.Limits {
	if now.Memory > rest.Memory {
		if s, err := i.box.Stats(); err == nil && s.Memory > rest.Memory-rest.Memory/8 {
			rest.Memory = min(s.Memory+s.Memory/4, now.Memory)
		}
	}
	err := i.box.Resize(rest)
	if err == nil {
		return rest
	}
	n.cfg.Logger.Warn("return to rest", "instance", i.info.ID, "error", err)
	return now
}

// watch reports the end of a ready instance that nobody asked for.
func (n *Node) watch(i *Instance) {
	n.watches.Go(func() {
		select {
		case <-n.closing:
			return
		case <-i.box.Done():
		}
		i.mu.Lock()
		expected := i.info.State != fleet.StateReady && i.info.State != fleet.StateStandby
		i.mu.Unlock()
		if expected {
			return
		}
		cause := "ended by itself"
		if i.box.Exit().OOM {
			cause = "killed for lack of memory"
		}
		n.report(i, cause, exitError(i.box.Exit()))
		if n.cfg.Gone != nil {
			n.cfg.Gone(i)
		}
		_ = n.remove(context.Background(), i) // logged
	})
}

// Close ends the watching. The instances go on: the next daemon adopts them.
func (n *Node) Close() {
	close(n.closing)
	n.watches.Wait()
}

// report tells why an instance could not start or ended by itself, with the
// last it said.
func (n *Node) report(i *Instance, cause string, err error) {
	_ = i.move(fleet.StateFailed)
	e := n.newEvent(i, fleet.EventFail, cause)
	e.Detail = withHint(err)
	e.Log = tailLines(i.log, 20, 4<<10)
	n.cfg.Events(e)
}

// Stop ends an instance by its ladder: its stop signal, at most drain, then
// SIGKILL; nothing is left of it when Stop returns. The caller has taken it out
// of the route before and waited for what was in flight.
func (n *Node) Stop(ctx context.Context, i *Instance, cause string) error {
	i.hangUp()      // a server that ends in good order waits for its connections
	i.sizing.Lock() // it may be about to be frozen
	i.frozen = i.Info().State == fleet.StateStandby
	i.sizing.Unlock()
	if err := i.move(fleet.StateRetiring); err != nil {
		<-i.stopped // somebody else is at it, or it failed
		return nil  //nolint:nilerr // it is over either way
	}
	sig := stopSignal(i.rev.Spec.StopSignal)
	if img, err := n.cfg.Images.Get(i.rev.Image); err == nil && i.rev.Spec.StopSignal == "" {
		sig = stopSignal(img.Config.StopSignal)
	}
	detail := i.obey(ctx, sig)
	err := n.remove(ctx, i)
	n.event(i, fleet.EventStop, cause, detail)
	return err
}

// obey asks the instance to end, and tells what was unusual about it.
func (i *Instance) obey(ctx context.Context, sig syscall.Signal) (detail string) {
	if deaf(i.box.PID(), sig) {
		return fmt.Sprintf("its first process has no handler for %v, so the kernel would not deliver it: killed", sig)
	}
	// A signal that cannot be sent says that somebody else was quicker: the
	// route can notice a death before the one who waits for the process does.
	_ = i.signal(sig)
	grace := time.NewTimer(i.rev.Spec.Drain.Std())
	defer grace.Stop()
	select {
	case <-i.box.Done():
		if x := i.box.Exit(); x.Signal == "SIGKILL" && sig != syscall.SIGKILL {
			return exitError(x).Error()
		}
		return ""
	case <-grace.C:
		return fmt.Sprintf("did not obey %v within %s: killed", sig, i.rev.Spec.Drain)
	case <-ctx.Done():
		return "killed: " + context.Cause(ctx).Error()
	}
}

// signal reaches also a frozen instance, which goes on for it.
func (i *Instance) signal(sig os.Signal) error {
	if f, ok := i.box.(sandbox.Freezer); ok && i.frozen {
		if err := f.Thaw(); err != nil {
			return err
		}
	}
	return i.box.Signal(sig)
}

// remove leaves nothing of an instance. Only its first caller does anything.
func (n *Node) remove(ctx context.Context, i *Instance) (err error) {
	i.end.Do(func() { err = n.removeOnce(ctx, i) })
	return err
}

func (n *Node) removeOnce(ctx context.Context, i *Instance) error {
	var err error
	i.sizing.Lock() // its state may be about to be written
	if i.box != nil {
		// A cgroup that will not go is retried by the next Clean; the instance
		// itself is over.
		if err = i.box.Destroy(ctx); err != nil {
			n.cfg.Logger.Error("destroy instance", "instance", i.info.ID, "error", err)
		}
	}
	if rerr := os.Remove(n.statePath(i.info.ID)); rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
		n.cfg.Logger.Warn("remove instance state", "instance", i.info.ID, "error", rerr)
	}
	i.sizing.Unlock()
	i.release()
	i.hangUp()
	i.quiet()
	_ = i.move(fleet.StateAbsent)
	n.mu.Lock()
	delete(n.instances, i.info.ID)
	n.mu.Unlock()
	n.pruneLogs(i.info.App)
	close(i.stopped)
	return err
}

// List gives the instances in the order of their names.
func (n *Node) List() []*Instance {
	n.mu.Lock()
	defer n.mu.Unlock()
	list := make([]*Instance, 0, len(n.instances))
	for _, i := range n.instances {
		list = append(list, i)
	}
	slices.SortFunc(list, func(a, b *Instance) int { return strings.Compare(string(a.info.ID), string(b.info.ID)) })
	return list
}

// Find gives an instance by name, or the newest ready one of an app.
func (n *Node) Find(name string) (*Instance, error) {
	var best *Instance
	for _, i := range n.List() {
		if string(i.info.ID) == name {
			return i, nil
		}
		if string(i.info.App) == name && i.Info().State == fleet.StateReady && (best == nil || i.readyAt.After(best.readyAt)) {
			best = i
		}
	}
	if best == nil {
		return nil, &fleet.Error{Op: "find instance", Subject: name, Kind: fleet.ErrNotFound, Hint: "fastcontainer ps lists what runs; a request to the app starts one"}
	}
	return best, nil
}

// Gone returns when no instance of an app is left, or ctx ends.
func (n *Node) Gone(ctx context.Context, app fleet.AppName) error {
	for _, i := range n.List() {
		if i.info.App != app {
			continue
		}
		select {
		case <-i.stopped:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// Run runs one program in a container of its own, which gets no requests, and
// returns its exit code. The container ends with ctx.
func (n *Node) Run(ctx context.Context, rev fleet.Revision, streams sandbox.Stdio) (int, error) {
	rt, ok := n.cfg.Runtimes[rev.Spec.Isolation.Runtime]
	if !ok {
		return 0, &fleet.Error{Op: "run", Subject: rev.Spec.Image, Kind: fleet.ErrInvalid, Err: fmt.Errorf("runtime %q is not available on this node", rev.Spec.Isolation.Runtime), Hint: "fastcontainer doctor says what is missing"}
	}
	img, err := n.cfg.Images.Get(rev.Image)
	if err != nil {
		return 0, fmt.Errorf("run: %w", err)
	}
	release, err := n.cfg.Images.Hold(rev.Image)
	if err != nil {
		return 0, fmt.Errorf("run: %w", err)
	}
	defer release()
	want, err := n.sandboxSpec(fleet.NewInstanceID(rev.App), rev, img)
	if err != nil {
		return 0, err
	}
	want.Stdio = &streams
	box, err := rt.Start(ctx, want)
	if err != nil {
		return 0, err
	}
	defer func() {
		if err := box.Destroy(context.WithoutCancel(ctx)); err != nil {
			n.cfg.Logger.Error("destroy container", "container", want.ID, "error", err)
		}
	}()
	select {
	case <-box.Done():
		x := box.Exit()
		if x.OOM {
			return x.Code, exitError(x)
		}
		return x.Code, nil
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
}

// Exec runs a program inside an instance.
func (i *Instance) Exec(ctx context.Context, p sandbox.Process) (int, error) {
	if i.Info().State == fleet.StateStandby {
		return 0, &fleet.Error{Op: "exec", Subject: string(i.info.ID), Kind: fleet.ErrConflict, Err: errors.New("it is frozen"), Hint: "a request to the app thaws it"}
	}
	return i.box.Exec(ctx, p)
}

// Resize changes the limits of a running instance; zeros leave a number as it
// is. The event has the cause and the numbers behind it.
func (n *Node) Resize(i *Instance, l sandbox.Limits, cause string, inputs map[string]float64) error {
	i.sizing.Lock()
	defer i.sizing.Unlock()
	before := i.Limits()
	l = l.Over(before)
	if l == before {
		return nil
	}
	if err := i.box.Resize(l); err != nil {
		return err
	}
	i.mu.Lock()
	i.limits = l
	i.mu.Unlock()
	if l.Memory != before.Memory {
		n.arm(i)
	}
	if i.Info().State == fleet.StateReady {
		if err := n.save(i); err != nil {
			n.cfg.Logger.Warn("save instance", "instance", i.info.ID, "error", err)
		}
	}
	if l.CPU == before.CPU && l.Memory == before.Memory {
		return nil // its weight is nobody's news
	}
	e := n.newEvent(i, fleet.EventResize, cause)
	e.Inputs = inputs
	e.Detail = change("cpu", before.CPU, l.CPU, "%g")
	if d := change("memory", before.Memory, l.Memory, "%s"); d != "" {
		e.Detail = strings.Trim(e.Detail+", "+d, ", ")
	}
	n.cfg.Events(e)
	return nil
}

func change[T comparable](name string, from, to T, format string) string {
	if from == to {
		return ""
	}
	return fmt.Sprintf("%s "+format+" to "+format, name, from, to)
}

// rearm is how long an instance that could not be given more is left alone.
const rearm = time.Second

// arm sets the memory alarm of an instance that could be given more: an eighth
// below its limit.
func (n *Node) arm(i *Instance) {
	if n.cfg.Pressed == nil {
		return
	}
	i.arming.Lock()
	defer i.arming.Unlock()
	i.quietLocked()
	limit := i.Limits().Memory
	if limit <= 0 || limit >= i.rev.Spec.Resources.Memory.Peak || i.Info().State != fleet.StateReady {
		return
	}
	stop, err := i.box.Alarm(limit-max(limit/8, 4<<20), func() { n.ring(i, limit) })
	if err != nil {
		n.alarms.Do(func() {
			n.cfg.Logger.Warn("no memory alarms: an instance gets more memory only when it is looked at", "error", err)
		})
		return
	}
	i.disarm = stop
}

// quiet turns the alarm off.
func (i *Instance) quiet() {
	i.arming.Lock()
	defer i.arming.Unlock()
	i.quietLocked()
}

func (i *Instance) quietLocked() {
	if i.disarm != nil {
		i.disarm()
		i.disarm = nil
	}
}

func (n *Node) ring(i *Instance, limit fleet.Bytes) {
	if s, err := i.box.Stats(); err != nil || s.Memory < limit-limit/4 {
		return // it has fallen
	}
	n.cfg.Pressed(i)
	if i.Limits().Memory > limit {
		return
	}
	i.quiet()
	time.AfterFunc(rearm, func() { n.arm(i) })
}

func (n *Node) newEvent(i *Instance, t fleet.EventType, cause string) fleet.Event {
	return fleet.Event{Time: time.Now(), Type: t, App: i.info.App, Instance: i.info.ID, Revision: i.info.Revision, Node: n.cfg.Name, Cause: cause}
}

func (n *Node) event(i *Instance, t fleet.EventType, cause, detail string) {
	e := n.newEvent(i, t, cause)
	e.Detail = detail
	n.cfg.Events(e)
}

func exitError(x sandbox.Exit) error {
	switch {
	case x.OOM:
		return &fleet.Error{Op: "run", Err: errors.New("killed by the kernel for lack of memory"), Hint: "raise resources.memory, or look for a leak"}
	case x.Signal != "":
		return fmt.Errorf("its program was ended by %s", x.Signal)
	case x.Code < 0:
		return errors.New("its program ended")
	default:
		return fmt.Errorf("its program ended with exit code %d", x.Code)
	}
}

// saved is the content of an instance's state file.
type saved struct {
	Instance fleet.Instance  `json:"instance"`
	Revision fleet.Revision  `json:"revision"`
	Box      json.RawMessage `json:"box"`
	Limits   sandbox.Limits  `json:"limits"`
	Log      string          `json:"log"`
	// Saved is the key of the checkpoint that it was restored from.
	Saved string `json:"saved,omitempty"`
	// ReadyBoot and ExpiresBoot are seconds on the clock that counts from boot
	// and never jumps.
	ReadyBoot   float64 `json:"ready_boot"`
	ExpiresBoot float64 `json:"expires_boot"`
}

func (n *Node) statePath(id fleet.InstanceID) string {
	return filepath.Join(n.cfg.RunDir, string(id)+".json")
}

// save writes what Adopt needs, atomically. The directory is on a tmpfs: what
// a reboot loses is lost with the containers, so nothing is synced.
func (n *Node) save(i *Instance) error {
	now, boot := time.Now(), bootTime()
	s := saved{Instance: i.Info(), Revision: i.rev, Box: i.box.State(), Limits: i.Limits(), Log: i.log, Saved: i.saved, ReadyBoot: boot - now.Sub(i.readyAt).Seconds()}
	s.Revision.Spec.Env = nil // may hold secrets, and is not needed
	if !s.Instance.ExpiresAt.IsZero() {
		s.ExpiresBoot = boot + s.Instance.ExpiresAt.Sub(now).Seconds()
	}
	b, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("save instance: %w", err)
	}
	name := n.statePath(i.info.ID)
	if err := os.WriteFile(name+".tmp", b, 0o600); err != nil {
		return fmt.Errorf("save instance: %w", err)
	}
	if err := os.Rename(name+".tmp", name); err != nil {
		return fmt.Errorf("save instance: %w", err)
	}
	return nil
}

// Adopt takes over what an earlier daemon left: ready instances go on, and
// everything else of it is removed. It is called once, before any Start.
func (n *Node) Adopt(ctx context.Context) ([]*Instance, error) {
	files, err := os.ReadDir(n.cfg.RunDir)
	if err != nil {
		return nil, fmt.Errorf("adopt instances: %w", err)
	}
	var adopted []*Instance
	for _, f := range files {
		path := filepath.Join(n.cfg.RunDir, f.Name())
		i, err := n.adopt(ctx, path)
		if err != nil {
			if !errors.Is(err, sandbox.ErrGone) {
				n.cfg.Logger.Warn("adopt instance", "file", path, "error", err)
			}
			if rerr := os.Remove(path); rerr != nil {
				n.cfg.Logger.Warn("remove instance state", "file", path, "error", rerr)
			}
			continue
		}
		adopted = append(adopted, i)
	}
	keep := make([]fleet.InstanceID, 0, len(adopted))
	for _, i := range adopted {
		keep = append(keep, i.info.ID)
	}
	for name, rt := range n.cfg.Runtimes {
		removed, err := rt.Clean(ctx, keep)
		if err != nil {
			n.cfg.Logger.Warn("clean up", "runtime", name, "error", err)
		}
		if len(removed) > 0 {
			n.cfg.Events(fleet.Event{Time: time.Now(), Type: fleet.EventClean, Node: n.cfg.Name, Cause: "left by an earlier daemon", Detail: strings.Join(removed, ", ")})
		}
	}
	return adopted, nil
}

func (n *Node) adopt(ctx context.Context, path string) (*Instance, error) {
	if filepath.Ext(path) != ".json" {
		return nil, sandbox.ErrGone // written half
	}
	b, err := os.ReadFile(path) //nolint:gosec // our own directory
	if err != nil {
		return nil, err
	}
	var s saved
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, err
	}
	rt, ok := n.cfg.Runtimes[s.Revision.Spec.Isolation.Runtime]
	if !ok {
		return nil, fmt.Errorf("its runtime %q is not available any more", s.Revision.Spec.Isolation.Runtime)
	}
	box, err := rt.Adopt(ctx, s.Box)
	if err != nil {
		if errors.Is(err, sandbox.ErrGone) {
			e := fleet.Event{Time: time.Now(), Type: fleet.EventFail, App: s.Instance.App, Instance: s.Instance.ID, Revision: s.Instance.Revision, Node: n.cfg.Name, Cause: "ended while no daemon ran", Log: tailLines(s.Log, 20, 4<<10)}
			n.cfg.Events(e)
		}
		return nil, err
	}
	i := &Instance{node: n, rev: s.Revision, box: box, log: s.Log, limits: s.Limits, info: s.Instance, saved: s.Saved, stopped: make(chan struct{}), release: func() {}}
	if release, err := n.cfg.Images.Hold(s.Revision.Image); err == nil {
		i.release = release
	}
	if s.Saved != "" && n.cfg.Checkpoints != nil {
		if release, ok := n.cfg.Checkpoints.Hold(s.Instance.App, s.Saved); ok {
			i.release = both(i.release, release)
		}
	}
	now, boot := time.Now(), bootTime()
	i.readyAt = now.Add(-time.Duration((boot - s.ReadyBoot) * float64(time.Second)))
	i.info.StartedAt = i.readyAt.Add(-s.Instance.ReadyAt.Sub(s.Instance.StartedAt))
	i.info.ReadyAt = i.readyAt
	if s.ExpiresBoot > 0 {
		i.info.ExpiresAt = now.Add(time.Duration((s.ExpiresBoot - boot) * float64(time.Second)))
	}
	standby, err := hold(ctx, box, s.Instance.State)
	if err != nil {
		return nil, err
	}
	i.info.State = fleet.StateReady
	if standby {
		i.info.State = fleet.StateStandby
	}
	n.mu.Lock()
	n.instances[i.info.ID] = i
	n.mu.Unlock()
	// The earlier daemon may have ended in the middle of a change.
	if err := box.Resize(s.Limits); err != nil {
		n.cfg.Logger.Warn("set limits of an adopted instance", "instance", i.info.ID, "error", err)
	}
	n.event(i, fleet.EventAdopt, "daemon restarted", "")
	n.arm(i)
	n.watch(i)
	return i, nil
}

// hold makes true what the state file says: the earlier daemon may have ended
// in the middle of a freeze or a thaw.
func hold(ctx context.Context, box sandbox.Sandbox, state fleet.State) (standby bool, err error) {
	f, ok := box.(sandbox.Freezer)
	if !ok {
		return false, nil
	}
	if state == fleet.StateStandby {
		return true, f.Freeze(ctx)
	}
	return false, f.Thaw()
}
