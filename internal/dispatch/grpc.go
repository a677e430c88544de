package dispatch

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"
)

// forwardGRPC speaks HTTP/2 to the instance, as gRPC needs.
func (x *exchange) forwardGRPC(in *instance) result {
	r := x.r
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	h := x.grpcHeader()
	body := &grpcBody{r: r, w: x.w, limit: x.s.cfg.MaxBody}
	defer body.leave()
	out := (&http.Request{
		Method: r.Method, URL: &url.URL{Scheme: "http", Host: in.addr, Path: r.URL.Path, RawPath: r.URL.RawPath, RawQuery: r.URL.RawQuery},
		Host: r.Host, Header: h, Body: body, ContentLength: r.ContentLength, Trailer: r.Trailer,
		Proto: "HTTP/2.0", ProtoMajor: 2,
	}).WithContext(ctx)
	if r.ContentLength == 0 {
		out.Body = nil
	}
	x.stream = true
	x.lease.Streams()
	done := make(chan struct{})
	var watch sync.WaitGroup
	watch.Go(func() {
		select {
		case <-done:
		case <-x.lease.Closing():
			cancel(errInstanceGone)
			_ = body.Close() // the transport waits for it
		}
	})
	defer func() { close(done); watch.Wait() }()
	begun := time.Now()
	res, err := in.transport().RoundTrip(out)
	if err != nil {
		return x.grpcFailed(ctx, err)
	}
	defer func() { _ = res.Body.Close() }()
	x.noteConnect(begun)
	x.noteFirstByte(begun)
	to := x.w.Header()
	for name, v := range res.Header {
		if !hopHeader(name) {
			to[name] = v
		}
	}
	var announced []string
	for name := range res.Trailer {
		if !forbiddenTrailer(name) {
			announced = append(announced, name)
		}
	}
	if len(announced) > 0 {
		to["Trailer"] = announced
	}
	x.serverTiming(to)
	x.code = res.StatusCode
	x.w.WriteHeader(res.StatusCode)
	if res.ContentLength == 0 {
		return result{} // what ends the call is in the header, so that must be the end
	}
	t := transfer{x: x}
	buf := copies.Get().(*[]byte)
	defer copies.Put(buf)
	if err := t.flush(); err != nil {
		return result{left: true, err: err}
	}
	for {
		n, err := res.Body.Read(*buf)
		if n > 0 {
			if werr := t.writeTimed((*buf)[:n]); werr != nil {
				return result{left: true, err: werr}
			}
			if werr := t.flush(); werr != nil {
				return result{left: true, err: werr}
			}
			t.disarm()
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			if errors.Is(context.Cause(ctx), errInstanceGone) {
				to[http.TrailerPrefix+"Grpc-Status"] = []string{"14"}
				to[http.TrailerPrefix+"Grpc-Message"] = []string{"the instance is going away"}
				return result{}
			}
			return x.grpcFailed(ctx, err)
		}
	}
	for name, v := range res.Trailer {
		if forbiddenTrailer(name) {
			continue
		}
		if !slices.Contains(announced, name) {
			name = http.TrailerPrefix + name
		}
		to[name] = v
	}
	return result{}
}

func (x *exchange) grpcHeader() http.Header {
	r := x.r
	h := make(http.Header, len(r.Header)+6)
	for name, v := range r.Header {
		if !hopHeader(name) && !ownHeader(name) {
			h[name] = v
		}
	}
	if hasToken(r.Header["Te"], "trailers") {
		h["Te"] = []string{"trailers"}
	}
	if h["User-Agent"] == nil {
		h["User-Agent"] = []string{""} // do not make one up
	}
	proto := "http"
	if x.conn.secure != nil {
		proto = "https"
	}
	o := originOf(r.Header, x.conn.trusted, x.conn.peerText, r.Host, proto)
	h["X-Forwarded-For"] = []string{string(o.appendFor(nil))}
	h["X-Forwarded-Host"] = []string{o.host}
	h["X-Forwarded-Proto"] = []string{o.proto}
	h["Forwarded"] = []string{string(o.appendForwarded(nil))}
	h["X-Request-Id"] = []string{x.id.String()}
	return h
}

func (x *exchange) grpcFailed(ctx context.Context, err error) result {
	switch {
	case errors.Is(context.Cause(ctx), errInstanceGone):
		return result{code: http.StatusServiceUnavailable, why: refusedUnavailable, err: errInstanceGone}
	case x.r.Context().Err() != nil:
		return result{left: true, err: err}
	case errors.Is(err, errBodySize):
		return result{code: http.StatusRequestEntityTooLarge, why: refusedBody, err: err}
	}
	var op *net.OpError
	if x.code == 0 && (errors.Is(err, errInstanceGone) || errors.As(err, &op) && op.Op == "dial") {
		return connectFailed(err)
	}
	return result{broken: true, code: http.StatusBadGateway, why: refusedGateway, err: err}
}

// grpcBody is the body of a call. A stream may be silent for long. The
// transport may still hold it when the exchange is over.
type grpcBody struct {
	r     *http.Request
	w     http.ResponseWriter
	limit int64 // 0: none
	got   int64

	mu   sync.Mutex
	used bool // it has been read: another instance cannot have it
	over bool // w must not be touched any more
}

func (b *grpcBody) Read(p []byte) (int, error) {
	b.mu.Lock()
	b.used = true
	b.mu.Unlock()
	n, err := b.r.Body.Read(p)
	b.got += int64(n)
	if b.limit > 0 && b.r.ContentLength >= 0 && b.got > b.limit {
		return 0, errBodySize
	}
	return n, err
}

// Close ends a Read that waits.
func (b *grpcBody) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if w, ok := b.w.(interface{ SetReadDeadline(time.Time) error }); ok && b.used && !b.over {
		return w.SetReadDeadline(longAgo)
	}
	return nil
}

// leave is called at the end of the exchange.
func (b *grpcBody) leave() {
	_ = b.Close()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.over = true
}
