package dispatch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// exchange is one request on its way.
type exchange struct {
	s       *Server
	w       http.ResponseWriter
	r       *http.Request
	conn    *clientConn
	arrived time.Time
	id      requestID
	host    string
	app     fleet.AppName
	lease   Lease
	stages  *fleet.Stages
	took    stageTimes
	out     outgoing
	t       transfer // on the connection in use

	code     int // sent to the client; 0: none
	bytes    int64
	protocol int
	stream   bool // long-lived: not a latency
	why      refusal
	cause    error // for the log only
	cut      bool  // the response ends in the middle
}

// stageTimes are what this request itself saw, in µs.
type stageTimes struct{ connect, firstByte int64 }

var exchanges = sync.Pool{New: func() any { return new(exchange) }}

// ServeHTTP answers one request: the whole life of it is here.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	x := exchanges.Get().(*exchange)
	*x = exchange{s: s, w: w, r: r, arrived: time.Now(), why: refusedNot}
	x.conn, _ = r.Context().Value(connKey{}).(*clientConn)
	s.metrics.inFlight.Add(1)
	x.serve()
	x.report()
	if s.metrics.inFlight.Add(-1) == 0 && s.draining.Load() {
		select {
		case s.idle <- struct{}{}:
		default:
		}
	}
	cut := x.cut
	*x = exchange{}
	exchanges.Put(x)
	if cut {
		panic(http.ErrAbortHandler) // net/http's way to end a response as broken
	}
}

func (x *exchange) serve() {
	r := x.r
	x.id.set(r.Header, x.conn.trusted)
	if r.ProtoMajor == 2 {
		x.protocol = protoH2
		if ct := r.Header["Content-Type"]; len(ct) > 0 && strings.HasPrefix(ct[0], "application/grpc") {
			x.protocol = protoGRPC
		}
	} else if r.Header["Upgrade"] != nil {
		// The framing of this connection is no longer followed: unless it is
		// upgraded, it ends with this response.
		x.w.Header()["Connection"] = []string{"close"}
	}
	if code, why := x.check(); why != refusedNot {
		x.refuse(code, why, nil)
		return
	}
	target, ok := x.s.router.Route(x.host)
	if !ok {
		x.refuse(http.StatusNotFound, refusedHost, nil)
		return
	}
	x.app = target.App()
	buf := heads.Get().(*[]byte)
	defer heads.Put(buf)
	out := &x.out
	if x.protocol != protoGRPC {
		res := x.prepare(out, (*buf)[:0])
		if cap(out.head) <= maxKeptHead {
			*buf = out.head[:0]
		}
		if res.code != 0 || res.left {
			x.finish(res)
			return
		}
	}
	for attempt := 1; ; attempt++ {
		asked := time.Now()
		lease, err := target.Acquire(r.Context(), x.arrived)
		if err != nil {
			x.notAcquired(err)
			return
		}
		x.lease, x.stages = lease, lease.Stages()
		if x.stages != nil {
			x.s.metrics.hold.Observe(time.Since(asked).Seconds())
		}
		in, ok := lease.Upstream().(*instance)
		if !ok {
			lease.Release(false)
			x.refuse(http.StatusBadGateway, refusedGateway, fmt.Errorf("instance %s has no upstream of this package", lease.Instance()))
			return
		}
		res := x.forward(in, out)
		if res.refused {
			lease.Refused()
			if attempt < maxInstances && r.Context().Err() == nil {
				x.s.metrics.elsewhere.Inc()
				continue
			}
			x.refuse(http.StatusBadGateway, refusedGateway, res.err)
			return
		}
		lease.Release(res.broken)
		if res.again && attempt == 1 && x.code == 0 {
			x.s.metrics.elsewhere.Inc()
			continue
		}
		x.finish(res)
		return
	}
}

// maxInstances that one request may try, each having refused the connection.
const maxInstances = 4

// maxKeptHead bounds the buffers that wait for the next request.
const maxKeptHead = 32 << 10

// result says how forwarding to one instance ended.
type result struct {
	refused bool // not a byte was sent: another instance may be asked
	again   bool // nothing came back, and it is harmless to ask another instance
	broken  bool // the instance broke the exchange
	left    bool // the client left
	code    int  // to answer if nothing was answered yet; 0: answered
	why     refusal
	err     error
}

// finish answers what the instance did not.
func (x *exchange) finish(res result) {
	x.cause = res.err
	switch {
	case res.left:
		x.why = refusedNot
		x.cut = true
	case res.code == 0:
	case x.code != 0: // the header is out already
		x.why = res.why
		x.s.metrics.refuse(res.why)
		x.cut = true
	default:
		x.refuse(res.code, res.why, res.err)
	}
}

