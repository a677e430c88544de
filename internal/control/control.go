// Package control keeps each app at what its requests need: it holds requests
// that find no free slot, asks the homeostat what to do, has the node do it,
// and gives every request its slot. It is also the route table: which host
// belongs to which app.
//
// A warm request takes one lock-free lookup and one short lock of its own app.
// A sleeping app is an entry in a map: no goroutine, no timer, no kernel object.
package control

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/homeostat"
	"github.com/fastcontainer/fastcontainer/internal/sandbox"
)

// Instance is one ready container, as control sees it.
type Instance interface {
	Info() fleet.Instance
	Revision() fleet.Revision
	// Ready is when it became ready, with a monotonic part.
	Ready() time.Time
	// Limits in force.
	Limits() sandbox.Limits
	// Stats of its cgroup, and those of its processor alone.
	Stats() (sandbox.Stats, error)
	CPU() (sandbox.Stats, error)
	// OutOfMemory tells whether it has ended for that.
	OutOfMemory() bool
	// Dialed gives away an unused connection to it, or nil.
	Dialed() net.Conn
}

// Order is a start that is wanted.
type Order struct {
	Revision fleet.Revision
	// Kind is CheckpointStart if saved processes may be restored.
	Kind fleet.StartKind
	// Cause and the numbers behind it.
	Cause  string
	Inputs map[string]float64
	// Stages hold what is known of the start so far and get the rest.
	Stages *fleet.Stages
	// Limits once it is ready; a zero stands for what the revision has at rest.
	Limits sandbox.Limits
}

// Node carries out what is decided.
type Node interface {
	// Start returns when the instance is ready.
	Start(ctx context.Context, o Order) (Instance, error)
	// Stop returns when nothing is left of it.
	Stop(ctx context.Context, i Instance, cause string) error
	// Resize changes limits; a zero leaves a number as it is.
	Resize(i Instance, l sandbox.Limits, cause string, inputs map[string]float64) error
	// Freeze makes a ready instance a standby; when ctx ends it may be half
	// frozen, and is thawed next.
	Freeze(ctx context.Context, i Instance, cause string, inputs map[string]float64) error
	// Thaw undoes it, and adds to the stages how long it took.
	Thaw(i Instance, stages *fleet.Stages) error
	// Save makes a checkpoint of a revision, unless there is one or it was
	// tried in vain, and gives its size in bytes; 0: there is none. Before it starts
	// anything it asks for room, and does not when there is none; what it got it
	// gives back.
	Save(ctx context.Context, rev fleet.Revision, cause string, inputs map[string]float64, room func() (free func(), ok bool)) int64
	// Vitals of the machine at present.
	Vitals() homeostat.Vitals
}

// Config of control.
type Config struct {
	Node   Node
	Logger *slog.Logger
	// Events is told of decisions.
	Events func(fleet.Event)
	// Attach makes what the front door keeps beside a ready instance.
	Attach func(id fleet.InstanceID, addr netip.AddrPort, dialed func() net.Conn) io.Closer
	// HoldsPerApp and HoldsTotal bound the waiting requests, HoldTimeout
	// their wait.
	HoldsPerApp, HoldsTotal int
	HoldTimeout             time.Duration
	// Capacity is what instances may reserve together, their resources at
	// rest; 0: no bound. Starts is the most starts at once; 0: 16 for each
	// processor.
	Capacity homeostat.Claim
	Starts   int
	// Standby is the memory that frozen instances may hold together; 0: none
	// is kept.
	Standby int64
	// Registerer of metrics; may be nil.
	Registerer prometheus.Registerer
}

// Control is the state of all apps on this node.
type Control struct {
	cfg     Config
	metrics *metrics
	routes  sync.Map     // host name → *App
	holds   atomic.Int64 // requests that wait
	holding atomic.Int64 // apps that have some
	ledger  *ledger
	larder  *larder
	savings savings
	unread  sync.Once
	vitals  atomic.Pointer[homeostat.Vitals] // as last felt
	active  atomic.Int64                     // apps that are looked at, for they have traffic
	ctx     context.Context                  //nolint:containedctx // the life of starts, which outlive the requests that caused them
	cancel  context.CancelCauseFunc
	work    sync.WaitGroup
	begun   atomic.Bool
	closed  atomic.Bool

	mu   sync.Mutex
	apps map[fleet.AppName]*App
}

var errShutdown = errors.New("daemon is stopping")

// New makes control without apps.
func New(c Config) (*Control, error) {
	if c.Starts <= 0 {
		c.Starts = 16 * runtime.NumCPU()
	}
	k := &Control{cfg: c, apps: map[fleet.AppName]*App{}, ledger: newLedger(c.Capacity, c.Starts)}
	k.larder = newLarder(c.Standby, k.ledger.first)
	k.ctx, k.cancel = context.WithCancelCause(context.Background())
	var err error
	if k.metrics, err = newMetrics(c.Registerer, &k.holds); err != nil {
		return nil, err
	}
	k.work.Go(k.autophagy)
	return k, nil
}

