package dispatch

import (
	"context"
	"errors"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// Server is the front door.
type Server struct {
	cfg     Config
	router  Router
	log     *slog.Logger
	metrics *metrics
	certs   *certStore
	http    *http.Server

	conns atomic.Int64
	peers *peerTable
	ready atomic.Bool

	stopping chan struct{} // closed when long-lived streams are to end
	stopOnce sync.Once
	draining atomic.Bool
	idle     chan struct{} // told while draining that no request is in flight

	tmu  sync.Mutex
	open map[*tunnel]struct{}
	cut  bool // tunnels are to end at once
}

// Listener is where clients come in.
type Listener struct {
	net.Listener
	// TLS: clients speak TLS here, with HTTP/1.1 or HTTP/2 inside. Without
	// it HTTP/2 is spoken by clients that know it beforehand.
	TLS bool
}

// New makes a front door that is not open yet. reg may be nil.
func New(cfg Config, router Router, logger *slog.Logger, reg prometheus.Registerer) (*Server, error) {
	if err := cfg.Validate(); err != nil {
		return nil, &fleet.Error{Op: "configure the front door", Kind: fleet.ErrInvalid, Err: err}
	}
	s := &Server{
		cfg: cfg, router: router, log: logger,
		peers:    newPeerTable(),
		stopping: make(chan struct{}),
		idle:     make(chan struct{}, 1),
		open:     map[*tunnel]struct{}{},
	}
	var err error
	if s.metrics, err = newMetrics(reg, &s.conns); err != nil {
		return nil, &fleet.Error{Op: "register metrics of the front door", Err: err}
	}
	if s.certs, err = newCertStore(cfg.Certificates, logger); err != nil {
		return nil, err
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	// A connection with TLS is decrypted before net/http sees it, so this is
	// also how HTTP/2 over TLS comes in.
	protocols.SetUnencryptedHTTP2(true)
	s.http = &http.Server{
		Handler:           s,
		Protocols:         protocols,
		ReadHeaderTimeout: cfg.HeaderTimeout,
		IdleTimeout:       cfg.IdleTimeout,
		MaxHeaderBytes:    cfg.MaxHeaderBytes,
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams: cfg.MaxStreams,
			SendPingTimeout:      cfg.IdleTimeout,
			PingTimeout:          15 * time.Second,
			WriteByteTimeout:     cfg.WriteTimeout,
		},
		ErrorLog: log.New(io.Discard, "", 0), // what clients do wrong is counted, not logged
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, c)
		},
		DisableGeneralOptionsHandler: true,
	}
	return s, nil
}

// Ready tells whether new requests are welcome.
func (s *Server) Ready() bool { return s.ready.Load() }

// Serve accepts clients on all listeners until ctx ends or one of them fails.
// Then it is no longer ready, closes the listeners, tells WebSockets and event
// streams to end, lets requests in flight finish within DrainTimeout, cuts
// what is left, and returns. It closes the listeners in every case and can be
// called once.
func (s *Server) Serve(ctx context.Context, listeners ...Listener) error {
	fail := make(chan error, len(listeners))
	var accepting sync.WaitGroup
	for _, l := range listeners {
		d := &door{Listener: l.Listener, srv: s}
		if l.TLS {
			if len(s.cfg.Certificates) == 0 && s.cfg.GetCertificate == nil {
				for _, l := range listeners {
					_ = l.Close()
				}
				return &fleet.Error{Op: "listen", Subject: l.Addr().String(), Kind: fleet.ErrInvalid,
					Err: errors.New("no certificate for a listener with TLS"), Hint: "give a certificate and a key file"}
			}
			d.tls = s.certs.config(s.cfg.GetCertificate)
		}
		accepting.Go(func() {
			if err := s.http.Serve(d); !errors.Is(err, http.ErrServerClosed) {
				fail <- &fleet.Error{Op: "accept on", Subject: l.Addr().String(), Err: err}
			}
		})
	}
	s.ready.Store(true)
	var err error
	select {
	case <-ctx.Done():
	case err = <-fail:
	}
	s.drain(context.WithoutCancel(ctx))
	accepting.Wait()
	return err
}

func (s *Server) drain(ctx context.Context) {
	s.ready.Store(false)
	s.draining.Store(true)
	ctx, cancel := context.WithTimeout(ctx, s.cfg.DrainTimeout)
	defer cancel()
	s.stopOnce.Do(func() { close(s.stopping) })
	if s.http.Shutdown(ctx) != nil {
		s.log.Warn("requests cut at the end of draining", "in_flight", s.metrics.inFlight.Load(), "limit", s.cfg.DrainTimeout)
		_ = s.http.Close()
	}
	// Upgraded connections are not net/http's any more; each is a request of
	// ours in flight, like those that it still runs.
	limit := ctx.Done()
	for s.metrics.inFlight.Load() > 0 {
		select {
		case <-s.idle:
		case <-limit:
			limit = nil
			s.cutTunnels()
		}
	}
}

func (s *Server) cutTunnels() {
	s.tmu.Lock()
	defer s.tmu.Unlock()
	s.cut = true
	for t := range s.open {
		t.cut()
	}
}

func (s *Server) trusts(a netip.Addr) bool {
	for _, p := range s.cfg.TrustedProxies {
		if p.Contains(a) {
			return true
		}
	}
	return false
}
