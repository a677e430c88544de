package control

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/homeostat"
)

// larder is the standbys of this node, which share a budget of memory. It is
// asked when one is frozen, thawed or ends, and by a starving machine.
type larder struct {
	budget int64
	first  bell // it is not empty any more

	mu    sync.Mutex
	holds map[*member]int64 // bytes
	bytes int64             // of all
}

func newLarder(budget int64, first bell) *larder {
	return &larder{budget: budget, first: first, holds: map[*member]int64{}}
}

func (l *larder) put(m *member, bytes int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.bytes += bytes - l.holds[m]
	if l.holds[m] = bytes; len(l.holds) == 1 {
		l.first.ring()
	}
}

func (l *larder) remove(m *member) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.bytes -= l.holds[m]
	delete(l.holds, m)
}

// full tells whether one more would only drive another one out.
func (l *larder) full() bool { return l.held() >= l.budget }

// held is what all of them hold together.
func (l *larder) held() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.bytes
}

func (l *larder) any() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.holds) > 0
}

func (l *larder) all() []*member {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Collect(maps.Keys(l.holds))
}

// standby is what a frozen member is to the homeostat. The caller holds no lock.
func (l *larder) standby(now time.Time, m *member) homeostat.Standby {
	l.mu.Lock()
	s := homeostat.Standby{Memory: l.holds[m]}
	l.mu.Unlock()
	a := m.app
	a.mu.Lock()
	defer a.mu.Unlock()
	s.Always = a.policy.Standby == homeostat.StandbyAlways && len(a.standby) == 1
	s.Prospect = m.life(now, a.rev.ID, 0).Prospect
	return s
}

// ration ends those that do not fit into the budget.
func (k *Control) ration() {
	if k.larder.held() <= k.larder.budget {
		return
	}
	members := k.larder.all()
	now := time.Now()
	standbys := make([]homeostat.Standby, len(members))
	for i, m := range members {
		standbys[i] = k.larder.standby(now, m)
	}
	for _, i := range homeostat.Ration(k.larder.budget, standbys) {
		m := members[i]
		m.app.mu.Lock()
		m.app.discard(m, causeBudget, map[string]float64{
			"memory": float64(standbys[i].Memory), "budget": float64(k.larder.budget), "chance": standbys[i].Chance, "boot_ms": standbys[i].Boot.Seconds() * 1e3,
		})
		m.app.mu.Unlock()
	}
}

// Causes of ends of standbys.
const (
	causeBudget  = "the budget of standbys is used up"
	causeNoThaw  = "it could not be thawed"
	causeNoSleep = "it could not be frozen"
)

// frost is what a member has while it is a standby.
type frost struct {
	// cancel ends the freezing, done is closed when it has ended.
	cancel  context.CancelFunc
	done    chan struct{}
	thawing bool
}

// freeze takes an idle instance out of the route and makes it a standby. The
// caller holds the lock.
func (a *App) freeze(m *member, cause string) {
	m.announce()
	a.ready = slices.DeleteFunc(a.ready, func(o *member) bool { return o == m })
	ctx, cancel := context.WithCancel(a.k.ctx)
	a.standby = append(a.standby, m)
	f := &frost{cancel: cancel, done: make(chan struct{})}
	m.frost = f
	p := m.life(time.Now(), a.rev.ID, 0).Prospect
	inputs := map[string]float64{"chance": p.Chance, "boot_ms": p.Boot.Seconds() * 1e3, "unused_s": time.Since(m.unused).Seconds()}
	a.k.ledger.ended(a, m.claim, false)
	a.k.work.Go(func() {
		defer cancel()
		// Its connections would be found closed, or closing, after the thaw.
		_ = m.upstream.Close()
		err := ctx.Err()
		if err == nil {
			err = a.k.cfg.Node.Freeze(ctx, m.inst, cause, inputs)
		}
		close(f.done)
		a.froze(m, f, err)
	})
	a.reweigh()
}

