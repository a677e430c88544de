package control

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// savedSpec is an app that renews what must differ in siblings.
func savedSpec(name string, policy fleet.StartPolicy) fleet.Spec {
	s := standbySpec(name, policy)
	s.RestoredSignal = "USR2"
	return s
}

// saving runs a test with a node that can save processes.
func saving(t *testing.T, test func(t *testing.T, k *Control, n *fakeNode)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		n := &fakeNode{
			took: time.Second, saving: 5 * time.Second, restoring: 30 * time.Millisecond,
			running: map[fleet.InstanceID]bool{}, saved: map[fleet.RevisionID]bool{},
		}
		k := newTestControl(t, n, func(*Config) {}) // it keeps no standbys
		test(t, k, n)
		k.Close()
	})
}

// wakes makes a visit that finds the app asleep, and lets it fall asleep again.
func wakes(t *testing.T, a *App) time.Duration {
	t.Helper()
	d := visit(t, a)
	time.Sleep(2 * time.Minute)
	synctest.Wait()
	if s := a.Status(); s.Ready > 0 {
		t.Fatal("it does not fall asleep")
	}
	return d
}

func (n *fakeNode) wishes() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.saves
}

func TestTiers_ASlowStartIsSavedAndRestored(t *testing.T) {
	saving(t, func(t *testing.T, k *Control, n *fakeNode) {
		a := deploy(k, savedSpec("shop", fleet.StartAuto), 1)
		for i, want := range []time.Duration{time.Second, 30 * time.Millisecond, 30 * time.Millisecond} {
			if d := wakes(t, a); d != want {
				t.Errorf("visit %d waited %v, want %v", i, d, want)
			}
		}
		if got := n.wishes(); got != 1 {
			t.Errorf("saved %d times", got)
		}
		starts := a.Starts()
		if c := starts[1]; c.Kind != fleet.CheckpointStart || c.Starts != 2 || c.Usual != 30*time.Millisecond || !c.Next || c.Disk != 1<<20 {
			t.Errorf("told %+v", c)
		}
		if c := starts[0]; c.Starts != 1 || c.Next {
			t.Errorf("told %+v", c)
		}
	})
}

