package control

import (
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/homeostat"
	"github.com/fastcontainer/fastcontainer/internal/sandbox"
)

// watch is how an app under traffic is looked at: its counters since the last
// look, and when the next one is due. An app without traffic has no look.
type watch struct {
	trend homeostat.Trend
	timer *time.Timer
	on    bool
	at    time.Time     // of the last look
	next  time.Duration // after it
	crowd int           // so many in flight are no news

	looking bool // a look is under way
	news    bool // a crowd came since it, or the one before, began

	inFlight          int // of all instances
	arrived, answered int
	busy              time.Duration
	weighed           time.Time // when memory was read last
}

// watching is the app's watch, made now if need be. The caller holds the lock.
func (a *App) watching() *watch {
	if a.watch == nil {
		a.watch = &watch{}
	}
	return a.watch
}

// trend is what the watch has shown; nothing before the first request. The
// caller holds the lock.
func (a *App) trend() *homeostat.Trend {
	if a.watch == nil {
		return &homeostat.Trend{}
	}
	return &a.watch.trend
}

// memoryPace is how often memory is looked at in an app under traffic. (What
// comes near its limit says so by itself.)
const memoryPace = time.Second

// noticed is called for every request that gets a slot or waits for one: it
// begins to look, or looks sooner. The caller holds the lock.
func (a *App) noticed() {
	w := a.watching()
	if w.on {
		if w.inFlight <= w.crowd {
			return
		}
		w.crowd, w.news = 2*w.inFlight, true
		if w.next > soon && !w.looking {
			w.next = soon
			w.timer.Reset(soon)
		}
		return
	}
	if len(a.ready) == 0 {
		return // nothing to see before it is ready
	}
	w.on, w.next = true, 0
	a.k.active.Add(1)
	if w.timer == nil {
		w.timer = time.AfterFunc(soonest, a.look)
		return
	}
	w.timer.Reset(soonest)
}

// unwatch ends the looking. The caller holds the lock.
func (a *App) unwatch() {
	if a.watch != nil && a.watch.on {
		a.watch.on = false
		a.k.active.Add(-1)
	}
}

// soon is when an app is looked at that has more to do than before.
const soon = 5 * time.Millisecond

// reading is what one instance's cgroup said.
type reading struct {
	m     *member
	cpu   sandbox.Stats
	all   sandbox.Stats
	whole bool
	err   error
}

// look samples the app, asks the homeostat, and has its plan carried out.
func (a *App) look() {
	a.mu.Lock()
	if a.k.closed.Load() || a.removed {
		a.unwatch()
		a.mu.Unlock()
		return
	}
	if a.watch.looking { // its end sets the timer
		a.mu.Unlock()
		return
	}
	a.watch.looking = true
	news := a.watch.news
	a.watch.news = false
	began := time.Now()
	weigh := began.Sub(a.watch.weighed) >= memoryPace
	pressing := a.trend().Hot() > 0 || a.limit > a.policy.CPU.Rest
	seen := make([]reading, 0, len(a.ready))
	for _, m := range a.ready {
		if !m.retiring {
			// One that has just begun has not grown yet.
			seen = append(seen, reading{m: m, whole: weigh && began.Sub(m.mostSince) >= memoryPace})
		}
	}
	a.mu.Unlock()

	if pressing {
		a.k.feel() // whether there are cores to spare
	}
	for i := range seen {
		r := &seen[i]
		if r.whole {
			r.all, r.err = r.m.inst.Stats()
			r.cpu = r.all
		} else {
			r.cpu, r.err = r.m.inst.CPU()
		}
		if r.err != nil {
			a.k.unreadable(r.m.info.ID, r.err)
		}
	}

	a.mu.Lock()
	defer a.mu.Unlock()
	w := a.watch
	w.looking = false
	if a.removed {
		a.unwatch()
		return
	}
	now := time.Now()
	a.sample(now, seen)
	if news || w.news { // what it does to the app may be too young to be seen
		w.trend.Stir()
	}
	for i := range seen {
		if seen[i].whole && seen[i].err == nil {
			a.weigh(now, seen[i].m, seen[i].all)
		}
	}
	if weigh {
		w.weighed = now
	}
	plan := a.decide(now)
	a.carryOut(now, plan)
	if plan.Active < a.serving() {
		a.wake(0) // surplus may end
	}
	w.next = plan.Look
	w.crowd = w.inFlight + w.inFlight/2 + 1
	if plan.Look == 0 || a.k.closed.Load() {
		a.unwatch()
		return
	}
	w.timer.Reset(plan.Look)
}

