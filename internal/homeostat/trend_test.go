package homeostat

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

// world is a toy machine with one app on it: requests cost processor time,
// instances work them off in order, starts take a while. It carries out every
// plan, as control does.
type world struct {
	t     *testing.T
	p     Policy
	trend Trend
	rnd   *rand.Rand
	start time.Duration // a start takes
	spare float64
	used  float64 // cores, in the last look

	now     time.Duration
	looked  time.Duration
	queue   []job // in flight, oldest first
	limit   float64
	ready   []time.Duration // unused since, per instance
	births  []time.Duration // due
	active  int
	crowd   int
	arrived int
	done    int
	busy    time.Duration
	cpu     float64

	starts, resizes, most int
	waits                 []time.Duration
}

type job struct {
	at   time.Duration
	left float64 // seconds of a core
}

const tick = 2 * time.Millisecond

func newTestWorld(t *testing.T, p Policy) *world {
	t.Helper()
	return &world{t: t, p: p, rnd: rand.New(rand.NewPCG(1, uint64(p.Max))), start: 10 * time.Millisecond, spare: 64, limit: p.CPU.Rest, ready: make([]time.Duration, 1), active: 1}
}

func (w *world) load() Load {
	return Load{InFlight: len(w.queue), Ready: len(w.ready), Starting: len(w.births), Limit: w.limit, Start: w.start, Spare: max(w.spare-w.used, 0)}
}

// run lets time pass, with so many requests a second of that cost.
func (w *world) run(d time.Duration, rate float64, cost time.Duration) {
	w.t.Helper()
	next := time.Duration(0)
	for end := w.now + d; w.now < end; w.now += tick {
		for n := w.poisson(rate * tick.Seconds()); n > 0; n-- {
			w.queue = append(w.queue, job{w.now, cost.Seconds() * w.rnd.ExpFloat64()})
			w.arrived++
		}
		w.work()
		for len(w.births) > 0 && w.births[0] <= w.now {
			w.births = w.births[1:]
			w.ready = append(w.ready, w.now)
		}
		if len(w.queue) > w.crowd { // control looks sooner then
			next, w.crowd = min(next, w.now+5*time.Millisecond), 2*len(w.queue)
		}
		if w.now >= next {
			next = w.now + w.look()
			w.crowd = len(w.queue) + len(w.queue)/2 + 1
		}
		w.judge()
	}
}

func (w *world) poisson(mean float64) int {
	n, p := 0, math.Exp(-mean)
	for x := w.rnd.Float64(); x > p; x *= w.rnd.Float64() {
		n++
	}
	return n
}

// work gives each instance its part of the tick; a request has one core.
func (w *world) work() {
	left := min(w.limit*float64(len(w.ready)), w.spare) * tick.Seconds()
	kept := w.queue[:0]
	for i := range w.queue {
		j := w.queue[i]
		do := min(j.left, tick.Seconds(), left)
		j.left -= do
		left -= do
		w.cpu += do
		if j.left > 1e-9 {
			kept = append(kept, j)
			continue
		}
		w.done++
		w.busy += w.now - j.at + tick
		w.waits = append(w.waits, w.now-j.at+tick)
	}
	w.queue = kept
	for i := range w.ready {
		if i < len(w.queue) {
			w.ready[i] = w.now
		}
	}
}

