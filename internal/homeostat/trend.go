package homeostat

import (
	"math"
	"time"
)

// Sample is what one look at an app shows: what happened since the look
// before, and what is now.
type Sample struct {
	// Span since the look before.
	Span time.Duration
	// Arrived and Answered requests, and Busy: the response times of those
	// answered, added up.
	Arrived, Answered int
	Busy              time.Duration
	// CPU time that all ready instances used. Periods of the processor limit
	// that went by, and those of them in which an instance was stopped at it.
	CPU                time.Duration
	Periods, Throttled uint64
	// Load as it is now.
	Load
}

// Trend is what an app's samples add up to. The zero value knows nothing. It
// is small, has no pointers, and costs nothing while nobody adds to it.
type Trend struct {
	// Sums of the last second or so, in seconds: older parts fade.
	span, arrived, answered, busy, cpu float64
	// use is the cores in use over the last period or so, inflow the requests
	// per second that arrived in it, usual the response
	// time in seconds when all is well, silent how long nothing was answered
	// although something was asked.
	use, inflow, usual float64
	silent             time.Duration

	tight time.Duration // for how long all that is allowed has been used
	hot   time.Duration // for how long the processor limit has been in the way
	full  time.Duration // the same, at the peak
	cool  time.Duration // for how long less than the limit at rest was enough
	slow  time.Duration // for how long responses took longer than usual
	late  time.Duration // for how long others left it less than its rest
	above time.Duration // for how long its limit has been more than others leave it
	calm  time.Duration // for how long nothing of this was seen
	most  [2]int        // instances needed in this and in the last stretch
	age   time.Duration // of this stretch
}

const (
	// memory of the sums, and of use: about a second, and one period of the
	// kernel's processor limit.
	memory, period = time.Second, 100 * time.Millisecond
	// moment at the processor limit that is no chance.
	moment = 2 * firstLook
	// stretch: what was needed is kept for one to two of these.
	stretch = 5 * time.Second
	// cooling is how long calm must last before a limit is lowered.
	cooling = 2 * time.Second
	// slowness: so much longer than usual, and at least so long, is slow.
	slowness, leastSlow = 3, 10 * time.Millisecond
	// lasting: so long at the peak is worth a sibling even if little waits.
	lasting = time.Second
	// catchUp is how soon what waits inside the instances should be done.
	catchUp = 500 * time.Millisecond
	// much above what others leave it is a limit that has to be lowered, unless
	// that passes: what others use differs from moment to moment.
	much, yielding = 1.15, 500 * time.Millisecond
	// scarce: with fewer cores unused than this the machine is full.
	scarce = 0.1
	// patience: for how long one instance may be slow before it gets a
	// sibling. Every further one takes four times as much: a sibling that does
	// not help is not followed by many.
	patience = 250 * time.Millisecond
)

// Rate of arriving requests, per second.
func (t *Trend) Rate() float64 { return ratio(t.arrived, t.span) }

// Cost of one request in processor time.
func (t *Trend) Cost() time.Duration { return seconds(ratio(t.cpu, t.answered)) }

// Service is how long a response takes at present.
func (t *Trend) Service() time.Duration { return seconds(ratio(t.busy, t.answered)) }

// Usual is how long it takes when all is well.
func (t *Trend) Usual() time.Duration { return seconds(t.usual) }

// Use is the number of cores that the app's instances use at present.
func (t *Trend) Use() float64 { return t.use }

// Hot is for how long the processor limit has been in the way.
func (t *Trend) Hot() time.Duration { return t.hot }

// Slow is for how long responses have taken longer than usual though no
// processor limit is in the way.
func (t *Trend) Slow() time.Duration { return t.slow }