// sample adds what happened since the last look to the trend. The caller holds
// the lock.
func (a *App) sample(now time.Time, seen []reading) {
	w := a.watch
	s := homeostat.Sample{Span: now.Sub(w.at), Arrived: w.arrived, Answered: w.answered, Busy: w.busy}
	for i := range seen {
		r := &seen[i]
		if r.err != nil {
			continue // its part is missing, the rest is good
		}
		if r.m.cpuKnown {
			s.CPU += max(r.cpu.CPUTime-r.m.cpu.CPUTime, 0)
			s.Periods += r.cpu.Periods - r.m.cpu.Periods
			s.Throttled += r.cpu.ThrottledPers - r.m.cpu.ThrottledPers
		}
		r.m.cpu, r.m.cpuKnown = r.cpu, true
	}
	first := w.next == 0
	w.at, w.arrived, w.answered, w.busy = now, 0, 0, 0
	if first {
		// It was not looked at for a while; what it used meanwhile is no load.
		w.arrived, w.answered, w.busy = s.Arrived, s.Answered, s.Busy
		a.trend().Wake(s.Span)
		return
	}
	s.Load = a.load(now)
	a.trend().Add(a.policy, s)
}

// carryOut changes limits as planned. The caller holds the lock.
func (a *App) carryOut(now time.Time, plan homeostat.Plan) {
	if plan.Limit <= 0 || plan.Limit == a.limit {
		return
	}
	a.setLimit(plan.Limit, plan.LimitCause, a.inputs(now))
}

// change is what an instance's limits shall become.
type change struct {
	limits sandbox.Limits // zeros stay as they are
	cause  string
	inputs map[string]float64
	busy   bool // somebody is carrying changes out
}

// resize changes limits of an instance without keeping the lock: a write to a
// cgroup may take its time. Later changes win over earlier ones that were not
// carried out yet. The caller holds the lock.
func (a *App) resize(m *member, l sandbox.Limits, cause string, inputs map[string]float64) {
	c := &m.change
	c.limits = l.Over(c.limits)
	if cause != "" {
		c.cause, c.inputs = cause, inputs
	}
	if c.busy {
		return
	}
	c.busy = true
	a.k.work.Go(func() {
		for {
			a.mu.Lock()
			next := m.change
			m.change = change{busy: next.limits != sandbox.Limits{} && !m.retiring}
			done := !m.change.busy
			a.mu.Unlock()
			if done {
				return
			}
			if err := a.k.cfg.Node.Resize(m.inst, next.limits, next.cause, next.inputs); err != nil {
				a.failedResize(m, err)
			}
		}
	})
}

func (a *App) failedResize(m *member, err error) {
	a.mu.Lock()
	gone := m.retiring
	a.mu.Unlock()
	if !gone {
		a.k.cfg.Logger.Warn("resize instance", "instance", m.info.ID, "error", err)
	}
}

// weigh looks at an instance's memory: what the kernel killed in it, whether
// it only grows, and whether a raised limit can go back. The caller holds the
// lock.
func (a *App) weigh(now time.Time, m *member, s sandbox.Stats) {
	used := int64(s.Memory)
	if s.OOMKills > m.kills && (m.weighed || m.birth != nil) { // or else it was long ago
		a.killed(now, m, s.OOMKills-m.kills)
	}
	if m.weighed {
		switch {
		case used > m.memory+m.memory/64:
			m.growth++
		case used < m.memory-m.memory/64:
			m.growth = 0
		}
	}
	m.weighed, m.kills, m.memory = true, s.OOMKills, used
	m.most = max(m.most, used)
	if now.Sub(m.mostSince) < memoryCalm {
		return
	}
	if next := homeostat.Shrink(a.policy, int64(m.inst.Limits().Memory), m.most); next > 0 {
		a.resize(m, sandbox.Limits{Memory: fleet.Bytes(next)}, homeostat.CauseCalm, map[string]float64{"used": float64(used), "most": float64(m.most)})
	}
	m.most, m.mostSince = used, now
}

