package control

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/sandbox"
)

// cellar runs a test with a control that keeps standbys.
func cellar(t *testing.T, budget int64, test func(t *testing.T, k *Control, n *fakeNode)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		n := &fakeNode{took: time.Second, freezing: time.Millisecond, running: map[fleet.InstanceID]bool{}}
		k := newTestControl(t, n, func(c *Config) { c.Standby = budget })
		test(t, k, n)
		k.Close()
	})
}

func standbySpec(name string, policy fleet.StartPolicy) fleet.Spec {
	s := testSpec(name)
	s.Start, s.Lifetime, s.Idle = policy, fleet.Duration(time.Hour), fleet.Duration(time.Minute)
	return s
}

// frozen is the app's only standby.
func (a *App) frozen() *member {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.standby[0]
}

// visit makes one request and tells how long it waited.
func visit(t *testing.T, a *App) time.Duration {
	t.Helper()
	began := time.Now()
	l, err := a.Acquire(t.Context(), began)
	if err != nil {
		t.Error(err)
		return 0
	}
	l.Release(false)
	return time.Since(began)
}

func TestStandby_IdleFreezesAndARequestThaws(t *testing.T) {
	cellar(t, 1<<30, func(t *testing.T, k *Control, n *fakeNode) {
		a := deploy(k, standbySpec("shop", fleet.StartAuto), 1)
		if d := visit(t, a); d != time.Second {
			t.Errorf("the first took %v", d)
		}
		for range 3 {
			time.Sleep(2 * time.Minute)
			if s := a.Status(); s.Ready != 0 || s.Standby != 1 {
				t.Fatalf("after its idle time: %+v", s)
			}
			if len(k.ledger.parties()) != 0 {
				t.Error("a standby reserves room")
			}
			if d := visit(t, a); d != 0 {
				t.Errorf("a thaw took %v", d)
			}
		}
		starts, stops, running := n.counts()
		if starts != 1 || stops != 0 || running != 1 || n.thaws != 3 || len(n.freezes) != 3 {
			t.Errorf("%d starts, %d stops, %d running, %d thaws, %d freezes", starts, stops, running, n.thaws, len(n.freezes))
		}
	})
}

func TestStandby_ManyFirstRequestsMakeOneThaw(t *testing.T) {
	cellar(t, 1<<30, func(t *testing.T, k *Control, n *fakeNode) {
		a := deploy(k, standbySpec("shop", fleet.StartAuto), 1)
		visit(t, a)
		time.Sleep(2 * time.Minute)
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() { visit(t, a) })
		}
		wg.Wait()
		if starts, _, _ := n.counts(); starts != 1 || n.thaws != 1 {
			t.Errorf("%d starts, %d thaws", starts, n.thaws)
		}
	})
}

func TestStandby_ARequestInTheMiddleOfAFreeze(t *testing.T) {
	cellar(t, 1<<30, func(t *testing.T, k *Control, n *fakeNode) {
		n.freezing = time.Hour
		a := deploy(k, standbySpec("shop", fleet.StartAuto), 1)
		visit(t, a)
		time.Sleep(time.Minute + time.Second)
		if s := a.Status(); s.Standby != 1 {
			t.Fatalf("it does not freeze: %+v", s)
		}
		if d := visit(t, a); d != 0 {
			t.Errorf("it waited %v", d)
		}
		if s := a.Status(); s.Ready != 1 || s.Standby != 0 {
			t.Errorf("got %+v", s)
		}
	})
}

func TestStandby_IsMortalAndRenewedWhereThatPays(t *testing.T) {
	for _, c := range []struct {
		name   string
		policy fleet.StartPolicy
		took   time.Duration
		kept   int
	}{
		{"always", fleet.StartStandby, time.Millisecond, 1},
		{"auto, a slow start", fleet.StartAuto, time.Second, 1},
		{"auto, a quick one", fleet.StartAuto, 10 * time.Millisecond, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			cellar(t, 1<<30, func(t *testing.T, k *Control, n *fakeNode) {
				n.took = c.took
				a := deploy(k, standbySpec("shop", c.policy), 1)
				for range 20 { // visited every half hour
					visit(t, a)
					time.Sleep(30 * time.Minute)
				}
				time.Sleep(31 * time.Minute)
				if s := a.Status(); s.Standby != c.kept || s.Ready != 0 {
					t.Errorf("at the end of its life: %+v", s)
				}
				// Ten and a half hours are eleven lives, some of them a little shorter.
				if starts, _, running := n.counts(); c.kept == 1 && (starts < 11 || starts > 13) || running != c.kept {
					t.Errorf("%d starts; %d running", starts, running)
				}
			})
		})
	}
}