// Begin ends the time of adoption: from now on instances are started that
// nobody asks for, and those that there are come to their ends.
func (k *Control) Begin() {
	k.begun.Store(true)
	for _, a := range k.Apps() {
		a.mu.Lock()
		if !a.removed && !a.stopped && (len(a.ready)+len(a.standby) > 0 || a.keeps()) {
			a.wake(0)
		}
		a.mu.Unlock()
	}
}

// Close refuses new requests, gives up starts under way and waits for stops
// under way. Ready instances go on: the next daemon adopts them.
func (k *Control) Close() {
	k.closed.Store(true)
	k.cancel(errShutdown)
	k.mu.Lock()
	apps := make([]*App, 0, len(k.apps))
	for _, a := range k.apps {
		apps = append(apps, a)
	}
	k.mu.Unlock()
	for _, a := range apps {
		a.close()
	}
	k.work.Wait()
}

// Route finds the app of a host name, which is lower case and has no port.
func (k *Control) Route(host string) (*App, bool) {
	if a, ok := k.routes.Load(host); ok {
		return a.(*App), true //nolint:forcetypeassert // only apps are stored
	}
	// A wildcard stands for one label.
	if _, parent, ok := strings.Cut(host, "."); ok {
		if a, ok := k.routes.Load("*." + parent); ok {
			return a.(*App), true //nolint:forcetypeassert // only apps are stored
		}
	}
	return nil, false
}

// SetApp makes an app known, or gives it a newer revision: instances of older
// ones are replaced, with their successors first where there is traffic.
func (k *Control) SetApp(app fleet.App, rev fleet.Revision) {
	k.mu.Lock()
	a := k.apps[app.Name]
	if a == nil {
		a = &App{k: k, name: app.Name}
		k.apps[app.Name] = a
	}
	old := a.hosts
	a.hosts = slices.Clone(rev.Spec.Hosts)
	for _, h := range a.hosts {
		k.routes.Store(h, a)
	}
	for _, h := range old {
		if !slices.Contains(a.hosts, h) {
			k.routes.CompareAndDelete(h, a)
		}
	}
	k.mu.Unlock()
	a.set(rev, app.Stopped)
}

// RemoveApp forgets an app and ends its instances.
func (k *Control) RemoveApp(name fleet.AppName) {
	k.mu.Lock()
	a := k.apps[name]
	delete(k.apps, name)
	if a != nil {
		for _, h := range a.hosts {
			k.routes.CompareAndDelete(h, a)
		}
	}
	k.mu.Unlock()
	if a != nil {
		a.remove()
	}
}

// Apps that are known.
func (k *Control) Apps() []*App {
	k.mu.Lock()
	defer k.mu.Unlock()
	apps := make([]*App, 0, len(k.apps))
	for _, a := range k.apps {
		apps = append(apps, a)
	}
	slices.SortFunc(apps, func(a, b *App) int { return strings.Compare(string(a.name), string(b.name)) })
	return apps
}

// App by name.
func (k *Control) App(name fleet.AppName) (*App, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	a, ok := k.apps[name]
	return a, ok
}

// Adopt puts an instance of an earlier daemon back into the route. Instances
// of apps that are not known any more end.
func (k *Control) Adopt(i Instance) {
	info := i.Info()
	a, ok := k.App(info.App)
	if !ok {
		k.work.Go(func() { k.stop(i, "its app was deleted") })
		return
	}
	a.adopt(i)
}

// Gone takes an instance that ended by itself out of the route at once.
func (k *Control) Gone(id fleet.InstanceID) {
	if a, ok := k.App(id.App()); ok {
		a.gone(id)
	}
}

// Pressed gives an instance whose memory comes near its limit more of it, if
// there is some.
func (k *Control) Pressed(id fleet.InstanceID) {
	if a, ok := k.App(id.App()); ok {
		a.pressed(id)
	}
}

// unreadable says once that an instance's numbers cannot be read: decisions go
// on without them.
func (k *Control) unreadable(id fleet.InstanceID, err error) {
	select {
	case <-k.ctx.Done():
	default:
		k.unread.Do(func() {
			k.cfg.Logger.Warn("numbers of an instance cannot be read, decisions go on without them; this is said once", "instance", id, "error", err)
		})
	}
}

func (k *Control) stop(i Instance, cause string) {
	if err := k.cfg.Node.Stop(context.WithoutCancel(k.ctx), i, cause); err != nil {
		k.cfg.Logger.Error("stop instance", "instance", i.Info().ID, "error", err)
	}
}
