package homeostat

import (
	"math"
	"time"
)

// Gaps is a histogram of the quiet times of an app: from the end of a response
// after which nothing was in flight to the next request. Its buckets double,
// from a millisecond to a day and more.
type Gaps struct {
	counts [28]uint32
}

// gapUnit is the upper end of the first bucket.
const gapUnit = time.Millisecond

func (g *Gaps) ends(i int) (from, to time.Duration) {
	to = gapUnit << i
	if i > 0 {
		from = gapUnit << (i - 1)
	}
	return from, to
}

// Add one. When a bucket is full all of them lose half: what is long ago
// counts less.
func (g *Gaps) Add(d time.Duration) {
	i := 0
	for i < len(g.counts)-1 && d >= gapUnit<<i {
		i++
	}
	if g.counts[i] == math.MaxUint32 {
		for j := range g.counts {
			g.counts[j] /= 2
		}
	}
	g.counts[i]++
}

// N is their number.
func (g *Gaps) N() float64 {
	n := 0.0
	for _, c := range g.counts {
		n += float64(c)
	}
	return n
}

// Over is how many were longer than d: within a bucket they count as evenly
// spread.
func (g *Gaps) Over(d time.Duration) float64 {
	n := 0.0
	for i, c := range g.counts {
		from, to := g.ends(i)
		switch {
		case d <= from:
			n += float64(c)
		case d < to:
			n += float64(c) * float64(to-d) / float64(to-from)
		}
	}
	return n
}

// Within is the time of all gaps together of which each counts up to d at
// most, beginning at from: the area of min(gap, d) above from.
func (g *Gaps) Within(from, d time.Duration) time.Duration {
	sum := 0.0
	for i, c := range g.counts {
		if c == 0 {
			continue
		}
		a, b := g.ends(i)
		// The mean of min(x, d) - from, where positive, over evenly spread x.
		const steps = 16
		part := 0.0
		for s := range steps {
			x := float64(a) + (float64(s)+0.5)/steps*float64(b-a)
			part += max(min(x, float64(d))-float64(from), 0)
		}
		sum += float64(c) * part / steps
	}
	return time.Duration(min(sum, math.MaxInt64/2))
}

// History is what is known of an app's requests.
type History struct {
	Gaps Gaps
	// Requests in Span, of which Busy had something in flight.
	Requests   uint64
	Span, Busy time.Duration
	// Start50 and Start99: how long half and 99 % of its starts took at most.
	Start50, Start99 time.Duration
}

// Level is the service that an app gets under a policy.
type Level struct {
	// Cold is the share of the requests that meet a start.
	Cold float64
	// Wait50 and Wait99: how long half and 99 % of the requests wait for a
	// start at most.
	Wait50, Wait99 time.Duration
	// Awake is the share of the time in which it has an instance; 1 with an
	// instance that stays.
	Awake float64
	// Starts a day.
	Starts float64
}

// Expect computes the level that a history would have had under an idle time
// and a lifetime (0: none), with one instance at a time. It takes gaps and
// starts as independent:
//
//	cold      gaps longer than idle, and ends of lifetimes in a quiet time
//	          (longer than ten seconds, so without a successor) before a
//	          request that would have met the instance
//	awake     the time in flight and the first part of each gap, up to idle
//	starts    cold ones and successors, one for each lifetime awake
func (h *History) Expect(idle, lifetime time.Duration, least int) Level {
	requests, span := float64(h.Requests), h.Span.Seconds()
	if requests == 0 || span <= 0 {
		return Level{}
	}
	if idle == 0 {
		idle = 1 << 62
	}
	awake := min(h.Busy.Seconds()+h.Gaps.Within(0, idle).Seconds(), span)
	cold := h.Gaps.Over(idle)
	if least > 0 {
		awake, cold = span, 0
	}
	renewed := 0.0
	if lifetime > 0 {
		if many := h.Gaps.Over(recent); least == 0 && awake > 0 && many > 0 {
			// The end of a lifetime falls into a quiet time with the share of
			// these. Then the app sleeps for what is left of the gap, which
			// would have been survived, and the next request is cold.
			quiet := h.Gaps.Within(recent, idle).Seconds()
			ends := quiet / awake * max(1-cold/many, 0) / lifetime.Seconds() // a second awake
			awake /= 1 + ends*quiet/many
			cold += awake * ends
		}
		renewed = awake / lifetime.Seconds()
	}
	l := Level{Cold: min(cold/requests, 1), Awake: awake / span, Starts: (cold + renewed) / span * (24 * time.Hour).Seconds()}
	l.Wait50, l.Wait99 = h.wait(l.Cold, .5), h.wait(l.Cold, .99)
	return l
}

// wait is the q-quantile of the waits of all requests, when that share of them
// meets a start whose duration is lognormal.
func (h *History) wait(cold, q float64) time.Duration {
	if cold <= 0 || 1-cold >= q {
		return 0
	}
	// Among the starts it is this quantile; z99 is that of 99 %.
	const z99 = 2.3263
	z := math.Sqrt2 * math.Erfinv(2*min((q-(1-cold))/cold, .9999)-1)
	sigma := 0.0
	if h.Start50 > 0 && h.Start99 > h.Start50 {
		sigma = math.Log(float64(h.Start99)/float64(h.Start50)) / z99
	}
	return time.Duration(float64(h.Start50) * math.Exp(sigma*z))
}

// Reach finds the shortest idle time, and with it the least memory, under
// which at least that share of the requests meets an instance that is ready:
// a whole number of doublings of a second, up to a day. Without one only an
// instance that stays will do.
func (h *History) Reach(warm float64, lifetime time.Duration) (idle time.Duration, ok bool) {
	for idle = time.Second; idle <= 24*time.Hour; idle *= 2 {
		if 1-h.Expect(idle, lifetime, 0).Cold >= warm {
			return idle, true
		}
	}
	return 0, false
}