func TestStandby_AlwaysIsThereBeforeTheFirstRequest(t *testing.T) {
	cellar(t, 1<<30, func(t *testing.T, k *Control, n *fakeNode) {
		a := deploy(k, standbySpec("shop", fleet.StartStandby), 1)
		time.Sleep(time.Minute)
		if s := a.Status(); s.Standby != 1 || s.Ready != 0 {
			t.Fatalf("after the deploy: %+v", s)
		}
		if d := visit(t, a); d != 0 {
			t.Errorf("the first request took %v", d)
		}
		time.Sleep(2 * time.Minute)
		// A newer revision: the frozen one is replaced and never thawed.
		deploy(k, standbySpec("shop", fleet.StartStandby), 2)
		synctest.Wait()
		began := time.Now()
		l, err := a.Acquire(t.Context(), began)
		if err != nil {
			t.Fatal(err)
		}
		if got := l.m.info.Revision; got != fleet.MakeRevisionID("shop", 2) {
			t.Errorf("the request went to %s", got)
		}
		l.Release(false)
		time.Sleep(2 * time.Minute)
		if s := a.Status(); s.Standby != 1 || s.Ready != 0 {
			t.Errorf("at the end: %+v", s)
		}
		if _, _, running := n.counts(); running != 1 {
			t.Errorf("%d running", running)
		}
	})
}

func TestStandby_WhatCannotBeThawedIsStarted(t *testing.T) {
	cellar(t, 1<<30, func(t *testing.T, k *Control, n *fakeNode) {
		a := deploy(k, standbySpec("shop", fleet.StartAuto), 1)
		visit(t, a)
		time.Sleep(2 * time.Minute)
		n.mu.Lock()
		n.thawErr = errors.New("no such cgroup")
		n.mu.Unlock()
		if d := visit(t, a); d != time.Second {
			t.Errorf("it took %v", d)
		}
		time.Sleep(time.Second)
		if starts, stops, running := n.counts(); starts != 2 || stops != 1 || running != 1 {
			t.Errorf("%d starts, %d stops, %d running", starts, stops, running)
		}
		if len(k.ledger.parties()) != 1 || k.ledger.accounts[a].instances != 1 {
			t.Error("the books are wrong")
		}
	})
}

func TestStandby_WhatDiesFrozenIsForgotten(t *testing.T) {
	cellar(t, 1<<30, func(t *testing.T, k *Control, n *fakeNode) {
		a := deploy(k, standbySpec("shop", fleet.StartAuto), 1)
		visit(t, a)
		time.Sleep(2 * time.Minute)
		id := a.frozen().info.ID
		n.mu.Lock()
		delete(n.running, id)
		n.mu.Unlock()
		k.Gone(id)
		if s := a.Status(); s.Standby != 0 || s.Failures != 0 {
			t.Errorf("got %+v", s)
		}
		if d := visit(t, a); d != time.Second {
			t.Errorf("it took %v", d)
		}
	})
}

func TestStandby_TheBudgetKeepsWhatIsWorthMost(t *testing.T) {
	cellar(t, 100<<20, func(t *testing.T, k *Control, n *fakeNode) {
		heavy := func(a *App) {
			a.mu.Lock()
			defer a.mu.Unlock()
			for _, m := range a.ready {
				m.inst.(*fakeInstance).set(func(i *fakeInstance) { i.stats = sandbox.Stats{Memory: 60 << 20} }) //nolint:forcetypeassert // it is one
			}
		}
		slow := deploy(k, standbySpec("slow", fleet.StartAuto), 1)
		n.took = 10 * time.Second
		visit(t, slow)
		heavy(slow)
		n.mu.Lock()
		n.took = 100 * time.Millisecond
		n.mu.Unlock()
		quick := deploy(k, standbySpec("quick", fleet.StartAuto), 1)
		visit(t, quick)
		heavy(quick)
		time.Sleep(2 * time.Minute)
		if s, q := slow.Status(), quick.Status(); s.Standby != 1 || q.Standby != 0 {
			t.Errorf("slow %+v, quick %+v", s, q)
		}
		if held := k.larder.held(); held != 60<<20 {
			t.Errorf("they hold %d bytes", held)
		}
	})
}

