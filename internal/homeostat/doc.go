// Package homeostat decides: how many instances of an app there should be and
// how much each may use, which of them get requests, when one ends and whether
// its successor comes first, how long a failing app rests, who may still start
// something on a full machine, and what a starving machine digests.
//
// Facts go in, a plan with its cause comes out. It does no I/O, reads no clock
// and rolls no dice, so that the same code runs in production, in tests of a
// thousand random days and in a simulation. What it must remember between two
// looks at an app is a [Trend], which its caller keeps.
package homeostat

import (
	"math"
	"time"
)

// Policy is what an app's owner allows.
type Policy struct {
	Min, Max int
	// Concurrency is the most requests in flight per instance; 0: no cap.
	Concurrency int
	// Lifetime and Idle end an instance; 0: never.
	Lifetime, Idle time.Duration
	// CPU and Memory of one instance: cores and bytes.
	CPU    Span[float64]
	Memory Span[int64]
	// Priority decides who is digested first: low.
	Priority int
	// Standby: what becomes of idle instances.
	Standby StandbyPolicy
	// Save: whether starts restore saved processes.
	Save SavePolicy
}

// Span is what an instance has when calm and the most that it may be given.
type Span[T float64 | int64] struct{ Rest, Peak T }

// Most of the span: a peak below its rest stands for none.
func (s Span[T]) Most() T { return max(s.Rest, s.Peak) }

// Causes of starts and of changed limits.
const (
	CauseRequest = "first request"
	CauseLoad    = "more requests than the instances may take"
	CauseCPU     = "the processor limit of the instances is used up"
	CauseSlow    = "responses take longer than usual"
	CauseMinimum = "scale.min"
	CauseRenewal = "successor"
	CauseCalm    = "calm"
	CauseOthers  = "other apps have traffic"
	CauseMemory  = "memory limit is near"
	CauseOOM     = "killed for lack of memory"
)

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
	// Limit is the cores that each instance may use now; 0: its rest.
	Limit float64
	// Start is how long a start of it usually takes; 0: not known.
	Start time.Duration
	// Spare is how many of the machine's cores nobody uses; negative: not known.
	Spare float64
	// Ceiling is the cores that all of its instances together may be given
	// while other apps have traffic too, see Ceiling; 0: no bound.
	Ceiling float64
	// Standby instances of the current revision are frozen, and could be thawed.
	Standby int
	// Streams are long-lived exchanges, which keep a slot each and are not
	// among those InFlight.
	Streams int
	// Full: the machine has no room for more of this app at present.
	Full bool
	// Lean: it gave its peak to apps of higher priority, which lacked it.
	Lean bool
}

// Plan says what to do for an app now, and why.
type Plan struct {
	// Thaw so many standbys, and start so many instances, because of Cause.
	Thaw, Start int
	Cause       string
	// Limit is the cores that each instance should have because of LimitCause;
	// 0: what it has.
	Limit      float64
	LimitCause string
	// Active is how many instances should get requests; the others are surplus.
	Active int
	// Refuse: the app cannot start at present; whoever waits is told at once.
	// RetryIn is when it is worth another try.
	Refuse  bool
	RetryIn time.Duration
	// Look is when to look at the app again; 0: nothing is to be seen before
	// its next request.
	Look time.Duration
}

const (
	// target is how much of its processor limit an instance should use.
	target = 0.7
	// settle is how soon held requests should be gone if starting were free,
	// and settleInside those that wait inside the instances.
	settle, settleInside = 50 * time.Millisecond, 100 * time.Millisecond
	// firstLook is how soon the first look follows a request, and the pace
	// while something is going on; lastLook the pace when all is calm.
	firstLook, lastLook = 7 * time.Millisecond, 500 * time.Millisecond
)

// Decide plans for an app.
func Decide(p Policy, l Load, t *Trend) Plan {
	var plan Plan
	have := l.Ready + l.Starting
	want, cause := t.need(p, l)
	if want < p.Min {
		want, cause = p.Min, CauseMinimum
	}
	want = min(want, max(p.Max, 1))
	plan.Active = min(max(want, t.held(), 1), max(p.Max, 1))
	plan.Limit, plan.LimitCause = t.limit(p, l)
	plan.Look = t.look(p, l)
	start := want - have
	if start <= 0 {
		return plan
	}
	if l.Standby > 0 { // which hold what they need already
		plan.Thaw, plan.Cause = min(start, l.Standby), cause
		start -= plan.Thaw
	}
	if start == 0 || l.Full && have+plan.Thaw > 0 {
		return plan
	}
	if rest := Backoff(l.Failures) - l.SinceFailure; l.Failures > 0 && rest > 0 {
		plan.Refuse, plan.RetryIn = have+plan.Thaw == 0, rest
		return plan
	}
	if l.Failures > 0 {
		start = 1 // one trial, not a stampede
	}
	plan.Start, plan.Cause = start, cause
	return plan
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

// ceil of a number of instances; a hair above a whole one is noise.
func ceil(n float64) int { return int(math.Ceil(min(max(n, 0), 1e6) - 1e-9)) }
