package dispatch

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httputil"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// maxSmallBody is what is read from the client before an instance is asked
// for: a slow client then occupies no instance, and the request is sent in
// one piece.
const maxSmallBody = 16 << 10

// outgoing is a request as it is written to an instance.
type outgoing struct {
	head    []byte // request line, header and, if small, body
	stream  bool   // the body follows while the response may already come
	expect  bool   // the client waits for 100-continue
	upgrade string // protocol asked for
	// harmless to send a second time, although an instance may have seen it
	replayable bool
}

// forward sends the request to the instance and the response to the client.
func (x *exchange) forward(in *instance, out *outgoing) result {
	if x.protocol == protoGRPC {
		return x.forwardGRPC(in)
	}
	ctx := x.r.Context()
	for fresh := false; ; {
		now := time.Now()
		var c *instanceConn
		if !fresh {
			c = in.kept(now)
		}
		if c != nil && (!out.replayable || now.Sub(c.since) > time.Second) {
			c.allow(now, x.s.cfg.ResponseTimeout)
			if !c.alive() {
				c.close()
				continue
			}
		}
		if c == nil {
			var err error
			if c, err = in.dial(ctx); err != nil {
				return connectFailed(err)
			}
		}
		x.noteConnect(now)
		res, stale := x.try(c, out)
		if !stale {
			return res
		}
		x.s.metrics.resent.Inc()
		fresh = true
	}
}

// try uses one connection. stale tells that it had been closed before the
// request came there, and that the request may be sent on another one.
func (x *exchange) try(c *instanceConn, out *outgoing) (res result, stale bool) {
	c.begin()
	var unfollow func() bool // false: the client left, and c has been or will be aborted
	if x.r.ProtoMajor == 1 {
		unfollow = x.conn.unfollow
		if !x.conn.follow(c) {
			x.conn.unfollow()
			c.close()
			return result{left: true}, false
		}
	} else {
		unfollow = context.AfterFunc(x.r.Context(), c.abort)
	}
	x.t = transfer{x: x, c: c, out: out}
	t := &x.t
	res, stale = t.run()
	if !t.upgraded {
		if t.pump != nil && !t.pump.stop() {
			t.reuse = false
		}
		if !unfollow() { // before c may serve anybody else
			t.reuse = false
		}
		if t.reuse && res.code == 0 {
			c.in.keep(c, time.Now())
		} else {
			c.close()
		}
	}
	return res, stale
}

// transfer is one request and its response on one connection to an instance.
type transfer struct {
	x        *exchange
	c        *instanceConn
	out      *outgoing
	head     responseHead
	pump     *pump
	reuse    bool
	upgraded bool
	armed    bool        // an HTTP/2 write deadline is set
	ending   atomic.Bool // Closing cut the connection
}

func (t *transfer) run() (res result, stale bool) {
	x, c, out := t.x, t.c, t.out
	cfg := &x.s.cfg
	now := time.Now()
	c.allow(now, cfg.ResponseTimeout)
	n, err := c.raw.Write(out.head)
	if err != nil {
		if n == 0 && c.reused && !out.stream && !c.aborted.Load() {
			return result{}, true
		}
		return t.failed(err), false
	}
	switch {
	case out.expect:
		c.allow(now, cfg.ContinueTimeout)
		_, err := c.r.Peek(1)
		if errors.Is(err, os.ErrDeadlineExceeded) && !c.aborted.Load() {
			t.startPump()
		} else if err != nil {
			return t.failed(err), false
		}
		c.allow(time.Now(), cfg.ResponseTimeout)
	case out.stream:
		t.startPump()
	}
	for informed := 0; ; informed++ {
		block, err := readHead(c.r, cfg.MaxHeaderBytes)
		if err != nil {
			if !c.got && c.reused && out.replayable && !c.aborted.Load() && !errors.Is(err, os.ErrDeadlineExceeded) {
				return result{}, true
			}
			return t.failed(err), false
		}
		code, err := statusOf(block)
		if err != nil || informed > 16 {
			return t.malformed(err), false
		}
		if informed == 0 {
			x.noteFirstByte(now)
		}
		if code >= 200 {
			return t.respond(block), false
		}
		switch code {
		case http.StatusSwitchingProtocols:
			return t.switchProtocols(block), false
		case http.StatusContinue:
			if out.expect && t.pump == nil {
				t.startPump()
			}
		default:
			if err := t.inform(block); err != nil {
				return t.malformed(err), false
			}
		}
		c.allow(time.Now(), cfg.ResponseTimeout)
	}
}

