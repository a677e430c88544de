package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/homeostat"
)

const mib = 1 << 20

// burn has an instance use processor time, up to its limit, for as long as a
// test's requests last; the limit is counted in periods of a millisecond.
func (n *fakeNode) burn(a *App, cores float64, d time.Duration) {
	for range int(d / time.Millisecond) {
		time.Sleep(time.Millisecond)
		a.mu.Lock()
		for _, m := range a.ready {
			f := m.inst.(*fakeInstance)
			f.mu.Lock()
			if m.inflight > 0 {
				f.stats.CPUTime += time.Duration(min(f.limits.CPU, cores) * float64(time.Millisecond))
				f.stats.Periods++
				if cores > f.limits.CPU {
					f.stats.ThrottledPers++
				}
			}
			f.mu.Unlock()
		}
		a.mu.Unlock()
	}
}

// each calls f for every ready instance.
func (a *App) each(f func(*member, *fakeInstance)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, m := range a.ready {
		f(m, m.inst.(*fakeInstance))
	}
}

// flood makes clients that ask again and again until stop is called.
func flood(t *testing.T, a *App, clients int, service time.Duration) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			for ctx.Err() == nil {
				l, err := a.Acquire(ctx, time.Now())
				if err != nil {
					if ctx.Err() == nil {
						t.Errorf("%s: %v", a.Name(), err)
					}
					return
				}
				time.Sleep(service)
				l.Release(false)
			}
		})
	}
	return func() { cancel(); wg.Wait() }
}

func scaled(name string) fleet.Spec {
	s := testSpec(name)
	s.Resources.CPU = fleet.CPU{Rest: 0.3, Peak: 1}
	s.Resources.Memory = fleet.Memory{Rest: 64 * mib, Peak: 256 * mib}
	s.Priority = 50
	return s
}

func TestLoad_LimitsRiseThenSiblingsComeAndCalmBringsAllBack(t *testing.T) {
	bubble(t, func(t *testing.T, k *Control, n *fakeNode) {
		n.vitals = homeostat.Vitals{Idle: 8, Cores: 8, Memory: 1 << 40}
		a := deploy(k, scaled("busy"), 1)
		stop := flood(t, a, 20, 40*time.Millisecond)
		n.burn(a, 2, 80*time.Millisecond) // it is ready after ten
		var cores []float64
		a.each(func(_ *member, f *fakeInstance) { cores = append(cores, f.Limits().CPU) })
		if len(cores) == 0 || cores[0] <= 0.3 { // a sibling may have come just now
			t.Errorf("instances have %v cores after the first was at its limit for 70 ms", cores)
		}
		n.burn(a, 2, 4*time.Second)
		if _, _, running := n.counts(); running < 3 {
			t.Errorf("%d instances after four seconds", running)
		}
		stop()
		time.Sleep(30 * time.Second)
		synctest.Wait()
		if _, _, running := n.counts(); running != 1 {
			t.Errorf("%d instances half a minute after the load", running)
		}
		a.each(func(m *member, f *fakeInstance) {
			if got := f.Limits(); got.CPU != 0.3 || got.CPUWeight != 100 {
				t.Errorf("got %+v, want it at rest with all of its app's weight", got)
			}
		})
		a.mu.Lock()
		on := a.watch.on
		a.mu.Unlock()
		if on {
			t.Error("it is still looked at though it has nothing to do")
		}
	})
}

// Looks at a calm app are half a second apart. A crowd that comes just as one
// is under way is not left to the next.
func TestLoad_ACrowdIsSeenAtOnceWheneverItComes(t *testing.T) {
	for _, after := range []time.Duration{-50 * time.Millisecond, -4 * time.Millisecond, -time.Millisecond, 0, time.Millisecond, 2 * time.Millisecond, 3 * time.Millisecond} {
		t.Run(after.String(), func(t *testing.T) { aCrowd(t, after) })
	}
}

