package dispatch

import (
	"crypto/tls"
	"errors"
	"hash/maphash"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// clientConn is a connection from a client. It follows the framing of what it
// reads, bounds how long a write may take, knows which exchange with an
// instance to end when the client leaves, and keeps net/http's many deadline
// changes away from the kernel's timers.
type clientConn struct {
	net.Conn
	srv      *Server
	peer     netip.Addr
	peerText string
	key      netip.Addr // what MaxConnsPerIP counts; invalid: not counted
	trusted  bool
	secure   *tls.Conn // nil without TLS

	frame framing
	bad   error // what ended the reading

	dmu     sync.Mutex
	want    time.Time // the read deadline that was asked for
	armed   time.Time // the one that is set: want or earlier
	aborted bool      // armed is in the past on purpose

	wrote atomic.Int64 // when the write deadline was last set, Unix ns

	mu   sync.Mutex
	gone bool
	up   *instanceConn // exchange to end when the client leaves

	nameOnce sync.Once
	sni      string
	cert     *tls.Certificate

	closed atomic.Bool
}

type connKey struct{}

func (c *clientConn) Read(p []byte) (int, error) {
	if c.bad != nil {
		return 0, c.bad
	}
	for {
		n, err := c.Conn.Read(p)
		if n > 0 {
			n, c.bad = c.frame.check(p[:n])
			if n > 0 {
				return n, nil
			}
			c.srv.metrics.refuse(refusedFraming)
			return 0, c.bad
		}
		if err == nil {
			continue
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			if c.rearm() {
				continue
			}
			return 0, err
		}
		c.leave()
		return 0, err
	}
}

// rearm tells whether a deadline came early, and sets the true one.
func (c *clientConn) rearm() bool {
	c.dmu.Lock()
	defer c.dmu.Unlock()
	if c.aborted || !c.want.IsZero() && !time.Now().Before(c.want) {
		return false
	}
	c.armed = c.want
	return c.Conn.SetReadDeadline(c.want) == nil
}

// SetReadDeadline is called several times for each request. Only a deadline
// earlier than the one that is set is set at once; later ones when that comes.
func (c *clientConn) SetReadDeadline(t time.Time) error {
	c.dmu.Lock()
	defer c.dmu.Unlock()
	c.want = t
	past := !t.IsZero() && t.Unix() <= 1
	if !past && !c.aborted {
		if t.IsZero() || !c.armed.IsZero() && !t.Before(c.armed) {
			return nil
		}
	}
	c.aborted, c.armed = past, t
	return c.Conn.SetReadDeadline(t)
}

// SetDeadline and SetWriteDeadline leave the time for writing to Write.
func (c *clientConn) SetDeadline(t time.Time) error { return c.SetReadDeadline(t) }

// SetWriteDeadline does nothing: Write has its own.
func (c *clientConn) SetWriteDeadline(time.Time) error { return nil }

// Write bounds the time for p; the deadline is moved only now and then.
func (c *clientConn) Write(p []byte) (int, error) {
	now := time.Now()
	limit := c.srv.cfg.WriteTimeout
	if last := c.wrote.Load(); now.UnixNano()-last > int64(limit/8) {
		c.wrote.Store(now.UnixNano())
		if err := c.Conn.SetWriteDeadline(now.Add(limit + limit/8)); err != nil {
			return 0, err
		}
	}
	return c.Conn.Write(p)
}

// CloseWrite ends the sending direction only.
func (c *clientConn) CloseWrite() error {
	if cw, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return cw.CloseWrite()
	}
	return c.Close()
}

func (c *clientConn) Close() error {
	if !c.closed.CompareAndSwap(false, true) {
		return net.ErrClosed
	}
	c.leave()
	c.srv.conns.Add(-1)
	if c.key.IsValid() {
		c.srv.peers.drop(c.key)
	}
	return c.Conn.Close()
}

// leave ends the exchange that is under way for a client that left.
func (c *clientConn) leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gone = true
	if c.up != nil {
		c.up.abort()
	}
}

// follow makes up end when the client leaves; false: it has left already.
func (c *clientConn) follow(up *instanceConn) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.up = up
	return !c.gone
}

// unfollow tells whether the client was still there.
func (c *clientConn) unfollow() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.up = nil
	return !c.gone
}

// serverName is the host and the certificate of the TLS handshake.
func (c *clientConn) serverName() (string, *tls.Certificate) {
	c.nameOnce.Do(func() {
		c.sni = c.secure.ConnectionState().ServerName
		c.cert = c.srv.certs.pick(c.sni)
	})
	return c.sni, c.cert
}

// door is a listener that refuses connections beyond the limits.
type door struct {
	net.Listener
	srv *Server
	tls *tls.Config
}

func (d *door) Accept() (net.Conn, error) {
	for {
		raw, err := d.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if c, why := d.admit(raw); c != nil {
			return c, nil
		} else {
			d.srv.metrics.refuse(why)
			_ = raw.Close()
		}
	}
}

func (d *door) admit(raw net.Conn) (*clientConn, refusal) {
	s := d.srv
	c := &clientConn{Conn: raw, srv: s, frame: newFraming(s.cfg.MaxHeaderBytes+4096, 2*s.cfg.MaxHeaders)}
	if a, ok := raw.RemoteAddr().(*net.TCPAddr); ok {
		c.peer = a.AddrPort().Addr().Unmap()
	}
	c.peerText = "unknown"
	if c.peer.IsValid() {
		c.peerText = c.peer.WithZone("").String()
	}
	c.trusted = s.trusts(c.peer)
	if s.conns.Add(1) > int64(s.cfg.MaxConns) {
		s.conns.Add(-1)
		return nil, refusedConns
	}
	if c.peer.IsValid() && !c.trusted {
		key := peerKey(c.peer)
		if !s.peers.take(key, s.cfg.MaxConnsPerIP) {
			s.conns.Add(-1)
			return nil, refusedPeer
		}
		c.key = key
	}
	if d.tls != nil {
		c.secure = tls.Server(raw, d.tls)
		c.Conn = c.secure
	}
	return c, 0
}

// peerKey is what counts as one client: an IPv6 customer has a /64.
func peerKey(a netip.Addr) netip.Addr {
	if a.Is6() {
		if p, err := a.WithZone("").Prefix(64); err == nil {
			return p.Addr()
		}
	}
	return a
}

// peerTable counts connections by client. It is touched when a connection
// comes and goes, never by a request.
type peerTable struct {
	seed   maphash.Seed
	shards [64]struct {
		mu sync.Mutex
		m  map[netip.Addr]int
	}
}

func newPeerTable() *peerTable {
	t := &peerTable{seed: maphash.MakeSeed()}
	for i := range t.shards {
		t.shards[i].m = map[netip.Addr]int{}
	}
	return t
}

func (t *peerTable) take(a netip.Addr, limit int) bool {
	s := &t.shards[maphash.Comparable(t.seed, a)%uint64(len(t.shards))]
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.m[a] >= limit {
		return false
	}
	s.m[a]++
	return true
}

func (t *peerTable) drop(a netip.Addr) {
	s := &t.shards[maphash.Comparable(t.seed, a)%uint64(len(t.shards))]
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.m[a]--; s.m[a] <= 0 {
		delete(s.m, a)
	}
}