// check refuses what no app should see.
func (x *exchange) check() (int, refusal) {
	r := x.r
	n := 0
	for name, v := range r.Header {
		n += len(v)
		if name == "" {
			return http.StatusBadRequest, refusedRequest
		}
	}
	if n > x.s.cfg.MaxHeaders {
		return http.StatusRequestHeaderFieldsTooLarge, refusedHeader
	}
	if r.Method == http.MethodConnect || r.Method == http.MethodTrace || r.Method == "TRACK" {
		return http.StatusMethodNotAllowed, refusedMethod
	}
	if !validToken(r.Method) || len(r.Method) > 32 {
		return http.StatusBadRequest, refusedRequest
	}
	if s := r.URL.Scheme; s != "" && s != "http" && s != "https" || r.URL.User != nil {
		return http.StatusBadRequest, refusedRequest
	}
	for _, c := range []byte(r.RequestURI) {
		if c <= ' ' || c == '#' || c == 0x7f {
			return http.StatusBadRequest, refusedRequest
		}
	}
	if r.RequestURI == "*" && r.Method != http.MethodOptions {
		return http.StatusBadRequest, refusedRequest
	}
	host, ok := hostName(r.Host)
	if !ok {
		return http.StatusBadRequest, refusedHost
	}
	x.host = host
	if x.conn.secure != nil {
		if sni, cert := x.conn.serverName(); sni != "" && sni != host && cert != nil && cert.Leaf != nil &&
			!strings.EqualFold(strings.TrimSuffix(sni, "."), host) && cert.Leaf.VerifyHostname(host) != nil {
			return http.StatusMisdirectedRequest, refusedMisdirected
		}
	}
	if limit := x.s.cfg.MaxBody; limit > 0 && r.ContentLength > limit {
		return http.StatusRequestEntityTooLarge, refusedBody
	}
	return 0, refusedNot
}

// notAcquired answers a request that got no instance.
func (x *exchange) notAcquired(err error) {
	switch {
	case x.r.Context().Err() != nil:
		x.cause, x.cut = err, true
	case errors.Is(err, fleet.ErrOverloaded):
		x.refuse(http.StatusServiceUnavailable, refusedOverload, err)
	case errors.Is(err, fleet.ErrFailing):
		x.refuse(http.StatusBadGateway, refusedFailing, err)
	case errors.Is(err, fleet.ErrTimeout), errors.Is(err, context.DeadlineExceeded):
		x.refuse(http.StatusGatewayTimeout, refusedTimeout, err)
	default:
		x.refuse(http.StatusServiceUnavailable, refusedUnavailable, err)
	}
}

// connectFailed sorts the errors of connecting to an instance.
func connectFailed(err error) result {
	if errors.Is(err, errInstanceGone) || errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ECONNRESET) ||
		errors.Is(err, syscall.EHOSTUNREACH) || errors.Is(err, syscall.ENETUNREACH) || errors.Is(err, syscall.ENETDOWN) {
		return result{refused: true, err: err}
	}
	if errors.Is(err, context.Canceled) {
		return result{left: true, err: err}
	}
	var timeout interface{ Timeout() bool }
	if errors.As(err, &timeout) && timeout.Timeout() {
		return result{broken: true, code: http.StatusGatewayTimeout, why: refusedSilent, err: err}
	}
	return result{broken: true, code: http.StatusBadGateway, why: refusedGateway, err: err}
}

// noteConnect and noteFirstByte time what a request saw that waited for a start.
func (x *exchange) noteConnect(since time.Time) {
	if x.stages != nil {
		x.took.connect = max(1, time.Since(since).Microseconds())
	}
}

func (x *exchange) noteFirstByte(since time.Time) {
	if x.stages != nil {
		x.took.firstByte = max(1, time.Since(since).Microseconds())
		x.lease.Answered(time.Duration(x.took.connect)*time.Microsecond, time.Duration(x.took.firstByte)*time.Microsecond)
	}
}

// serverTiming adds the stages of the start that this request waited for.
func (x *exchange) serverTiming(h http.Header) {
	if x.stages == nil || !x.s.cfg.ServerTiming {
		return
	}
	var b strings.Builder
	st := x.stages
	for _, e := range [...]struct {
		name string
		us   int64
	}{{"hold", st.Hold}, {"place", st.Place}, {"claim", st.Claim}, {"rootfs", st.Rootfs}, {"network", st.Network}, {"exec", st.Exec}, {"listen", st.Listen}} {
		fmt.Fprintf(&b, "%s;dur=%.3f, ", e.name, float64(e.us)/1e3)
	}
	fmt.Fprintf(&b, "connect;dur=%.3f, first_byte;dur=%.3f", float64(x.took.connect)/1e3, float64(x.took.firstByte)/1e3)
	h["Server-Timing"] = append(h["Server-Timing"], b.String())
}

// report counts the request and maybe logs it.
func (x *exchange) report() {
	took := time.Since(x.arrived)
	x.s.metrics.done(x.protocol, x.code, took, x.stream)
	l := x.s.cfg.AccessLog
	if l == nil || x.why == refusedNot && x.s.cfg.AccessSample < 1 && rand.Float64() >= x.s.cfg.AccessSample {
		return
	}
	attrs := [16]slog.Attr{
		slog.String("request", x.id.String()),
		slog.String("app", string(x.app)),
		slog.String("host", x.r.Host),
		slog.String("method", x.r.Method),
		slog.String("path", x.r.URL.Path),
		slog.String("protocol", protocolNames[x.protocol]),
		slog.Int("status", x.code),
		slog.Int64("bytes", x.bytes),
		slog.Duration("took", took),
		slog.String("client", x.conn.peerText),
	}
	list := attrs[:10]
	if x.lease != nil {
		list = append(list, slog.String("instance", string(x.lease.Instance())), slog.Bool("held", x.stages != nil))
	}
	if x.why != refusedNot {
		list = append(list, slog.String("refused", refusalNames[x.why]))
	}
	if x.cause != nil {
		list = append(list, slog.Any("error", x.cause))
	}
	l.LogAttrs(context.WithoutCancel(x.r.Context()), slog.LevelInfo, "request", list...)
}
