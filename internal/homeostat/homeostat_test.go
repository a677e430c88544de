package homeostat

import (
	"math/rand/v2"
	"testing"
	"time"
)

func TestDecide(t *testing.T) {
	one := Policy{Max: 1}
	for name, c := range map[string]struct {
		p    Policy
		l    Load
		want Plan
	}{
		"nothing to do":                 {one, Load{}, Plan{}},
		"first request":                 {one, Load{Waiting: 1}, Plan{Start: 1, Cause: CauseRequest}},
		"a thousand first requests":     {Policy{Max: 10}, Load{Waiting: 1000}, Plan{Start: 1, Cause: CauseRequest}},
		"already starting":              {one, Load{Waiting: 7, Starting: 1}, Plan{}},
		"ready, no cap":                 {Policy{Max: 10}, Load{InFlight: 5000, Ready: 1}, Plan{}},
		"one at a time, three wait":     {Policy{Max: 10, Concurrency: 1}, Load{Waiting: 3, InFlight: 1, Ready: 1}, Plan{Start: 3, Cause: CauseLoad}},
		"never above max":               {Policy{Max: 2, Concurrency: 1}, Load{Waiting: 9, InFlight: 1, Ready: 1}, Plan{Start: 1, Cause: CauseLoad}},
		"minimum":                       {Policy{Min: 2, Max: 5}, Load{}, Plan{Start: 2, Cause: CauseMinimum}},
		"failing: refuse at once":       {one, Load{Waiting: 1, Failures: 1, SinceFailure: 100 * time.Millisecond}, Plan{Refuse: true, RetryIn: 400 * time.Millisecond}},
		"failing, but one still serves": {Policy{Max: 5, Concurrency: 1}, Load{Waiting: 1, InFlight: 1, Ready: 1, Failures: 1}, Plan{RetryIn: 500 * time.Millisecond}},
		"rested: one trial":             {Policy{Max: 5, Concurrency: 1}, Load{Waiting: 5, Failures: 3, SinceFailure: 2 * time.Second}, Plan{Start: 1, Cause: CauseRequest}},
	} {
		if got := Decide(c.p, c.l); got != c.want {
			t.Errorf("%s: got %+v, want %+v", name, got, c.want)
		}
	}
}

func TestJudge(t *testing.T) {
	p := Policy{Max: 5, Lifetime: time.Minute, Idle: 20 * time.Second}
	for name, c := range map[string]struct {
		p    Policy
		l    Life
		want Fate
	}{
		"young and busy":            {p, Life{Age: time.Second, Limit: time.Minute, InFlight: 1, Siblings: 1}, Fate{Again: 20 * time.Second}},
		"idle soon":                 {p, Life{Age: 15 * time.Second, Limit: time.Minute, Unused: 15 * time.Second, Siblings: 1}, Fate{Again: 5 * time.Second}},
		"idle":                      {p, Life{Age: 20 * time.Second, Limit: time.Minute, Unused: 20 * time.Second, Siblings: 1}, Fate{Verdict: Retire, Cause: CauseIdle}},
		"idle, but the last of min": {Policy{Min: 1, Max: 1, Idle: time.Second}, Life{Unused: time.Hour, Siblings: 1}, Fate{}},
		"old and unused":            {p, Life{Age: time.Minute, Limit: time.Minute, Unused: 15 * time.Second, Siblings: 1}, Fate{Verdict: Retire, Cause: CauseLifetime}},
		"old and busy":              {p, Life{Age: time.Minute, Limit: time.Minute, InFlight: 3, Siblings: 1}, Fate{Verdict: Replace, Cause: CauseLifetime}},
		"old and just used":         {p, Life{Age: time.Minute, Limit: time.Minute, Unused: time.Second, Siblings: 1}, Fate{Verdict: Replace, Cause: CauseLifetime}},
		"outdated, in use":          {p, Life{Outdated: true, InFlight: 1, Siblings: 1}, Fate{Verdict: Replace, Cause: CauseOutdated}},
		"outdated, unused":          {p, Life{Outdated: true, Unused: 15 * time.Second, Siblings: 1}, Fate{Verdict: Retire, Cause: CauseOutdated}},
		"for ever":                  {Policy{Max: 1}, Life{Age: 1000 * time.Hour, Unused: time.Hour, Siblings: 1}, Fate{}},
	} {
		if got := Judge(c.p, c.l); got != c.want {
			t.Errorf("%s: got %+v, want %+v", name, got, c.want)
		}
	}
}

func TestBackoff_GrowsAndIsBounded(t *testing.T) {
	last := time.Duration(0)
	for n := range 100 {
		b := Backoff(n)
		if b < last || b > 30*time.Second {
			t.Fatalf("after %d failures: %v, before %v", n, b, last)
		}
		last = b
	}
}

func TestLifetime_IsAtMostATenthShorter(t *testing.T) {
	p := Policy{Lifetime: time.Minute}
	for range 1000 {
		if l := Lifetime(p, rand.Float64()); l > time.Minute || l < 54*time.Second {
			t.Fatalf("got %v", l)
		}
	}
}

// Whatever the facts, a plan stays within its bounds.
func TestDecide_Invariants(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 200000 {
		p := Policy{Min: rnd.IntN(4), Concurrency: rnd.IntN(5)}
		p.Max = p.Min + rnd.IntN(6)
		l := Load{Waiting: rnd.IntN(50), InFlight: rnd.IntN(50), Ready: rnd.IntN(8), Starting: rnd.IntN(8), Failures: rnd.IntN(12), SinceFailure: time.Duration(rnd.Int64N(int64(time.Minute)))}
		plan := Decide(p, l)
		have := l.Ready + l.Starting
		switch {
		case plan.Start < 0:
			t.Fatalf("%+v %+v: negative start", p, l)
		case plan.Start > 0 && have+plan.Start > max(p.Max, 1):
			t.Fatalf("%+v %+v: %d more is above max", p, l, plan.Start)
		case plan.Start > 0 && plan.Cause == "":
			t.Fatalf("%+v %+v: no cause", p, l)
		case plan.Refuse && (plan.RetryIn <= 0 || have > 0):
			t.Fatalf("%+v %+v: refused without need: %+v", p, l, plan)
		case l.Waiting > 0 && have == 0 && plan.Start == 0 && !plan.Refuse:
			t.Fatalf("%+v %+v: somebody waits for nothing", p, l)
		case l.Failures == 0 && have+plan.Start < p.Min:
			t.Fatalf("%+v %+v: below min", p, l)
		}
	}
}

func TestDecide_WarmCostsNothing(t *testing.T) {
	p, l := Policy{Max: 10, Concurrency: 100}, Load{InFlight: 30, Ready: 1}
	if n := testing.AllocsPerRun(100, func() { _ = Decide(p, l) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkDecide(b *testing.B) {
	p, l := Policy{Max: 10, Concurrency: 100}, Load{InFlight: 30, Ready: 1}
	for b.Loop() {
		_ = Decide(p, l)
	}
}