// inform passes on a 1xx response, such as 103 early hints.
func (t *transfer) inform(block string) error {
	if !t.x.r.ProtoAtLeast(1, 1) {
		return nil
	}
	h := http.Header{}
	if err := t.head.parse(block, t.x.s.cfg.MaxHeaders, h); err != nil {
		return err
	}
	to := t.x.w.Header()
	for name, v := range h {
		to[name] = v
	}
	t.x.w.WriteHeader(t.head.code)
	for name := range h {
		delete(to, name)
	}
	return nil
}

// failed sorts out why nothing or only a part of a response came.
func (t *transfer) failed(err error) result {
	if t.pump != nil {
		t.pump.stop()
		if r := t.pump.fault(); r.code != 0 || r.left {
			return r
		}
	}
	switch {
	case t.left():
		return result{left: true, err: err}
	case t.c.aborted.Load():
		return result{broken: true, code: http.StatusBadGateway, why: refusedGateway, err: errInstanceGone}
	case errors.Is(err, os.ErrDeadlineExceeded):
		return result{broken: true, code: http.StatusGatewayTimeout, why: refusedSilent, err: err}
	case !t.c.got && t.out.replayable && (errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)):
		return result{broken: true, again: true, code: http.StatusBadGateway, why: refusedGateway, err: err}
	}
	return result{broken: true, code: http.StatusBadGateway, why: refusedGateway, err: err}
}

func (t *transfer) left() bool {
	if t.x.r.ProtoMajor == 1 {
		t.x.conn.mu.Lock()
		defer t.x.conn.mu.Unlock()
		return t.x.conn.gone
	}
	return t.x.r.Context().Err() != nil
}

func (t *transfer) malformed(err error) result {
	if err == nil {
		err = errMalformed
	}
	return result{broken: true, code: http.StatusBadGateway, why: refusedGateway, err: err}
}

// respond passes on the final response.
func (t *transfer) respond(block string) result {
	x, c, d := t.x, t.c, &t.head
	h := x.w.Header()
	if err := d.parse(block, x.s.cfg.MaxHeaders, h); err != nil {
		return t.malformed(err)
	}
	if t.out.expect && t.pump == nil {
		d.close = true // it answered without the body that it was announced
	}
	if h["Content-Type"] == nil {
		h["Content-Type"] = nil // do not guess
	}
	if len(d.trailer) > 0 && d.chunked {
		h["Trailer"] = d.trailer
	}
	if d.length >= 0 && d.code != http.StatusNoContent {
		h["Content-Length"] = []string{d.lengthText}
	}
	x.serverTiming(h)
	x.code = d.code
	x.w.WriteHeader(d.code)
	switch {
	case d.bodyless(x.r.Method):
		t.reuse = !d.close
		return result{}
	case d.length >= 0:
		if err := t.copyLength(); err != nil {
			return t.broke(err)
		}
		t.reuse = !d.close
	case d.chunked:
		if err := t.copyStream(httputil.NewChunkedReader(c.r), nil); err != nil {
			return t.broke(err)
		}
		trailer, err := readTrailer(c.r, x.s.cfg.MaxHeaders, x.s.cfg.MaxHeaderBytes)
		if err != nil {
			return t.broke(err)
		}
		for name, v := range trailer {
			if !slices.Contains(d.trailer, name) {
				name = http.TrailerPrefix + name
			}
			h[name] = v
		}
		t.reuse = !d.close
	default:
		if err := t.copyStream(c.r, nil); err != nil {
			return t.broke(err)
		}
	}
	return result{}
}

