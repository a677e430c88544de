package control

import (
	"container/list"
	"context"
	"errors"
	"io"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/homeostat"
	"github.com/fastcontainer/fastcontainer/internal/sandbox"
)

// App is one app on this node: its ready instances, the requests that wait for
// one, and the starts under way.
type App struct {
	k     *Control
	name  fleet.AppName
	hosts []string // guarded by k.mu

	mu     sync.Mutex
	rev    fleet.Revision
	policy homeostat.Policy
	watch  *watch  // nil before the first request
	active int     // instances that get requests first; the others are surplus
	limit  float64 // cores of each instance; 0: as at rest
	memory int64   // that instances to come have at rest, if more than the policy says
	births *births // nil before the first
	record *record // nil before the first request
	// fullUntil: the machine had no room; asking again is useless before.
	fullUntil time.Time
	used      time.Time // end of the last response
	// leanUntil: it gave its peak to others.
	leanUntil time.Time
	stopped   bool
	removed   bool
	ready     []*member
	standby   []*member  // frozen, or about to be
	waiting   *list.List // of *hold; nil while nobody waits
	// starting counts starts under way; those of successors are not for holds
	// alone.
	starting int
	failures int
	failedAt time.Time
	young    int // instances in a row that ended by themselves within a moment
	lastErr  error
	timer    *time.Timer // wakes judge; nil while there is no instance
}

// member is one ready instance of an app.
type member struct {
	app  *App
	inst Instance
	info fleet.Instance
	// upstream is the front door's.
	upstream io.Closer

	inflight  int
	unused    time.Time // end of the last response
	answered  bool      // a request
	retiring  bool
	replacing string        // why a successor is under way; "" if none is
	birth     *birth        // nil if it was adopted
	frost     *frost        // nil unless it is a standby
	quiet     chan struct{} // closed when retiring and nothing is in flight
	closing   chan struct{} // closed when long-lived streams must end

	part      part
	change    change
	claim     homeostat.Claim
	streams   int       // of those in flight, long-lived ones
	brokeAt   time.Time // an exchange
	cpu       sandbox.Stats
	cpuKnown  bool
	weighed   bool   // memory and what follows are known
	kills     uint64 // processes that the kernel killed in it
	memory    int64
	growth    int   // looks in a row in which its memory grew
	most      int64 // memory since mostSince
	mostSince time.Time
}

// part of the processor that an instance has, or will have in a moment.
type part struct {
	cores  float64
	weight uint64
}

// hold is one waiting request.
type hold struct {
	arrived time.Time
	done    chan struct{} // closed once lease or err is set
	lease   *Lease
	err     error
}

// Lease is a slot on an instance: see dispatch.Lease, whose methods it has.
type Lease struct {
	m *member
	// birth is the start that the request waited for, or nil.
	birth  *birth
	began  time.Time
	stream bool
}

// birth is the ready event of an instance that requests waited for. It is told
// with the timings of the first answer, so it waits for that a little.
type birth struct {
	tell   func(fleet.Event)
	stages *fleet.Stages // only read
	once   sync.Once
	event  fleet.Event
}

// birthWait is the longest that a ready event waits for the first answer.
const birthWait = time.Second

// expect has the event told now, or with the first answer if somebody waits
// for the instance.
func (b *birth) expect(somebody bool) {
	if !somebody {
		b.answered(0, 0)
		return
	}
	time.AfterFunc(birthWait, func() { b.answered(0, 0) })
}

func (b *birth) answered(connect, firstByte time.Duration) {
	b.once.Do(func() {
		s := *b.stages
		s.Connect, s.FirstByte = connect.Microseconds(), firstByte.Microseconds()
		b.event.Stages = &s
		b.tell(b.event)
	})
}

// Name of the app.
func (a *App) Name() fleet.AppName { return a.name }

