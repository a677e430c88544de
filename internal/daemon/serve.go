// Package daemon is the whole service in one process: it reads the
// configuration, builds every part in order, joins them, and stops them in
// reverse. It decides nothing itself.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	systemd "github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/api"
	"github.com/fastcontainer/fastcontainer/internal/checkpoint"
	"github.com/fastcontainer/fastcontainer/internal/control"
	"github.com/fastcontainer/fastcontainer/internal/dispatch"
	"github.com/fastcontainer/fastcontainer/internal/etcd"
	"github.com/fastcontainer/fastcontainer/internal/events"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/homeostat"
	"github.com/fastcontainer/fastcontainer/internal/image"
	"github.com/fastcontainer/fastcontainer/internal/network"
	"github.com/fastcontainer/fastcontainer/internal/node"
	"github.com/fastcontainer/fastcontainer/internal/release"
	"github.com/fastcontainer/fastcontainer/internal/sandbox"
	"github.com/fastcontainer/fastcontainer/internal/sandbox/oci"
	"github.com/fastcontainer/fastcontainer/internal/slow"
	"github.com/fastcontainer/fastcontainer/internal/store"
)

// Daemon is one node, built. Its parts are in the order in which they were
// opened.
type Daemon struct {
	cfg     Config
	log     *slog.Logger
	version string
	started time.Time
	metrics *prometheus.Registry
	// ends are what Close does, in the order in which it was opened.
	ends []func() error

	events      *events.Log
	images      *image.Store
	checkpoints *checkpoint.Store
	runtimes    map[fleet.Runtime]sandbox.Runtime
	network     *network.Network
	node        *node.Node
	control     *control.Control
	door        *dispatch.Server
	store       store.Store
	releases    *release.Releases
	routes      *routes
	work        sync.WaitGroup // what goes on in the background
}

// Serve runs a node until ctx ends. What listens and what is started is told
// to log; ready, where not nil, is called once requests are taken.
func Serve(ctx context.Context, c Config, version string, log *slog.Logger, ready func()) (err error) {
	if err := c.Validate(); err != nil {
		return err
	}
	d := &Daemon{cfg: c, log: log, version: version, started: time.Now(), metrics: prometheus.NewRegistry(), routes: newRoutes()}
	defer func() { err = errors.Join(err, d.close()) }()
	d.metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	if err := d.prepare(); err != nil {
		return err
	}
	doors, err := d.listen(ctx)
	if err != nil {
		return err
	}
	// Whoever knocks now is not refused, but waits until we are ready.
	if err := d.open(ctx); err != nil {
		closeAll(doors)
		return err
	}
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	d.ends = append(d.ends, func() error { stop(); d.work.Wait(); return nil })
	if err := d.begin(ctx, background); err != nil {
		closeAll(doors)
		return err
	}
	if ready != nil {
		ready()
	}
	_, _ = systemd.SdNotify(false, systemd.SdNotifyReady)
	err = d.door.Serve(ctx, doors...)
	_, _ = systemd.SdNotify(false, systemd.SdNotifyStopping)
	log.Info("stopping; containers go on, and the next daemon takes them over")
	return err
}

func closeAll(doors []dispatch.Listener) {
	for _, l := range doors {
		_ = l.Close()
	}
}

// close ends everything in reverse.
func (d *Daemon) close() error {
	var errs []error
	for _, end := range slices.Backward(d.ends) {
		errs = append(errs, end())
	}
	return errors.Join(errs...)
}

// prepare makes the directories and this process fit.
func (d *Daemon) prepare() error {
	for _, dir := range []string{d.cfg.Data, d.cfg.Run} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return &fleet.Error{Op: "make directory", Subject: dir, Err: err, Hint: "the daemon needs root; choose other directories with --data and --run"}
		}
		if err := os.Chmod(dir, 0o700); err != nil { //nolint:gosec // a directory
			return &fleet.Error{Op: "close directory to others", Subject: dir, Err: err}
		}
	}
	unlock, err := lockRun(d.cfg.Run)
	if err != nil {
		return err
	}
	d.ends = append(d.ends, unlock)
	// Each request and each container needs descriptors.
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err == nil {
		limit.Cur = limit.Max
		_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	}
	// Collecting garbage a little less often costs some memory and saves time
	// on the path of requests; who sets GOGC knows better.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(200)
	}
	// To make and to remove containers is to call the kernel, which makes the
	// caller wait for 10 ms and more: for other processors (RCU), for the locks
	// of the network and of mounts. The runtime counts such a thread as one that
	// runs, and until its monitor looks, requests wait with it. With spare ones,
	// while there are such calls, they do not; who sets GOMAXPROCS knows better.
	if os.Getenv("GOMAXPROCS") == "" {
		slow.Spare(spareThreads)
	}
	return nil
}