func aCrowd(t *testing.T, after time.Duration) {
	bubble(t, func(t *testing.T, k *Control, n *fakeNode) {
		n.vitals = homeostat.Vitals{Idle: 8, Cores: 8, Memory: 1 << 40}
		n.reading = 2 * time.Millisecond
		a := deploy(k, scaled("calm"), 1)
		stop := flood(t, a, 1, 100*time.Millisecond)
		n.burn(a, 0.01, 6*time.Second)
		next := func() time.Duration {
			a.mu.Lock()
			defer a.mu.Unlock()
			return time.Until(a.watch.at.Add(a.watch.next))
		}
		if left := next(); left < 10*time.Millisecond {
			time.Sleep(left + 10*time.Millisecond)
		}
		if next() < 100*time.Millisecond {
			t.Fatalf("the next look is in %v, want a calm app", next())
		}
		n.burn(a, 0.01, next()+after)
		crowd := flood(t, a, 8, time.Second)
		n.burn(a, 2, 30*time.Millisecond)
		a.each(func(_ *member, f *fakeInstance) {
			if got := f.Limits().CPU; got <= 0.3 {
				t.Errorf("%v after the look began: it still has %v cores 30 ms later", after, got)
			}
		})
		crowd()
		stop()
		time.Sleep(time.Minute) // the last look is over
	})
}

// What cannot be read is missing, and said once; what else is known decides.
func TestLoad_NumbersThatCannotBeRead(t *testing.T) {
	var said bytes.Buffer
	quiet := func(c *Config) { c.Logger = slog.New(slog.NewTextHandler(&said, nil)) }
	bubbleWith(t, quiet, func(t *testing.T, k *Control, n *fakeNode) {
		n.vitals = homeostat.Vitals{Idle: 8, Cores: 8, Memory: 1 << 40}
		n.unread = errors.New("no such file")
		spec := scaled("blind")
		spec.Concurrency = 1
		a := deploy(k, spec, 1)
		stop := flood(t, a, 4, 500*time.Millisecond)
		n.burn(a, 2, 3*time.Second)
		if _, _, running := n.counts(); running != 4 {
			t.Errorf("%d instances for four requests at once", running)
		}
		a.each(func(_ *member, f *fakeInstance) {
			if got := f.Limits().CPU; got != 0.3 {
				t.Errorf("%v cores, though nobody knows what it uses", got)
			}
		})
		stop()
		time.Sleep(time.Minute)
	})
	if got := strings.Count(said.String(), "cannot be read"); got != 1 || !strings.Contains(said.String(), "no such file") {
		t.Errorf("said %d times: %s", got, said.String())
	}
}

func TestLoad_StreamsAreNoSlowResponses(t *testing.T) {
	bubble(t, func(t *testing.T, k *Control, n *fakeNode) {
		a := deploy(k, scaled("chat"), 1)
		for range 50 {
			l, err := a.Acquire(t.Context(), time.Now())
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(5 * time.Millisecond)
			l.Release(false)
		}
		for range 40 {
			l, err := a.Acquire(t.Context(), time.Now())
			if err != nil {
				t.Fatal(err)
			}
			l.Streams()
			defer l.Release(false)
		}
		time.Sleep(time.Minute)
		if starts, _, _ := n.counts(); starts != 1 {
			t.Errorf("%d starts for streams that are silent", starts)
		}
	})
}

func TestWeight_IsTheAppsAndSharedByItsInstances(t *testing.T) {
	bubble(t, func(t *testing.T, k *Control, n *fakeNode) {
		s := scaled("four")
		s.Scale.Min, s.Priority = 4, 100
		a := deploy(k, s, 1)
		time.Sleep(time.Second)
		synctest.Wait()
		a.each(func(_ *member, f *fakeInstance) {
			if got := f.Limits().CPUWeight; got != 50 {
				t.Errorf("one of four has weight %d, want a quarter of 200", got)
			}
		})
	})
}