const (
	// memoryCalm is for how long less memory must have been enough before a
	// raised limit goes back.
	memoryCalm = 10 * time.Second
	// leaking is how many looks in a row an instance must have grown in to
	// count as one that only grows.
	leaking = 30
)

// killed takes note that the kernel killed processes of an instance, which
// itself goes on: it gets more, and so does the next one. The caller holds the
// lock.
func (a *App) killed(now time.Time, m *member, n uint64) {
	a.k.cfg.Events(fleet.Event{
		Time: now, Type: fleet.EventFail, App: a.name, Instance: m.info.ID, Revision: m.info.Revision, Node: m.info.Node,
		Cause: homeostat.CauseOOM, Detail: "the kernel killed processes in it; the instance goes on",
		Inputs: map[string]float64{"killed": float64(n), "limit": float64(m.inst.Limits().Memory)},
	})
	a.enlarge(int64(m.inst.Limits().Memory))
	if l := int64(m.inst.Limits().Memory); a.memory > l {
		a.resize(m, sandbox.Limits{Memory: fleet.Bytes(a.memory)}, homeostat.CauseOOM, nil)
	}
}

// enlarge gives instances to come more memory than limit, within the peak. The
// caller holds the lock.
func (a *App) enlarge(limit int64) {
	if next := homeostat.Grow(a.policy, limit, 1<<62); next > a.memory {
		a.memory = next
	}
}

// pressed gives an instance that comes near its memory limit more of it.
func (a *App) pressed(id fleet.InstanceID) {
	vitals := a.k.feel()
	a.mu.Lock()
	var m *member
	for _, c := range a.ready {
		if c.info.ID == id {
			m = c
		}
	}
	if m == nil {
		a.mu.Unlock()
		return
	}
	limit := int64(m.inst.Limits().Memory)
	free := vitals.Memory - vitals.Used
	next := homeostat.Grow(a.policy, limit, free)
	m.mostSince = time.Now()
	a.mu.Unlock()
	if next == 0 {
		a.k.ledger.hungry() // somebody else may have it to spare
		return
	}
	inputs := map[string]float64{"limit": float64(limit), "free": float64(free)}
	if err := a.k.cfg.Node.Resize(m.inst, sandbox.Limits{Memory: fleet.Bytes(next)}, homeostat.CauseMemory, inputs); err != nil {
		a.k.cfg.Logger.Warn("give more memory", "instance", id, "error", err)
	}
}

// load is the app's present as the homeostat wants it. The caller holds the lock.
func (a *App) load(now time.Time) homeostat.Load {
	l := homeostat.Load{
		Starting: a.starting, Standby: a.thawable(), Failures: a.failures, InFlight: 0, Limit: a.limit,
		Start: a.usual(), Spare: -1, Full: now.Before(a.fullUntil), Lean: now.Before(a.leanUntil),
	}
	for _, m := range a.ready {
		if !m.retiring {
			l.Ready++
			l.InFlight += m.inflight - m.streams
			l.Streams += m.streams
		}
	}
	if a.waiting != nil {
		l.Waiting = a.waiting.Len()
	}
	if a.failures > 0 {
		l.SinceFailure = now.Sub(a.failedAt)
	}
	if v := a.k.vitals.Load(); v != nil {
		l.Spare = v.Idle
		l.Ceiling = homeostat.Ceiling(v.Cores, v.Idle, a.trend().Use(), int(a.k.active.Load()))
	}
	return l
}

// inputs are the numbers behind a decision of this moment. The caller holds
// the lock.
func (a *App) inputs(now time.Time) map[string]float64 {
	l, t := a.load(now), a.trend()
	in := map[string]float64{"waiting": float64(l.Waiting), "in_flight": float64(l.InFlight), "ready": float64(l.Ready), "starting": float64(l.Starting)}
	for name, v := range map[string]float64{
		"rate": t.Rate(), "service_ms": t.Service().Seconds() * 1e3, "usual_ms": t.Usual().Seconds() * 1e3,
		"cost_ms": t.Cost().Seconds() * 1e3, "cpu_used": t.Use(), "cpu_limit": l.Limit, "hot_ms": t.Hot().Seconds() * 1e3,
	} {
		if v > 0 {
			in[name] = float64(int64(v*1000+0.5)) / 1000
		}
	}
	if l.Spare >= 0 {
		in["cpu_spare"] = float64(int64(l.Spare*1000+0.5)) / 1000
	}
	return in
}