const spareThreads = 4

// lockRun keeps a second daemon out of the run directory.
func lockRun(dir string) (func() error, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, &fleet.Error{Op: "lock", Subject: dir, Err: err}
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, &fleet.Error{Op: "lock", Subject: dir, Kind: fleet.ErrConflict, Err: errors.New("another daemon runs here"), Hint: "stop it, or choose other --run and --data directories"}
	}
	return f.Close, nil
}

// listen opens the front doors: sockets that systemd holds for us, by their
// names "http" and "https", or our own.
func (d *Daemon) listen(ctx context.Context) ([]dispatch.Listener, error) {
	given, err := activation.ListenersWithNames()
	if err != nil {
		return nil, &fleet.Error{Op: "take over sockets", Err: err}
	}
	var doors []dispatch.Listener
	for _, w := range []struct {
		name, addr string
		tls        bool
	}{{"http", d.cfg.HTTP, false}, {"https", d.cfg.HTTPS, true}} {
		if held := given[w.name]; len(held) > 0 {
			for _, l := range held {
				doors = append(doors, dispatch.Listener{Listener: l, TLS: w.tls})
			}
			continue
		}
		if w.addr == "" {
			continue
		}
		l, err := new(net.ListenConfig).Listen(ctx, "tcp", w.addr)
		if err != nil {
			closeAll(doors)
			e := &fleet.Error{Op: "listen", Subject: w.addr, Err: err, Hint: "choose another address with --" + w.name}
			if errors.Is(err, unix.EADDRINUSE) {
				e.Kind = fleet.ErrConflict
				e.Hint = "something else listens there: stop it, or choose another address with --" + w.name
			}
			return nil, e
		}
		doors = append(doors, dispatch.Listener{Listener: l, TLS: w.tls})
	}
	return doors, nil
}

// open builds every part, in order.
func (d *Daemon) open(ctx context.Context) error {
	c := &d.cfg
	data := func(name string) string { return filepath.Join(c.Data, name) }
	var err error
	if d.events, err = events.Open(events.Config{File: data("events.jsonl"), Node: fleet.NodeName(c.Node), Logger: d.log}); err != nil {
		return err
	}
	d.ends = append(d.ends, d.events.Close)
	if d.images, err = image.Open(data("images"), image.Options{Logger: d.log, MaxSize: c.Images.MaxSize, Grace: imageGrace}); err != nil {
		return err
	}
	d.ends = append(d.ends, d.images.Close)
	if err := d.openRuntimes(ctx); err != nil {
		return err
	}
	// No CRIU of an earlier daemon writes there any more: the runtime ended it.
	if d.checkpoints, err = checkpoint.Open(checkpoint.Config{Dir: data("checkpoints"), Budget: c.Checkpoint.Budget, Logger: d.log}); err != nil {
		return err
	}
	d.node, err = node.New(node.Config{
		Name: fleet.NodeName(c.Node), Runtimes: d.runtimes, Images: d.images, Checkpoints: d.checkpoints,
		RunDir: filepath.Join(c.Run, "instances"), LogDir: data("logs"), VolumeDir: data("volumes"),
		Logger: d.log, Events: d.events.Append, Registerer: d.metrics,
		Gone:    func(i *node.Instance) { d.control.Gone(i.Info().ID) },
		Pressed: func(i *node.Instance) { d.control.Pressed(i.Info().ID) },
		Control: d.network.Control,
		CPU:     c.Capacity.cores(), Memory: c.Capacity.bytes(), Used: d.usedMemory,
	})
	if err != nil {
		return err
	}
	d.ends = append(d.ends, func() error { d.node.Close(); return nil })
	door := d.doorConfig()
	d.control, err = control.New(control.Config{
		Node: machine{d.node}, Logger: d.log, Events: d.events.Append, Attach: dispatch.NewAttach(door),
		HoldsPerApp: c.Holds.PerApp, HoldsTotal: c.Holds.Total, HoldTimeout: c.Holds.Timeout.Std(), Registerer: d.metrics,
		Standby: int64(float64(c.Capacity.bytes()) * c.Capacity.Standby),
		Starts:  c.Capacity.Starts, Capacity: homeostat.Claim{
			CPU: c.Capacity.cores() * c.Capacity.CPUOvercommit, Memory: int64(float64(c.Capacity.bytes()) * c.Capacity.MemoryOvercommit),
		},
	})
	if err != nil {
		return err
	}
	d.ends = append(d.ends, func() error { d.control.Close(); return nil })
	if d.door, err = dispatch.New(door, router{d.control}, d.log, d.metrics); err != nil {
		return err
	}
	if d.store, err = d.openStore(ctx); err != nil {
		return err
	}
	d.ends = append(d.ends, d.store.Close)
	d.releases = release.New(release.Config{
		Store: d.store, Images: d.images, Logger: d.log, Events: d.events.Append,
		Check: d.check, Refresh: c.Images.Refresh.Std(),
	})
	return nil
}

