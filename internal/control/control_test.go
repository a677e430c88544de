package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/homeostat"
	"github.com/fastcontainer/fastcontainer/internal/sandbox"
)

// fakeNode starts and stops instances in no time, or in the time and with the
// errors that a test sets.
type fakeNode struct {
	mu      sync.Mutex
	took    time.Duration
	err     error
	starts  []string // causes
	stops   []string
	resizes []string // causes
	freezes []string // causes
	thaws   int
	// freezing is how long a freeze takes; thawErr fails a thaw.
	freezing time.Duration
	thawErr  error
	vitals   homeostat.Vitals
	felt     int // how often they were read
	running  map[fleet.InstanceID]bool
	// saved are revisions whose starts are restores, if they may be, and take
	// restoring. saves counts the wishes; saving is how long one takes.
	saved             map[fleet.RevisionID]bool
	saves             int
	saving, restoring time.Duration
	// reading is how long it takes to read an instance's processor time; unread
	// is why no number of an instance can be read.
	reading time.Duration
	unread  error
}

type fakeInstance struct {
	node  *fakeNode
	info  fleet.Instance
	rev   fleet.Revision
	ready time.Time

	mu     sync.Mutex
	limits sandbox.Limits
	stats  sandbox.Stats
	oom    bool
}

func (i *fakeInstance) Limits() sandbox.Limits {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.limits
}

func (i *fakeInstance) Stats() (sandbox.Stats, error) {
	i.node.mu.Lock()
	err := i.node.unread
	i.node.mu.Unlock()
	if err != nil {
		return sandbox.Stats{}, err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.stats, nil
}

// set changes what a test needs changed.
func (i *fakeInstance) set(f func(i *fakeInstance)) {
	i.mu.Lock()
	defer i.mu.Unlock()
	f(i)
}

func (i *fakeInstance) CPU() (sandbox.Stats, error) {
	i.node.mu.Lock()
	reading := i.node.reading
	i.node.mu.Unlock()
	time.Sleep(reading)
	return i.Stats()
}

func (i *fakeInstance) Dialed() net.Conn { return nil }

func (i *fakeInstance) OutOfMemory() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.oom
}

func (i *fakeInstance) Info() fleet.Instance {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.info
}

func (i *fakeInstance) Revision() fleet.Revision { return i.rev }
func (i *fakeInstance) Ready() time.Time         { return i.ready }

func (n *fakeNode) Vitals() homeostat.Vitals {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.felt++
	return n.vitals
}

func (n *fakeNode) Resize(i Instance, l sandbox.Limits, cause string, _ map[string]float64) error {
	f := i.(*fakeInstance)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.limits = l.Over(f.limits)
	if cause != "" {
		n.mu.Lock()
		n.resizes = append(n.resizes, fmt.Sprintf("%g %s", l.CPU, cause))
		n.mu.Unlock()
	}
	return nil
}