// Acquire claims a slot for one request: see dispatch.Target.
func (a *App) Acquire(ctx context.Context, arrived time.Time) (*Lease, error) {
	if a.k.closed.Load() {
		return nil, &fleet.Error{Op: "route to", Subject: string(a.name), Kind: fleet.ErrUnavailable, Err: errShutdown}
	}
	a.mu.Lock()
	a.arrives(arrived)
	if m := a.free(); m != nil && a.waiting == nil {
		l := a.lease(m, nil, arrived)
		a.mu.Unlock()
		return l, nil
	}
	h, place, err := a.hold(arrived)
	a.mu.Unlock()
	if err != nil {
		return nil, err
	}
	return a.wait(ctx, h, place)
}

// lease gives a slot away. The caller holds the lock.
func (a *App) lease(m *member, b *birth, now time.Time) *Lease {
	m.inflight++
	w := a.watching()
	w.inFlight++
	w.arrived++
	a.record.opens(now)
	a.noticed()
	return &Lease{m: m, birth: b, began: now}
}

// hold queues a request and sees to it that it will be served. The caller
// holds the lock.
func (a *App) hold(arrived time.Time) (*hold, *list.Element, error) {
	if a.stopped || a.removed {
		return nil, nil, &fleet.Error{Op: "route to", Subject: string(a.name), Kind: fleet.ErrUnavailable, Err: errors.New("the app is stopped")}
	}
	held := 0
	if a.waiting != nil {
		held = a.waiting.Len()
	}
	if held >= a.k.cfg.HoldsPerApp || a.k.crowded(held) {
		a.k.metrics.refused.WithLabelValues("too many").Inc()
		return nil, nil, &fleet.Error{Op: "route to", Subject: string(a.name), Kind: fleet.ErrOverloaded, Err: errors.New("too many requests wait for it")}
	}
	if a.waiting == nil {
		a.waiting = list.New()
		a.k.holding.Add(1)
	}
	a.noticed()
	h := &hold{arrived: arrived, done: make(chan struct{})}
	place := a.waiting.PushBack(h)
	a.k.holds.Add(1)
	if plan := a.decide(time.Now()); plan.Refuse {
		a.drop(place)
		a.k.metrics.refused.WithLabelValues("failing").Inc()
		return nil, nil, &fleet.Error{Op: "route to", Subject: string(a.name), Kind: fleet.ErrFailing, Err: a.lastErr}
	}
	return h, place, nil
}

// drop takes a hold out of the queue. The caller holds the lock.
func (a *App) drop(place *list.Element) {
	a.waiting.Remove(place)
	a.k.holds.Add(-1)
	if a.waiting.Len() == 0 {
		a.waiting = nil
		a.k.holding.Add(-1)
	}
}

// wait sleeps until the hold is answered, its client leaves, or it took too long.
func (a *App) wait(ctx context.Context, h *hold, place *list.Element) (*Lease, error) {
	timeout := time.NewTimer(a.k.cfg.HoldTimeout - time.Since(h.arrived))
	defer timeout.Stop()
	var err error
	select {
	case <-h.done:
		a.k.metrics.held.Observe(time.Since(h.arrived).Seconds())
		return h.lease, h.err
	case <-ctx.Done():
		err = context.Cause(ctx)
		a.k.metrics.refused.WithLabelValues("client left").Inc()
	case <-timeout.C:
		err = &fleet.Error{Op: "route to", Subject: string(a.name), Kind: fleet.ErrTimeout, Err: errors.New("it waited too long for an instance")}
		a.k.metrics.refused.WithLabelValues("too long").Inc()
	}
	a.mu.Lock()
	select {
	case <-h.done: // answered meanwhile: the slot goes to somebody else
		a.mu.Unlock()
		if h.lease != nil {
			h.lease.Release(false)
		}
	default:
		a.drop(place)
		a.mu.Unlock()
	}
	return nil, err
}

// free is the instance for the next request: the least loaded of the active
// ones, so that surplus gets idle and ends, and only if they are full another.
// The caller holds the lock.
func (a *App) free() *member {
	var best *member
	place := 0
	for _, m := range a.ready {
		if m.retiring {
			continue
		}
		place++
		if best != nil && place > a.active {
			break
		}
		if a.policy.Concurrency > 0 && m.inflight >= a.policy.Concurrency {
			continue
		}
		if best == nil || m.inflight < best.inflight {
			best = m
		}
	}
	return best
}

