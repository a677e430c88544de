package dispatch

import (
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync/atomic"
	"time"
)

var errBodySize = errors.New("request body too large")

// slowBody reads a request body with bounds on silence, rate and size.
type slowBody struct {
	x     *exchange
	begun time.Time
	got   int64
}

func (s *slowBody) start() { s.begun = time.Now() }

func (s *slowBody) Read(p []byte) (int, error) {
	cfg := &s.x.s.cfg
	now := time.Now()
	due := now.Add(cfg.BodyTimeout)
	if cfg.MinBodyRate > 0 {
		if end := s.begun.Add(cfg.BodyTimeout + time.Duration(float64(s.got)/float64(cfg.MinBodyRate)*float64(time.Second))); end.Before(due) {
			due = end
		}
	}
	s.x.readDeadline(due)
	n, err := s.x.r.Body.Read(p)
	if err == nil && s.x.r.ProtoMajor == 2 {
		// There it ends the body even while nobody reads.
		s.x.readDeadline(time.Time{})
	}
	s.got += int64(n)
	if limit := cfg.MaxBody; limit > 0 && s.got > limit {
		return 0, errBodySize
	}
	return n, err
}

// result sorts out why a body could not be read.
func (s *slowBody) result(err error) result {
	switch {
	case err == nil:
		return result{}
	case errors.Is(err, errBodySize):
		return result{code: http.StatusRequestEntityTooLarge, why: refusedBody, err: err}
	case errors.Is(err, os.ErrDeadlineExceeded):
		return result{code: http.StatusRequestTimeout, why: refusedSlow, err: err}
	case s.x.conn.framingBroken(err):
		return result{code: http.StatusBadRequest, why: refusedFraming, err: err}
	}
	return result{left: true, err: err}
}

// readDeadline bounds the next read of the request body.
func (x *exchange) readDeadline(t time.Time) {
	if x.r.ProtoMajor == 1 {
		_ = x.conn.SetReadDeadline(t)
		return
	}
	if w, ok := x.w.(interface{ SetReadDeadline(time.Time) error }); ok {
		_ = w.SetReadDeadline(t)
	}
}

// framingBroken tells whether err is what the framing check said.
func (c *clientConn) framingBroken(err error) bool {
	for _, e := range []error{errLineEnd, errFolded, errLength, errCoding, errChunk, errTooBig, errTrailer, errVersion, errBadBytes} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// pump sends a request body to the instance while its response may already be
// on its way. The exchange that started it stops it and waits for it.
type pump struct {
	t    *transfer
	body slowBody
	done chan struct{}
	// failed: the client's part failed by itself, run is about to end.
	failed atomic.Bool
	// whole: the client's part is complete, and only what is left of it is
	// still to be written.
	whole atomic.Bool
	// Valid once done is closed.
	readErr  error // of the client
	writeErr error // of the instance
	stopped  bool
}

func (t *transfer) startPump() {
	p := &pump{t: t, body: slowBody{x: t.x}, done: make(chan struct{})}
	t.pump = p
	if w, ok := t.x.w.(interface{ EnableFullDuplex() error }); ok && t.x.r.ProtoMajor == 1 {
		_ = w.EnableFullDuplex()
	}
	p.body.start()
	go p.run()
}

// run ends when the body ends, or when stop makes its read and write fail.
func (p *pump) run() {
	defer close(p.done)
	p.readErr, p.writeErr = p.copy()
	if p.readErr != nil {
		// The instance cannot answer a request that it will never have whole.
		p.failed.Store(true)
		p.t.c.abort()
	}
}

func (p *pump) copy() (readErr, writeErr error) {
	x, c := p.t.x, p.t.c
	chunked := x.r.ContentLength < 0
	buf := copies.Get().(*[]byte)
	defer copies.Put(buf)
	// Room before and after the data makes a chunk one write.
	const front, back = 16, 2
	b := *buf
	var sent int64
	for {
		n, err := p.body.Read(b[front : len(b)-back])
		if n > 0 {
			sent += int64(n)
			piece := b[front : front+n]
			if chunked {
				size := strconv.AppendInt(make([]byte, 0, front), int64(n), 16)
				from := front - len(size) - 2
				copy(b[from:], size)
				copy(b[front-2:], "\r\n")
				copy(b[front+n:], "\r\n")
				piece = b[from : front+n+2]
			}
			if !chunked && sent == x.r.ContentLength {
				p.whole.Store(true)
			}
			c.allow(time.Now(), x.s.cfg.ResponseTimeout)
			if _, werr := c.raw.Write(piece); werr != nil {
				return nil, werr
			}
		}
		if errors.Is(err, io.EOF) {
			p.whole.Store(true)
			break
		}
		if err != nil {
			return err, nil
		}
	}
	if !chunked {
		if sent != x.r.ContentLength {
			return io.ErrUnexpectedEOF, nil
		}
		return nil, nil
	}
	end := []byte("0\r\n")
	for name, values := range x.r.Trailer {
		if forbiddenTrailer(name) {
			continue
		}
		for _, v := range values {
			end = append(append(append(append(end, name...), ": "...), v...), "\r\n"...)
		}
	}
	_, err := c.raw.Write(append(end, "\r\n"...))
	return nil, err
}

// stop ends the pump if it has not ended, and tells whether it had sent the
// whole body.
func (p *pump) stop() bool {
	select {
	case <-p.done:
	default:
		if p.whole.Load() && p.settle() {
			break // the instance was quicker with its answer than we are here
		}
		if !p.failed.Load() {
			p.stopped = true
			p.t.x.readDeadline(longAgo)
			p.t.c.abort()
		}
		<-p.done
	}
	return !p.stopped && p.readErr == nil && p.writeErr == nil
}

// settle gives run, which has nothing to wait for but the instance, a moment
// to end by itself: then both connections can be used again.
func (p *pump) settle() bool {
	timer := time.NewTimer(time.Second)
	defer timer.Stop()
	select {
	case <-p.done:
		return true
	case <-timer.C:
		return false
	}
}

// fault is what was wrong with the client's body; valid after stop.
func (p *pump) fault() result {
	if p.stopped || p.readErr == nil {
		return result{}
	}
	return p.body.result(p.readErr)
}

var _ net.Conn = (*clientConn)(nil)