func (w *world) look() time.Duration {
	if span := w.now - w.looked; span > 0 {
		w.used = w.cpu / span.Seconds()
		w.trend.Add(w.p, Sample{Span: span, Arrived: w.arrived, Answered: w.done, Busy: w.busy, CPU: seconds(w.cpu), Load: w.load()})
		w.looked, w.arrived, w.done, w.busy, w.cpu = w.now, 0, 0, 0, 0
	}
	plan := Decide(w.p, w.load(), &w.trend)
	w.active = plan.Active
	if plan.Limit > 0 && plan.Limit != w.limit {
		if plan.Limit < w.p.CPU.Rest || plan.Limit > w.p.CPU.Most() {
			w.t.Fatalf("limit %g is outside of %+v", plan.Limit, w.p.CPU)
		}
		w.limit = plan.Limit
		w.resizes++
	}
	for range plan.Start {
		w.births = append(w.births, w.now+w.start)
		w.starts++
	}
	have := len(w.ready) + len(w.births)
	w.most = max(w.most, have)
	if have > max(w.p.Max, 1) || have < min(w.p.Min, 1) {
		w.t.Fatalf("%d instances, allowed are %d to %d", have, w.p.Min, w.p.Max)
	}
	if plan.Look < 0 || plan.Look > lastLook {
		w.t.Fatalf("look in %v", plan.Look)
	}
	if plan.Look == 0 {
		return lastLook // the next request would look
	}
	return plan.Look
}

func (w *world) judge() {
	for i := len(w.ready) - 1; i > 0; i-- {
		l := Life{Unused: w.now - w.ready[i], Siblings: len(w.ready), Surplus: i >= w.active}
		if i < len(w.queue) {
			l.InFlight, l.Unused = 1, 0
		}
		if Judge(w.p, l).Verdict == Retire {
			w.ready = append(w.ready[:i], w.ready[i+1:]...)
		}
	}
}

func app() Policy {
	return Policy{Max: 10, Idle: time.Minute, CPU: Span[float64]{Rest: 0.3, Peak: 1}, Memory: Span[int64]{Rest: 1, Peak: 1}}
}

func TestTrend_SaturationRaisesTheLimitWithinTwentyMilliseconds(t *testing.T) {
	w := newTestWorld(t, app())
	w.run(2*time.Second, 5, time.Millisecond)
	if w.resizes != 0 {
		t.Fatalf("%d changes while there is little to do", w.resizes)
	}
	w.run(40*time.Millisecond, 3000, 10*time.Millisecond)
	if w.limit <= 0.3 {
		t.Errorf("the limit is %g after 40 ms of saturation", w.limit)
	}
	w.run(60*time.Millisecond, 3000, 10*time.Millisecond)
	if w.limit != 1 {
		t.Errorf("the limit is %g after 100 ms, want the peak", w.limit)
	}
}

// Who is stopped at the limit in most periods of one short look is at it; who
// only uses much for so short a time, or is stopped now and then, may not be.
func TestTrend_OneLookIsEnoughToSeeThatItIsStopped(t *testing.T) {
	for _, c := range []struct {
		what               string
		cores              float64
		periods, throttled uint64
		hot                bool
	}{
		{"stopped in one period of one", 0.3, 1, 1, true},
		{"stopped in a quarter of them", 0.2, 4, 1, true},
		{"stopped in fewer", 0.2, 5, 1, false},
		{"as much as the limit for 7 ms", 0.3, 1, 0, false},
	} {
		var trend Trend
		trend.Add(app(), Sample{Span: 7 * time.Millisecond, Arrived: 1, CPU: seconds(c.cores * .007), Periods: c.periods, Throttled: c.throttled,
			Load: Load{InFlight: 1, Ready: 1, Limit: 0.3, Spare: 4}})
		if hot := trend.Hot() > 0; hot != c.hot {
			t.Errorf("%s: at the limit %v, want %v", c.what, hot, c.hot)
		}
	}
}

func TestTrend_SiblingsFollowWhenThePeakIsNotEnough(t *testing.T) {
	w := newTestWorld(t, app())
	w.run(time.Second, 10, 2*time.Millisecond)
	w.run(300*time.Millisecond, 400, 10*time.Millisecond) // four cores' worth
	if len(w.ready) < 4 {
		t.Errorf("%d instances after 300 ms, want 4 and more", len(w.ready))
	}
	w.run(5*time.Second, 400, 10*time.Millisecond)
	if n := len(w.ready); n < 5 || n > 8 {
		t.Errorf("%d instances for four cores' worth of work, want 5 to 8", n)
	}
	w.waits = nil
	w.run(5*time.Second, 400, 10*time.Millisecond)
	slow := 0
	for _, d := range w.waits {
		if d > 200*time.Millisecond {
			slow++
		}
	}
	if slow > len(w.waits)/100 {
		t.Errorf("%d of %d responses took more than 200 ms with all instances there", slow, len(w.waits))
	}
}