func (n *fakeNode) Freeze(ctx context.Context, i Instance, cause string, _ map[string]float64) error {
	n.mu.Lock()
	n.freezes = append(n.freezes, cause)
	took := n.freezing
	n.mu.Unlock()
	select {
	case <-time.After(took):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (n *fakeNode) Thaw(i Instance, _ *fleet.Stages) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.thaws++
	if !n.running[i.Info().ID] {
		return fmt.Errorf("%s does not run", i.Info().ID)
	}
	return n.thawErr
}

func (n *fakeNode) Start(ctx context.Context, o Order) (Instance, error) {
	rev, cause := o.Revision, o.Cause
	n.mu.Lock()
	n.starts = append(n.starts, cause)
	took, err, kind := n.took, n.err, fleet.ColdStart
	if o.Kind == fleet.CheckpointStart && n.saved[rev.ID] {
		took, kind = n.restoring, fleet.CheckpointStart
	}
	n.mu.Unlock()
	select {
	case <-time.After(took):
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if err != nil {
		return nil, err
	}
	now := time.Now()
	limits := o.Limits.Over(sandbox.Limits{CPU: rev.Spec.Resources.CPU.Rest, Memory: rev.Spec.Resources.Memory.Rest})
	i := &fakeInstance{node: n, limits: limits, rev: rev, ready: now, info: fleet.Instance{ID: fleet.NewInstanceID(rev.App), App: rev.App, Revision: rev.ID, Kind: kind, State: fleet.StateReady, StartedAt: now.Add(-took), ReadyAt: now}}
	if l := rev.Spec.Lifetime.Std(); l > 0 {
		i.info.ExpiresAt = now.Add(l)
	}
	n.mu.Lock()
	n.running[i.info.ID] = true
	n.mu.Unlock()
	return i, nil
}

func (n *fakeNode) Save(ctx context.Context, rev fleet.Revision, _ string, _ map[string]float64, room func() (func(), bool)) int64 {
	free, ok := room()
	if !ok {
		return 0
	}
	defer free()
	n.mu.Lock()
	n.saves++
	took := n.saving
	n.mu.Unlock()
	select {
	case <-time.After(took):
	case <-ctx.Done():
		return 0
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.saved == nil {
		return 0
	}
	n.saved[rev.ID] = true
	return 1 << 20
}

func (n *fakeNode) Stop(_ context.Context, i Instance, cause string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.running[i.Info().ID] {
		return fmt.Errorf("%s does not run", i.Info().ID)
	}
	delete(n.running, i.Info().ID)
	n.stops = append(n.stops, cause)
	return nil
}

func (n *fakeNode) counts() (starts, stops, running int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.starts), len(n.stops), len(n.running)
}

type nothing struct{}

func (nothing) Close() error { return nil }

func newTestControl(t testing.TB, n Node, change func(*Config)) *Control {
	t.Helper()
	c := Config{
		Node: n, Logger: slog.New(slog.DiscardHandler), Events: func(fleet.Event) {},
		Attach:      func(fleet.InstanceID, netip.AddrPort, func() net.Conn) io.Closer { return nothing{} },
		HoldsPerApp: 2000, HoldsTotal: 5000, HoldTimeout: 30 * time.Second,
	}
	if change != nil {
		change(&c)
	}
	k, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	k.Begin()
	return k
}

func testSpec(name string) fleet.Spec {
	return fleet.Spec{
		Name: fleet.AppName(name), Hosts: []string{name + ".test"}, Scale: fleet.Scale{Max: 10},
		Lifetime: fleet.Duration(20 * time.Minute), Idle: fleet.Duration(5 * time.Minute), Drain: fleet.Duration(10 * time.Second),
	}
}

func deploy(k *Control, s fleet.Spec, revision int) *App {
	rev := fleet.Revision{ID: fleet.MakeRevisionID(s.Name, revision), App: s.Name, Spec: s}
	k.SetApp(fleet.App{Name: s.Name, Current: rev.ID}, rev)
	a, _ := k.Route(s.Hosts[0])
	return a
}

// bubble runs a test with its own time and a control that is closed at its end.
func bubble(t *testing.T, test func(t *testing.T, k *Control, n *fakeNode)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		n := &fakeNode{took: 10 * time.Millisecond, running: map[fleet.InstanceID]bool{}}
		k := newTestControl(t, n, nil)
		test(t, k, n)
		k.Close()
	})
}

func TestAcquire_AThousandFirstRequestsMakeOneStart(t *testing.T) {
	bubble(t, func(t *testing.T, k *Control, n *fakeNode) {
		a := deploy(k, testSpec("blog"), 1)
		var wg sync.WaitGroup
		for range 1000 {
			wg.Go(func() {
				l, err := a.Acquire(t.Context(), time.Now())
				if err != nil {
					t.Error(err)
					return
				}
				if l.Stages() == nil {
					t.Error("a request that waited has no stages")
				}
				l.Release(false)
			})
		}
		wg.Wait()
		if starts, _, _ := n.counts(); starts != 1 {
			t.Errorf("got %d starts, want 1", starts)
		}
		if k.holds.Load() != 0 {
			t.Errorf("%d holds are left", k.holds.Load())
		}
		if l, err := a.Acquire(t.Context(), time.Now()); err != nil || l.Stages() != nil {
			t.Errorf("warm request: %v, stages %v", err, l.Stages())
		} else {
			l.Release(false)
		}
	})
}