// serve gives free slots to the oldest holds. The caller holds the lock.
func (a *App) serve(b *birth) {
	for a.waiting != nil {
		m := a.free()
		if m == nil {
			return
		}
		place := a.waiting.Front()
		h := place.Value.(*hold) //nolint:forcetypeassert // only holds are queued
		a.drop(place)
		h.lease = a.lease(m, b, time.Now())
		close(h.done)
	}
}

// refuse answers every hold with an error. The caller holds the lock.
func (a *App) refuse(err error) {
	for a.waiting != nil {
		place := a.waiting.Front()
		h := place.Value.(*hold) //nolint:forcetypeassert // only holds are queued
		a.drop(place)
		h.err = err
		close(h.done)
	}
}

// decide asks the homeostat and begins the starts it plans. The caller holds
// the lock.
func (a *App) decide(now time.Time) homeostat.Plan {
	if a.stopped || a.removed || a.k.closed.Load() {
		return homeostat.Plan{Active: 1}
	}
	load := a.load(now)
	plan := homeostat.Decide(a.policy, load, a.trend())
	a.active = plan.Active
	if plan.Thaw+plan.Start > 0 {
		inputs := a.inputs(now)
		for range plan.Thaw {
			a.thaw(now, plan.Cause, inputs)
		}
		for range plan.Start {
			a.start(now, plan.Cause, inputs, nil)
		}
	}
	if plan.RetryIn > 0 && (load.Waiting > 0 || a.policy.Min > 0) {
		a.wake(plan.RetryIn)
	}
	return plan
}

// start begins one start; retire, if not nil, is the instance that the new one
// is to replace. The caller holds the lock.
func (a *App) start(now time.Time, cause string, inputs map[string]float64, retire *member) {
	a.starting++
	o := Order{
		Revision: a.rev, Kind: a.next(), Cause: cause, Inputs: inputs, Stages: &fleet.Stages{},
		Limits: sandbox.Limits{CPU: a.limit, CPUWeight: a.share(a.serving() + a.starting), Memory: fleet.Bytes(a.memory)},
	}
	if a.waiting != nil {
		oldest := a.waiting.Front().Value.(*hold) //nolint:forcetypeassert // only holds are queued
		o.Stages.Hold = now.Sub(oldest.arrived).Microseconds()
	}
	claim := a.claim()
	priority := a.policy.Priority
	a.k.work.Go(func() {
		inst, err := a.k.bringUp(a, o, claim, priority, retire != nil)
		a.started(inst, err, o, claim, retire)
	})
}

// bringUp waits for its turn and for room, then starts. What replaces another
// instance needs no room: that one makes it.
func (k *Control) bringUp(a *App, o Order, claim homeostat.Claim, priority int, renewal bool) (Instance, error) {
	asked := time.Now()
	ctx, cancel := context.WithTimeoutCause(k.ctx, k.cfg.HoldTimeout, errFull)
	defer cancel()
	if renewal {
		k.ledger.adopted(a, claim, priority)
	} else if err := k.ledger.admit(ctx, a, claim, priority); err != nil {
		return nil, err
	}
	o.Stages.Place = time.Since(asked).Microseconds()
	if !renewal && time.Since(asked) > settled && !a.stillWants(o) {
		k.ledger.ended(a, claim, true)
		return nil, errNotWanted
	}
	began := time.Now()
	inst, err := k.cfg.Node.Start(k.ctx, o)
	switch {
	case err != nil:
		k.ledger.ended(a, claim, !renewal)
	case !renewal:
		k.ledger.started(a)
	}
	if err == nil {
		a.mu.Lock()
		a.born(inst.Info().Kind, time.Since(began))
		a.mu.Unlock()
		a.keepStart(inst)
	}
	return inst, err
}

// settled is how long a start may wait for its turn before it is asked again
// whether it is wanted.
const settled = 100 * time.Millisecond

var errNotWanted = errors.New("whoever wanted it has left")

