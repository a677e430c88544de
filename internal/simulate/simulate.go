// Package simulate replays requests through the very homeostat that runs in
// production, faster than real time: what would another idle time, another
// lifetime or another start time have meant for these apps?
//
// What it leaves out: apps do not compete for the machine, a response takes
// the same time whatever the processor limit, and nothing fails.
package simulate

import (
	"container/heap"
	"context"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/homeostat"
)

// Variant is a policy that is tried, with its name.
type Variant struct {
	Name   string
	Policy homeostat.Policy
}

// Model is what an app's containers are like.
type Model struct {
	// Start50 and Start99: half and 99 % of the starts take at most so long.
	Start50, Start99 time.Duration
	// Service is the mean time of a response, CPU the share of it that is
	// processor time.
	Service time.Duration
	CPU     float64
}

// Arrivals gives the times of one app's requests since the begin, in order;
// false after the last.
type Arrivals func() (time.Duration, bool)

// Day is what is replayed: so many apps for so long. App gives the arrivals of
// one of them, the same each time.
type Day struct {
	Apps int
	Span time.Duration
	App  func(i int) Arrivals
	Seed uint64
}

// Result of one variant.
type Result struct {
	Name     string `json:"name"`
	Requests uint64 `json:"requests"`
	// Cold requests waited for a start.
	Cold   uint64 `json:"cold"`
	Starts uint64 `json:"starts"`
	// Wait of all requests for an instance.
	Wait50  time.Duration `json:"wait_p50_ns"`
	Wait99  time.Duration `json:"wait_p99_ns"`
	Longest time.Duration `json:"wait_max_ns"`
	// InstanceSeconds of all instances, MemorySeconds in bytes × seconds.
	InstanceSeconds float64 `json:"instance_seconds"`
	MemorySeconds   float64 `json:"memory_byte_seconds"`
	// Instances in each minute, as a mean, and the cold requests of it.
	Instances   []float64 `json:"instances"`
	ColdMinutes []uint64  `json:"cold_by_minute"`
}

// Peak is the most instances in any minute.
func (r *Result) Peak() float64 { return slices.Max(append([]float64{0}, r.Instances...)) }

// ColdShare of the requests.
func (r *Result) ColdShare() float64 { return float64(r.Cold) / max(float64(r.Requests), 1) }

// Run tries the variants on a day. Progress, if not nil, is told the share
// that is done, from any goroutine.
func Run(ctx context.Context, d Day, m Model, variants []Variant, progress func(float64)) ([]*Result, error) {
	results := make([]*Result, len(variants))
	var done atomic.Int64
	for v, variant := range variants {
		parts := make([]*partial, d.Apps)
		var next atomic.Int64
		var wg sync.WaitGroup
		for range runtime.GOMAXPROCS(0) {
			wg.Go(func() {
				for i := int(next.Add(1)) - 1; i < d.Apps && ctx.Err() == nil; i = int(next.Add(1)) - 1 {
					parts[i] = one(d, m, variant.Policy, i)
					if n := done.Add(1); progress != nil && n%64 == 0 {
						progress(float64(n) / float64(d.Apps*len(variants)))
					}
				}
			})
		}
		wg.Wait()
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		results[v] = sum(variant, d, parts)
	}
	return results, nil
}

// partial is the result of one app.
type partial struct {
	requests, cold, starts uint64
	waits                  waits
	alive                  map[int]float64 // seconds by minute
	coldAt                 map[int]uint64
}

func sum(v Variant, d Day, parts []*partial) *Result {
	minutes := int(d.Span/time.Minute) + 1
	r := &Result{Name: v.Name, Instances: make([]float64, minutes), ColdMinutes: make([]uint64, minutes)}
	var all waits
	for _, p := range parts {
		r.Requests += p.requests
		r.Cold += p.cold
		r.Starts += p.starts
		all.merge(&p.waits)
		for _, minute := range sorted(p.alive) {
			r.InstanceSeconds += p.alive[minute]
			if minute < minutes {
				r.Instances[minute] += p.alive[minute] / 60
			}
		}
		for minute, n := range p.coldAt {
			if minute < minutes {
				r.ColdMinutes[minute] += n
			}
		}
	}
	r.MemorySeconds = r.InstanceSeconds * float64(v.Policy.Memory.Rest)
	r.Wait50, r.Wait99, r.Longest = all.quantile(.5), all.quantile(.99), all.most
	return r
}