// froze takes up the end of a freeze.
func (a *App) froze(m *member, f *frost, err error) {
	a.mu.Lock()
	if m.frost != f || f.thawing || a.k.closed.Load() {
		a.mu.Unlock()
		return
	}
	if err != nil {
		a.k.cfg.Logger.Warn("freeze instance", "instance", m.info.ID, "error", err)
		a.discard(m, causeNoSleep, nil)
		a.mu.Unlock()
		return
	}
	a.mu.Unlock()
	if s, err := m.inst.Stats(); err == nil {
		a.mu.Lock()
		m.memory = int64(s.Memory)
		a.mu.Unlock()
	}
	a.mu.Lock()
	if m.frost == f && !f.thawing {
		a.k.larder.put(m, max(m.memory, 1))
	}
	a.mu.Unlock()
	a.k.ration()
}

// thawable counts the standbys that may be thawed. The caller holds the lock.
func (a *App) thawable() int {
	n := 0
	for _, m := range a.standby {
		if !m.frost.thawing && m.info.Revision == a.rev.ID {
			n++
		}
	}
	return n
}

// thaw brings the standby back that has most of its life left. The caller
// holds the lock.
func (a *App) thaw(now time.Time, cause string, inputs map[string]float64) {
	var best *member
	for _, m := range a.standby {
		if m.frost.thawing || m.info.Revision != a.rev.ID {
			continue
		}
		if best == nil || best.info.ExpiresAt.Before(m.info.ExpiresAt) {
			best = m
		}
	}
	if best == nil {
		return
	}
	m := best
	m.frost.thawing = true
	m.frost.cancel()
	a.starting++
	a.k.larder.remove(m)
	m.claim = a.claim()
	a.k.ledger.adopted(a, m.claim, a.policy.Priority)
	stages := &fleet.Stages{}
	if a.waiting != nil {
		oldest := a.waiting.Front().Value.(*hold) //nolint:forcetypeassert // only holds are queued
		stages.Hold = now.Sub(oldest.arrived).Microseconds()
	}
	frozen := m.frost.done
	a.k.work.Go(func() {
		<-frozen // or not, if it was in the middle of it
		began := time.Now()
		err := a.k.cfg.Node.Thaw(m.inst, stages)
		a.thawed(m, err, time.Since(began), stages, cause, inputs)
	})
}

// thawed takes up the end of a thaw.
func (a *App) thawed(m *member, err error, took time.Duration, stages *fleet.Stages, cause string, inputs map[string]float64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.starting--
	i := slices.Index(a.standby, m)
	if i < 0 { // it has ended meanwhile
		a.k.ledger.ended(a, m.claim, false)
		a.decide(time.Now())
		return
	}
	if err != nil {
		a.k.cfg.Logger.Warn("thaw instance", "instance", m.info.ID, "error", err)
		a.k.ledger.ended(a, m.claim, false)
		a.discard(m, causeNoThaw, nil)
		a.decide(time.Now()) // by a start, then
		return
	}
	a.standby = slices.Delete(a.standby, i, i+1)
	a.born(fleet.StandbyStart, took)
	a.births.thawed.memory = m.memory
	m.frost, m.cpuKnown = nil, false
	m.birth = &birth{tell: a.k.cfg.Events, stages: stages, event: fleet.Event{
		Time: time.Now(), Type: fleet.EventThaw, App: a.name, Instance: m.info.ID, Revision: m.info.Revision, Node: m.info.Node,
		Cause: cause, Inputs: inputs, Kind: fleet.StandbyStart,
	}}
	m.birth.expect(a.waiting != nil)
	a.enter(m, m.birth)
	a.decide(time.Now())
	a.reweigh()
	a.wake(0)
}

