package control

import (
	"context"
	"errors"
	"sync"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/homeostat"
)

// ledger counts what the instances of all apps reserve of this machine, and
// decides who may start the next one: the app that has least for its weight.
// Only starts and ends touch it.
type ledger struct {
	capacity homeostat.Claim // 0: not bounded
	parallel int             // most starts at once
	wanted   bell            // somebody needs room
	first    bell            // the first account was opened

	mu       sync.Mutex
	claimed  homeostat.Claim
	starting int
	accounts map[*App]*account
	queue    []*ticket
}

// account is one app's part. It exists while the app has instances, starts or
// asks for one.
type account struct {
	weight    float64
	instances int // ready, starting and ending ones
	starting  int
	waiting   int
	claimed   homeostat.Claim
	digested  bool // in the last digestion
}

// ticket is a start that waits for its turn.
type ticket struct {
	app   *App
	acc   *account
	claim homeostat.Claim
	turn  chan error // one value
}

func newLedger(capacity homeostat.Claim, parallel int) *ledger {
	return &ledger{capacity: capacity, parallel: parallel, wanted: make(bell, 1), first: make(bell, 1), accounts: map[*App]*account{}}
}

var errFull = errors.New("the machine is full, and the app has its share of it")

// bell wakes a loop, which hears several rings as one.
type bell chan struct{}

func (b bell) ring() {
	select {
	case b <- struct{}{}:
	default:
	}
}

// hungry asks for a digestion soon.
func (g *ledger) hungry() { g.wanted.ring() }

// any tells whether an app has an instance or asks for one.
func (g *ledger) any() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.accounts) > 0
}

// account of an app, which is opened if it has none. The caller holds the lock.
func (g *ledger) account(a *App, priority int) *account {
	acc := g.accounts[a]
	if acc == nil {
		acc = &account{}
		if g.accounts[a] = acc; len(g.accounts) == 1 {
			g.first.ring()
		}
	}
	acc.weight = weight(priority)
	return acc
}

// weight of an app by its priority: 50 is one.
func weight(priority int) float64 { return float64(max(priority, 1)) / 50 }

// admit waits until one more instance may be started. It fails with errFull
// when there is no room and the app has its share already.
func (g *ledger) admit(ctx context.Context, a *App, claim homeostat.Claim, priority int) error {
	g.mu.Lock()
	acc := g.account(a, priority)
	t := &ticket{app: a, acc: acc, claim: claim, turn: make(chan error, 1)}
	acc.waiting++
	g.queue = append(g.queue, t)
	g.grant()
	short := len(g.queue) > 0 && !g.room(claim)
	g.mu.Unlock()
	if short {
		g.hungry()
	}
	select {
	case err := <-t.turn:
		return err
	case <-ctx.Done():
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case err := <-t.turn:
		if err == nil {
			g.giveBack(a, claim, true)
		}
	default:
		for i, q := range g.queue {
			if q == t {
				g.queue = append(g.queue[:i], g.queue[i+1:]...)
				break
			}
		}
		acc.waiting--
		g.forget(a, acc)
	}
	return context.Cause(ctx)
}

func (g *ledger) room(claim homeostat.Claim) bool {
	c := g.capacity
	if c.CPU <= 0 {
		claim.CPU = 0
	}
	if c.Memory <= 0 {
		claim.Memory = 0
	}
	return homeostat.Fits(c, g.claimed, claim, 1) == 1
}

// share is what an app has, divided by what is its due among those that have
// or want something. The caller holds the lock.
func (g *ledger) share(acc *account) float64 {
	sum := 0.0
	for _, o := range g.accounts {
		sum += o.weight
	}
	part := homeostat.Part(g.capacity, acc.claimed)
	if sum == 0 || acc.weight == 0 {
		return part
	}
	return part * sum / acc.weight
}

