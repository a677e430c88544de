package homeostat

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

func TestGaps_ChanceOfAVisit(t *testing.T) {
	var hourly Gaps
	for range 100 {
		hourly.Add(time.Hour)
	}
	var none Gaps
	for _, c := range []struct {
		name     string
		g        *Gaps
		quiet, d time.Duration
		from, to float64
	}{
		{"hourly, the next two hours", &hourly, time.Minute, 2 * time.Hour, .9, 1},
		{"hourly, the next minutes", &hourly, time.Minute, 10 * time.Minute, 0, .05},
		{"hourly, but silent for a day", &hourly, 24 * time.Hour, time.Hour, .03, .05},
		{"never seen: as likely as not", &none, time.Minute, time.Minute, .5, .5},
		{"never seen: soon", &none, time.Hour, time.Minute, .01, .02},
		{"no time left", &hourly, time.Minute, 0, 0, 0},
	} {
		if p := c.g.Chance(c.quiet, c.d); p < c.from || p > c.to {
			t.Errorf("%s: got %.3f, want %.2f to %.2f", c.name, p, c.from, c.to)
		}
	}
}

func TestJudge_WhatIsIdleFreezesWhereItIsWorthIt(t *testing.T) {
	idle := Life{Age: time.Minute, Limit: time.Hour, Unused: 10 * time.Minute, Quiet: 10 * time.Minute, Siblings: 1}
	with := func(boot time.Duration, chance, next float64) Life {
		l := idle
		l.Prospect = Prospect{Boot: boot, Chance: chance, Next: next}
		return l
	}
	surplus := with(time.Second, .5, .5)
	surplus.Surplus, surplus.Siblings = true, 2
	quickSurplus := surplus
	quickSurplus.Prospect.Boot = 10 * time.Millisecond
	old := with(time.Second, .5, .9)
	old.Age = time.Hour
	policy := func(s StandbyPolicy) Policy {
		return Policy{Idle: 5 * time.Minute, Lifetime: time.Hour, Max: 10, Standby: s}
	}
	for _, c := range []struct {
		name   string
		policy StandbyPolicy
		life   Life
		want   Verdict
		frozen Verdict // the same life as a standby
	}{
		{"never", StandbyNever, with(time.Second, .9, .9), Retire, Retire},
		{"auto, worth it", StandbyAuto, with(time.Second, .9, .9), Freeze, Keep},
		{"auto, start time not known", StandbyAuto, with(0, .9, .9), Retire, Keep},
		{"auto, starts in no time", StandbyAuto, with(time.Millisecond, .9, .9), Retire, Keep},
		{"auto, nobody will come", StandbyAuto, with(time.Second, .01, .01), Retire, Keep},
		{"always", StandbyAlways, with(0, 0, 0), Freeze, Keep},
		{"surplus of a slow starter", StandbyAuto, surplus, Freeze, Keep},
		{"surplus of a quick one", StandbyAuto, quickSurplus, Retire, Keep},
		{"at its end, slow and wanted", StandbyAuto, old, Retire, Replace},
		{"at its end, always", StandbyAlways, func() Life { l := idle; l.Age = time.Hour; return l }(), Retire, Replace},
		{"at its end, quick", StandbyAuto, func() Life { l := with(20*time.Millisecond, .9, .9); l.Age = time.Hour; return l }(), Retire, Retire},
		{"outdated, slow and wanted", StandbyAuto, func() Life { l := with(time.Second, .9, .9); l.Outdated = true; return l }(), Retire, Replace},
		{"outdated, nobody will come", StandbyAuto, func() Life { l := with(time.Second, .9, .1); l.Outdated = true; return l }(), Retire, Retire},
	} {
		if f := Judge(policy(c.policy), c.life); f.Verdict != c.want {
			t.Errorf("%s: got %v (%s), want %v", c.name, f.Verdict, f.Cause, c.want)
		}
		if f := JudgeStandby(policy(c.policy), c.life); f.Verdict != c.frozen {
			t.Errorf("%s, frozen: got %v (%s), want %v", c.name, f.Verdict, f.Cause, c.frozen)
		}
	}
	needed := with(time.Second, .9, .9)
	p := policy(StandbyAlways)
	p.Min = 1
	if f := Judge(p, needed); f.Verdict != Keep {
		t.Errorf("needed for scale.min: got %v", f.Verdict)
	}
}

func TestDecide_ThawsBeforeItStarts(t *testing.T) {
	p := Policy{Max: 10, Concurrency: 1}
	for _, c := range []struct {
		name        string
		load        Load
		thaw, start int
		refuse      bool
	}{
		{"one waits", Load{Waiting: 1, Standby: 1}, 1, 0, false},
		{"three wait", Load{Waiting: 3, Standby: 2}, 2, 1, false},
		{"none is wanted", Load{InFlight: 1, Ready: 1, Standby: 1}, 0, 0, false},
		{"a full machine", Load{Waiting: 3, InFlight: 1, Ready: 1, Standby: 1, Full: true}, 1, 0, false},
		{"an app that fails", Load{Waiting: 1, Standby: 1, Failures: 3}, 1, 0, false},
		{"one that fails, with none", Load{Waiting: 1, Failures: 3}, 0, 0, true},
	} {
		plan := Decide(p, c.load, &Trend{})
		if plan.Thaw != c.thaw || plan.Start != c.start || plan.Refuse != c.refuse {
			t.Errorf("%s: got thaw %d, start %d, refuse %v", c.name, plan.Thaw, plan.Start, plan.Refuse)
		}
	}
}

func TestRation_KeepsWithinTheBudgetWhatIsWorthMost(t *testing.T) {
	dice := rand.New(rand.NewPCG(1, 2))
	for range 1000 {
		list := make([]Standby, dice.IntN(20))
		held := int64(0)
		for i := range list {
			list[i] = Standby{
				Memory: 1 + dice.Int64N(1<<30), Always: dice.IntN(4) == 0,
				Prospect: Prospect{Boot: time.Duration(dice.Int64N(int64(time.Second))), Chance: dice.Float64()},
			}
			held += list[i].Memory
		}
		budget := dice.Int64N(4 << 30)
		gone := Ration(budget, list)
		left := held
		for n, i := range gone {
			if left <= budget {
				t.Fatalf("one more than needed: %d of %d", n, len(gone))
			}
			left -= list[i].Memory
			for j := range list {
				if slices.Contains(gone, j) || list[i].Always == list[j].Always && list[i].Worth() <= list[j].Worth() || list[j].Always && !list[i].Always {
					continue
				}
				t.Fatalf("%d went, worth %f; %d stayed, worth %f", i, list[i].Worth(), j, list[j].Worth())
			}
		}
		if left > budget {
			t.Fatalf("%d bytes are left of a budget of %d", left, budget)
		}
	}
}

func TestDigest_StandbysFirstAndOnlyForMemory(t *testing.T) {
	cells := []Cell{
		{App: 1, Unused: time.Minute, Siblings: 2, Surplus: true, Memory: 100},
		{App: -1, Standby: true, Worth: 2, Memory: 100},
		{App: -2, Standby: true, Worth: 1, Memory: 100},
	}
	bites := Digest(Hunger{Memory: 250}, cells, 5)
	if len(bites) != 3 || bites[0].Cell != 2 || bites[1].Cell != 1 || bites[2].Cell != 0 {
		t.Errorf("got %+v", bites)
	}
	if bites := Digest(Hunger{Rooms: 2}, cells, 5); len(bites) != 1 || bites[0].Cell != 0 {
		t.Errorf("for room: got %+v", bites)
	}
}