func TestTrend_SurplusDiesAndLimitsReturn(t *testing.T) {
	w := newTestWorld(t, app())
	w.run(5*time.Second, 400, 10*time.Millisecond)
	if len(w.ready) < 4 || w.limit != 1 {
		t.Fatalf("%d instances with %g cores under load", len(w.ready), w.limit)
	}
	w.run(30*time.Second, 5, time.Millisecond)
	if len(w.ready) != 1 || w.limit != 0.3 {
		t.Errorf("%d instances with %g cores half a minute after the load, want 1 with 0.3", len(w.ready), w.limit)
	}
}

func TestTrend_NoiseDoesNotDoubleAnApp(t *testing.T) {
	for name, rate := range map[string]float64{"a quarter": 25, "half": 50, "six tenths": 60} {
		w := newTestWorld(t, app())
		w.run(2*time.Second, rate, 10*time.Millisecond)
		w.starts, w.resizes, w.most = 0, 0, 0
		w.run(time.Minute, rate, 10*time.Millisecond) // of one core's worth, the peak
		if w.most > 2 || w.starts > 6 {
			t.Errorf("%s of the peak: up to %d instances, %d starts in a minute", name, w.most, w.starts)
		}
		if w.resizes > 30 {
			t.Errorf("%s of the peak: %d changes of the limit in a minute", name, w.resizes)
		}
	}
}

func TestTrend_WithoutSpareCoresNoSiblingForTheProcessor(t *testing.T) {
	w := newTestWorld(t, app())
	w.spare = 1
	w.run(3*time.Second, 400, 10*time.Millisecond)
	if w.most > 2 {
		t.Errorf("up to %d instances, though one uses all there is", w.most)
	}
}

func TestTrend_SlowResponsesGetASiblingButNotMany(t *testing.T) {
	p := app()
	var trend Trend
	ready, starts := 1, 0
	look := func(span time.Duration, service time.Duration) {
		l := Load{InFlight: 20 * ready, Ready: ready, Limit: 0.3, Spare: 2}
		trend.Add(p, Sample{Span: span, Arrived: 10, Answered: 10, Busy: 10 * service, CPU: time.Millisecond, Load: l})
		plan := Decide(p, l, &trend)
		starts += plan.Start
		ready += plan.Start
		if plan.Start > 0 && plan.Cause != CauseSlow {
			t.Fatalf("cause %q", plan.Cause)
		}
	}
	for range 100 {
		look(50*time.Millisecond, 5*time.Millisecond)
	}
	if starts != 0 {
		t.Fatalf("%d starts while all is well", starts)
	}
	for range 18 { // nearly one second: the database is away, say
		look(50*time.Millisecond, 300*time.Millisecond)
	}
	if starts != 1 {
		t.Errorf("%d starts in a slow second, want 1", starts)
	}
	for range 200 {
		look(50*time.Millisecond, 300*time.Millisecond)
	}
	if starts > 3 {
		t.Errorf("%d starts in ten slow seconds in which they did not help", starts)
	}
}

// A flood is slow for as long as it lasts. When the processor limit is not in
// the way for a moment, because a neighbour had the processor, that is no reason
// for siblings; nor are there more of them than the app may have at rest beside others.
func TestTrend_AFloodGetsNoSiblingsForBeingSlow(t *testing.T) {
	p := app()
	p.CPU.Rest, p.CPU.Peak = 0.5, 1
	var trend Trend
	ready := 1
	look := func(service time.Duration, cores float64) {
		t.Helper()
		const span = 20 * time.Millisecond
		l := Load{InFlight: 200, Ready: ready, Limit: 1, Spare: 0.4, Ceiling: 1.4}
		trend.Add(p, Sample{Span: span, Arrived: 1, Answered: 1, Busy: service, CPU: seconds(cores * span.Seconds()), Load: l})
		if plan := Decide(p, l, &trend); plan.Start > 0 {
			t.Errorf("%d starts at %d, %q", plan.Start, ready, plan.Cause)
		}
	}
	for range 50 {
		look(20*time.Millisecond, 0.3)
	}
	for range 30 {
		for range 50 {
			look(4*time.Second, 0.99)
		}
		for range 5 {
			look(4*time.Second, 0.75)
		}
	}
	for range 100 { // nor while most of what it may use is used, and the limit is not in the way
		look(4*time.Second, 0.75)
	}
	ready = 2
	for range 1000 { // they wait for something else, and a third one would take what others may need
		look(4*time.Second, 0.1)
	}
}