// grant lets those begin who have least for their weight, as long as there is
// room, and sends away those who have their share. The caller holds the lock.
func (g *ledger) grant() {
	for len(g.queue) > 0 {
		best := -1
		var least float64
		for i, t := range g.queue {
			// Of two with as much, the one that starts less: so a stampede
			// of one app does not delay the first instance of another.
			have := (homeostat.Part(g.capacity, t.acc.claimed) + float64(t.acc.starting)/float64(g.parallel)) / t.acc.weight
			if best < 0 || have < least {
				best, least = i, have
			}
		}
		t := g.queue[best]
		fits := g.room(t.claim)
		if fits && g.starting >= g.parallel {
			return
		}
		if !fits {
			if !g.sendAway() {
				return
			}
			continue
		}
		g.queue = append(g.queue[:best], g.queue[best+1:]...)
		t.acc.waiting--
		t.acc.starting++
		g.starting++
		g.count(t.acc, t.claim)
		t.turn <- nil
	}
}

// sendAway refuses the tickets of apps that have their share of a full
// machine. The caller holds the lock.
func (g *ledger) sendAway() bool {
	kept := g.queue[:0]
	for _, t := range g.queue {
		if t.acc.instances > 0 && g.share(t.acc) >= 1 {
			t.acc.waiting--
			t.turn <- errFull
			continue
		}
		kept = append(kept, t)
	}
	gone := len(kept) < len(g.queue)
	clear(g.queue[len(kept):])
	g.queue = kept
	return gone
}

// started ends the start of an instance, which goes on to be counted.
func (g *ledger) started(a *App) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.starting--
	if acc := g.accounts[a]; acc != nil {
		acc.starting--
	}
	g.grant()
}

// adopted counts an instance that was there before.
func (g *ledger) adopted(a *App, claim homeostat.Claim, priority int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.count(g.account(a, priority), claim)
}

// spare counts what nobody waits for, if there is room for it that nobody else
// wants. It is no start, so it takes nobody's turn.
func (g *ledger) spare(a *App, claim homeostat.Claim, priority int) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.queue) > 0 || !g.room(claim) {
		return false
	}
	g.count(g.account(a, priority), claim)
	return true
}

// count one more instance of an app. The caller holds the lock.
func (g *ledger) count(acc *account, claim homeostat.Claim) {
	acc.instances++
	acc.claimed = acc.claimed.Add(claim, 1)
	g.claimed = g.claimed.Add(claim, 1)
}

// ended gives back what an instance had.
func (g *ledger) ended(a *App, claim homeostat.Claim, starting bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.giveBack(a, claim, starting)
	g.grant()
}

func (g *ledger) giveBack(a *App, claim homeostat.Claim, starting bool) {
	acc := g.accounts[a]
	acc.instances--
	if starting {
		acc.starting--
		g.starting--
	}
	acc.claimed = acc.claimed.Add(claim, -1)
	g.claimed = g.claimed.Add(claim, -1)
	g.forget(a, acc)
}

func (g *ledger) forget(a *App, acc *account) {
	if acc.instances == 0 && acc.waiting == 0 {
		delete(g.accounts, a)
		if len(g.accounts) == 0 {
			g.claimed = homeostat.Claim{} // no crumbs of floating point
		}
	}
}

// rooms is how many starts wait for room.
func (g *ledger) rooms() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	n := 0
	for _, t := range g.queue {
		if !g.room(t.claim) {
			n++
		}
	}
	return n
}

// party is an app with instances, for the digestion.
type party struct {
	app      *App
	share    float64
	digested bool
}

func (g *ledger) parties() []party {
	g.mu.Lock()
	defer g.mu.Unlock()
	list := make([]party, 0, len(g.accounts))
	for a, acc := range g.accounts {
		if acc.instances > 0 {
			list = append(list, party{a, g.share(acc), acc.digested})
		}
	}
	return list
}

// crowded is whether an app has so many of the holds of this node that one
// more of it would be at the cost of others: beyond half of all, apps that
// wait share alike.
func (k *Control) crowded(held int) bool {
	total, all := int64(k.cfg.HoldsTotal), k.holds.Load()
	if all >= total {
		return true
	}
	return all >= total/2 && int64(held) >= total/(k.holding.Load()+1)
}

func full(name fleet.AppName) error {
	return &fleet.Error{Op: "route to", Subject: string(name), Kind: fleet.ErrOverloaded, Err: errFull, Hint: "try again soon; on this machine other apps need their share"}
}