func TestAcquire_ConcurrencyIsHardAndTheOldestIsServedFirst(t *testing.T) {
	bubble(t, func(t *testing.T, k *Control, n *fakeNode) {
		s := testSpec("one")
		s.Concurrency, s.Scale.Max = 1, 1
		a := deploy(k, s, 1)
		first, err := a.Acquire(t.Context(), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		order := make(chan int, 5)
		var wg sync.WaitGroup
		for i := range 5 {
			wg.Go(func() {
				l, err := a.Acquire(t.Context(), time.Now())
				if err != nil {
					t.Error(err)
					return
				}
				order <- i
				time.Sleep(time.Second)
				l.Release(false)
			})
			synctest.Wait()
		}
		first.Release(false)
		wg.Wait()
		for want := range 5 {
			if got := <-order; got != want {
				t.Errorf("got request %d, want %d", got, want)
			}
		}
		if starts, _, _ := n.counts(); starts != 1 {
			t.Errorf("got %d starts, want 1", starts)
		}
	})
}

func TestAcquire_AClientThatLeavesStopsWaiting(t *testing.T) {
	bubble(t, func(t *testing.T, k *Control, n *fakeNode) {
		n.took = time.Minute
		a := deploy(k, testSpec("slow"), 1)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := a.Acquire(ctx, time.Now()); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		if s := a.Status(); s.Waiting != 0 || k.holds.Load() != 0 {
			t.Errorf("it still waits: %+v", s)
		}
	})
}

func TestAcquire_TooLongAndTooManyHolds(t *testing.T) {
	bubble(t, func(t *testing.T, k *Control, n *fakeNode) {
		n.took = time.Hour
		k.cfg.HoldsPerApp = 3
		a := deploy(k, testSpec("slow"), 1)
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				began := time.Now()
				if _, err := a.Acquire(t.Context(), began); !errors.Is(err, fleet.ErrTimeout) || time.Since(began) != 30*time.Second {
					t.Errorf("got %v after %v", err, time.Since(began))
				}
			})
		}
		synctest.Wait()
		if _, err := a.Acquire(t.Context(), time.Now()); !errors.Is(err, fleet.ErrOverloaded) {
			t.Errorf("got %v, want overloaded", err)
		}
		wg.Wait()
	})
}

func TestAcquire_AFailingAppIsRefusedAtOnceAndTriedAgain(t *testing.T) {
	bubble(t, func(t *testing.T, k *Control, n *fakeNode) {
		n.err = errors.New("exit code 1")
		a := deploy(k, testSpec("bad"), 1)
		if _, err := a.Acquire(t.Context(), time.Now()); !errors.Is(err, fleet.ErrFailing) {
			t.Errorf("first: got %v", err)
		}
		for range 100 {
			began := time.Now()
			if _, err := a.Acquire(t.Context(), began); !errors.Is(err, fleet.ErrFailing) || time.Since(began) != 0 {
				t.Errorf("while it rests: got %v after %v", err, time.Since(began))
			}
		}
		if starts, _, _ := n.counts(); starts != 1 {
			t.Errorf("%d starts while it rests", starts)
		}
		time.Sleep(time.Second)
		n.mu.Lock()
		n.err = nil
		n.mu.Unlock()
		l, err := a.Acquire(t.Context(), time.Now())
		if err != nil {
			t.Fatalf("after its rest: %v", err)
		}
		l.Release(false)
	})
}