// stillWants tells whether a start that waited long is wanted yet.
func (a *App) stillWants(o Order) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.stopped || a.removed || a.rev.ID != o.Revision.ID {
		return false
	}
	load := a.load(time.Now())
	load.Starting-- // this one
	return a.lacksStandby(load.Starting) || homeostat.Decide(a.policy, load, a.trend()).Start > 0
}

// claim is what one more instance reserves. The caller holds the lock.
func (a *App) claim() homeostat.Claim {
	return homeostat.Claim{CPU: a.policy.CPU.Rest, Memory: a.policy.Memory.Rest}
}

// share of the processor's time that each of n instances gets: all of them
// together have the weight of their app. Who may use more than at rest has
// that of others, and comes after them.
func (a *App) share(n int) uint64 {
	if a.limit > a.policy.CPU.Rest {
		return sandbox.IdleWeight
	}
	return uint64(min(max(100*weight(a.policy.Priority)/float64(max(n, 1)), sandbox.IdleWeight+1), 10000))
}

// reweigh shares the app's weight among its instances, and gives those of its
// present revision the same limit: one that was a standby may have another. The
// caller holds the lock.
func (a *App) reweigh() {
	cores, weight := a.limit, a.share(a.serving())
	if cores <= 0 {
		cores = a.policy.CPU.Rest
	}
	for _, m := range a.ready {
		p := part{m.part.cores, weight}
		if m.info.Revision == a.rev.ID {
			p.cores = cores
		}
		a.portion(m, p, causeSiblings, nil)
	}
}

const causeSiblings = "as its siblings"

// setLimit gives each instance so many cores. The caller holds the lock.
func (a *App) setLimit(cores float64, cause string, inputs map[string]float64) {
	a.limit = cores
	p := part{cores, a.share(a.serving())}
	for _, m := range a.ready {
		a.portion(m, p, cause, inputs)
	}
}

// portion gives an instance its part of the processor. The caller holds the
// lock.
func (a *App) portion(m *member, p part, cause string, inputs map[string]float64) {
	if !m.retiring && m.part != p {
		m.part = p
		a.resize(m, sandbox.Limits{CPU: p.cores, CPUWeight: p.weight}, cause, inputs)
	}
}

// started takes up the end of a start.
func (a *App) started(inst Instance, err error, o Order, claim homeostat.Claim, retire *member) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.starting--
	cause := ""
	if retire != nil {
		cause, retire.replacing = retire.replacing, ""
	}
	if err != nil {
		if retire != nil && retire.frost != nil {
			a.discard(retire, cause, nil) // its time is over all the same
		}
		a.notStarted(err)
		return
	}
	a.failures, a.lastErr = 0, nil
	info := inst.Info()
	b := &birth{tell: a.k.cfg.Events, stages: o.Stages, event: fleet.Event{
		Time: info.ReadyAt, Type: fleet.EventReady, App: a.name, Instance: info.ID, Revision: info.Revision, Node: info.Node,
		Cause: o.Cause, Kind: info.Kind,
	}}
	b.expect(a.waiting != nil)
	m := a.join(inst, b, claim)
	switch {
	case retire != nil && retire.frost != nil:
		a.discard(retire, cause, nil)
		a.spare(m, o.Cause)
	case retire != nil && !retire.retiring:
		a.retire(retire, cause)
	case o.Cause == causeAhead:
		a.spare(m, o.Cause)
	}
	a.decide(time.Now())
	a.reweigh()
	a.wake(0)
}

// notStarted takes up a start that came to nothing. The caller holds the lock.
func (a *App) notStarted(err error) {
	now := time.Now()
	alone := a.starting == 0 && a.serving() == 0
	switch {
	case errors.Is(err, errNotWanted):
		if a.waiting != nil {
			a.decide(now)
		}
		return
	case errors.Is(err, errFull):
		a.fullUntil = now.Add(fullPause)
		a.k.metrics.full.Inc()
		if alone {
			a.refuse(full(a.name))
		}
		if !a.k.closed.Load() && a.keeps() {
			a.wake(fullPause) // nobody else asks again
		}
		return
	}
	a.failures++
	a.failedAt = now
	a.lastErr = err
	if alone {
		kind := fleet.ErrFailing
		if errors.Is(err, fleet.ErrTimeout) {
			kind = fleet.ErrTimeout
		}
		a.refuse(&fleet.Error{Op: "route to", Subject: string(a.name), Kind: kind, Err: err})
	}
	if !a.k.closed.Load() && (a.serving() > 0 || a.keeps()) {
		a.wake(homeostat.Backoff(a.failures))
	}
}

