package sandbox

import (
	"context"
	"sync"
	"time"
)

// calm is how long the shelf is left as it is after a sandbox was taken from
// it, as long as half of what is wanted is there. Making another one at once
// would take locks of the kernel that the start needs, too: moving a process
// into a cgroup v1 alone waits some 10 ms for RCU with cgroup_mutex held.
const calm = 50 * time.Millisecond

// pool keeps sandboxes prepared ahead. A start takes one from the shelf; the
// shelf is filled again in the background, to at least min and to twice the
// starts of the last second.
type pool struct {
	n        *Native
	min, max int
	ctx      context.Context //nolint:containedctx // the life of the background work
	cancel   context.CancelFunc
	wg       sync.WaitGroup
	kick     chan struct{}

	mu    sync.Mutex
	shelf []*prepared
	taken []time.Time // of the last second
}

func newPool(n *Native, least, most int) *pool {
	p := &pool{n: n, min: least, max: most, kick: make(chan struct{}, 1)}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	if least > 0 {
		p.wg.Go(p.fill)
	}
	return p
}

// open begins to fill the shelf. Before the containers of an earlier daemon
// were adopted it must not be: what is prepared takes addresses and uids.
func (p *pool) open() {
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// take gives the freshest sandbox of the shelf, or makes one.
func (p *pool) take(ctx context.Context) (*prepared, error) {
	p.mu.Lock()
	p.taken = append(p.taken, time.Now())
	var s *prepared
	for s == nil && len(p.shelf) > 0 {
		last := len(p.shelf) - 1
		s, p.shelf = p.shelf[last], p.shelf[:last]
		select {
		case <-s.ended: // somebody killed it on the shelf
			dead := s
			s = nil
			p.wg.Go(func() { p.discard(dead) })
		default:
		}
	}
	p.mu.Unlock()
	p.open()
	if s != nil {
		return s, nil
	}
	return p.n.prepare(ctx, true, p.n.usualCaps)
}

// want is how many should be on the shelf now. The caller holds the lock.
func (p *pool) want(now time.Time) int {
	recent := 0
	for i, t := range p.taken {
		if now.Sub(t) < time.Second {
			recent = len(p.taken) - i
			break
		}
	}
	p.taken = p.taken[len(p.taken)-recent:]
	return min(max(p.min, 2*recent), p.max)
}

// fill is the background work: it prepares what is missing, and retires what
// is too much once nothing was taken for a while.
func (p *pool) fill() {
	for {
		select {
		case <-p.ctx.Done():
			return
		case <-p.kick:
		case <-p.surplusTimer():
		}
		for p.rest(); p.ctx.Err() == nil && p.step(); p.rest() {
		}
	}
}

// rest waits until no start of the last moments would be disturbed, or until
// there are too few on the shelf to care.
func (p *pool) rest() {
	for {
		p.mu.Lock()
		now := time.Now()
		want := p.want(now)
		var left time.Duration
		if len(p.shelf) >= want/2 && len(p.taken) > 0 {
			left = calm - now.Sub(p.taken[len(p.taken)-1])
		}
		p.mu.Unlock()
		if left <= 0 {
			return
		}
		select {
		case <-time.After(left):
		case <-p.kick:
		case <-p.ctx.Done():
			return
		}
	}
}

// surplusTimer wakes the filler when there is more on the shelf than the
// least, so that a burst's surplus goes away; otherwise the pool sleeps.
func (p *pool) surplusTimer() <-chan time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.shelf) > p.min {
		return time.After(2 * time.Second)
	}
	return nil
}

// step adds one to the shelf or takes one away, and tells whether it did.
func (p *pool) step() bool {
	p.mu.Lock()
	want, have := p.want(time.Now()), len(p.shelf)
	var surplus *prepared
	if have > want {
		surplus, p.shelf = p.shelf[0], p.shelf[1:]
	}
	p.mu.Unlock()
	switch {
	case surplus != nil:
		p.discard(surplus)
		return true
	case have == want:
		return false
	}
	s, err := p.n.prepare(p.ctx, true, p.n.usualCaps)
	if err != nil {
		if p.ctx.Err() == nil {
			p.n.log.Warn("prepare sandbox ahead", "error", err)
		}
		return false
	}
	if u := p.n.usual.Load(); u != nil {
		// Whatever is refused here, its start will be told.
		_ = s.group.Set(u.limits.Cgroup())
		_ = s.disk.resize(u.disk)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.shelf = append(p.shelf, s)
	return true
}

func (p *pool) discard(s *prepared) {
	if err := p.n.discard(s); err != nil {
		p.n.log.Warn("discard prepared sandbox", "error", err)
	}
}

func (p *pool) close() {
	p.cancel()
	p.wg.Wait()
	p.mu.Lock()
	shelf := p.shelf
	p.shelf = nil
	p.mu.Unlock()
	for _, s := range shelf {
		p.discard(s)
	}
}