func TestTiers_TheRequestComesFirst(t *testing.T) {
	saving(t, func(t *testing.T, k *Control, n *fakeNode) {
		a := deploy(k, savedSpec("shop", fleet.StartAuto), 1)
		visit(t, a)
		synctest.Wait()
		if n.wishes() != 0 {
			t.Error("processes are saved while a request waits")
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if n.wishes() != 1 {
			t.Error("processes are not saved")
		}
	})
}

func TestTiers_OneIsMadeAtATime(t *testing.T) {
	saving(t, func(t *testing.T, k *Control, n *fakeNode) {
		n.saving = time.Hour
		a := deploy(k, savedSpec("shop", fleet.StartAuto), 1)
		for range 3 {
			wakes(t, a)
		}
		if got := n.wishes(); got != 1 {
			t.Errorf("saved %d times at once", got)
		}
	})
}

// Whoever deletes what is saved of a removed app finds all of it: nothing is
// saved later.
func TestTiers_ARemovedAppIsNotSaved(t *testing.T) {
	for name, before := range map[string]time.Duration{"while it waits": saveDelay / 2, "while it is saved": 3 * saveDelay} {
		t.Run(name, func(t *testing.T) {
			saving(t, func(t *testing.T, k *Control, n *fakeNode) {
				a := deploy(k, savedSpec("shop", fleet.StartAuto), 1)
				visit(t, a)
				time.Sleep(before)
				k.RemoveApp("shop")
				time.Sleep(time.Hour)
				n.mu.Lock()
				defer n.mu.Unlock()
				if len(n.saved) != 0 {
					t.Error("it is saved")
				}
			})
		})
	}
}

func TestTiers_ASlowRestoreIsGivenUp(t *testing.T) {
	saving(t, func(t *testing.T, k *Control, n *fakeNode) {
		n.restoring = 3 * time.Second
		a := deploy(k, savedSpec("shop", fleet.StartAuto), 1)
		var got []time.Duration
		for range 6 {
			got = append(got, wakes(t, a))
		}
		if got[3] != 3*time.Second || got[4] != time.Second || got[5] != time.Second {
			t.Errorf("starts took %v", got)
		}
	})
}

func TestTiers_ANewRevisionIsTriedAgain(t *testing.T) {
	saving(t, func(t *testing.T, k *Control, n *fakeNode) {
		spec := savedSpec("shop", fleet.StartAuto)
		a := deploy(k, spec, 1)
		wakes(t, a)
		wakes(t, a)
		deploy(k, spec, 2)
		if d := wakes(t, a); d != time.Second {
			t.Errorf("processes of the revision before were restored: %v", d)
		}
		if d := wakes(t, a); d != 30*time.Millisecond {
			t.Errorf("those of the new one were not: %v", d)
		}
		if got := n.wishes(); got != 2 {
			t.Errorf("saved %d times", got)
		}
	})
}

func TestTiers_WhoIsNotSaved(t *testing.T) {
	for name, change := range map[string]func(*fleet.Spec, *fakeNode){
		"who does not want it":                             func(s *fleet.Spec, _ *fakeNode) { s.Start = fleet.StartCold },
		"who has not said that it renews what must differ": func(s *fleet.Spec, _ *fakeNode) { s.RestoredSignal = "" },
		"who starts quickly":                               func(_ *fleet.Spec, n *fakeNode) { n.took = 10 * time.Millisecond },
		"who is alone and writes to a volume": func(s *fleet.Spec, _ *fakeNode) {
			s.Scale.Max, s.Volumes = 1, []fleet.Volume{{Name: "data", Mount: "/data"}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			saving(t, func(t *testing.T, k *Control, n *fakeNode) {
				spec := savedSpec("shop", fleet.StartAuto)
				change(&spec, n)
				a := deploy(k, spec, 1)
				wakes(t, a)
				if n.wishes() != 0 {
					t.Error("it is saved")
				}
				spec.Start = fleet.StartCheckpoint
				if a = deploy(k, spec, 2); name != "who does not want it" {
					wakes(t, a)
					if n.wishes() != 1 {
						t.Error("it is not saved though its owner wants it")
					}
				}
			})
		})
	}
}

// Saving is what a machine does when it has nothing better to do.
func TestTiers_SavingYields(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*Config)
		saved  bool // in the end
	}{
		"there is room":                 {small(3), true},
		"there is none":                 {small(1), false},
		"somebody needs the room":       {small(2), false},
		"one start at a time":           {func(c *Config) { c.Starts = 1 }, true},
		"the machine lacks processors":  {func(c *Config) { small(3)(c); c.Capacity.CPU = 1 }, false},
		"the machine has no bounds set": {func(*Config) {}, true},
	} {
		t.Run(name, func(t *testing.T) {
			bubbleWith(t, c.change, func(t *testing.T, k *Control, n *fakeNode) {
				n.took, n.saving, n.saved = time.Second, time.Minute, map[fleet.RevisionID]bool{}
				slow, other := savedSpec("slow", fleet.StartAuto), testSpec("other")
				for _, s := range []*fleet.Spec{&slow, &other} {
					s.Resources.CPU, s.Resources.Memory = fleet.CPU{Rest: .4, Peak: .4}, fleet.Memory{Rest: 64 * mib, Peak: 64 * mib}
				}
				slow.Idle = fleet.Duration(time.Hour)
				visit(t, deploy(k, slow, 1))
				time.Sleep(10 * time.Second) // it is being saved
				if name != "there is none" {
					if d := visit(t, deploy(k, other, 1)); d > 1200*time.Millisecond {
						t.Errorf("the other app's start waited %v", d)
					}
				}
				time.Sleep(time.Hour / 2)
				synctest.Wait()
				n.mu.Lock()
				defer n.mu.Unlock()
				if n.saved["slow@1"] != c.saved {
					t.Errorf("saved: %v", !c.saved)
				}
			})
		})
	}
}
