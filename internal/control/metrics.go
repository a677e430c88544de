package control

import (
	"fmt"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	held    prometheus.Histogram
	refused *prometheus.CounterVec
	// digested bites by cause; full: starts for which there was no room.
	digested *prometheus.CounterVec
	full     prometheus.Counter
}

func newMetrics(reg prometheus.Registerer, waiting *atomic.Int64) (*metrics, error) {
	m := &metrics{
		held: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "fastcontainer_hold_seconds", Help: "Time that held requests waited for an instance.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
		}),
		refused:  prometheus.NewCounterVec(prometheus.CounterOpts{Name: "fastcontainer_holds_refused_total", Help: "Requests that were not held to the end, by reason."}, []string{"reason"}),
		digested: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "fastcontainer_digested_total", Help: "Instances ended or made smaller because the machine was starving, by cause."}, []string{"cause"}),
		full:     prometheus.NewCounter(prometheus.CounterOpts{Name: "fastcontainer_starts_without_room_total", Help: "Starts that were not made because the machine was full and the app had its share."}),
	}
	if reg == nil {
		return m, nil
	}
	now := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "fastcontainer_holds", Help: "Requests that wait for an instance."}, func() float64 { return float64(waiting.Load()) })
	for _, c := range []prometheus.Collector{m.held, m.refused, m.digested, m.full, now} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	return m, nil
}
