package control

import (
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/homeostat"
	"github.com/fastcontainer/fastcontainer/internal/sandbox"
)

const (
	// breath is the pace at which the machine is felt, gulp the pace while it
	// digests.
	breath, gulp = 500 * time.Millisecond, 100 * time.Millisecond
	// doze is the pace while all instances are frozen: they use no more than
	// they did, so only others on this machine could starve it.
	doze = 2 * time.Second
	// bites at most in each gulp: twenty instances a second.
	bites = 2
	// feast is the longest that a digestion goes on, and rest how long it then
	// pauses: too much of it would be worse than hunger.
	feast, rest = 30 * time.Second, 5 * time.Second
	// lean is how long an app whose peak was digested stays at rest.
	lean = 5 * time.Second
	// fresh is how soon after a broken exchange an instance counts as failing.
	fresh = 10 * time.Second
)

// autophagy feels the machine and has it digest its idle parts when it
// starves. Without instances there is nothing to feel, and nothing ticks until
// the first of them comes.
func (k *Control) autophagy() {
	timer := time.NewTimer(breath)
	defer timer.Stop()
	var since, until time.Time // of a digestion; of a pause
	pace := breath
	for {
		select {
		case <-k.ctx.Done():
			return
		case <-k.ledger.first:
			if pace == 0 || pace == doze {
				pace = breath
				timer.Reset(pace)
			}
			continue
		case <-timer.C:
		case <-k.ledger.wanted:
		}
		pace = k.pace()
		now := time.Now()
		starving := false
		if pace > 0 && now.After(until) {
			v := k.feel()
			h := homeostat.Feel(v, !since.IsZero())
			h.Rooms = k.ledger.rooms()
			if starving = !h.None(); starving {
				pace = gulp
				if n := k.savings.giveUp(); n > 0 { // the first that it can do without
					k.cfg.Logger.Info("the machine starves: checkpoints that were being made are given up", "checkpoints", n)
				} else {
					k.digest(now, k.ledger.parties(), h, v)
				}
			}
		}
		switch {
		case !starving: // it is fed
			since = time.Time{}
		case since.IsZero():
			since = now
		case now.Sub(since) > feast:
			since, until = time.Time{}, now.Add(rest)
			k.cfg.Logger.Warn("the machine still starves after a long digestion, which pauses now", "pause", rest)
		}
		if pace > 0 {
			timer.Reset(pace)
		}
	}
}

// pace at which the machine is felt while it is fed: 0, not at all.
func (k *Control) pace() time.Duration {
	switch {
	case k.ledger.any():
		return breath
	case k.larder.any():
		return doze
	default:
		return 0
	}
}

// feel the machine.
func (k *Control) feel() homeostat.Vitals {
	v := k.cfg.Node.Vitals()
	k.vitals.Store(&v)
	return v
}

// digest has some cells digested.
func (k *Control) digest(now time.Time, parties []party, h homeostat.Hunger, v homeostat.Vitals) {
	var cells []homeostat.Cell
	var members []*member
	for i, p := range parties {
		cells, members = p.app.cells(now, i, p, cells, members)
	}
	cells, members = k.larder.cells(now, cells, members)
	bitten := map[*App]bool{}
	for _, b := range homeostat.Digest(h, cells, bites) {
		m, c := members[b.Cell], cells[b.Cell]
		inputs := map[string]float64{
			"lacks_memory": float64(h.Memory), "lacks_cpu": h.CPU, "lacks_rooms": float64(h.Rooms), "priority": float64(c.Priority),
			"node_used": float64(v.Used), "node_memory": float64(v.Memory), "memory_stalled": v.MemoryStalled, "cpu_stalled": v.CPUStalled,
			"unused_s": c.Unused.Seconds(), "used": float64(c.Memory), "share": c.Share,
		}
		if m.app.digest(now, m, c, b, inputs) {
			bitten[m.app] = true
			k.metrics.digested.WithLabelValues(b.Cause).Inc()
		}
	}
	k.ledger.mu.Lock()
	for a, acc := range k.ledger.accounts {
		acc.digested = bitten[a]
	}
	k.ledger.mu.Unlock()
}

// cells adds the app's instances as candidates. Nothing of a lone serving
// instance is taken but its peak.
func (a *App) cells(now time.Time, number int, p party, cells []homeostat.Cell, members []*member) ([]homeostat.Cell, []*member) {
	a.mu.Lock()
	defer a.mu.Unlock()
	serving := a.serving()
	place := 0
	for _, m := range a.ready {
		if m.retiring {
			continue
		}
		place++
		life := m.life(now, a.rev.ID, serving)
		limits := m.inst.Limits()
		c := homeostat.Cell{
			App: number, Priority: a.policy.Priority, InFlight: m.inflight, Unused: life.Unused,
			Surplus: place > a.active, Outdated: life.Outdated, Growing: m.growth >= leaking, Failing: !m.brokeAt.IsZero() && now.Sub(m.brokeAt) < fresh,
			Hot:      a.trend().Hot() > 0,
			Siblings: serving, Min: a.policy.Min, Share: p.share, Digested: p.digested,
			Memory: m.memory, MemoryLimit: int64(limits.Memory), MemoryRest: a.policy.Memory.Rest, CPU: limits.CPU, CPURest: a.policy.CPU.Rest,
		}
		if life.Limit > 0 {
			c.Left = max(life.Limit-life.Age, 1)
		}
		if c.Memory == 0 {
			c.Memory = 1 // not weighed yet, but something
		}
		cells, members = append(cells, c), append(members, m)
	}
	return cells, members
}

// digest takes one bite of an instance, if it is still as harmless as it was.
func (a *App) digest(now time.Time, m *member, c homeostat.Cell, b homeostat.Bite, inputs map[string]float64) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if c.Standby {
		if m.frost == nil || m.frost.thawing {
			return false
		}
		a.k.cfg.Events(fleet.Event{
			Time: now, Type: fleet.EventDigest, App: a.name, Instance: m.info.ID, Revision: m.info.Revision, Node: m.info.Node, Cause: b.Cause, Inputs: inputs,
		})
		a.discard(m, b.Cause, nil)
		return true
	}
	if m.retiring || m.frost != nil || b.Retire && c.InFlight == 0 && m.inflight > 0 || b.Retire && c.Siblings > 1 && a.serving() < 2 {
		return false
	}
	a.k.cfg.Events(fleet.Event{
		Time: now, Type: fleet.EventDigest, App: a.name, Instance: m.info.ID, Revision: m.info.Revision, Node: m.info.Node, Cause: b.Cause, Inputs: inputs,
	})
	if b.Retire {
		a.retire(m, b.Cause)
		return true
	}
	if b.CPU {
		a.leanUntil = now.Add(lean)
		a.setLimit(a.policy.CPU.Rest, b.Cause, inputs)
	}
	if b.Memory {
		a.resize(m, sandbox.Limits{Memory: fleet.Bytes(c.MemoryRest)}, b.Cause, inputs)
	}
	return true
}
