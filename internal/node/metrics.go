package node

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// metrics of starts and instances. Nothing has an app's name in it: ten
// thousand apps would be ten thousand series.
type metrics struct {
	starts *prometheus.CounterVec
	stages *prometheus.HistogramVec
	total  *prometheus.HistogramVec
}

func newMetrics(reg prometheus.Registerer, n *Node) (*metrics, error) {
	buckets := []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30}
	m := &metrics{
		starts: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "fastcontainer_starts_total", Help: "Starts of instances by kind and result."}, []string{"kind", "result"}),
		stages: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "fastcontainer_start_stage_seconds", Help: "Stages of successful starts.", Buckets: buckets}, []string{"kind", "stage"}),
		total:  prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "fastcontainer_start_seconds", Help: "Successful starts, from decided to ready.", Buckets: buckets}, []string{"kind"}),
	}
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.starts, m.stages, m.total, &stateCollector{n: n, desc: prometheus.NewDesc("fastcontainer_instances", "Instances by state.", []string{"state"}, nil)}} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	return m, nil
}

func (m *metrics) started(err error, s *fleet.Stages, kind fleet.StartKind) {
	if err != nil {
		m.starts.WithLabelValues(string(kind), "failed").Inc()
		return
	}
	m.starts.WithLabelValues(string(kind), "ready").Inc()
	var sum time.Duration
	for _, st := range s.List() {
		if st.Name == "connect" || st.Name == "first_byte" {
			continue // not over yet
		}
		if st.Name != "hold" {
			sum += st.Took
		}
		m.stages.WithLabelValues(string(kind), st.Name).Observe(st.Took.Seconds())
	}
	m.total.WithLabelValues(string(kind)).Observe(sum.Seconds())
}

// stateCollector counts the instances when it is asked.
type stateCollector struct {
	n    *Node
	desc *prometheus.Desc
}

func (c *stateCollector) Describe(ch chan<- *prometheus.Desc) { ch <- c.desc }

func (c *stateCollector) Collect(ch chan<- prometheus.Metric) {
	count := map[fleet.State]int{}
	for _, i := range c.n.List() {
		count[i.Info().State]++
	}
	for _, s := range fleet.States() {
		if s != fleet.StateAbsent {
			ch <- prometheus.MustNewConstMetric(c.desc, prometheus.GaugeValue, float64(count[s]), string(s))
		}
	}
}
