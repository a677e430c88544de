package dispatch

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// NewAttach makes what the front door keeps beside each instance. It may be
// called before there is a Server.
func NewAttach(cfg Config) Attach {
	return func(id fleet.InstanceID, addr netip.AddrPort, dialed func() net.Conn) io.Closer {
		return &instance{
			id: id, addr: addr.String(), dialed: dialed,
			maxIdle: cfg.MaxIdlePerInstance, idleFor: cfg.InstanceIdleTimeout, maxHeader: cfg.MaxHeaderBytes,
			dialer: net.Dialer{Timeout: cfg.ConnectTimeout, KeepAlive: 30 * time.Second, Control: cfg.Control},
			live:   map[*instanceConn]struct{}{},
		}
	}
}

// instance holds the connections to one instance. Its lock is held for a push
// or a pop only, and shared with no other instance.
type instance struct {
	id        fleet.InstanceID
	addr      string
	maxIdle   int
	idleFor   time.Duration
	maxHeader int
	dialer    net.Dialer
	dialed    func() net.Conn

	mu     sync.Mutex
	closed bool
	idle   []*instanceConn // the newest last
	live   map[*instanceConn]struct{}
	h2     *http.Transport // made when the first gRPC call comes
}

var errInstanceGone = errors.New("instance has left the route")

// Close ends every connection to the instance, also those in use.
func (in *instance) Close() error {
	in.mu.Lock()
	in.closed = true
	in.idle = nil
	live := in.live
	in.live = map[*instanceConn]struct{}{}
	h2 := in.h2
	in.mu.Unlock()
	for c := range live {
		c.abort()
		_ = c.raw.Close()
	}
	if h2 != nil {
		h2.CloseIdleConnections()
	}
	return nil
}

// kept gives the connection that was used last, or nil.
func (in *instance) kept(now time.Time) *instanceConn {
	in.mu.Lock()
	n := len(in.idle)
	if n == 0 {
		in.mu.Unlock()
		return nil
	}
	c := in.idle[n-1]
	in.idle[n-1] = nil
	in.idle = in.idle[:n-1]
	in.mu.Unlock()
	if now.Sub(c.since) > in.idleFor {
		c.close() // the others are older still; put throws them away
		return nil
	}
	c.reused = true
	return c
}

// dial makes a connection, or takes the one there is already. It is as good as a
// new one: what is sent on it is not sent again, because it may be what ended the instance.
func (in *instance) dial(ctx context.Context) (*instanceConn, error) {
	if raw := in.dialed(); raw != nil {
		c, err := in.own(raw)
		if err != nil {
			return nil, err
		}
		if c.alive() {
			return c, nil
		}
		c.close()
	}
	raw, err := in.dialer.DialContext(ctx, "tcp", in.addr)
	if err != nil {
		return nil, err
	}
	return in.own(raw)
}

// own makes a connection one of the instance's.
func (in *instance) own(raw net.Conn) (*instanceConn, error) {
	c := &instanceConn{raw: raw, in: in}
	if sc, ok := raw.(syscall.Conn); ok {
		c.sys, _ = sc.SyscallConn()
	}
	c.probe = c.peek
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.closed {
		_ = raw.Close()
		return nil, errInstanceGone
	}
	in.live[c] = struct{}{}
	return c, nil
}

// keep puts c back for the next request.
func (in *instance) keep(c *instanceConn, now time.Time) {
	if c.r.Buffered() > 0 || c.aborted.Load() {
		c.close() // it said more than its response
		return
	}
	readers.Put(c.r)
	c.r = nil
	c.since = now
	var old *instanceConn
	in.mu.Lock()
	switch {
	case in.closed || len(in.idle) >= in.maxIdle:
		old = c
	default:
		if len(in.idle) > 0 && now.Sub(in.idle[0].since) > in.idleFor {
			old = in.idle[0]
			copy(in.idle, in.idle[1:])
			in.idle = in.idle[:len(in.idle)-1]
		}
		in.idle = append(in.idle, c)
	}
	in.mu.Unlock()
	if old != nil {
		old.close()
	}
}

// transport is the HTTP/2 side of the instance.
func (in *instance) transport() *http.Transport {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.h2 == nil {
		protocols := new(http.Protocols)
		protocols.SetUnencryptedHTTP2(true)
		in.h2 = &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				c, err := in.dial(ctx)
				if err != nil {
					return nil, err
				}
				return h2Conn{c.raw, c}, nil
			},
			Protocols:              protocols,
			DisableCompression:     true,
			IdleConnTimeout:        in.idleFor,
			MaxResponseHeaderBytes: int64(in.maxHeader),
			HTTP2:                  &http.HTTP2Config{SendPingTimeout: 30 * time.Second, PingTimeout: 15 * time.Second},
		}
	}
	return in.h2
}

// h2Conn takes the connection off the instance's list when it is closed.
type h2Conn struct {
	net.Conn
	c *instanceConn
}

func (h h2Conn) Close() error { h.c.close(); return nil }

var (
	readers = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, 4<<10) }}
	heads   = sync.Pool{New: func() any { b := make([]byte, 0, 4<<10); return &b }}
	copies  = sync.Pool{New: func() any { b := make([]byte, 32<<10); return &b }}
)

// instanceConn is one HTTP/1.1 connection to an instance, used by one
// exchange at a time.
type instanceConn struct {
	raw    net.Conn
	in     *instance
	r      *bufio.Reader // nil while it is kept
	since  time.Time     // of its last use
	reused bool
	got    bool // a byte of the present response has come

	due     atomic.Int64 // the deadline that is set, Unix ns
	aborted atomic.Bool

	sys     syscall.RawConn
	probe   func(fd uintptr) bool
	waiting bool
}

func (c *instanceConn) begin() {
	c.got = false
	if c.r == nil {
		c.r = readers.Get().(*bufio.Reader)
		c.r.Reset(c)
	}
}

// Read notes that the instance has said something.
func (c *instanceConn) Read(p []byte) (int, error) {
	n, err := c.raw.Read(p)
	if n > 0 {
		c.got = true
	}
	return n, err
}

func (c *instanceConn) Write(p []byte) (int, error) { return c.raw.Write(p) }

// allow gives the instance at least d from now. The deadline is moved in
// steps, since moving it costs more than reading the clock.
func (c *instanceConn) allow(now time.Time, d time.Duration) {
	due, least := c.due.Load(), now.UnixNano()+int64(d)
	if due >= least && due <= least+int64(d/4) {
		return
	}
	next := now.Add(d + d/8)
	c.due.Store(next.UnixNano())
	_ = c.raw.SetDeadline(next)
	if c.aborted.Load() {
		_ = c.raw.SetDeadline(longAgo)
	}
}

var longAgo = time.Unix(1, 0)

// abort ends whatever waits on the connection; it cannot be used again.
func (c *instanceConn) abort() {
	c.aborted.Store(true)
	_ = c.raw.SetDeadline(longAgo)
}

func (c *instanceConn) close() {
	c.in.mu.Lock()
	delete(c.in.live, c)
	c.in.mu.Unlock()
	_ = c.raw.Close()
	if c.r != nil {
		c.r.Reset(nil)
		readers.Put(c.r)
		c.r = nil
	}
}

// alive asks the kernel whether the instance has closed a kept connection, or
// said something on it that nobody asked for.
func (c *instanceConn) alive() bool {
	if c.sys == nil {
		return true
	}
	c.waiting = false
	return c.sys.Read(c.probe) == nil && c.waiting
}

func (c *instanceConn) peek(fd uintptr) bool {
	var b [1]byte
	_, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
	c.waiting = err == syscall.EAGAIN
	return true
}
