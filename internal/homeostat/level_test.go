package homeostat

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

func TestGaps(t *testing.T) {
	var g Gaps
	for range 100 {
		g.Add(3 * time.Second)
	}
	for range 50 {
		g.Add(time.Hour)
	}
	g.Add(0)
	g.Add(1000 * time.Hour)
	if g.N() != 152 {
		t.Errorf("got %g", g.N())
	}
	if got := g.Over(5 * time.Minute); got != 51 {
		t.Errorf("%g are longer than five minutes", got)
	}
	if got := g.Within(0, time.Minute); math.Abs(got.Seconds()-(300+51*60)) > 30 {
		t.Errorf("up to a minute of each is %v together", got)
	}
	g.counts[3] = math.MaxUint32
	g.Add(5 * time.Millisecond)
	if g.counts[3] != math.MaxUint32/2+1 || g.Over(time.Minute) > 26 {
		t.Errorf("a full bucket: %+v", g)
	}
}

// poisson is the history of requests by chance.
func poisson(perSecond float64) *History {
	rnd := rand.New(rand.NewPCG(5, 6))
	h := &History{Start50: 10 * time.Millisecond, Start99: 40 * time.Millisecond}
	for range 100000 {
		gap := time.Duration(rnd.ExpFloat64() / perSecond * float64(time.Second))
		h.Gaps.Add(gap)
		h.Requests++
		h.Span += gap
	}
	return h
}

func TestExpect_PoissonArrivals(t *testing.T) {
	h := poisson(1.0 / 60)
	for _, idle := range []time.Duration{10 * time.Second, time.Minute, 5 * time.Minute} {
		got, want := h.Expect(idle, 0, 0), math.Exp(-idle.Seconds()/60)
		if math.Abs(got.Cold-want) > 0.06 {
			t.Errorf("idle %v: %.3f of the requests are cold, the exact share is %.3f", idle, got.Cold, want)
		}
		if awake := 1 - want; math.Abs(got.Awake-awake) > 0.06 {
			t.Errorf("idle %v: awake %.3f, exact %.3f", idle, got.Awake, awake)
		}
	}
}

func TestExpect_Bounds(t *testing.T) {
	if got := (&History{}).Expect(time.Minute, time.Minute, 0); got != (Level{}) {
		t.Errorf("of nothing: %+v", got)
	}
	h := poisson(1)
	if got := h.Expect(time.Minute, 0, 1); got.Cold != 0 || got.Awake != 1 || got.Wait99 != 0 {
		t.Errorf("always on: %+v", got)
	}
	last := 1.1
	for idle := time.Second; idle < time.Hour; idle *= 2 {
		got := h.Expect(idle, 20*time.Minute, 0)
		if got.Cold > last || got.Cold < 0 || got.Awake < 0 || got.Awake > 1 {
			t.Fatalf("idle %v: %+v after %g", idle, got, last)
		}
		last = got.Cold
	}
	seldom := poisson(1.0 / 3600)
	if got := seldom.Expect(time.Second, 0, 0); got.Wait50 < 9*time.Millisecond || got.Wait99 < 35*time.Millisecond || got.Wait99 > 45*time.Millisecond {
		t.Errorf("nearly all are cold: %+v", got)
	}
}

func TestReach(t *testing.T) {
	h := poisson(1.0 / 60)
	idle, ok := h.Reach(.99, 0)
	if !ok || idle < 4*time.Minute || idle > 9*time.Minute {
		t.Errorf("for 99 %%: %v, %v; the exact time is 4m36s", idle, ok)
	}
	if _, ok := poisson(1.0/1e6).Reach(.999, 0); ok {
		t.Error("an idle time of a day is said to be enough for a request in eleven days")
	}
}