// clientError marks a failure on the client's side.
type clientError struct{ error }

// broke sorts out why a body ended early.
func (t *transfer) broke(err error) result {
	var client clientError
	switch {
	case t.ending.Load() && t.head.events:
		return result{} // told to end: for the client the stream ends as if the app had closed it
	case t.ending.Load():
		return result{code: http.StatusBadGateway, why: refusedUnavailable, err: errInstanceGone}
	case errors.As(err, &client):
		return result{left: true, err: client.error}
	}
	return t.failed(err)
}

func (t *transfer) write(p []byte) error {
	n, err := t.x.w.Write(p)
	t.x.bytes += int64(n)
	if err != nil {
		return clientError{err}
	}
	return nil
}

func (t *transfer) flush() error {
	if f, ok := t.x.w.(interface{ FlushError() error }); ok {
		if err := f.FlushError(); err != nil {
			return clientError{err}
		}
	}
	return nil
}

// copyLength copies a body of known length. What lies in the buffer is
// written from there.
func (t *transfer) copyLength() error {
	c, left := t.c, t.head.length
	if n := min(left, int64(c.r.Buffered())); n > 0 {
		b, _ := c.r.Peek(int(n))
		if err := t.writeTimed(b); err != nil {
			return err
		}
		_, _ = c.r.Discard(int(n))
		left -= n
	}
	if left == 0 {
		return nil
	}
	return t.copyStream(&io.LimitedReader{R: c.r, N: left}, &left)
}

