// Package homeostat decides: how many instances of an app there should be, when
// one of them ends and whether its successor comes first, and how long a
// failing app rests. Facts go in, a plan with its cause comes out. It does no
// I/O, reads no clock, rolls no dice and keeps no state, so that the same code
// runs in production, in tests of a thousand random days and in a simulation.
package homeostat

import (
	"time"
)

// Policy is what an app's owner allows.
type Policy struct {
	Min, Max int
	// Concurrency is the most requests in flight per instance; 0: no cap.
	Concurrency int
	// Lifetime and Idle end an instance; 0: never.
	Lifetime, Idle time.Duration
}

// Load is what an app has to do right now, and with what.
type Load struct {
	// Waiting requests are held, InFlight ones are being answered.
	Waiting, InFlight int
	// Ready and Starting instances of the current revision or an older one.
	Ready, Starting int
	// Failures in a row of starting an instance.
	Failures int
	// SinceFailure is the time since the last of them.
	SinceFailure time.Duration
}

// Plan says how many instances to start, and why.
type Plan struct {
	Start int
	Cause string
	// Refuse: the app cannot start at present; whoever waits is told at once.
	// RetryIn is when it is worth another try.
	Refuse  bool
	RetryIn time.Duration
}

// Causes of starts.
const (
	CauseRequest = "first request"
	CauseLoad    = "more requests than the instances may take"
	CauseMinimum = "scale.min"
	CauseRenewal = "successor"
)

// Decide plans the starts of an app.
func Decide(p Policy, l Load) Plan {
	have := l.Ready + l.Starting
	want, cause := 0, ""
	if l.Waiting > 0 {
		want, cause = 1, CauseRequest
		if have > 0 {
			cause = CauseLoad
		}
		if p.Concurrency > 0 {
			want = (l.Waiting + l.InFlight + p.Concurrency - 1) / p.Concurrency
		}
	}
	if want < p.Min {
		want, cause = p.Min, CauseMinimum
	}
	want = min(want, max(p.Max, 1))
	start := want - have
	if start <= 0 {
		return Plan{}
	}
	if rest := Backoff(l.Failures) - l.SinceFailure; l.Failures > 0 && rest > 0 {
		return Plan{Refuse: l.Ready == 0 && l.Starting == 0, RetryIn: rest}
	}
	if l.Failures > 0 {
		start = 1 // one trial, not a stampede
	}
	return Plan{Start: start, Cause: cause}
}

// Backoff is how long an app rests after that many failures in a row: half a
// second, doubled each time, at most half a minute.
func Backoff(failures int) time.Duration {
	const first, most = 500 * time.Millisecond, 30 * time.Second
	if failures <= 0 {
		return 0
	}
	return min(first<<min(failures-1, 10), most)
}

// Life is one instance's present.
type Life struct {
	// Age since it became ready, and Limit of it: its own lifetime, see Lifetime.
	Age, Limit time.Duration
	// Unused is the time since the end of its last response; 0 while InFlight.
	Unused   time.Duration
	InFlight int
	// Outdated: a newer revision or image exists.
	Outdated bool
	// Siblings that are ready and not retiring, itself included.
	Siblings int
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
)

// recent is how fresh the last response must be for an instance to count as
// having traffic, which is worth a successor before its end.
const recent = 10 * time.Second

// Judge decides about one ready instance.
func Judge(p Policy, l Life) Fate {
	busy := l.InFlight > 0 || l.Unused < recent
	needed := l.Siblings <= p.Min
	switch {
	case l.Outdated && (busy || needed):
		return Fate{Verdict: Replace, Cause: CauseOutdated}
	case l.Outdated:
		return Fate{Verdict: Retire, Cause: CauseOutdated}
	case l.Limit > 0 && l.Age >= l.Limit && (busy || needed):
		return Fate{Verdict: Replace, Cause: CauseLifetime}
	case l.Limit > 0 && l.Age >= l.Limit:
		return Fate{Verdict: Retire, Cause: CauseLifetime}
	case p.Idle > 0 && l.InFlight == 0 && l.Unused >= p.Idle && !needed:
		return Fate{Verdict: Retire, Cause: CauseIdle}
	}
	f := Fate{}
	if l.Limit > 0 {
		f.Again = l.Limit - l.Age
	}
	if p.Idle > 0 && !needed {
		// With requests in flight it cannot be idle before a whole idle time.
		if left := p.Idle - l.Unused; f.Again == 0 || left < f.Again {
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
