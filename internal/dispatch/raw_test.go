package dispatch

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// rawConn is a client or a server that says exactly what the test says.
type rawConn struct {
	net.Conn
	t testing.TB
	r *bufio.Reader
}

func newRawConn(t testing.TB, c net.Conn) *rawConn {
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	return &rawConn{Conn: c, t: t, r: bufio.NewReader(c)}
}

func dial(t testing.TB, addr string) *rawConn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return newRawConn(t, c)
}

func (c *rawConn) send(s string) { _, _ = io.WriteString(c.Conn, s) }

// line reads one without its end; "" also at the end of the stream.
func (c *rawConn) line() string {
	s, _ := c.r.ReadString('\n')
	return strings.TrimRight(s, "\r\n")
}

func (c *rawConn) response(method string) (*http.Response, string) {
	c.t.Helper()
	res, err := http.ReadResponse(c.r, &http.Request{Method: method})
	if err != nil {
		c.t.Fatalf("no response: %v", err)
	}
	b, err := io.ReadAll(res.Body)
	if err != nil {
		c.t.Fatalf("response broken off: %v", err)
	}
	return res, string(b)
}

// ended waits for the end of the stream and gives what came before.
func (c *rawConn) ended() string {
	c.t.Helper()
	b, err := io.ReadAll(c.r)
	if ne, ok := errors.AsType[net.Error](err); ok && ne.Timeout() {
		c.t.Fatalf("connection is still open after %q", b)
	}
	return string(b)
}
