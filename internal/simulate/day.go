package simulate

import (
	"container/heap"
	"math"
	"math/rand/v2"
	"time"
)

// Generated is a day of visitors: few apps have many and many have few (Zipf),
// there are more of them by day than by night, each visit is a handful of
// requests, and a fifth of the requests comes from robots at any time.
func Generated(apps int, perApp float64, span time.Duration, seed uint64) Day {
	const skew = 1.1
	weights, sum := make([]float64, apps), 0.0
	for i := range weights {
		weights[i] = math.Pow(float64(i+1), -skew)
		sum += weights[i]
	}
	total := perApp * float64(apps) * span.Hours() / 24
	return Day{Apps: apps, Span: span, Seed: seed, App: func(i int) Arrivals {
		rnd := rand.New(rand.NewPCG(seed^0x9e3779b97f4a7c15, uint64(i))) //nolint:gosec // not negative
		return visits(rnd, total*weights[i]/sum/span.Seconds(), span)
	}}
}

const (
	robots   = 0.2             // of the requests
	perVisit = 6               // requests, as a mean
	reading  = 3 * time.Second // between two of a visit, as a mean
	swing    = 0.7             // more by day, less by night
)

// moments are times, the earliest first.
type moments []time.Duration

func (m moments) Len() int           { return len(m) }
func (m moments) Less(i, j int) bool { return m[i] < m[j] }
func (m moments) Swap(i, j int)      { m[i], m[j] = m[j], m[i] }
func (m *moments) Push(x any)        { *m = append(*m, x.(time.Duration)) } //nolint:forcetypeassert // only times
func (m *moments) Pop() any {
	old := *m
	last := old[len(old)-1]
	*m = old[:len(old)-1]
	return last
}

// visits gives rate requests a second, as a mean over the day.
func visits(rnd *rand.Rand, rate float64, span time.Duration) Arrivals {
	var pending moments // requests of visits that have begun
	robot, visit := time.Duration(0), time.Duration(0)
	step := func(perSecond float64) time.Duration {
		if perSecond <= 0 {
			return span + 1
		}
		return time.Duration(min(rnd.ExpFloat64()/perSecond, 1e9) * float64(time.Second))
	}
	// Visits are thinned out of an even stream of the most there are.
	most := rate * (1 - robots) / perVisit * (1 + swing)
	nextVisit := func() {
		for {
			visit += step(most)
			day := visit.Hours() / 24
			if visit > span || rnd.Float64()*(1+swing) < 1-swing*math.Cos(2*math.Pi*day) {
				return
			}
		}
	}
	robot = step(rate * robots)
	nextVisit()
	return func() (time.Duration, bool) {
		for visit <= span && (len(pending) == 0 || visit <= pending[0]) && visit <= robot {
			at := visit
			for n := 1; ; n++ {
				heap.Push(&pending, at)
				if n >= 100 || rnd.Float64() > 1-1.0/perVisit {
					break
				}
				at += time.Duration(rnd.ExpFloat64() * float64(reading))
			}
			nextVisit()
		}
		if len(pending) > 0 && pending[0] <= robot {
			at := heap.Pop(&pending).(time.Duration) //nolint:forcetypeassert // only times
			return at, at <= span
		}
		at := robot
		robot += step(rate * robots)
		return at, at <= span
	}
}
