package dispatch

import (
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"testing"
)

// backend answers every request on a connection with the same short response,
// at next to no cost.
func backend(t testing.TB) string {
	const answer = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 13\r\n\r\nHello, world\n"
	l := listen(t)
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = c.Close() }()
				b := make([]byte, 4096)
				for {
					n := 0
					for n < 4 || string(b[n-4:n]) != "\r\n\r\n" {
						m, err := c.Read(b[n:])
						if err != nil {
							return
						}
						n += m
					}
					if _, err := io.WriteString(c, answer); err != nil {
						return
					}
				}
			}()
		}
	}()
	return l.Addr().String()
}

// BenchmarkForward compares the front door with net/http's ReverseProxy, on
// one kept connection with the client each.
func BenchmarkForward(b *testing.B) {
	addr := backend(b)
	run := func(b *testing.B, to string) {
		b.RunParallel(func(pb *testing.PB) {
			c, err := net.Dial("tcp", to)
			if err != nil {
				b.Error(err)
				return
			}
			defer func() { _ = c.Close() }()
			buf := make([]byte, 4096)
			for pb.Next() {
				if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: app.test\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n"); err != nil {
					b.Error(err)
					return
				}
				n := 0
				for n < 13 || string(buf[n-13:n]) != "Hello, world\n" {
					m, err := c.Read(buf[n:])
					if err != nil {
						b.Error(err)
						return
					}
					n += m
				}
			}
		})
	}
	b.Run("dispatch", func(b *testing.B) {
		f := newFront(b, nil)
		f.instance(addr)
		b.ReportAllocs()
		b.ResetTimer()
		run(b, f.http)
	})
	b.Run("reverseproxy", func(b *testing.B) {
		u, _ := url.Parse("http://" + addr)
		l := listen(b)
		srv := &http.Server{Handler: &httputil.ReverseProxy{
			Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(u); r.SetXForwarded() },
			Transport: &http.Transport{MaxIdleConnsPerHost: 100},
		}}
		go func() { _ = srv.Serve(l) }()
		defer func() { _ = srv.Close() }()
		b.ReportAllocs()
		b.ResetTimer()
		run(b, l.Addr().String())
	})
}