// keeps tells whether the app has instances without being asked. The caller
// holds the lock.
func (a *App) keeps() bool { return a.policy.Min > 0 || a.policy.Standby == homeostat.StandbyAlways }

// fullPause is how long an app that has its share of a full machine does not
// ask for more.
const fullPause = 250 * time.Millisecond

// serving counts the instances in the route. The caller holds the lock.
func (a *App) serving() int {
	n := 0
	for _, m := range a.ready {
		if !m.retiring {
			n++
		}
	}
	return n
}

// join puts a ready instance into the route. The caller holds the lock.
func (a *App) join(inst Instance, b *birth, claim homeostat.Claim) *member {
	m := newMember(a, inst)
	m.birth, m.claim = b, claim
	a.enter(m, b)
	return m
}

func newMember(a *App, inst Instance) *member {
	now, l := time.Now(), inst.Limits()
	return &member{
		app: a, inst: inst, info: inst.Info(), part: part{l.CPU, l.CPUWeight}, mostSince: now, unused: now,
		quiet: make(chan struct{}), closing: make(chan struct{}),
	}
}

// enter puts a member into the route. The caller holds the lock.
func (a *App) enter(m *member, b *birth) {
	m.upstream = a.k.cfg.Attach(m.info.ID, m.info.Address, m.inst.Dialed)
	m.unused = time.Now()
	a.ready = append(a.ready, m)
	if a.stopped || a.removed {
		a.retire(m, "the app is stopped")
		return
	}
	a.serve(b)
}

func (a *App) adopt(inst Instance) {
	a.mu.Lock()
	defer a.mu.Unlock()
	info := inst.Info()
	if took := info.ReadyAt.Sub(info.StartedAt); took > 0 {
		a.born(info.Kind, took)
	}
	if info.State == fleet.StateStandby {
		a.adoptStandby(inst)
		return
	}
	claim := a.claim()
	a.k.ledger.adopted(a, claim, a.policy.Priority)
	a.used = time.Now() // the earlier daemon knew
	l := inst.Limits()
	if l.CPU > a.policy.CPU.Rest {
		a.limit = max(a.limit, l.CPU)
	}
	a.join(inst, nil, claim)
	if l.CPU > a.policy.CPU.Rest {
		a.noticed() // it comes back to rest
	}
	a.wake(0)
}

// soonest is when a timer fires that is due now: where tests fake the time, the
// runtime (Go 1.26) would run it inside Reset, and it has crashed there under the race
// detector.
const soonest = time.Nanosecond

// wake has judge run after d. The caller holds the lock.
func (a *App) wake(d time.Duration) {
	d = max(d, soonest)
	if a.timer == nil {
		a.timer = time.AfterFunc(d, a.judge)
		return
	}
	a.timer.Reset(d)
}

// judge looks at every instance and carries out its fate, then sleeps until
// the next may end.
func (a *App) judge() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.k.closed.Load() || !a.k.begun.Load() {
		return
	}
	now := time.Now()
	a.decide(now)
	siblings := a.serving()
	place := 0
	again := time.Duration(0)
	sooner := func(d time.Duration) {
		if d > 0 && (again == 0 || d < again) {
			again = d
		}
	}
	for _, m := range slices.Clone(a.ready) {
		if m.retiring {
			continue
		}
		place++
		life := m.life(now, a.rev.ID, siblings)
		// Where there is surplus, one that is at its end needs no successor.
		life.Surplus = place > a.active || siblings > a.active && !life.Outdated && life.Limit > 0 && life.Age >= life.Limit
		fate := homeostat.Judge(a.policy, life)
		switch {
		case fate.Verdict == homeostat.Retire:
			siblings--
			place--
			a.retire(m, fate.Cause)
		case fate.Verdict == homeostat.Freeze:
			siblings--
			place--
			a.freeze(m, fate.Cause)
		case fate.Verdict == homeostat.Replace && m.replacing == "":
			if rest := homeostat.Backoff(a.failures) - now.Sub(a.failedAt); a.failures > 0 && rest > 0 {
				sooner(rest) // the old one goes on serving while its successor fails
				continue
			}
			m.replacing = fate.Cause
			a.start(now, homeostat.CauseRenewal+": "+fate.Cause, nil, m)
		default:
			sooner(fate.Again)
		}
	}
	a.judgeStandbys(now, sooner)
	if again > 0 {
		a.wake(again)
	}
	if len(a.ready) == 0 && len(a.standby) == 0 && a.starting == 0 && a.waiting == nil && again == 0 && a.failures == 0 && a.timer != nil {
		a.timer.Stop()
		a.timer = nil
	}
}

