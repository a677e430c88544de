package dispatch

import (
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

// switchProtocols joins the client's connection with the instance's after 101.
func (t *transfer) switchProtocols(block string) result {
	x, c := t.x, t.c
	h := http.Header{}
	if t.out.upgrade == "" {
		return t.malformed(nil)
	}
	if err := t.head.parse(block, x.s.cfg.MaxHeaders, h); err != nil || !strings.EqualFold(t.head.upgrade, t.out.upgrade) {
		return t.malformed(err)
	}
	if !x.conn.unfollow() {
		return result{left: true}
	}
	hj, ok := x.w.(http.Hijacker)
	if !ok {
		return t.malformed(nil)
	}
	_, rw, err := hj.Hijack()
	if err != nil {
		return result{left: true, err: err}
	}
	t.upgraded = true
	x.protocol, x.stream, x.code = protoUpgrade, true, http.StatusSwitchingProtocols
	x.lease.Streams()
	head := append([]byte("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "), t.head.upgrade...)
	head = append(head, "\r\n"...)
	for name, values := range h {
		for _, v := range values {
			head = append(append(append(append(head, name...), ": "...), v...), "\r\n"...)
		}
	}
	head = append(head, "\r\n"...)
	tn := &tunnel{s: x.s, client: x.conn, inst: c, grace: x.s.cfg.CloseGrace, silence: x.s.cfg.TunnelTimeout}
	if strings.EqualFold(t.head.upgrade, "websocket") {
		tn.down.frames = &frameTracker{}
		tn.up.frames = &frameTracker{masked: true}
	}
	_ = x.conn.SetReadDeadline(time.Time{})
	if _, err := x.conn.Write(head); err != nil {
		c.close()
		_ = x.conn.Close()
		return result{left: true, err: err}
	}
	var early []byte
	if n := rw.Reader.Buffered(); n > 0 {
		early, _ = rw.Reader.Peek(n)
	}
	tn.run(early, x.lease.Closing())
	x.bytes = tn.down.copied
	return result{}
}

// tunnel copies bytes between a client and an instance until both directions
// have ended, one of them failed, or it is told to close.
type tunnel struct {
	s       *Server
	client  *clientConn
	inst    *instanceConn
	grace   time.Duration
	silence time.Duration

	down, up direction // to the client; to the instance
}

// direction is one way through a tunnel.
type direction struct {
	mu      sync.Mutex    // held while writing
	frames  *frameTracker // nil: not WebSocket
	closing bool          // a close frame is to be sent at the next boundary
	said    bool          // it was sent: nothing may follow
	copied  int64
}

func (t *tunnel) run(early []byte, closing <-chan struct{}) {
	s := t.s
	s.tmu.Lock()
	s.open[t] = struct{}{}
	if s.cut {
		t.cut()
	}
	s.tmu.Unlock()
	s.metrics.tunnels.Add(1)
	defer func() {
		t.inst.close()
		_ = t.client.Close()
		s.tmu.Lock()
		delete(s.open, t)
		s.tmu.Unlock()
		s.metrics.tunnels.Add(-1)
	}()

	done := make(chan struct{})
	var watch, copying sync.WaitGroup
	watch.Go(func() {
		select {
		case <-done:
			return
		case <-closing:
		case <-s.stopping:
		}
		t.sayGoodbye()
		timer := time.NewTimer(t.grace)
		defer timer.Stop()
		select {
		case <-done:
		case <-timer.C:
			t.cut()
		}
	})
	copying.Go(func() { t.copy(&t.up, t.inst.raw, t.client, early) })
	t.copy(&t.down, t.client, instReader{t.inst}, nil)
	copying.Wait()
	close(done)
	watch.Wait()
}

// instReader reads what lies in the connection's buffer first.
type instReader struct{ c *instanceConn }

func (r instReader) Read(p []byte) (int, error) { return r.c.r.Read(p) }

// cut ends both directions at once.
func (t *tunnel) cut() {
	t.inst.abort()
	_ = t.client.SetReadDeadline(longAgo)
	_ = t.client.Conn.SetWriteDeadline(longAgo)
}

// copy moves bytes until src ends, and then ends that direction only. When it
// fails, both end.
func (t *tunnel) copy(d *direction, dst io.Writer, src io.Reader, early []byte) {
	buf := copies.Get().(*[]byte)
	defer copies.Put(buf)
	write := func(p []byte) error {
		t.inst.allow(time.Now(), t.silence)
		return d.write(dst, p)
	}
	if len(early) > 0 {
		if write(early) != nil {
			t.cut()
			return
		}
	}
	t.inst.allow(time.Now(), t.silence)
	for {
		n, err := src.Read(*buf)
		if n > 0 {
			if write((*buf)[:n]) != nil {
				t.cut()
				return
			}
		}
		if err == io.EOF {
			cw, ok := dst.(interface{ CloseWrite() error })
			if !ok || cw.CloseWrite() != nil {
				t.cut()
			}
			return
		}
		if err != nil {
			t.cut()
			return
		}
	}
}

// write sends p; a close frame that is due goes in at the first boundary, and
// what comes after it is dropped.
func (d *direction) write(dst io.Writer, p []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.said {
		return nil
	}
	d.copied += int64(len(p))
	if d.frames == nil {
		_, err := dst.Write(p)
		return err
	}
	if !d.closing {
		d.frames.follow(p)
		_, err := dst.Write(p)
		return err
	}
	n := d.frames.untilBoundary(p)
	out := p[:n]
	if d.frames.boundary() {
		d.said = true
		out = append(append([]byte(nil), out...), d.frames.goingAway()...)
	}
	_, err := dst.Write(out)
	return err
}

// sayGoodbye sends WebSocket's close frame 1001 to both sides, each at once
// if nothing is half sent, and ends other protocols.
func (t *tunnel) sayGoodbye() {
	if t.down.frames == nil {
		t.cut()
		return
	}
	for _, e := range []struct {
		d   *direction
		dst net.Conn
	}{{&t.down, t.client}, {&t.up, t.inst.raw}} {
		e.d.mu.Lock()
		e.d.closing = true
		if !e.d.said && e.d.frames.boundary() {
			e.d.said = true
			_, _ = e.dst.Write(e.d.frames.goingAway())
		}
		e.d.mu.Unlock()
	}
}