// Others take all of the machine: what an app has above its rest goes back at
// once, and does not rise before there is something left.
func TestTrend_TheRestIsKeptOnAFullMachine(t *testing.T) {
	p := app()
	p.Max = 1
	var trend Trend
	limit, next, cause := p.CPU.Rest, firstLook, ""
	// live gives it at most so many cores while so many are left, until the
	// limit is some or a time is over.
	live := func(d time.Duration, spare, cores, until float64) (took time.Duration) {
		for took < d && limit != until {
			l := Load{InFlight: 5, Ready: 1, Limit: limit, Spare: spare, Ceiling: 1.5}
			trend.Add(p, Sample{Span: next, Arrived: 1, Answered: 1, Busy: 10 * time.Millisecond, CPU: seconds(min(cores, limit) * next.Seconds()), Load: l})
			plan := Decide(p, l, &trend)
			if plan.Limit > 0 {
				limit, cause = plan.Limit, plan.LimitCause
			}
			took += next
			next = plan.Look
		}
		return took
	}
	live(time.Second, 1, 1, 1)
	if limit != 1 {
		t.Fatalf("the limit is %g with a core to spare", limit)
	}
	live(time.Minute, 0, 0.4, p.CPU.Rest)
	if limit != 1 {
		t.Errorf("the limit is %g though it gets more than its rest", limit)
	}
	if took := live(time.Minute, 0, 0.01, p.CPU.Rest); took > 2*lastLook || cause != CauseOthers {
		t.Errorf("for %v it keeps a limit that only puts it behind others, then %q", took, cause)
	}
	live(time.Minute, 0, 1, 1)
	if limit != p.CPU.Rest {
		t.Errorf("the limit is %g on a full machine", limit)
	}
	live(time.Second, 0.5, 1, 1)
	if limit != 1 {
		t.Errorf("the limit is %g with half a core to spare", limit)
	}
}