// announce sees to it that the instance's birth is told before its end.
func (m *member) announce() {
	if m.birth != nil {
		m.birth.answered(0, 0)
	}
}

// life is an instance's present.
func (m *member) life(now time.Time, current fleet.RevisionID, siblings int) homeostat.Life {
	l := homeostat.Life{InFlight: m.inflight, Outdated: m.info.Revision != current, Siblings: siblings}
	ready := m.inst.Ready()
	l.Age = now.Sub(ready)
	if !m.info.ExpiresAt.IsZero() {
		l.Limit = max(m.info.ExpiresAt.Round(0).Sub(ready.Round(0)), 1)
	}
	if m.inflight == 0 {
		l.Unused, l.Quiet = now.Sub(m.unused), now.Sub(m.app.used)
		l.Prospect = m.app.prospect(now, l)
	}
	return l
}

// farthest is how far a standby without an end looks ahead.
const farthest = time.Hour

// prospect of a standby of the app. The caller holds the lock.
func (a *App) prospect(now time.Time, l homeostat.Life) homeostat.Prospect {
	if a.policy.Standby == homeostat.StandbyNever {
		return homeostat.Prospect{}
	}
	rest, life := farthest, farthest
	if l.Limit > 0 {
		rest, life = min(l.Limit-l.Age, farthest), min(l.Limit, farthest)
	}
	p := homeostat.Prospect{Boot: a.usual()}
	if a.used.IsZero() {
		return p
	}
	gaps := &homeostat.Gaps{} // an earlier daemon knew them
	if a.record != nil {
		gaps = &a.record.gaps
	}
	quiet := max(now.Sub(a.used), 0)
	p.Chance, p.Next = gaps.Chance(quiet, rest), gaps.Chance(quiet, life)
	return p
}

// retire takes an instance out of the route and ends it once what is in flight
// has finished. The caller holds the lock.
func (a *App) retire(m *member, cause string) {
	m.retiring = true
	m.announce()
	if m.inflight == 0 {
		close(m.quiet)
	}
	a.k.cfg.Events(fleet.Event{Time: time.Now(), Type: fleet.EventRetire, App: a.name, Instance: m.info.ID, Revision: m.info.Revision, Node: m.info.Node, Cause: cause,
		Inputs: map[string]float64{"in_flight": float64(m.inflight), "age_s": time.Since(m.inst.Ready()).Seconds(), "unused_s": time.Since(m.unused).Seconds()}})
	drain := a.rev.Spec.Drain.Std()
	a.k.work.Go(func() {
		m.drain(drain, a.k.ctx)
		a.leave(m)
		if a.k.closed.Load() && cause != causeRemoved {
			return // what did not finish goes on under the next daemon
		}
		a.k.stop(m.inst, cause)
		a.k.ledger.ended(a, m.claim, false)
	})
	a.reweigh()
}

const causeRemoved = "the app was deleted"

// streamGrace is how long a long-lived stream may take to say goodbye.
const streamGrace = 5 * time.Second

// drain waits until nothing is in flight, for the drain time; then long-lived
// streams are told to end, and get a moment for it.
func (m *member) drain(limit time.Duration, ctx context.Context) { //nolint:revive // the context is not the subject
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-m.quiet:
		return
	case <-ctx.Done():
		return
	case <-timer.C:
	}
	close(m.closing)
	timer.Reset(streamGrace)
	select {
	case <-m.quiet:
	case <-ctx.Done():
	case <-timer.C:
	}
}