// A deploy that gives less does not throttle those that still serve.
func TestDeploy_LeavesTheOldOnesTheirLimit(t *testing.T) {
	bubble(t, func(t *testing.T, k *Control, n *fakeNode) {
		s := scaled("three")
		s.Scale.Min = 3
		a := deploy(k, s, 1)
		time.Sleep(time.Second)
		synctest.Wait()
		a.mu.Lock()
		a.setLimit(0.6, homeostat.CauseCPU, nil)
		a.mu.Unlock()
		synctest.Wait()
		var old []*fakeInstance
		a.each(func(_ *member, f *fakeInstance) { old = append(old, f) })
		s.Resources.CPU.Rest = 0.2
		deploy(k, s, 2)
		a.mu.Lock()
		a.reweigh() // as when one of them ends before its successor is ready
		a.mu.Unlock()
		time.Sleep(time.Second)
		synctest.Wait()
		for _, f := range old {
			if got := f.Limits().CPU; got != 0.6 {
				t.Errorf("an old one has %g cores, want the 0.6 that it had", got)
			}
		}
		a.each(func(m *member, f *fakeInstance) {
			if got := f.Limits().CPU; got != 0.2 || m.info.Revision != "three@2" {
				t.Errorf("%s has %g cores, want a new one with 0.2", m.info.Revision, got)
			}
		})
		if len(old) != 3 {
			t.Errorf("%d old ones", len(old))
		}
	})
}

func TestMemory_GrowsBeforeItsLimitAndAfterAKill(t *testing.T) {
	bubble(t, func(t *testing.T, k *Control, n *fakeNode) {
		n.vitals = homeostat.Vitals{Used: 100 * mib, Memory: 200 * mib, Idle: 1}
		a := deploy(k, scaled("fat"), 1)
		l, err := a.Acquire(t.Context(), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		l.Release(false)
		var id fleet.InstanceID
		limit := func() (got fleet.Bytes) {
			synctest.Wait()
			a.each(func(m *member, f *fakeInstance) { id, got = m.info.ID, f.Limits().Memory })
			return got
		}
		a.each(func(_ *member, f *fakeInstance) { f.set(func(f *fakeInstance) { f.limits.Memory = 64 * mib }) })
		limit()
		k.Pressed(id)
		if got := limit(); got != 96*mib {
			t.Errorf("got %s, want half as much again", got)
		}
		n.mu.Lock()
		n.vitals.Used = 190 * mib
		n.mu.Unlock()
		k.Pressed(id)
		if got := limit(); got != 96*mib {
			t.Errorf("got %s though the machine has no more", got)
		}
		// Killed for it nevertheless, it comes back larger.
		a.each(func(_ *member, f *fakeInstance) { f.set(func(f *fakeInstance) { f.oom = true }) })
		k.Gone(id)
		if l, err = a.Acquire(t.Context(), time.Now()); err != nil {
			t.Fatal(err)
		}
		l.Release(false)
		if got := limit(); got != 144*mib {
			t.Errorf("the next instance has %s, want more than the one that was killed", got)
		}
	})
}

// starving makes a machine of apps whose memory is what their instances use.
func starve(n *fakeNode, used, all int64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.vitals = homeostat.Vitals{Used: used, Memory: all, Idle: 1, Cores: 2}
}

func TestAutophagy_EatsIdleOnesAndStopsWhenFed(t *testing.T) {
	bubble(t, func(t *testing.T, k *Control, n *fakeNode) {
		starve(n, 100*mib, 1000*mib)
		var apps []*App
		for i := range 20 {
			s := scaled(fmt.Sprintf("app%d", i))
			s.Priority = 10 + i
			a := deploy(k, s, 1)
			l, err := a.Acquire(t.Context(), time.Now())
			if err != nil {
				t.Fatal(err)
			}
			l.Release(false)
			a.each(func(_ *member, f *fakeInstance) { f.set(func(f *fakeInstance) { f.stats.Memory = 50 * mib }) })
			apps = append(apps, a)
		}
		serving, err := apps[0].Acquire(t.Context(), time.Now()) // of the least priority, but it serves
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if _, _, running := n.counts(); running != 20 {
			t.Fatalf("%d run while all is well", running)
		}
		starve(n, 970*mib, 1000*mib)
		time.Sleep(1200 * time.Millisecond)
		starve(n, 700*mib, 1000*mib)
		time.Sleep(time.Second)
		synctest.Wait()
		_, stops, running := n.counts()
		if stops < 4 || stops > 20 {
			t.Errorf("%d digested in about a second, want some, at most twenty", stops)
		}
		time.Sleep(5 * time.Second)
		if _, again, _ := n.counts(); again != stops {
			t.Errorf("%d more digested by a machine that is fed", again-stops)
		}
		for i, a := range apps {
			gone := a.Status().Ready == 0
			if want := i > 0 && i <= stops; gone != want {
				t.Errorf("%s (priority %d): digested %v; %d run", a.Name(), 10+i, gone, running)
			}
		}
		serving.Release(false)
	})
}

func TestAutophagy_IsBoundedInTime(t *testing.T) {
	bubble(t, func(t *testing.T, k *Control, n *fakeNode) {
		for i := range 800 {
			a := deploy(k, scaled(fmt.Sprintf("app%d", i)), 1)
			l, err := a.Acquire(t.Context(), time.Now())
			if err != nil {
				t.Fatal(err)
			}
			l.Release(false)
		}
		starve(n, 999*mib, 1000*mib) // and nothing helps
		_, before, _ := n.counts()
		time.Sleep(30 * time.Second)
		synctest.Wait()
		_, after, _ := n.counts()
		if got := after - before; got < 500 || got > 620 {
			t.Errorf("%d deaths in half a minute, want at most twenty a second", got)
		}
		time.Sleep(4 * time.Second)
		if _, now, _ := n.counts(); now-after > 20 { // the end of the feast
			t.Errorf("%d deaths in the pause", now-after)
		}
	})
}

// small makes the machine so small that it holds so many instances.
func small(instances int) func(*Config) {
	return func(c *Config) { c.Capacity = homeostat.Claim{Memory: int64(instances) * 64 * mib} }
}

func bubbleWith(t *testing.T, change func(*Config), test func(t *testing.T, k *Control, n *fakeNode)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		n := &fakeNode{took: 10 * time.Millisecond, running: map[fleet.InstanceID]bool{}, vitals: homeostat.Vitals{Idle: 1, Cores: 2, Memory: 1 << 40}}
		k := newTestControl(t, n, change)
		test(t, k, n)
		k.Close()
	})
}