// sorted keys: sums of floating point come out alike in one order only.
func sorted(m map[int]float64) []int {
	keys := make([]int, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// instance of the app that is simulated.
type instance struct {
	ready, limit time.Duration // when, and its own lifetime
	unused       time.Duration // since
	inFlight     int
	retiring     bool
	replacing    bool
}

// event kinds, in the order in which those of one moment happen.
const (
	evReady = iota
	evAnswer
	evLook
	evJudge
)

type event struct {
	at    time.Duration
	kind  int
	inst  *instance
	began time.Duration // of the request that is answered
	old   *instance     // that the one which is ready replaces
}

type events []event

func (e events) Len() int { return len(e) }
func (e events) Less(i, j int) bool {
	return e[i].at < e[j].at || e[i].at == e[j].at && e[i].kind < e[j].kind
}
func (e events) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)   { *e = append(*e, x.(event)) } //nolint:forcetypeassert // only events
func (e *events) Pop() any {
	old := *e
	last := old[len(old)-1]
	*e = old[:len(old)-1]
	return last
}

// life is one app's day.
type life struct {
	p   homeostat.Policy
	m   Model
	rnd *rand.Rand
	out *partial

	now      time.Duration
	end      time.Duration
	queue    events
	ready    []*instance
	waiting  []time.Duration // arrivals, oldest first
	starting int
	active   int
	limit    float64
	trend    homeostat.Trend
	judgeAt  time.Duration
	used     time.Duration // end of the last response

	looking           bool
	lookedAt          time.Duration
	arrived, answered int
	busy              time.Duration
	inFlight          int
}

// one simulates one app.
func one(d Day, m Model, p homeostat.Policy, i int) *partial {
	l := &life{
		p: p, m: m, end: d.Span, active: 1, limit: p.CPU.Rest, rnd: rand.New(rand.NewPCG(d.Seed, uint64(i))), //nolint:gosec // not negative
		out: &partial{alive: map[int]float64{}, coldAt: map[int]uint64{}},
	}
	arrivals := d.App(i)
	next, more := arrivals()
	if p.Min > 0 {
		l.decide()
	}
	for {
		if more && next < l.end && (len(l.queue) == 0 || next < l.queue[0].at) {
			l.now = next
			l.request()
			next, more = arrivals()
			continue
		}
		if len(l.queue) == 0 || l.queue[0].at >= l.end {
			break
		}
		e := heap.Pop(&l.queue).(event) //nolint:forcetypeassert // only events
		l.now = e.at
		switch e.kind {
		case evReady:
			l.join(e.old)
		case evAnswer:
			l.answer(e)
		case evLook:
			l.look()
		case evJudge:
			if e.at == l.judgeAt {
				l.judge()
			}
		}
	}
	l.now = l.end
	for _, in := range l.ready {
		l.died(in)
	}
	return l.out
}

func (l *life) push(e event) { heap.Push(&l.queue, e) }

func (l *life) request() {
	l.out.requests++
	l.arrived++
	if in := l.free(); in != nil && len(l.waiting) == 0 {
		l.out.waits.add(0)
		l.serve(in, l.now)
		l.noticed()
		return
	}
	l.out.cold++
	l.out.coldAt[int(l.now/time.Minute)]++
	l.waiting = append(l.waiting, l.now)
	l.noticed()
	l.decide()
}

// free is control's rule: the least loaded of the active ones, or else another.
func (l *life) free() *instance {
	var best *instance
	place := 0
	for _, in := range l.ready {
		if in.retiring {
			continue
		}
		place++
		if best != nil && place > l.active {
			break
		}
		if l.p.Concurrency > 0 && in.inFlight >= l.p.Concurrency {
			continue
		}
		if best == nil || in.inFlight < best.inFlight {
			best = in
		}
	}
	return best
}

func (l *life) serve(in *instance, arrived time.Duration) {
	if wait := l.now - arrived; wait > 0 {
		l.out.waits.add(wait)
	}
	in.inFlight++
	l.inFlight++
	took := time.Duration(l.rnd.ExpFloat64() * float64(l.m.Service))
	l.push(event{at: l.now + took, kind: evAnswer, inst: in, began: l.now})
}

func (l *life) answer(e event) {
	in := e.inst
	in.inFlight--
	l.inFlight--
	l.answered++
	l.busy += l.now - e.began
	l.used = l.now
	if in.inFlight == 0 {
		in.unused = l.now
		if in.retiring {
			l.died(in)
		}
	}
	l.drain()
}

// drain gives free slots to the oldest holds.
func (l *life) drain() {
	for len(l.waiting) > 0 {
		in := l.free()
		if in == nil {
			return
		}
		l.serve(in, l.waiting[0])
		l.waiting = l.waiting[1:]
	}
}

func (l *life) load() homeostat.Load {
	load := homeostat.Load{Waiting: len(l.waiting), InFlight: l.inFlight, Starting: l.starting, Limit: l.limit, Start: l.m.Start50, Spare: -1}
	for _, in := range l.ready {
		if !in.retiring {
			load.Ready++
		}
	}
	return load
}

func (l *life) decide() {
	plan := homeostat.Decide(l.p, l.load(), &l.trend)
	l.active = plan.Active
	for range plan.Start {
		l.start(nil)
	}
}

func (l *life) start(old *instance) {
	l.starting++
	l.out.starts++
	sigma := 0.0
	if l.m.Start50 > 0 && l.m.Start99 > l.m.Start50 {
		sigma = math.Log(float64(l.m.Start99)/float64(l.m.Start50)) / 2.3263
	}
	took := time.Duration(float64(l.m.Start50) * math.Exp(sigma*l.rnd.NormFloat64()))
	l.push(event{at: l.now + took, kind: evReady, old: old})
}

func (l *life) join(old *instance) {
	l.starting--
	l.ready = append(l.ready, &instance{ready: l.now, unused: l.now, limit: homeostat.Lifetime(l.p, l.rnd.Float64())})
	if old != nil && !old.retiring {
		l.retire(old)
	}
	l.drain()
	l.noticed()
	l.decide()
	l.judge()
}

func (l *life) retire(in *instance) {
	in.retiring = true
	if in.inFlight == 0 {
		l.died(in)
	}
}

// died books an instance's life, minute by minute.
func (l *life) died(in *instance) {
	for at := in.ready; at < l.now; {
		minute := at / time.Minute
		to := min((minute+1)*time.Minute, l.now)
		l.out.alive[int(minute)] += (to - at).Seconds()
		at = to
	}
	if i := slices.Index(l.ready, in); i >= 0 && l.now < l.end {
		l.ready = slices.Delete(l.ready, i, i+1)
	}
}

// noticed begins to look.
func (l *life) noticed() {
	if !l.looking && len(l.ready) > 0 {
		l.looking = true
		l.trend.Wake(l.now - l.lookedAt)
		l.lookedAt = l.now
		l.push(event{at: l.now + 7*time.Millisecond, kind: evLook})
	}
}

func (l *life) look() {
	load := l.load()
	l.trend.Add(l.p, homeostat.Sample{
		Span: l.now - l.lookedAt, Arrived: l.arrived, Answered: l.answered, Busy: l.busy,
		CPU: time.Duration(l.m.CPU * float64(l.busy)), Load: load,
	})
	l.lookedAt, l.arrived, l.answered, l.busy = l.now, 0, 0, 0
	plan := homeostat.Decide(l.p, load, &l.trend)
	l.active = plan.Active
	for range plan.Start {
		l.start(nil)
	}
	if plan.Limit > 0 {
		l.limit = plan.Limit
	}
	if plan.Active < load.Ready {
		l.judge()
	}
	if l.looking = plan.Look > 0; l.looking {
		l.push(event{at: l.now + plan.Look, kind: evLook})
	}
}

// judge carries out the fate of each instance, as control does.
func (l *life) judge() {
	siblings := 0
	for _, in := range l.ready {
		if !in.retiring {
			siblings++
		}
	}
	again, place := time.Duration(0), 0
	for _, in := range slices.Clone(l.ready) {
		if in.retiring {
			continue
		}
		place++
		f := homeostat.Life{Age: l.now - in.ready, Limit: in.limit, InFlight: in.inFlight, Siblings: siblings}
		if in.inFlight == 0 {
			f.Unused, f.Quiet = l.now-in.unused, l.now-l.used
		}
		f.Surplus = place > l.active || siblings > l.active && f.Limit > 0 && f.Age >= f.Limit
		switch fate := homeostat.Judge(l.p, f); {
		case fate.Verdict == homeostat.Retire:
			siblings--
			place--
			l.retire(in)
		case fate.Verdict == homeostat.Replace && !in.replacing:
			in.replacing = true
			l.start(in)
		case fate.Again > 0 && (again == 0 || fate.Again < again):
			again = fate.Again
		}
	}
	if again > 0 {
		l.judgeAt = l.now + again
		l.push(event{at: l.judgeAt, kind: evJudge})
	}
}

// waits is a histogram of waits: a twentieth of a decade wide from a
// microsecond on.
type waits struct {
	counts [200]uint64
	most   time.Duration
}

func (w *waits) add(d time.Duration) {
	i := 0
	if d > time.Microsecond {
		i = min(1+int(20*math.Log10(float64(d)/float64(time.Microsecond))), len(w.counts)-1)
	}
	w.counts[i]++
	w.most = max(w.most, d)
}

func (w *waits) merge(o *waits) {
	for i, n := range o.counts {
		w.counts[i] += n
	}
	w.most = max(w.most, o.most)
}

func (w *waits) quantile(q float64) time.Duration {
	total := uint64(0)
	for _, n := range w.counts {
		total += n
	}
	left := q * float64(total)
	for i, n := range w.counts {
		if left -= float64(n); left <= 0 && n > 0 {
			if i == 0 {
				return 0
			}
			return min(time.Duration(float64(time.Microsecond)*math.Pow(10, (float64(i)-.5)/20)), w.most)
		}
	}
	return w.most
}