// leave forgets an instance whose drain is over.
func (a *App) leave(m *member) {
	a.mu.Lock()
	if i := slices.Index(a.ready, m); i >= 0 {
		a.ready = slices.Delete(a.ready, i, i+1)
	}
	a.mu.Unlock()
	_ = m.upstream.Close()
}

// gone handles the end of an instance that nobody asked for.
func (a *App) gone(id fleet.InstanceID) {
	a.mu.Lock()
	i := slices.IndexFunc(a.ready, func(m *member) bool { return m.info.ID == id })
	if i < 0 || a.ready[i].retiring {
		a.lost(id)
		a.mu.Unlock()
		return
	}
	m := a.ready[i]
	m.retiring = true
	m.announce()
	a.ready = slices.Delete(a.ready, i, i+1)
	// An instance that lives for a moment only is a failed start by another
	// name; but one that has answered before is given the benefit of the doubt
	// once.
	a.k.ledger.ended(a, m.claim, false)
	if m.inst.OutOfMemory() {
		a.enlarge(int64(m.inst.Limits().Memory))
	}
	a.young++
	if time.Since(m.inst.Ready()) >= 5*time.Second {
		a.young = 0
	} else if !m.answered || a.young > 1 {
		a.failures++
		a.failedAt = time.Now()
		a.lastErr = errors.New("it ended just after it had become ready")
	}
	if plan := a.decide(time.Now()); plan.Refuse {
		a.refuse(&fleet.Error{Op: "route to", Subject: string(a.name), Kind: fleet.ErrFailing, Err: a.lastErr})
	}
	if a.keeps() {
		a.wake(homeostat.Backoff(a.failures))
	}
	a.mu.Unlock()
	_ = m.upstream.Close()
}

// set gives the app its revision.
func (a *App) set(rev fleet.Revision, stopped bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := rev.Spec
	renewed := a.rev.ID != rev.ID
	changed := renewed || a.stopped != stopped
	a.rev, a.stopped = rev, stopped
	a.policy = homeostat.Policy{
		Min: s.Scale.Min, Max: s.Scale.Max, Concurrency: s.Concurrency, Lifetime: s.Lifetime.Std(), Idle: s.Idle.Std(), Priority: s.Priority,
		CPU:    homeostat.Span[float64]{Rest: s.Resources.CPU.Rest, Peak: s.Resources.CPU.Peak},
		Memory: homeostat.Span[int64]{Rest: int64(s.Resources.Memory.Rest), Peak: int64(s.Resources.Memory.Peak)},
	}
	switch {
	case a.k.larder.budget <= 0:
	case s.Start == fleet.StartStandby:
		a.policy.Standby = homeostat.StandbyAlways
	case s.Start == fleet.StartAuto:
		a.policy.Standby = homeostat.StandbyAuto
	}
	a.policy.Save = savePolicy(s)
	a.active = max(a.active, 1)
	if renewed && a.births != nil {
		a.births.restored = window{}
	}
	if changed { // what failed before may work now
		a.failures, a.young, a.lastErr = 0, 0, nil
		a.limit, a.memory = 0, 0
		if a.watch != nil {
			a.watch.trend = homeostat.Trend{}
		}
	}
	if stopped {
		for _, m := range slices.Clone(a.ready) {
			if !m.retiring {
				a.retire(m, "the app is stopped")
			}
		}
		a.discardAll("the app is stopped")
		a.refuse(&fleet.Error{Op: "route to", Subject: string(a.name), Kind: fleet.ErrUnavailable, Err: errors.New("the app is stopped")})
		return
	}
	if len(a.ready)+len(a.standby) > 0 || a.keeps() {
		a.wake(0)
	}
}