func TestAdmission_AFullMachineServesTheRestAndRefusesWhoFloods(t *testing.T) {
	bubbleWith(t, func(c *Config) { small(6)(c); c.HoldsPerApp = 50 }, func(t *testing.T, k *Control, n *fakeNode) {
		s := scaled("flood")
		s.Concurrency, s.Scale.Max = 1, 20
		a := deploy(k, s, 1)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		refused := 0
		var mu sync.Mutex
		for range 200 {
			wg.Go(func() {
				for ctx.Err() == nil {
					l, err := a.Acquire(ctx, time.Now())
					if err != nil {
						if ctx.Err() == nil && !errors.Is(err, fleet.ErrOverloaded) {
							t.Error(err)
						}
						mu.Lock()
						refused++
						mu.Unlock()
						time.Sleep(100 * time.Millisecond)
						continue
					}
					time.Sleep(2 * time.Second)
					l.Release(false)
				}
			})
		}
		time.Sleep(5 * time.Second)
		if got := a.Status().Ready; got != 6 {
			t.Errorf("the flood has %d instances of the 6 that fit", got)
		}
		// Another app's first request: it is served, for the flood gives way.
		b := deploy(k, scaled("quiet"), 1)
		began := time.Now()
		l, err := b.Acquire(t.Context(), began)
		if err != nil {
			t.Fatalf("quiet: %v", err)
		}
		if d := time.Since(began); d > 5*time.Second {
			t.Errorf("quiet waited %v", d)
		}
		l.Release(false)
		mu.Lock()
		if refused == 0 {
			t.Error("the flood was never refused")
		}
		mu.Unlock()
		cancel()
		wg.Wait()
	})
}