// copyStream copies until src ends, and passes each piece on at once. With
// left, that many bytes are expected.
func (t *transfer) copyStream(src io.Reader, left *int64) error {
	x, c := t.x, t.c
	silence := x.s.cfg.ResponseTimeout
	var watch sync.WaitGroup
	if t.head.events {
		silence = x.s.cfg.TunnelTimeout
		x.stream = true
		x.lease.Streams()
		done := make(chan struct{})
		watch.Go(func() { t.endOn(done, x.s.stopping) })
		defer func() { close(done); watch.Wait() }()
	}
	buf := copies.Get().(*[]byte)
	defer copies.Put(buf)
	for reads := 0; ; reads++ {
		if c.r.Buffered() == 0 {
			if left == nil || reads > 0 {
				if err := t.flush(); err != nil {
					return err
				}
			}
			t.disarm()
			c.allow(time.Now(), silence)
		}
		if reads == 3 && !t.head.events {
			done := make(chan struct{})
			watch.Go(func() { t.endOn(done, nil) })
			defer func() { close(done); watch.Wait() }()
		}
		n, err := src.Read(*buf)
		if n > 0 {
			if werr := t.writeTimed((*buf)[:n]); werr != nil {
				return werr
			}
		}
		if left != nil {
			if *left -= int64(n); *left == 0 {
				return nil
			}
			if err == io.EOF {
				return io.ErrUnexpectedEOF
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// writeTimed bounds the time that an HTTP/2 client may keep its window shut;
// on HTTP/1.1 clientConn does so.
func (t *transfer) writeTimed(p []byte) error {
	if t.x.r.ProtoMajor == 2 {
		t.armed = true
		t.writeDeadline(time.Now().Add(t.x.s.cfg.WriteTimeout))
	}
	return t.write(p)
}

// disarm lifts the bound while there is nothing to write: HTTP/2 would end the
// stream at that time in any case.
func (t *transfer) disarm() {
	if t.armed {
		t.armed = false
		t.writeDeadline(time.Time{})
	}
}

func (t *transfer) writeDeadline(at time.Time) {
	if w, ok := t.x.w.(interface{ SetWriteDeadline(time.Time) error }); ok {
		_ = w.SetWriteDeadline(at)
	}
}

// endOn cuts the connection to the instance when the stream is to end.
func (t *transfer) endOn(done, stopping <-chan struct{}) {
	select {
	case <-done:
		return
	case <-stopping:
	case <-t.x.lease.Closing():
	}
	t.ending.Store(true)
	t.c.abort()
}

// prepare makes the request as an instance gets it, reading a small body.
func (x *exchange) prepare(out *outgoing, buf []byte) result {
	r := x.r
	h := r.Header
	hasBody := r.Body != nil && r.Body != http.NoBody && r.ContentLength != 0
	if r.ProtoMajor == 1 && !hasBody && h["Upgrade"] != nil && hasToken(h["Connection"], "upgrade") {
		out.upgrade = upgradeTo(h["Upgrade"])
	}
	out.expect = hasBody && len(h["Expect"]) > 0
	small := hasBody && !out.expect && r.ContentLength > 0 && r.ContentLength <= maxSmallBody
	out.stream = hasBody && !small
	out.replayable = !hasBody && out.upgrade == "" && (r.Method == http.MethodGet || r.Method == http.MethodHead || r.Method == http.MethodOptions)
	b := x.appendHead(buf, out, hasBody)
	if small {
		body := slowBody{x: x}
		body.start()
		from := len(b)
		b = slices.Grow(b, int(r.ContentLength))[:from+int(r.ContentLength)]
		if _, err := io.ReadFull(&body, b[from:]); err != nil {
			out.head = b
			return body.result(err)
		}
	}
	out.head = b
	return result{}
}

// upgradeTo is the protocol to ask an instance for. HTTP/2 is not switched to
// in this way.
func upgradeTo(values []string) string {
	if len(values) != 1 || len(values[0]) > 64 || strings.Contains(values[0], ",") || strings.EqualFold(values[0], "h2c") {
		return ""
	}
	return values[0]
}

// appendHead writes request line and header.
func (x *exchange) appendHead(b []byte, out *outgoing, hasBody bool) []byte {
	r := x.r
	h := r.Header
	line := func(name, value string) {
		b = append(append(append(append(b, name...), ": "...), value...), "\r\n"...)
	}
	b = append(append(b, r.Method...), ' ')
	switch {
	case r.RequestURI != "" && r.RequestURI[0] == '/', r.RequestURI == "*":
		b = append(b, r.RequestURI...)
	default:
		b = append(b, r.URL.RequestURI()...)
	}
	b = append(b, " HTTP/1.1\r\n"...)
	line("Host", r.Host)
	var drop []string
	if conn := h["Connection"]; len(conn) > 0 {
		drop = named(conn)
	}
	for name, values := range h {
		if hopHeader(name) || ownHeader(name) || drop != nil && slices.Contains(drop, name) {
			continue
		}
		for _, v := range values {
			line(name, v)
		}
	}
	proto := "http"
	if x.conn.secure != nil {
		proto = "https"
	}
	o := originOf(h, x.conn.trusted, x.conn.peerText, r.Host, proto)
	b = append(o.appendFor(append(b, "X-Forwarded-For: "...)), "\r\n"...)
	line("X-Forwarded-Host", o.host)
	line("X-Forwarded-Proto", o.proto)
	b = append(o.appendForwarded(append(b, "Forwarded: "...)), "\r\n"...)
	b = append(x.id.append(append(b, "X-Request-Id: "...)), "\r\n"...)
	switch {
	case out.upgrade != "":
		line("Connection", "Upgrade")
		line("Upgrade", out.upgrade)
	case len(h["Te"]) > 0 && hasToken(h["Te"], "trailers"):
		line("Connection", "TE")
		line("TE", "trailers")
	}
	if out.expect {
		line("Expect", "100-continue")
	}
	switch {
	case hasBody && r.ContentLength < 0:
		for name := range r.Trailer {
			if !forbiddenTrailer(name) {
				line("Trailer", name)
			}
		}
		line("Transfer-Encoding", "chunked")
	case hasBody:
		b = append(b, "Content-Length: "...)
		b = append(strconv.AppendInt(b, r.ContentLength, 10), "\r\n"...)
	case r.Method == http.MethodPost, r.Method == http.MethodPut, r.Method == http.MethodPatch:
		line("Content-Length", "0")
	}
	return append(b, "\r\n"...)
}
