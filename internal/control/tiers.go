package control

import (
	"context"
	"sync"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/homeostat"
)

// births is what was measured of an app's starts, by kind. It exists from the
// first one on.
type births struct {
	cold, restored, thawed window
	saving                 bool   // a checkpoint is being made
	giveUp                 func() // ends that; nil: it has not begun
}

// window is how long the last starts of a kind took, and what came of them.
type window struct {
	took   [16]time.Duration
	n      int
	memory int64 // of the last one
	disk   int64
}

func (w *window) add(d time.Duration) {
	w.took[w.n%len(w.took)] = d
	w.n++
}

// of the last starts, the one in the middle and the longest.
func (w *window) quantiles() (p50, most time.Duration) {
	n := min(w.n, len(w.took))
	if n == 0 {
		return 0, 0
	}
	s := w.took
	for i := 1; i < n; i++ { // so few are sorted where they are
		for j := i; j > 0 && s[j] < s[j-1]; j-- {
			s[j], s[j-1] = s[j-1], s[j]
		}
	}
	return s[n/2], s[n-1]
}

func (w *window) tier() homeostat.Tier {
	p50, most := w.quantiles()
	return homeostat.Tier{Starts: w.n, Usual: p50, Tail: most, Memory: w.memory, Disk: w.disk}
}

func (b *births) of(kind fleet.StartKind) *window {
	switch kind {
	case fleet.CheckpointStart:
		return &b.restored
	case fleet.StandbyStart:
		return &b.thawed
	case fleet.ColdStart:
	}
	return &b.cold
}

// next is the kind of start that the app's next one is asked to be: a restore
// becomes a cold one where nothing is saved. The caller holds the lock.
func (a *App) next() fleet.StartKind {
	var cold, restored homeostat.Tier
	if a.births != nil {
		cold, restored = a.births.cold.tier(), a.births.restored.tier()
	}
	if a.policy.Restores(cold, restored) {
		return fleet.CheckpointStart
	}
	return fleet.ColdStart
}

// usual is how long the next start will take, as far as is known. The caller
// holds the lock.
func (a *App) usual() time.Duration {
	p50, _ := a.expected()
	return p50
}

// expected is how long the next start will take: usually, and at the most.
func (a *App) expected() (usual, most time.Duration) {
	switch {
	case a.births == nil:
		return 0, 0
	case a.births.cold.n == 0 || a.births.restored.n > 0 && a.next() == fleet.CheckpointStart:
		return a.births.restored.quantiles()
	default:
		return a.births.cold.quantiles()
	}
}

// born takes note of a start. The caller holds the lock.
func (a *App) born(kind fleet.StartKind, took time.Duration) {
	if a.births == nil {
		a.births = &births{}
	}
	a.births.of(kind).add(took)
}

// Start is what is known of one kind of start of an app.
type Start struct {
	Kind fleet.StartKind
	homeostat.Tier
	// Next: the app's next start is to be of this kind.
	Next bool
}

// Starts are what was measured on this node, by kind. While a standby is there
// the next start is its thaw.
func (a *App) Starts() []Start {
	a.mu.Lock()
	defer a.mu.Unlock()
	next := a.next()
	b := a.births
	if b == nil {
		b = &births{}
	}
	if next == fleet.CheckpointStart && b.restored.n == 0 && b.restored.disk == 0 {
		next = fleet.ColdStart // nothing is saved, as far as is known here
	}
	if a.thawable() > 0 {
		next = fleet.StandbyStart
	}
	var starts []Start
	for _, kind := range []fleet.StartKind{fleet.ColdStart, fleet.CheckpointStart, fleet.StandbyStart} {
		starts = append(starts, Start{Kind: kind, Tier: b.of(kind).tier(), Next: kind == next})
	}
	return starts
}

// saveDelay is how long a checkpoint waits after the start that it is made
// for: the request of that comes first.
const saveDelay = time.Second

const causeSlow = "its starts take long enough"

// keepStart measures what an instance that was just started holds, and has the app's
// processes saved if that is worth it. It goes on in the background.
func (a *App) keepStart(inst Instance) {
	kind := inst.Info().Kind
	a.mu.Lock()
	saves := kind == fleet.ColdStart && !a.births.saving && a.policy.Saves(a.births.cold.tier()) && inst.Info().Revision == a.rev.ID
	if saves {
		a.births.saving = true
	}
	known := a.births.of(kind).memory > 0
	a.mu.Unlock()
	if known && !saves {
		return
	}
	a.k.work.Go(func() {
		select {
		case <-time.After(saveDelay):
		case <-a.k.ctx.Done():
			return
		}
		if s, err := inst.Stats(); err == nil {
			a.mu.Lock()
			a.births.of(kind).memory = int64(s.Memory)
			a.mu.Unlock()
		}
		if saves {
			a.save()
		}
	})
}

// save has the processes of the app's revision saved, if the machine has room
// for one more instance that nobody else wants. It is given up when the machine
// starves, and when the app is removed, so that nothing is saved after what was
// saved is deleted.
func (a *App) save() {
	a.mu.Lock()
	rev, claim, priority := a.rev, a.claim(), a.policy.Priority
	cold, over := a.births.cold.tier(), a.removed || a.stopped
	ctx, cancel := context.WithCancel(a.k.ctx)
	defer cancel()
	a.births.giveUp = cancel
	a.mu.Unlock()
	bytes := int64(0)
	if !over {
		inputs := map[string]float64{"cold_ms": cold.Usual.Seconds() * 1e3, "starts": float64(cold.Starts)}
		bytes = a.k.cfg.Node.Save(ctx, rev, causeSlow, inputs, func() (func(), bool) {
			if !a.k.ledger.spare(a, claim, priority) {
				return nil, false
			}
			a.k.savings.begin(a, cancel)
			return func() {
				a.k.savings.end(a)
				a.k.ledger.ended(a, claim, false)
			}, true
		})
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.births.saving = false
	if rev.ID == a.rev.ID && bytes > 0 {
		a.births.restored.disk = bytes
	}
}

// savings are the checkpoints that are being made, and what ends them.
type savings struct {
	mu  sync.Mutex
	all map[*App]context.CancelFunc
}

func (s *savings) begin(a *App, giveUp context.CancelFunc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.all == nil {
		s.all = map[*App]context.CancelFunc{}
	}
	s.all[a] = giveUp
}

func (s *savings) end(a *App) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.all, a)
}

// giveUp ends all of them, and tells how many there were. Each is made another
// time, after a start of its app.
func (s *savings) giveUp() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := len(s.all)
	for _, giveUp := range s.all {
		giveUp()
	}
	clear(s.all)
	return n
}

// savePolicy of an app. Siblings from one image begin with the same memory, and so
// with the same state of random generators that live in it: OpenSSL's, and with it
// all that Node.js calls cryptographic. Nobody gets that who has not said that
// it is taken care of, by start: checkpoint or by naming a signal.
//
// Processes that are to be saved run beside those that serve: an app that never
// has two instances and writes to a volume may not bear that, so it must ask for it.
func savePolicy(s fleet.Spec) homeostat.SavePolicy {
	switch s.Start {
	case fleet.StartCheckpoint:
		return homeostat.SaveAlways
	case fleet.StartCold:
		return homeostat.SaveNever
	case fleet.StartAuto, fleet.StartStandby:
	}
	if s.RestoredSignal == "" {
		return homeostat.SaveNever
	}
	if s.Scale.Max == 1 {
		for _, v := range s.Volumes {
			if !v.Readonly {
				return homeostat.SaveNever
			}
		}
	}
	return homeostat.SaveAuto
}