func TestStandby_StoppedAndDeletedAppsKeepNone(t *testing.T) {
	cellar(t, 1<<30, func(t *testing.T, k *Control, n *fakeNode) {
		s := standbySpec("shop", fleet.StartStandby)
		a := deploy(k, s, 1)
		time.Sleep(time.Minute)
		rev := fleet.Revision{ID: fleet.MakeRevisionID(s.Name, 1), App: s.Name, Spec: s}
		k.SetApp(fleet.App{Name: s.Name, Current: rev.ID, Stopped: true}, rev)
		time.Sleep(time.Minute)
		if _, _, running := n.counts(); running != 0 || a.Status().Standby != 0 {
			t.Errorf("stopped: %d running", running)
		}
		k.SetApp(fleet.App{Name: s.Name, Current: rev.ID}, rev)
		time.Sleep(time.Minute)
		if a.Status().Standby != 1 {
			t.Error("started again, it keeps none")
		}
		k.RemoveApp(s.Name)
		time.Sleep(time.Minute)
		if _, _, running := n.counts(); running != 0 {
			t.Errorf("deleted: %d running", running)
		}
	})
}

func TestStandby_ANextDaemonTakesThemOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &fakeNode{took: time.Second, freezing: time.Millisecond, running: map[fleet.InstanceID]bool{}}
		first := newTestControl(t, n, func(c *Config) { c.Standby = 1 << 30 })
		deploy(first, standbySpec("shop", fleet.StartStandby), 1)
		time.Sleep(time.Minute)
		app, _ := first.App("shop")
		inst := app.frozen().inst.(*fakeInstance) //nolint:forcetypeassert // it is one
		first.Close()
		inst.set(func(i *fakeInstance) { i.info.State = fleet.StateStandby })
		next := newTestControl(t, n, func(c *Config) { c.Standby = 1 << 30 })
		next.begun.Store(false)
		a := deploy(next, standbySpec("shop", fleet.StartStandby), 1)
		time.Sleep(time.Second) // to find them takes its time
		next.Adopt(inst)
		next.Begin()
		time.Sleep(time.Second)
		if s := a.Status(); s.Standby != 1 || s.Starting != 0 || s.Ready != 0 {
			t.Errorf("adopted: %+v", s)
		}
		if d := visit(t, a); d != 0 {
			t.Errorf("it took %v", d)
		}
		next.Close()
	})
}

// An instance that the next daemon takes over awake, and nobody asks it: what
// visits there were the earlier one knew, so it is frozen, not ended.
func TestStandby_OfOneThatWasTakenOverAwake(t *testing.T) {
	cellar(t, 1<<30, func(t *testing.T, k *Control, n *fakeNode) {
		s := standbySpec("shop", fleet.StartAuto)
		i, err := n.Start(t.Context(), Order{Revision: fleet.Revision{ID: "shop@1", App: "shop", Spec: s}})
		if err != nil {
			t.Fatal(err)
		}
		a := deploy(k, s, 1)
		k.Adopt(i)
		time.Sleep(2 * time.Minute)
		if s := a.Status(); s.Ready != 0 || s.Standby != 1 {
			t.Errorf("after its idle time: %+v", s)
		}
	})
}

