package dispatch

import (
	"errors"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// refusal says why the front door itself ended a request or a connection.
type refusal uint8

const (
	refusedNot refusal = iota
	refusedConns
	refusedPeer
	refusedFraming
	refusedRequest
	refusedHeader
	refusedHost
	refusedMisdirected
	refusedMethod
	refusedBody
	refusedSlow
	refusedOverload
	refusedFailing
	refusedTimeout
	refusedUnavailable
	refusedGateway
	refusedSilent
	refusalCount
)

var refusalNames = [refusalCount]string{
	"none", "connections", "connections_per_ip", "framing", "bad_request", "header_size", "unknown_host", "misdirected", "method",
	"body_size", "slow_body", "overloaded", "failing", "start_timeout", "unavailable", "bad_gateway", "gateway_timeout",
}

var protocolNames = [...]string{"h1", "h2", "grpc", "upgrade"}

const (
	protoH1 = iota
	protoH2
	protoGRPC
	protoUpgrade
)

// metrics has no label that a client or a user can choose, so its size is
// fixed. Everything is looked up once, here.
type metrics struct {
	requests  [len(protocolNames)][6]prometheus.Counter // by status class; 0: the client left
	refused   [refusalCount]prometheus.Counter
	latency   prometheus.Histogram
	hold      prometheus.Histogram
	resent    prometheus.Counter
	elsewhere prometheus.Counter
	inFlight  atomic.Int64
	tunnels   atomic.Int64
}

func newMetrics(reg prometheus.Registerer, conns *atomic.Int64) (*metrics, error) {
	m := &metrics{}
	requests := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "fastcontainer_http_requests_total",
		Help: "Requests by protocol and class of the status that was sent; class none: the client left before.",
	}, []string{"protocol", "class"})
	for p, protocol := range protocolNames {
		for c, class := range []string{"none", "1xx", "2xx", "3xx", "4xx", "5xx"} {
			m.requests[p][c] = requests.WithLabelValues(protocol, class)
		}
	}
	refused := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "fastcontainer_http_refused_total",
		Help: "Connections and requests that the front door itself refused or ended, by reason.",
	}, []string{"reason"})
	for r := refusedConns; r < refusalCount; r++ {
		m.refused[r] = refused.WithLabelValues(refusalNames[r])
	}
	m.latency = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    "fastcontainer_http_request_seconds",
		Help:    "Arrival of a request until its response ended; upgraded connections and event streams are not counted.",
		Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
	})
	m.hold = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    "fastcontainer_http_hold_seconds",
		Help:    "How long the requests that waited for a start waited.",
		Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
	})
	m.resent = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "fastcontainer_http_resent_total",
		Help: "Requests sent again because a kept connection turned out to be closed.",
	})
	m.elsewhere = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "fastcontainer_http_elsewhere_total",
		Help: "Requests that asked for another instance because theirs refused the connection.",
	})
	gauge := func(name, help string, v *atomic.Int64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 { return float64(v.Load()) })
	}
	all := []prometheus.Collector{
		requests, refused, m.latency, m.hold, m.resent, m.elsewhere,
		gauge("fastcontainer_http_in_flight", "Requests in flight, waiting ones included.", &m.inFlight),
		gauge("fastcontainer_http_tunnels", "Upgraded connections that are open.", &m.tunnels),
		gauge("fastcontainer_http_connections", "Client connections that are open.", conns),
	}
	if reg == nil {
		return m, nil
	}
	var errs []error
	for _, c := range all {
		errs = append(errs, reg.Register(c))
	}
	return m, errors.Join(errs...)
}

func (m *metrics) refuse(r refusal) { m.refused[r].Inc() }

func (m *metrics) done(protocol, code int, took time.Duration, stream bool) {
	class := code / 100
	if class > 5 {
		class = 0
	}
	m.requests[protocol][class].Inc()
	if !stream {
		m.latency.Observe(took.Seconds())
	}
}