func TestAdmission_TheAppWithLeastStartsNext(t *testing.T) {
	bubbleWith(t, func(c *Config) { c.Starts = 2 }, func(t *testing.T, k *Control, n *fakeNode) {
		n.took = time.Second
		s := scaled("many")
		s.Concurrency, s.Scale.Max = 1, 10
		a := deploy(k, s, 1)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				if l, err := a.Acquire(ctx, time.Now()); err == nil {
					time.Sleep(time.Minute)
					l.Release(false)
				}
			})
		}
		time.Sleep(100 * time.Millisecond) // two of them start, eight wait
		b := deploy(k, scaled("one"), 1)
		began := time.Now()
		l, err := b.Acquire(t.Context(), began)
		if err != nil {
			t.Fatal(err)
		}
		if d := time.Since(began); d > 2*time.Second {
			t.Errorf("the first request of another app waited %v behind a stampede", d)
		}
		l.Release(false)
		cancel()
		wg.Wait()
	})
}

func TestAdmission_NothingIsLostInTheBooks(t *testing.T) {
	bubbleWith(t, small(3), func(t *testing.T, k *Control, n *fakeNode) {
		var stops []func()
		for i := range 5 {
			s := scaled(fmt.Sprintf("app%d", i))
			s.Lifetime, s.Idle, s.Concurrency, s.Scale.Max = fleet.Duration(time.Second), fleet.Duration(time.Second), 2, 3
			a := deploy(k, s, 1)
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(func() {
					for ctx.Err() == nil {
						if l, err := a.Acquire(ctx, time.Now()); err == nil {
							time.Sleep(30 * time.Millisecond)
							l.Release(false)
						}
						time.Sleep(20 * time.Millisecond)
					}
				})
			}
			stops = append(stops, func() { cancel(); wg.Wait() })
		}
		time.Sleep(30 * time.Second)
		for _, stop := range stops {
			stop()
		}
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		g := k.ledger
		g.mu.Lock()
		defer g.mu.Unlock()
		if len(g.accounts) != 0 || g.starting != 0 || len(g.queue) != 0 || g.claimed != (homeostat.Claim{}) {
			t.Errorf("after the last instance: %d accounts, %d starting, %d tickets, %+v claimed", len(g.accounts), g.starting, len(g.queue), g.claimed)
		}
		if _, _, running := n.counts(); running != 0 {
			t.Errorf("%d still run", running)
			for _, a := range k.Apps() {
				t.Logf("%+v timer %v", a.Status(), a.timer != nil)
				a.each(func(m *member, _ *fakeInstance) {
					t.Logf("%s: in flight %d, retiring %v, replacing %q, unused for %v, streams %d, age %v", m.info.ID, m.inflight, m.retiring, m.replacing, time.Since(m.unused), m.streams, time.Since(m.inst.Ready()))
				})
			}
		}
	})
}

func TestHolds_OneAppCannotTakeThemAll(t *testing.T) {
	bubbleWith(t, func(c *Config) { c.HoldsTotal = 100 }, func(t *testing.T, k *Control, n *fakeNode) {
		n.took = 10 * time.Second
		a, b := deploy(k, scaled("flood"), 1), deploy(k, scaled("quiet"), 1)
		var wg sync.WaitGroup
		for range 300 {
			wg.Go(func() {
				if l, err := a.Acquire(t.Context(), time.Now()); err == nil {
					l.Release(false)
				}
			})
		}
		synctest.Wait()
		for range 10 {
			wg.Go(func() {
				l, err := b.Acquire(t.Context(), time.Now())
				if err != nil {
					t.Errorf("quiet: %v", err)
					return
				}
				l.Release(false)
			})
		}
		wg.Wait()
	})
}
