package homeostat

import (
	"cmp"
	"slices"
	"time"
)

// A standby is an instance that was ready and idle, and was frozen instead of
// ended: it uses no processor, holds its memory, and answers as soon as it is
// thawed. It is mortal like any other.

// StandbyPolicy is what an app's owner wants of standbys.
type StandbyPolicy int

// The standby policies.
const (
	// StandbyNever: idle instances end.
	StandbyNever StandbyPolicy = iota
	// StandbyAuto: those are kept that are worth it.
	StandbyAuto
	// StandbyAlways: one is always kept, where the budget allows it.
	StandbyAlways
)

// Prospect is what a standby of an app promises.
type Prospect struct {
	// Boot is the wait for a start that a visit would be spared; 0: not known.
	Boot time.Duration
	// Chance of a visit in the rest of its life, and in one more life.
	Chance, Next float64
}

const (
	// leastBoot: below it a thaw saves nothing that anybody would notice.
	leastBoot = 2 * time.Millisecond
	// leastChance: below it memory is held for nobody.
	leastChance = 0.02
	// slowBoot: so slow a start is worth the processor time of one that is
	// made ahead, if a visit in its life is likelier than not, and a surplus
	// instance is kept for the next burst.
	slowBoot, likely = 250 * time.Millisecond, 0.5
)

// freezes tells whether an idle instance should be frozen instead of ended.
func (p Policy) freezes(l Life) bool {
	switch p.Standby {
	case StandbyAlways:
		return true
	case StandbyAuto:
		return l.Prospect.Boot >= leastBoot && l.Prospect.Chance >= leastChance
	case StandbyNever:
	}
	return false
}

// freezesSurplus is the same for one whose siblings suffice.
func (p Policy) freezesSurplus(l Life) bool {
	return p.Standby != StandbyNever && l.Prospect.Boot >= slowBoot && l.Prospect.Chance >= leastChance
}

// ahead tells whether a standby is worth a start of its own.
func (p Policy) ahead(l Life) bool {
	return p.Standby == StandbyAlways || p.Standby == StandbyAuto && l.Prospect.Boot >= slowBoot && l.Prospect.Next >= likely
}

// JudgeStandby decides about a frozen instance: what has come to its end, or is
// outdated, is replaced by a frozen successor if that pays.
func JudgeStandby(p Policy, l Life) Fate {
	var cause string
	switch {
	case l.Outdated:
		cause = CauseOutdated
	case l.Limit > 0 && l.Age >= l.Limit:
		cause = CauseLifetime
	case p.Standby == StandbyNever:
		cause = CauseIdle // the policy changed
	case l.Limit > 0:
		return Fate{Again: l.Limit - l.Age}
	default:
		return Fate{}
	}
	if p.ahead(l) {
		return Fate{Verdict: Replace, Cause: cause}
	}
	return Fate{Verdict: Retire, Cause: cause}
}

// Chance that a request comes within d, when none has come for so long: of the
// gaps that were as long, the share that ended in time. Without any it is as
// likely to stay quiet for as long again as not (the law of succession, with
// one gap that is taken for granted).
func (g *Gaps) Chance(quiet, d time.Duration) float64 {
	if d <= 0 {
		return 0
	}
	as, longer := g.Over(quiet), g.Over(quiet+d)
	guess := float64(d) / float64(quiet+d)
	return (as - longer + guess) / (as + 1)
}

// Standby is one of those that a machine keeps.
type Standby struct {
	// Memory that it holds.
	Memory int64
	// Always: its owner wants one kept.
	Always bool
	Prospect
}

// Worth of a standby: the wait that it is expected to spare, in seconds for
// each GiB that it holds.
func (s *Standby) Worth() float64 {
	return s.Boot.Seconds() * s.Chance / (float64(max(s.Memory, 1)) / (1 << 30))
}

// Ration chooses which standbys must go so that the others fit into so many
// bytes: those that are worth least for their memory, and those that their
// owners want last. It gives their indexes.
func Ration(budget int64, standbys []Standby) []int {
	held := int64(0)
	order := make([]int, len(standbys))
	for i := range standbys {
		held += standbys[i].Memory
		order[i] = i
	}
	if held <= budget {
		return nil
	}
	slices.SortStableFunc(order, func(i, j int) int {
		a, b := &standbys[i], &standbys[j]
		if a.Always != b.Always {
			if b.Always {
				return -1
			}
			return 1
		}
		return cmp.Compare(a.Worth(), b.Worth())
	})
	n := 0
	for ; n < len(order) && held > budget; n++ {
		held -= standbys[order[n]].Memory
	}
	return order[:n]
}