// What others leave an app differs from moment to moment. Its limit follows
// what lasts.
func TestTrend_TheLimitDoesNotFollowNoise(t *testing.T) {
	p := app()
	p.Max = 1
	var trend Trend
	limit, changes := 1.0, 0
	look := func(ceiling float64) {
		l := Load{InFlight: 50, Ready: 1, Limit: limit, Spare: 0.4, Ceiling: ceiling}
		trend.Add(p, Sample{Span: firstLook, Arrived: 1, Answered: 1, Busy: 10 * time.Millisecond, CPU: seconds(limit * firstLook.Seconds()), Load: l})
		if plan := Decide(p, l, &trend); plan.Limit > 0 {
			limit, changes = plan.Limit, changes+1
		}
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 100 {
		for range 1 + rnd.IntN(30) { // up to 200 ms
			look(0.7)
		}
		look(1)
	}
	if changes > 0 {
		t.Errorf("the limit changed %d times, and is %g", changes, limit)
	}
	for range 100 { // 700 ms
		look(0.7)
	}
	if changes != 1 || limit != 0.7 {
		t.Errorf("after half a second with less the limit is %g, after %d changes", limit, changes)
	}
	// Neither does one look after a long time say that it lasts.
	calm := Trend{}
	l := Load{InFlight: 1, Ready: 1, Limit: 1, Spare: 0.4, Ceiling: 0.7}
	calm.Add(p, Sample{Span: lastLook, Arrived: 1, Answered: 1, Busy: 10 * time.Millisecond, CPU: lastLook / 2, Load: l})
	if plan := Decide(p, l, &calm); plan.Limit > 0 || plan.Look != firstLook {
		t.Errorf("at the first sight of less: limit %g, next look after %v", plan.Limit, plan.Look)
	}
}

// A queue that is gone before a sibling could be there gets none.
func TestDecide_QueueInProportion(t *testing.T) {
	p := Policy{Max: 20, Concurrency: 1, CPU: Span[float64]{Rest: 1, Peak: 1}}
	for _, c := range []struct {
		service time.Duration
		waiting int
		want    int
	}{
		{2 * time.Millisecond, 5, 0},
		{2 * time.Millisecond, 10, 1},
		{20 * time.Millisecond, 10, 4},
		{time.Second, 10, 10},
		{time.Second, 100, 19},
	} {
		l := Load{InFlight: 1, Ready: 1, Limit: 1, Start: 20 * time.Millisecond}
		var trend Trend
		for range 200 {
			trend.Add(p, Sample{Span: 10 * time.Millisecond, Arrived: 1, Answered: 1, Busy: c.service, Load: l})
		}
		// What arrives is served by one; then some more come at once.
		trend.arrived = 0.7 * trend.span / c.service.Seconds()
		l.Waiting = c.waiting
		if got := Decide(p, l, &trend).Start; got != c.want {
			t.Errorf("%d wait for one that takes %v: %d starts, want %d", c.waiting, c.service, got, c.want)
		}
	}
}

// Whatever happens, on a hundred days of the worst weather.
func TestTrend_RandomDays(t *testing.T) {
	for seed := range uint64(100) {
		rnd := rand.New(rand.NewPCG(seed, 7))
		p := Policy{Min: rnd.IntN(2), Max: 1 + rnd.IntN(8), Idle: time.Duration(rnd.IntN(20)) * time.Second}
		p.CPU.Rest = 0.05 + rnd.Float64()
		p.CPU.Peak = p.CPU.Rest * (1 + 3*rnd.Float64())
		p.Max = max(p.Max, p.Min)
		w := newTestWorld(t, p)
		w.rnd, w.start, w.spare = rnd, time.Duration(1+rnd.IntN(300))*time.Millisecond, rnd.Float64()*16
		for range 10 {
			w.run(time.Duration(rnd.IntN(2000))*time.Millisecond, rnd.Float64()*float64(rnd.IntN(300)), time.Duration(rnd.IntN(20))*time.Millisecond)
		}
		w.queue = nil
		w.run(25*time.Second, 0, 0)
		if len(w.ready) > max(p.Min, 1) || w.limit != p.CPU.Rest {
			t.Fatalf("seed %d, %+v: %d instances with %g cores after the storm", seed, p, len(w.ready), w.limit)
		}
	}
}

func FuzzTrend_StaysFinite(f *testing.F) {
	f.Add(int64(1), 3, 2, int64(5), int64(7), 1, 2, 0.5)
	f.Fuzz(func(t *testing.T, span int64, arrived, answered int, busy, cpu int64, inFlight, ready int, limit float64) {
		p := app()
		var trend Trend
		l := Load{InFlight: max(inFlight, 0) % 1e6, Ready: max(ready, 0) % 1000, Limit: limit, Spare: 1}
		for range 5 {
			trend.Add(p, Sample{Span: time.Duration(span), Arrived: max(arrived, 0), Answered: max(answered, 0), Busy: time.Duration(max(busy, 0)), CPU: time.Duration(max(cpu, 0)), Load: l})
		}
		plan := Decide(p, l, &trend)
		if plan.Start < 0 || plan.Start > p.Max || plan.Active < 1 || plan.Active > p.Max || plan.Look < 0 || math.IsNaN(plan.Limit) || plan.Limit < 0 || plan.Limit > 1 {
			t.Fatalf("got %+v", plan)
		}
	})
}