// discard ends a standby. The caller holds the lock.
func (a *App) discard(m *member, cause string, inputs map[string]float64) {
	i := slices.Index(a.standby, m)
	if i < 0 || m.frost.thawing && cause != causeNoThaw {
		return
	}
	a.standby = slices.Delete(a.standby, i, i+1)
	a.k.larder.remove(m)
	m.frost.cancel()
	m.frost, m.retiring = nil, true
	a.k.cfg.Events(fleet.Event{Time: time.Now(), Type: fleet.EventRetire, App: a.name, Instance: m.info.ID, Revision: m.info.Revision, Node: m.info.Node, Cause: cause, Inputs: inputs})
	a.k.work.Go(func() {
		if a.k.closed.Load() && cause != causeRemoved {
			return // the next daemon finds it
		}
		a.k.stop(m.inst, cause)
	})
}

func (a *App) discardAll(cause string) {
	for _, m := range slices.Clone(a.standby) {
		a.discard(m, cause, nil)
	}
}

// judgeStandbys carries out the fates of the frozen instances, and gives when
// to ask again. The caller holds the lock.
func (a *App) judgeStandbys(now time.Time, sooner func(time.Duration)) {
	for _, m := range slices.Clone(a.standby) {
		if m.frost.thawing || m.replacing != "" {
			continue
		}
		fate := homeostat.JudgeStandby(a.policy, m.life(now, a.rev.ID, 0))
		switch {
		case fate.Verdict == homeostat.Replace && a.failures == 0 && a.serving() == 0 && a.starting == 0:
			m.replacing = fate.Cause
			a.start(now, homeostat.CauseRenewal+": "+fate.Cause, nil, m)
		case fate.Verdict != homeostat.Keep:
			a.discard(m, fate.Cause, nil)
		default:
			sooner(fate.Again)
		}
	}
	if !a.lacksStandby(a.starting) {
		return
	}
	if rest := homeostat.Backoff(a.failures) - now.Sub(a.failedAt); a.failures > 0 && rest > 0 {
		sooner(rest)
		return
	}
	a.start(now, causeAhead, nil, nil)
}

// lacksStandby tells whether an instance is to be started for nobody, beside so
// many starts under way. The caller holds the lock.
func (a *App) lacksStandby(starting int) bool {
	return a.policy.Standby == homeostat.StandbyAlways && !a.stopped && !a.removed && a.waiting == nil &&
		len(a.ready)+starting+len(a.standby) == 0 && !a.k.larder.full()
}

// causeAhead: the app's owner wants a standby.
const causeAhead = "start: standby"

// spare makes a standby of an instance that was started for nobody. The caller
// holds the lock.
func (a *App) spare(m *member, cause string) {
	if m.inflight == 0 && !m.retiring && a.waiting == nil && a.policy.Standby != homeostat.StandbyNever && a.serving() > a.policy.Min {
		a.freeze(m, cause)
	}
}

// adoptStandby takes over a frozen instance of an earlier daemon. The caller
// holds the lock.
func (a *App) adoptStandby(inst Instance) {
	m := newMember(a, inst)
	f := &frost{cancel: func() {}, done: make(chan struct{})}
	m.frost = f
	a.standby = append(a.standby, m)
	close(f.done)
	a.k.work.Go(func() { a.froze(m, f, nil) })
	a.wake(0)
}

// lost takes note that a standby ended by itself. The caller holds the lock.
func (a *App) lost(id fleet.InstanceID) {
	i := slices.IndexFunc(a.standby, func(m *member) bool { return m.info.ID == id })
	if i < 0 {
		return
	}
	m := a.standby[i]
	a.standby = slices.Delete(a.standby, i, i+1)
	a.k.larder.remove(m)
	m.frost.cancel()
	m.retiring = true
	if a.policy.Standby == homeostat.StandbyAlways {
		a.wake(0)
	}
}

// cells adds the standbys as candidates of a digestion: each is an app of
// its own there, for none of them serves.
func (l *larder) cells(now time.Time, cells []homeostat.Cell, members []*member) ([]homeostat.Cell, []*member) {
	for i, m := range l.all() {
		s := l.standby(now, m)
		cells = append(cells, homeostat.Cell{App: -1 - i, Standby: true, Worth: s.Worth(), Memory: s.Memory, Priority: m.app.Policy().Priority})
		members = append(members, m)
	}
	return cells, members
}
