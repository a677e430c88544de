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
		if got := Decide(c.p, c.l, &Trend{}); got.Start != c.want.Start || got.Cause != c.want.Cause || got.Refuse != c.want.Refuse || got.RetryIn != c.want.RetryIn {
			t.Errorf("%s: got %+v, want %+v", name, got, c.want)
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
		plan := Decide(p, l, &Trend{})
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
	var trend Trend
	if n := testing.AllocsPerRun(100, func() { _ = Decide(p, l, &trend) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkDecide(b *testing.B) {
	p, l := Policy{Max: 10, Concurrency: 100}, Load{InFlight: 30, Ready: 1}
	trend := warm(p, l)
	b.ReportAllocs()
	for b.Loop() {
		trend.Add(p, Sample{Span: 10 * time.Millisecond, Arrived: 10, Answered: 10, Busy: 30 * time.Millisecond, CPU: time.Millisecond, Load: l})
		_ = Decide(p, l, &trend)
	}
}

// warm is the trend of an app that has been busy and well for a while.
func warm(p Policy, l Load) Trend {
	var t Trend
	for range 200 {
		t.Add(p, Sample{Span: 50 * time.Millisecond, Arrived: 50, Answered: 50, Busy: 150 * time.Millisecond, CPU: 5 * time.Millisecond, Load: l})
	}
	return t
}