func TestStandby_AlwaysWaitsForItsTurn(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"among the starts": func(c *Config) { c.Starts = 1 },
		"for room":         func(c *Config) { c.Capacity.CPU, c.HoldTimeout = 1, 2*time.Second },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := &fakeNode{took: time.Second, freezing: time.Millisecond, running: map[fleet.InstanceID]bool{}}
				k := newTestControl(t, n, func(c *Config) { c.Standby = 1 << 30; change(c) })
				var apps []*App
				for i := range 10 { // nobody asks for them, and each start takes a second
					s := standbySpec(fmt.Sprintf("app%d", i), fleet.StartStandby)
					s.Resources.CPU, s.Idle = fleet.CPU{Rest: 1, Peak: 1}, fleet.Duration(time.Second)
					apps = append(apps, deploy(k, s, 1))
				}
				time.Sleep(30 * time.Second)
				synctest.Wait()
				for _, a := range apps {
					if s := a.Status(); s.Standby != 1 {
						t.Errorf("%s: %+v", a.Name(), s)
					}
				}
				k.Close()
			})
		})
	}
}

func TestStandby_OfFrozenOnesAloneTheMachineIsFeltSeldom(t *testing.T) {
	cellar(t, 1<<30, func(t *testing.T, k *Control, n *fakeNode) {
		felt := func(d time.Duration) int {
			n.mu.Lock()
			before := n.felt
			n.mu.Unlock()
			time.Sleep(d)
			synctest.Wait()
			n.mu.Lock()
			defer n.mu.Unlock()
			return n.felt - before
		}
		a := deploy(k, standbySpec("shop", fleet.StartAuto), 1)
		if got := felt(time.Hour); got != 0 {
			t.Errorf("felt %d times in an hour in which nothing runs", got)
		}
		for range 2 { // a start, then a thaw
			visit(t, a)
			if got := felt(30 * time.Second); got < 50 {
				t.Errorf("felt %d times in half a minute in which one is ready, want two a second", got)
			}
			time.Sleep(time.Minute)
			if s := a.Status(); s.Standby != 1 {
				t.Fatalf("it is not frozen: %+v", s)
			}
			if got := felt(2 * time.Minute); got > 60 || got < 50 {
				t.Errorf("felt %d times in two minutes with one that is frozen, want one in two seconds", got)
			}
		}
		starve(n, 970*mib, 1000*mib)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if s := a.Status(); s.Standby != 0 {
			t.Errorf("the machine starves, and it is still there: %+v", s)
		}
		if got := felt(time.Hour); got != 0 {
			t.Errorf("felt %d times in an hour after it has ended", got)
		}
	})
}

func TestStandby_AClientThatLeavesWhileItThaws(t *testing.T) {
	cellar(t, 1<<30, func(t *testing.T, k *Control, n *fakeNode) {
		a := deploy(k, standbySpec("shop", fleet.StartAuto), 1)
		visit(t, a)
		time.Sleep(2 * time.Minute)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if l, err := a.Acquire(ctx, time.Now()); err == nil {
			l.Release(false) // it was served before it left: both are right
		}
		time.Sleep(2 * time.Minute)
		if s := a.Status(); s.Standby != 1 || s.Waiting != 0 || s.InFlight != 0 {
			t.Errorf("afterwards: %+v", s)
		}
	})
}

func TestStandby_ComesBackToWhatItsSiblingsHave(t *testing.T) {
	cellar(t, 1<<30, func(t *testing.T, k *Control, n *fakeNode) {
		s := standbySpec("shop", fleet.StartAuto)
		s.Resources.CPU, s.Priority = fleet.CPU{Rest: 0.3, Peak: 1}, 50
		a := deploy(k, s, 1)
		for _, want := range []sandbox.Limits{{CPU: 0.3, CPUWeight: 100}, {CPU: 0.6, CPUWeight: sandbox.IdleWeight}} {
			a.mu.Lock()
			a.limit = want.CPU
			a.mu.Unlock()
			visit(t, a)
			synctest.Wait()
			a.each(func(_ *member, f *fakeInstance) {
				if got := f.Limits(); got.CPU != want.CPU || got.CPUWeight != want.CPUWeight {
					t.Errorf("got %+v, want %+v", got, want)
				}
			})
			time.Sleep(2 * time.Minute)
			if s := a.Status(); s.Standby != 1 {
				t.Fatalf("it is not frozen: %+v", s)
			}
		}
	})
}
