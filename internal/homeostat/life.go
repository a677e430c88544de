package homeostat

import "time"

// Life is one instance's present.
type Life struct {
	// Age since it became ready, and Limit of it: its own lifetime, see Lifetime.
	Age, Limit time.Duration
	// Unused is the time since the end of its last response; 0 while InFlight.
	Unused   time.Duration
	InFlight int
	// Quiet is the same for its whole app: a successor has answered nothing
	// yet, and is not busy for that.
	Quiet time.Duration
	// Outdated: a newer revision or image exists.
	Outdated bool
	// Siblings that are ready and not retiring, itself included.
	Siblings int
	// Surplus: its siblings suffice, see Plan.Active.
	Surplus bool
	// Prospect of it as a standby.
	Prospect Prospect
}

// Verdict on one instance.
type Verdict int

// The verdicts.
const (
	// Keep it until Again has passed.
	Keep Verdict = iota
	// Retire it now.
	Retire
	// Replace it: start a successor, and retire it when that is ready.
	Replace
	// Freeze it: it becomes a standby.
	Freeze
)

// Fate is a verdict with its cause.
type Fate struct {
	Verdict Verdict
	Cause   string
	// Again is when to ask again; 0: only when something changes.
	Again time.Duration
}

// Causes of ends.
const (
	CauseLifetime = "lifetime ended"
	CauseIdle     = "idle"
	CauseOutdated = "newer revision"
	CauseSurplus  = "surplus"
)

const (
	// recent is how fresh the last response must be for an app to count as
	// having traffic, which is worth a successor before its end.
	recent = 10 * time.Second
	// surplusIdle is how long surplus lives unused, where idle is not shorter:
	// what was started on a false alarm is soon gone.
	surplusIdle = 3 * time.Second
)

// Judge decides about one ready instance.
func Judge(p Policy, l Life) Fate {
	busy := l.InFlight > 0 || l.Quiet < recent
	needed := l.Siblings <= p.Min
	surplus := l.Surplus && !needed && l.Siblings > 1
	idle := p.Idle
	if surplus && (idle == 0 || idle > surplusIdle) {
		idle = surplusIdle
	}
	switch {
	case surplus && l.Outdated:
		return Fate{Verdict: Retire, Cause: CauseOutdated}
	case surplus && l.Limit > 0 && l.Age >= l.Limit:
		return Fate{Verdict: Retire, Cause: CauseLifetime}
	case l.Outdated && (busy || needed):
		return Fate{Verdict: Replace, Cause: CauseOutdated}
	case l.Outdated:
		return Fate{Verdict: Retire, Cause: CauseOutdated}
	case l.Limit > 0 && l.Age >= l.Limit && (busy || needed):
		return Fate{Verdict: Replace, Cause: CauseLifetime}
	case l.Limit > 0 && l.Age >= l.Limit:
		return Fate{Verdict: Retire, Cause: CauseLifetime}
	case idle > 0 && l.InFlight == 0 && l.Unused >= idle && !needed:
		switch {
		case surplus && p.freezesSurplus(l):
			return Fate{Verdict: Freeze, Cause: CauseSurplus}
		case surplus:
			return Fate{Verdict: Retire, Cause: CauseSurplus}
		case p.freezes(l):
			return Fate{Verdict: Freeze, Cause: CauseIdle}
		}
		return Fate{Verdict: Retire, Cause: CauseIdle}
	}
	f := Fate{}
	if l.Limit > 0 {
		f.Again = l.Limit - l.Age
	}
	if idle > 0 && !needed {
		// With requests in flight it cannot be idle before a whole idle time.
		if left := idle - l.Unused; f.Again == 0 || left < f.Again {
			f.Again = left
		}
	}
	return f
}

// Lifetime is an instance's own lifetime: up to a tenth shorter than the
// policy's, by chance (from 0 to 1), so that siblings do not end together.
func Lifetime(p Policy, chance float64) time.Duration {
	return p.Lifetime - time.Duration(chance*float64(p.Lifetime)/10)
}