// imageGrace is how long an image that nothing uses yet is safe from being
// collected: a deploy pulls before it makes its revision.
const imageGrace = 10 * time.Minute

func (d *Daemon) openStore(ctx context.Context) (store.Store, error) {
	e := d.cfg.Etcd
	if len(e.Endpoints) == 0 {
		return etcd.OpenEmbedded(ctx, filepath.Join(d.cfg.Data, "etcd"), d.log)
	}
	return etcd.OpenExternal(ctx, etcd.Config{
		Endpoints: e.Endpoints, CA: e.CA, Cert: e.Cert, Key: e.Key, User: e.User, PasswordFile: e.PasswordFile, Logger: d.log,
	})
}

func (d *Daemon) openRuntimes(ctx context.Context) error {
	c := &d.cfg
	dns := make([]netip.Addr, len(c.Network.DNS))
	for i, s := range c.Network.DNS {
		dns[i] = netip.MustParseAddr(s) // Validate parsed it
	}
	n, err := network.Open(ctx, network.Config{
		Logger: d.log, Interface: c.Network.Interface, Subnet: netip.MustParsePrefix(c.Network.Subnet), Table: table(c.Network.Interface), DNS: dns,
	})
	if err != nil {
		return err
	}
	d.network = n
	d.ends = append(d.ends, n.Close)
	w := newWires(n)
	program := c.Checkpoint.CRIU
	if c.Checkpoint.Budget == 0 {
		program = ""
	}
	native, err := sandbox.Open(ctx, sandbox.Config{
		CRIU:   program,
		Logger: d.log, Cgroup: c.Sandbox.Cgroup, UIDBase: c.Sandbox.UIDBase, UIDCount: c.Sandbox.UIDCount, Network: w, Pool: c.Sandbox.Pool,
	})
	if err != nil {
		return err
	}
	d.runtimes = map[fleet.Runtime]sandbox.Runtime{fleet.RuntimeNative: native}
	for i, kind := range []fleet.Runtime{fleet.RuntimeCrun, fleet.RuntimeRunc, fleet.RuntimeRunsc} {
		dir := filepath.Join(c.Run, "oci", string(kind))
		d.runtimes[kind] = &lazy{dir: dir, open: func() (sandbox.Runtime, error) {
			return oci.Open(ctx, oci.Config{
				Logger: d.log, Runtime: string(kind), Dir: dir, Cgroup: c.Sandbox.Cgroup + "-" + string(kind),
				UIDBase: ociUIDs + uint32(i)*ociUIDCount<<16, UIDCount: ociUIDCount, Network: w, //nolint:gosec // i is 0 to 2
			})
		}}
	}
	d.ends = append(d.ends, func() error {
		var errs []error
		for _, rt := range d.runtimes {
			errs = append(errs, rt.Close())
		}
		return errors.Join(errs...)
	})
	return nil
}

// The uid ranges of the OCI runtimes lie above the native one's default.
const (
	ociUIDs     = 1610612736
	ociUIDCount = 4096
)

// table is the nftables table that belongs to an interface: two daemons on
// one host have two.
func table(iface string) string {
	if iface == "fc0" {
		return "fastcontainer"
	}
	return "fastcontainer-" + iface
}