func (a *App) remove() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.removed = true
	if a.births != nil && a.births.giveUp != nil {
		a.births.giveUp()
	}
	for _, m := range slices.Clone(a.ready) {
		if !m.retiring {
			a.retire(m, causeRemoved)
		}
	}
	a.discardAll(causeRemoved)
	a.refuse(&fleet.Error{Op: "route to", Subject: string(a.name), Kind: fleet.ErrNotFound, Err: errors.New(causeRemoved)})
	a.stopTimers()
}

func (a *App) stopTimers() {
	if a.timer != nil {
		a.timer.Stop()
	}
	if a.watch != nil && a.watch.timer != nil {
		a.watch.timer.Stop()
		a.unwatch()
	}
}

// close refuses whoever waits, for the daemon is stopping.
func (a *App) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.refuse(&fleet.Error{Op: "route to", Subject: string(a.name), Kind: fleet.ErrUnavailable, Err: errShutdown})
	a.stopTimers()
}

// Status is an app's present, for people.
type Status struct {
	Revision  fleet.RevisionID
	Stopped   bool
	Ready     int
	Standby   int
	Starting  int
	Waiting   int
	InFlight  int
	Failures  int
	LastError string
}

// Status of the app.
func (a *App) Status() Status {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := Status{Revision: a.rev.ID, Stopped: a.stopped, Starting: a.starting, Failures: a.failures}
	if a.lastErr != nil {
		s.LastError = a.lastErr.Error()
	}
	if a.waiting != nil {
		s.Waiting = a.waiting.Len()
	}
	s.Ready, s.Standby = a.serving(), len(a.standby)
	for _, m := range a.ready {
		s.InFlight += m.inflight
	}
	return s
}

// InFlight requests by instance.
func (a *App) InFlight() map[fleet.InstanceID]int {
	a.mu.Lock()
	defer a.mu.Unlock()
	n := make(map[fleet.InstanceID]int, len(a.ready))
	for _, m := range a.ready {
		n[m.info.ID] = m.inflight
	}
	return n
}

// Instance that the slot is on.
func (l *Lease) Instance() fleet.InstanceID { return l.m.info.ID }

// Address of the instance.
func (l *Lease) Address() netip.AddrPort { return l.m.info.Address }

// Upstream is what the front door attached to the instance.
func (l *Lease) Upstream() io.Closer { return l.m.upstream }

// Stages of the start that the request waited for, or nil.
func (l *Lease) Stages() *fleet.Stages {
	if l.birth == nil {
		return nil
	}
	return l.birth.stages
}

// Answered tells how long the connection and the first byte took.
func (l *Lease) Answered(connect, firstByte time.Duration) {
	if l.birth != nil {
		l.birth.answered(connect, firstByte)
	}
}

// Closing is closed when long-lived streams must end.
func (l *Lease) Closing() <-chan struct{} { return l.m.closing }

// Streams tells that the exchange became a long-lived one: how long it takes
// says nothing about the load.
func (l *Lease) Streams() {
	a := l.m.app
	a.mu.Lock()
	defer a.mu.Unlock()
	if !l.stream {
		l.stream = true
		l.m.streams++
		a.watch.inFlight--
	}
}

// Release gives the slot back.
func (l *Lease) Release(failed bool) {
	a, m := l.m.app, l.m
	a.mu.Lock()
	now := time.Now()
	m.inflight--
	if l.stream {
		m.streams--
	} else {
		w := a.watch
		w.inFlight--
		w.answered++
		w.busy += now.Sub(l.began)
	}
	a.used = now
	a.record.closes(now, a.waiting != nil)
	m.answered = m.answered || !failed
	if failed {
		m.brokeAt = now
	}
	if m.inflight == 0 {
		m.unused = now
		if m.retiring {
			select {
			case <-m.quiet:
			default:
				close(m.quiet)
			}
		}
	}
	if a.waiting != nil {
		a.serve(nil)
	}
	a.mu.Unlock()
}

// Refused gives the slot back and takes the instance, which refused the
// connection, out of the route.
func (l *Lease) Refused() {
	a, m := l.m.app, l.m
	a.mu.Lock()
	if !m.retiring && !a.k.closed.Load() {
		a.retire(m, "refused a connection")
		a.decide(time.Now())
	}
	a.mu.Unlock()
	l.Release(true)
}