func TestLife_IdleEndsItCountedFromTheLastResponse(t *testing.T) {
	bubble(t, func(t *testing.T, k *Control, n *fakeNode) {
		a := deploy(k, testSpec("blog"), 1)
		l, err := a.Acquire(t.Context(), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(12 * time.Minute) // one long request
		if _, _, running := n.counts(); running != 1 {
			t.Fatal("it ended while a request was in flight")
		}
		l.Release(false)
		time.Sleep(5*time.Minute - time.Second)
		synctest.Wait()
		if _, _, running := n.counts(); running != 1 {
			t.Error("it ended before its idle time")
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if _, stops, running := n.counts(); running != 0 || stops != 1 || n.stops[0] != "idle" {
			t.Errorf("after its idle time: %d run, stops %v", running, n.stops)
		}
		if a.timer != nil {
			time.Sleep(time.Hour)
			synctest.Wait()
		}
	})
}

func TestLife_ABusyInstanceIsReplacedWithItsSuccessorFirst(t *testing.T) {
	bubble(t, func(t *testing.T, k *Control, n *fakeNode) {
		s := testSpec("blog")
		s.Lifetime = fleet.Duration(time.Minute)
		a := deploy(k, s, 1)
		seen := map[fleet.InstanceID]bool{}
		for range 1000 { // ten requests a second, 100 s
			began := time.Now()
			l, err := a.Acquire(t.Context(), began)
			if err != nil {
				t.Fatal(err)
			}
			if len(seen) > 0 && time.Since(began) != 0 {
				t.Fatalf("a request waited %v for a renewal", time.Since(began))
			}
			seen[l.Instance()] = true
			time.Sleep(100 * time.Millisecond)
			l.Release(false)
		}
		if len(seen) != 2 {
			t.Errorf("%d instances served in 100 s, want 2", len(seen))
		}
	})
}

func TestDeploy_OldServesUntilTheNewIsReady(t *testing.T) {
	bubble(t, func(t *testing.T, k *Control, n *fakeNode) {
		a := deploy(k, testSpec("blog"), 1)
		l, err := a.Acquire(t.Context(), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		n.mu.Lock()
		n.took = 3 * time.Second
		n.mu.Unlock()
		deploy(k, testSpec("blog"), 2)
		for range 20 {
			began := time.Now()
			l, err := a.Acquire(t.Context(), began)
			if err != nil || time.Since(began) != 0 {
				t.Fatalf("during the deploy: %v after %v", err, time.Since(began))
			}
			l.Release(false)
			time.Sleep(200 * time.Millisecond)
		}
		next, err := a.Acquire(t.Context(), time.Now())
		if err != nil || next.Instance() == l.Instance() {
			t.Errorf("after the deploy the old instance serves (%v)", err)
		}
		if _, _, running := n.counts(); running != 2 {
			t.Errorf("%d run: the old one has a request in flight", running)
		}
		next.Release(false)
		l.Release(false)
		synctest.Wait()
		if _, _, running := n.counts(); running != 1 {
			t.Errorf("%d run", running)
		}
	})
}

func TestDeploy_ARevisionThatNeverGetsReadyLeavesTheOldOneServing(t *testing.T) {
	bubble(t, func(t *testing.T, k *Control, n *fakeNode) {
		a := deploy(k, testSpec("blog"), 1)
		n.mu.Lock()
		n.took = 0
		n.mu.Unlock()
		hold, err := a.Acquire(t.Context(), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		n.mu.Lock()
		n.err = errors.New("exit code 1")
		n.mu.Unlock()
		deploy(k, testSpec("blog"), 2)
		for range 60 {
			l, err := a.Acquire(t.Context(), time.Now())
			if err != nil || l.Instance() != hold.Instance() {
				t.Fatalf("got %v", err)
			}
			l.Release(false)
			time.Sleep(time.Second)
		}
		starts, _, _ := n.counts()
		if starts < 3 || starts > 12 {
			t.Errorf("%d tries in a minute: the backoff is wrong", starts)
		}
		hold.Release(false)
	})
}

func TestRetire_StreamsAreToldToEndAfterTheDrain(t *testing.T) {
	bubble(t, func(t *testing.T, k *Control, n *fakeNode) {
		a := deploy(k, testSpec("ws"), 1)
		l, err := a.Acquire(t.Context(), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		k.SetApp(fleet.App{Name: "ws", Stopped: true}, fleet.Revision{ID: "ws@1", App: "ws", Spec: testSpec("ws")})
		<-l.Closing()
		if d := time.Since(began); d != 10*time.Second {
			t.Errorf("told after %v, want the drain of 10 s", d)
		}
		l.Release(false)
		synctest.Wait()
		if _, _, running := n.counts(); running != 0 {
			t.Error("it still runs")
		}
		if _, err := a.Acquire(t.Context(), time.Now()); !errors.Is(err, fleet.ErrUnavailable) {
			t.Errorf("a stopped app answers %v", err)
		}
	})
}

func TestRefused_AnotherInstanceIsStarted(t *testing.T) {
	bubble(t, func(t *testing.T, k *Control, n *fakeNode) {
		a := deploy(k, testSpec("blog"), 1)
		l, err := a.Acquire(t.Context(), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		l.Refused()
		next, err := a.Acquire(t.Context(), time.Now())
		if err != nil || next.Instance() == l.Instance() {
			t.Fatalf("got the same instance again (%v)", err)
		}
		next.Release(false)
	})
}

func TestGone_ACrashedInstanceIsReplacedForWhoWaits(t *testing.T) {
	bubble(t, func(t *testing.T, k *Control, n *fakeNode) {
		s := testSpec("one")
		s.Concurrency, s.Scale.Max = 1, 1
		a := deploy(k, s, 1)
		l, err := a.Acquire(t.Context(), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		var wg sync.WaitGroup
		wg.Go(func() {
			next, err := a.Acquire(t.Context(), time.Now())
			if err != nil {
				t.Error(err)
				return
			}
			next.Release(false)
		})
		synctest.Wait()
		k.Gone(l.Instance())
		wg.Wait()
		l.Release(true)
	})
}

func TestMinimum_IsKeptWithoutRequests(t *testing.T) {
	bubble(t, func(t *testing.T, k *Control, n *fakeNode) {
		s := testSpec("always")
		s.Scale.Min, s.Idle = 2, fleet.Duration(time.Second)
		deploy(k, s, 1)
		time.Sleep(time.Hour)
		synctest.Wait()
		if _, _, running := n.counts(); running != 2 {
			t.Errorf("%d run, want 2", running)
		}
	})
}

func TestAdopt_InstancesServeAgainAndUnknownOnesEnd(t *testing.T) {
	bubble(t, func(t *testing.T, k *Control, n *fakeNode) {
		rev := fleet.Revision{ID: "blog@1", App: "blog", Spec: testSpec("blog")}
		i, _ := n.Start(t.Context(), Order{Revision: rev, Cause: ""})
		lost, _ := n.Start(t.Context(), Order{Revision: fleet.Revision{ID: "gone@1", App: "gone", Spec: testSpec("gone")}, Cause: ""})
		a := deploy(k, testSpec("blog"), 1)
		k.Adopt(i)
		k.Adopt(lost)
		l, err := a.Acquire(t.Context(), time.Now())
		if err != nil || l.Instance() != i.Info().ID {
			t.Fatalf("the adopted instance does not serve: %v", err)
		}
		l.Release(false)
		synctest.Wait()
		if n.running[lost.Info().ID] {
			t.Error("an instance of a deleted app still runs")
		}
	})
}

func TestRoute_HostsAndWildcards(t *testing.T) {
	k := newTestControl(t, &fakeNode{running: map[fleet.InstanceID]bool{}}, nil)
	defer k.Close()
	s := testSpec("blog")
	s.Hosts = []string{"blog.test", "*.shop.test"}
	deploy(k, s, 1)
	for host, want := range map[string]bool{
		"blog.test": true, "a.shop.test": true, "a.b.shop.test": false, "shop.test": false, "other.test": false, "": false,
	} {
		if _, ok := k.Route(host); ok != want {
			t.Errorf("%q: got %v, want %v", host, ok, want)
		}
	}
	s.Hosts = []string{"new.test"}
	deploy(k, s, 2)
	if _, ok := k.Route("blog.test"); ok {
		t.Error("a host that was given up is still routed")
	}
	k.RemoveApp("blog")
	if _, ok := k.Route("new.test"); ok {
		t.Error("a deleted app is still routed")
	}
}

// Random operations against the rules that must always hold.
func TestControl_RandomOperations(t *testing.T) {
	for seed := range uint64(20) {
		bubble(t, func(t *testing.T, k *Control, n *fakeNode) {
			rnd := rand.New(rand.NewPCG(seed, 1))
			s := testSpec("x")
			s.Concurrency = 1 + rnd.IntN(3)
			s.Scale.Max = 1 + rnd.IntN(4)
			s.Lifetime, s.Idle = fleet.Duration(20*time.Second), fleet.Duration(5*time.Second)
			a := deploy(k, s, 1)
			var mu sync.Mutex
			load := map[fleet.InstanceID]int{}
			var wg sync.WaitGroup
			for i := range 400 {
				switch rnd.IntN(20) {
				case 0:
					n.mu.Lock()
					n.err = nil
					if rnd.IntN(3) == 0 {
						n.err = errors.New("bad luck")
					}
					n.mu.Unlock()
				case 1:
					deploy(k, s, 2+i)
				}
				patience := time.Duration(rnd.Int64N(int64(40 * time.Second)))
				work := time.Duration(rnd.Int64N(int64(3 * time.Second)))
				refused := rnd.IntN(50) == 0
				wg.Go(func() {
					ctx, cancel := context.WithTimeout(t.Context(), patience)
					defer cancel()
					l, err := a.Acquire(ctx, time.Now())
					if err != nil {
						return
					}
					if refused {
						l.Refused()
						return
					}
					mu.Lock()
					load[l.Instance()]++
					if load[l.Instance()] > s.Concurrency {
						t.Errorf("%d requests at a time on one instance, at most %d", load[l.Instance()], s.Concurrency)
					}
					mu.Unlock()
					time.Sleep(work)
					mu.Lock()
					load[l.Instance()]--
					mu.Unlock()
					l.Release(false)
				})
				time.Sleep(time.Duration(rnd.Int64N(int64(300 * time.Millisecond))))
			}
			wg.Wait()
			n.mu.Lock()
			n.err = nil
			n.mu.Unlock()
			time.Sleep(5 * time.Minute)
			synctest.Wait()
			if st := a.Status(); st.Waiting != 0 || st.InFlight != 0 || st.Ready != 0 || st.Starting != 0 || k.holds.Load() != 0 {
				t.Errorf("seed %d: after a calm time: %+v, %d holds", seed, st, k.holds.Load())
			}
			if _, _, running := n.counts(); running != 0 {
				t.Errorf("seed %d: %d instances leaked", seed, running)
			}
		})
	}
}

func TestSleepingApps_CostLittle(t *testing.T) {
	const apps = 10000
	k := newTestControl(t, &fakeNode{running: map[fleet.InstanceID]bool{}}, nil)
	defer k.Close()
	var before, after runtime.MemStats
	goroutines := runtime.NumGoroutine()
	runtime.GC()
	runtime.ReadMemStats(&before)
	for i := range apps {
		deploy(k, testSpec(fmt.Sprintf("app-%d", i)), 1)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if each := (after.HeapAlloc - before.HeapAlloc) / apps; each > 2048 {
		t.Errorf("a sleeping app costs %d bytes, want at most 2048", each)
	}
	if got := runtime.NumGoroutine(); got > goroutines {
		t.Errorf("%d goroutines for sleeping apps", got-goroutines)
	}
	runtime.KeepAlive(k)
}

func BenchmarkAcquire_Warm(b *testing.B) {
	n := &fakeNode{running: map[fleet.InstanceID]bool{}}
	k := newTestControl(b, n, nil)
	defer k.Close()
	deploy(k, testSpec("blog"), 1)
	for b.Loop() {
		a, _ := k.Route("blog.test")
		l, err := a.Acquire(b.Context(), time.Now())
		if err != nil {
			b.Fatal(err)
		}
		l.Release(false)
	}
}