func (d *Daemon) doorConfig() dispatch.Config {
	c := dispatch.DefaultConfig()
	for _, p := range d.cfg.Door.TrustedProxies {
		c.TrustedProxies = append(c.TrustedProxies, netip.MustParsePrefix(p)) // Validate parsed it
	}
	for _, cert := range d.cfg.TLS.Certificates {
		c.Certificates = append(c.Certificates, dispatch.Certificate{CertFile: cert.Cert, KeyFile: cert.Key})
	}
	c.Control = d.network.Control
	c.MaxBody = int64(d.cfg.Door.MaxBody)
	c.MaxConns, c.MaxConnsPerIP = d.cfg.Door.MaxConns, d.cfg.Door.MaxConnsPerIP
	c.ResponseTimeout = d.cfg.Door.ResponseTimeout.Std()
	c.ServerTiming = d.cfg.ServerTiming
	if d.cfg.Log.Access > 0 {
		c.AccessLog, c.AccessSample = d.log, d.cfg.Log.Access
	}
	return c
}

// forgetSaved removes the saved processes of a deleted app.
func (d *Daemon) forgetSaved(app fleet.AppName) {
	if err := d.node.ForgetSaved(app); err != nil {
		d.log.Warn("remove checkpoints", "app", app, "error", err)
	}
}

// keepSaved removes the saved processes that no start on this host will use: of
// another kernel or CRIU, and of revisions that are neither an app's current one nor
// the one that a rollback goes to. which: of one app; "": of all.
func (d *Daemon) keepSaved(ctx context.Context, which fleet.AppName) {
	_, err := d.checkpoints.Keep(func(app fleet.AppName, key string) bool {
		return which != "" && app != which || d.wanted(ctx, app, key)
	})
	if err != nil {
		d.log.Warn("remove checkpoints", "app", which, "error", err)
	}
}

// wanted tells whether a start may use a checkpoint; also if that cannot be known.
func (d *Daemon) wanted(ctx context.Context, app fleet.AppName, key string) bool {
	r, ok := d.routes.get(app)
	if !ok {
		return false
	}
	for _, id := range []fleet.RevisionID{r.app.Current, r.app.Previous} {
		if id == "" {
			continue
		}
		rev, err := store.Revision(ctx, d.store, id)
		if errors.Is(err, fleet.ErrNotFound) {
			continue
		}
		if err != nil {
			return true
		}
		if own, err := d.node.SavedKey(ctx, rev); err != nil || own == key {
			return true
		}
	}
	return false
}