func ratio(a, b float64) float64 {
	if b <= 0 {
		return 0
	}
	return a / b
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// Add takes a sample up.
func (t *Trend) Add(p Policy, s Sample) {
	if s.Span <= 0 {
		return
	}
	span := s.Span.Seconds()
	keep := math.Exp(-span / memory.Seconds())
	t.span = t.span*keep + span
	t.arrived = t.arrived*keep + float64(s.Arrived)
	t.answered = t.answered*keep + float64(s.Answered)
	t.busy = t.busy*keep + s.Busy.Seconds()
	t.cpu = t.cpu*keep + s.CPU.Seconds()
	now := s.CPU.Seconds() / span
	keep = math.Exp(-span / period.Seconds())
	t.use = t.use*keep + now*(1-keep)
	t.inflow = t.inflow*keep + float64(s.Arrived)/span*(1-keep)
	switch {
	case s.Answered > 0 || s.InFlight == 0:
		t.silent = 0
	default:
		t.silent += s.Span
	}
	t.heat(p, s, now)
	t.lag(s)
	if s.limitOf(p) > p.CPU.Rest && s.full() && s.InFlight > 0 && t.use < p.CPU.Rest*float64(s.Ready) {
		t.late += s.Span
	} else {
		t.late = 0
	}
	switch {
	case s.limitOf(p) <= much*s.peak(p):
		t.above = 0
	case t.above == 0: // since when is not known
		t.above = 1
	default:
		t.above += s.Span
	}
	if t.hot > 0 || t.slow > 0 || s.Waiting > 0 {
		t.calm = 0
	} else {
		t.calm += s.Span
	}
	t.age += s.Span
	if t.age >= stretch {
		t.most[1], t.most[0] = t.most[0], 0
		if t.age >= 2*stretch {
			t.most[1] = 0
		}
		t.age = 0
	}
	n, _ := t.need(p, s.Load)
	t.most[0] = max(t.most[0], min(n, max(p.Max, 1)))
}

// Wake follows a time in which nobody looked, because nothing was to be seen.
func (t *Trend) Wake(slept time.Duration) {
	t.Add(Policy{}, Sample{Span: slept})
	t.Stir()
}

// Stir ends the calm: something may come of what has just begun.
func (t *Trend) Stir() { t.calm = 0 }

// heat finds out whether the processor limit is in the way: the instances use
// what they may, and more than a moment's worth of it. now is the cores used
// in this sample alone.
func (t *Trend) heat(p Policy, s Sample, now float64) {
	limit := s.limitOf(p)
	all := limit * float64(s.Ready)
	if all <= 0 {
		t.hot, t.full = 0, 0
		return
	}
	// An instance may use a whole period's quota at once. Half of it gone,
	// faster than it comes back, says that the rest will be gone too; so does
	// a moment at the limit; and who was stopped at it has no need to be guessed about.
	throttled := s.Throttled > 0 && 4*s.Throttled >= s.Periods
	if (now >= 0.9*all || throttled) && s.InFlight > 0 {
		t.tight += s.Span
	} else {
		t.tight = 0
	}
	quota := all * period.Seconds()
	burst := t.tight > 0 && (max(t.use*period.Seconds(), now*s.Span.Seconds()) >= quota/2 || t.tight >= moment || throttled)
	if s.InFlight > 0 && (burst || t.use >= 0.9*all) {
		t.hot += s.Span
		if limit >= 0.9*s.peak(p) {
			t.full += s.Span
		}
	} else {
		t.hot, t.full = 0, 0
	}
	if t.use <= target*p.CPU.Rest*float64(s.Ready) && t.hot == 0 {
		t.cool += s.Span
	} else {
		t.cool = 0
	}
}

// lag compares response times with the usual ones.
func (t *Trend) lag(s Sample) {
	took := ratio(t.busy, t.answered)
	if t.silent > 0 {
		took = max(took, t.silent.Seconds())
	}
	if took == 0 {
		t.slow = 0
		return
	}
	slow := t.usual > 0 && took > slowness*t.usual && took > leastSlow.Seconds() && s.InFlight > 0
	if !slow || t.hot > 0 { // what the processor's limit slows down is another matter
		t.slow = 0
	} else {
		t.slow += s.Span
	}
	if s.Answered == 0 || t.hot > 0 {
		return
	}
	// What is always slow is usual in the end.
	keep := math.Exp(-s.Span.Seconds() / 5)
	if slow {
		keep = math.Exp(-s.Span.Seconds() / 60)
	}
	if t.usual == 0 {
		keep = 0
	}
	t.usual = t.usual*keep + took*(1-keep)
}

// peak is the most that each instance may be given at present.
func (l *Load) peak(p Policy) float64 {
	if l.Ceiling <= 0 || l.Ready == 0 {
		return p.CPU.Most()
	}
	return min(max(l.Ceiling/float64(l.Ready), p.CPU.Rest), p.CPU.Most())
}

// roomFor tells whether so many instances at rest stay below what the app may
// have while others have traffic.
func (l *Load) roomFor(p Policy, n int) bool {
	return l.Ceiling <= 0 || float64(n)*p.CPU.Rest <= l.Ceiling
}

// full tells whether all of the machine is in use while others have traffic.
func (l *Load) full() bool { return l.Ceiling > 0 && l.Spare >= 0 && l.Spare < scarce }

func (l *Load) limitOf(p Policy) float64 {
	if l.Limit > 0 {
		return l.Limit
	}
	return p.CPU.Rest
}

// held is how many instances were needed in the last stretch or two.
func (t *Trend) held() int { return max(t.most[0], t.most[1]) }

// need is how many instances the load needs, and why more than there are. It
// is never more than one for each request.
func (t *Trend) need(p Policy, l Load) (int, string) {
	asked := l.Waiting + l.InFlight + l.Streams
	if asked == 0 {
		return 0, ""
	}
	have := l.Ready + l.Starting
	n, cause := 1, CauseRequest
	if have > 0 {
		cause = CauseLoad
	}
	if p.Concurrency > 0 {
		n = max(n, ceil(t.slots(l)/float64(p.Concurrency)))
	}
	if l.Ready == 0 {
		return min(n, asked), cause
	}
	if m := t.cores(p, l); m > n {
		n, cause = m, CauseCPU
	}
	more, wait := l.Ready+1, patience<<min(2*(l.Ready-1), 20)
	if t.slow >= wait && l.InFlight >= 2*l.Ready && t.use < target*l.limitOf(p)*float64(l.Ready) && n < more && l.roomFor(p, more) {
		n, cause = more, CauseSlow
	}
	return min(n, asked), cause
}

// slots is how many requests should be in flight at once under a hard
// concurrency: by Little's law what arrives keeps rate × service time of them
// busy, and the queue should be gone by the time that a start takes. Without
// knowing them everyone who waits gets one.
func (t *Trend) slots(l Load) float64 {
	all := float64(l.Waiting + l.InFlight + l.Streams)
	service := max(t.Service(), t.silent).Seconds()
	if l.Waiting == 0 || service == 0 || l.Ready == 0 {
		return all
	}
	gone := max(l.Start, settle).Seconds()
	busy := float64(l.InFlight + l.Streams)
	return min(all, max(busy, t.Rate()*service+float64(l.Streams)+float64(l.Waiting)*service/gone))
}

// cores is how many instances the work needs when one may use its peak. More
// than there are helps only where the limit is in the way, what waits inside
// the instances would take longer than a start, and cores are spare.
func (t *Trend) cores(p Policy, l Load) int {
	peak := p.CPU.Most()
	if peak <= 0 || t.use == 0 {
		return 0
	}
	n := ceil(ratio(t.cpu, t.span) / (peak * target))
	cost := ratio(t.cpu, max(t.answered, 1))
	gone := max(l.Start, settleInside).Seconds()
	behind := float64(l.InFlight) * cost / (peak * float64(l.Ready))
	if t.full < settleInside/4 || behind < gone/2 && t.full < lasting {
		return min(n, l.Ready)
	}
	n = max(n, ceil((max(t.Rate(), t.inflow)*cost+float64(l.InFlight)*cost/max(gone, catchUp.Seconds()))/(peak*target)))
	if l.Ceiling > 0 {
		n = min(n, max(int(l.Ceiling/peak), l.Ready))
	}
	if l.Spare >= 0 {
		n = min(n, l.Ready+ceil(l.Spare/peak-0.25))
	}
	return max(n, 1)
}

// limit is what each instance may use from now on. Whoever may use more than at
// rest comes after all who may not. So the limit goes back as soon as they leave
// less than the rest, which is the app's own, and does not rise on a full machine.
func (t *Trend) limit(p Policy, l Load) (float64, string) {
	rest, peak := p.CPU.Rest, l.peak(p)
	limit := l.limitOf(p)
	if l.Ready == 0 || rest <= 0 {
		return 0, ""
	}
	each := t.use / float64(l.Ready)
	switch {
	case t.late >= 2*period: // use follows in one
		return rest, CauseOthers
	case t.hot > 0 && limit < 0.9*peak && !l.Lean && !(limit <= rest && l.full()):
		return min(max(2*limit, each/target), peak), CauseCPU
	case limit > rest && t.cool >= cooling:
		return max(limit/2, rest), CauseCalm
	case t.above >= yielding && limit > much*peak:
		return peak, CauseOthers
	case limit < rest: // the policy changed
		return rest, "policy"
	}
	return 0, ""
}

// look is when to look at the app again: soon while something is going on,
// seldom when it has been calm for long, never when nothing is left to see.
func (t *Trend) look(p Policy, l Load) time.Duration {
	if l.Ready == 0 {
		return 0
	}
	if l.InFlight+l.Waiting+l.Streams == 0 && t.arrived < 0.5 && l.limitOf(p) <= p.CPU.Rest && t.held() <= 1 {
		return 0
	}
	if t.hot > 0 || t.slow > 0 || t.late > 0 || t.above > 0 || l.Waiting > 0 {
		return firstLook
	}
	return min(max(t.calm/4, firstLook), lastLook)
}