// begin learns the apps, takes over the instances of an earlier daemon, and
// starts what goes on in the background.
func (d *Daemon) begin(ctx, background context.Context) error {
	synced, held := make(chan struct{}), make(chan struct{})
	// later does something once what adopted instances use of saved processes is
	// held.
	later := func(do func()) {
		d.work.Go(func() {
			select {
			case <-held:
				do()
			case <-background.Done():
			}
		})
	}
	d.work.Go(func() {
		all := false // apps are known
		err := store.WatchApps(background, d.store, func(c store.AppChange) error {
			switch {
			case c.Synced:
				close(synced)
			case c.Deleted:
				d.control.RemoveApp(c.App.Name)
			default:
				d.control.SetApp(c.App, c.Revision)
			}
			d.routes.set(c)
			switch all = all || c.Synced; {
			case c.Deleted:
				later(func() { d.forgetSaved(c.App.Name) })
			case all: // Synced has no name
				later(func() { d.keepSaved(background, c.App.Name) })
			}
			return nil
		})
		if background.Err() == nil {
			d.log.Error("watch apps", "error", err)
		}
	})
	select {
	case <-synced:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	adopted, err := d.node.Adopt(ctx)
	if err != nil {
		return err
	}
	for _, i := range adopted {
		d.control.Adopt(i)
	}
	close(held)
	d.control.Begin()
	if len(adopted) > 0 {
		d.log.Info("adopted the instances of an earlier daemon", "instances", len(adopted))
	}
	d.work.Go(func() { d.releases.Watch(background) })
	d.work.Go(func() { d.announce(background) })
	if err := d.serveAPI(); err != nil {
		return err
	}
	return d.serveMetrics(ctx)
}

// announce enters this node in the store.
func (d *Daemon) announce(ctx context.Context) {
	op, err := store.PutNode(fleet.Node{Name: fleet.NodeName(d.cfg.Node), CPUs: cpus(), Memory: memory(), Version: d.version, StartedAt: d.started})
	if err != nil {
		d.log.Error("announce node", "error", err)
		return
	}
	for {
		if _, err = d.store.Commit(ctx, op); err == nil {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(5 * time.Second):
			d.log.Warn("announce node", "error", err)
		}
	}
}

func (d *Daemon) serveAPI() error {
	l, err := api.Listen(filepath.Join(d.cfg.Run, "api.sock"))
	if err != nil {
		return err
	}
	s := api.NewServer(backend{d}, d.metrics, d.log)
	d.work.Go(func() {
		if err := s.Serve(l); err != nil {
			d.log.Error("serve management interface", "error", err)
		}
	})
	d.ends = append(d.ends, func() error { s.Close(); return nil })
	return nil
}

func (d *Daemon) serveMetrics(ctx context.Context) error {
	if d.cfg.Metrics == "" {
		return nil
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", d.cfg.Metrics)
	if err != nil {
		return &fleet.Error{Op: "listen", Subject: d.cfg.Metrics, Err: err, Hint: "choose another address with --metrics"}
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(d.metrics, promhttp.HandlerOpts{}))
	s := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	d.work.Go(func() {
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			d.log.Error("serve metrics", "error", err)
		}
	})
	d.ends = append(d.ends, s.Close)
	return nil
}

// check refuses what this node could never run.
func (d *Daemon) check(s fleet.Spec) error {
	bad := func(err error, hint string) error {
		return &fleet.Error{Op: "deploy", Subject: string(s.Name), Kind: fleet.ErrInvalid, Err: err, Hint: hint}
	}
	rt, ok := d.runtimes[s.Isolation.Runtime]
	if !ok {
		return bad(fmt.Errorf("there is no runtime %q", s.Isolation.Runtime), "use native, crun, runc or runsc")
	}
	if err := rt.Check(); err != nil {
		return bad(fmt.Errorf("runtime %s: %w", s.Isolation.Runtime, err), fleet.Hint(err))
	}
	c := d.cfg.Capacity
	if all := c.bytes(); max(s.Resources.Memory.Peak, s.Resources.Memory.Rest) > all {
		return bad(fmt.Errorf("memory peak %s is more than instances may use on this machine", max(s.Resources.Memory.Peak, s.Resources.Memory.Rest)), "at most "+all.String())
	}
	if all := c.cores(); max(s.Resources.CPU.Peak, s.Resources.CPU.Rest) > all {
		return bad(fmt.Errorf("cpu peak %g is more than instances may use on this machine", max(s.Resources.CPU.Peak, s.Resources.CPU.Rest)), fmt.Sprintf("at most %g cores", all))
	}
	if n := int(min(c.cores()*c.CPUOvercommit/s.Resources.CPU.Rest, float64(c.bytes())*c.MemoryOvercommit/float64(s.Resources.Memory.Rest))); s.Scale.Min > n {
		return bad(fmt.Errorf("scale.min %d instances do not fit on this machine with their resources at rest", s.Scale.Min), fmt.Sprintf("at most %d, or less at rest, or a larger overcommit in the configuration", n))
	}
	return nil
}

// usedMemory of all instances.
func (d *Daemon) usedMemory() (fleet.Bytes, error) {
	var sum fleet.Bytes
	var errs []error
	for _, rt := range d.runtimes {
		if m, ok := rt.(measured); ok {
			n, err := m.Memory()
			sum += n
			errs = append(errs, err)
		}
	}
	return sum, errors.Join(errs...)
}

// memory of this machine.
func memory() fleet.Bytes {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0
	}
	return fleet.Bytes(info.Totalram * uint64(info.Unit)) //nolint:gosec // far from the end
}

// routes knows which revision of each app requests reach.
type routes struct {
	mu      sync.Mutex
	current map[fleet.AppName]route
	changed chan struct{} // closed and replaced at each change
}

type route struct {
	app   fleet.App
	image string
	hosts []string
}

func newRoutes() *routes {
	return &routes{current: map[fleet.AppName]route{}, changed: make(chan struct{})}
}

func (r *routes) set(c store.AppChange) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case c.Synced:
	case c.Deleted:
		delete(r.current, c.App.Name)
	default:
		r.current[c.App.Name] = route{c.App, c.Revision.Spec.Image, c.Revision.Spec.Hosts}
	}
	close(r.changed)
	r.changed = make(chan struct{})
}

func (r *routes) get(name fleet.AppName) (route, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	v, ok := r.current[name]
	return v, ok
}

// wait returns when ok holds for an app's route.
func (r *routes) wait(ctx context.Context, name fleet.AppName, ok func(route, bool) bool) error {
	for {
		r.mu.Lock()
		v, found := r.current[name]
		changed := r.changed
		r.mu.Unlock()
		if ok(v, found) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
