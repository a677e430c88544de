package dispatch

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
)

// Everything here is sent raw; a valid request follows in the same piece and
// must not be answered, or the two could be told apart wrongly.
func TestFraming_AmbiguousIsRefused(t *testing.T) {
	f := newFront(t, nil)
	f.serve(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = io.WriteString(w, "app")
	})
	const get = "GET / HTTP/1.1\r\nHost: app.test\r\n"
	const post = "POST / HTTP/1.1\r\nHost: app.test\r\n"
	for name, raw := range map[string]string{
		"te and cl":               post + "Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
		"cl and te":               post + "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"two lengths":             post + "Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
		"two equal lengths":       post + "Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
		"length list":             post + "Content-Length: 3, 3\r\n\r\nabc",
		"length with plus":        post + "Content-Length: +3\r\n\r\nabc",
		"length negative":         post + "Content-Length: -3\r\n\r\nabc",
		"length hex":              post + "Content-Length: 0x3\r\n\r\nabc",
		"length empty":            post + "Content-Length: \r\n\r\nabc",
		"length huge":             post + "Content-Length: 99999999999999999999\r\n\r\nabc",
		"space before colon":      post + "Content-Length : 3\r\n\r\nabc",
		"tab before colon":        post + "Transfer-Encoding\t: chunked\r\n\r\n0\r\n\r\n",
		"te twice":                post + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"te identity":             post + "Transfer-Encoding: identity\r\n\r\n",
		"te list":                 post + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
		"te xchunked":             post + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
		"te vertical tab":         post + "Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
		"te in 1.0":               "POST / HTTP/1.0\r\nHost: app.test\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"folded":                  get + "X-A: b\r\n c\r\n\r\n",
		"folded te":               post + "Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
		"bare lf":                 get + "X-A: b\n\r\n",
		"bare lf request line":    "GET / HTTP/1.1\nHost: app.test\r\n\r\n",
		"bare lf end":             get + "\n",
		"bare cr":                 get + "X-A: b\rX-B: c\r\n\r\n",
		"nul":                     get + "X-A: b\x00c\r\n\r\n",
		"no colon":                get + "X-A\r\n\r\n",
		"empty name":              get + ": x\r\n\r\n",
		"space first":             " GET / HTTP/1.1\r\nHost: app.test\r\n\r\n",
		"blank line first":        "\r\n" + get + "\r\n",
		"no host":                 "GET / HTTP/1.1\r\n\r\n",
		"two hosts":               get + "Host: other.test\r\n\r\n",
		"two equal hosts":         get + "Host: app.test\r\n\r\n",
		"two spaces":              "GET  / HTTP/1.1\r\nHost: app.test\r\n\r\n",
		"tab in request line":     "GET\t/ HTTP/1.1\r\nHost: app.test\r\n\r\n",
		"no version":              "GET /\r\nHost: app.test\r\n\r\n",
		"version 2":               "GET / HTTP/2.0\r\nHost: app.test\r\n\r\n",
		"version 1.2":             "GET / HTTP/1.2\r\nHost: app.test\r\n\r\n",
		"version 1.10":            "GET / HTTP/1.10\r\nHost: app.test\r\n\r\n",
		"bad method":              "G(T / HTTP/1.1\r\nHost: app.test\r\n\r\n",
		"control in path":         "GET /\x01 HTTP/1.1\r\nHost: app.test\r\n\r\n",
		"chunk size bad":          post + "Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n",
		"chunk size 0x":           post + "Transfer-Encoding: chunked\r\n\r\n0x3\r\nabc\r\n0\r\n\r\n",
		"chunk size negative":     post + "Transfer-Encoding: chunked\r\n\r\n-3\r\nabc\r\n0\r\n\r\n",
		"chunk size space":        post + "Transfer-Encoding: chunked\r\n\r\n3 \r\nabc\r\n0\r\n\r\n",
		"chunk size overflow":     post + "Transfer-Encoding: chunked\r\n\r\n10000000000000003\r\nabc\r\n0\r\n\r\n",
		"chunk size lf":           post + "Transfer-Encoding: chunked\r\n\r\n3\nabc\r\n0\r\n\r\n",
		"chunk end lf":            post + "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\n0\r\n\r\n",
		"chunk too long":          post + "Transfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n",
		"chunk extension lf":      post + "Transfer-Encoding: chunked\r\n\r\n3;a\nb\r\nabc\r\n0\r\n\r\n",
		"chunk extension long":    post + "Transfer-Encoding: chunked\r\n\r\n3;" + strings.Repeat("a", 5000) + "\r\nabc\r\n0\r\n\r\n",
		"trailer lf":              post + "Transfer-Encoding: chunked\r\n\r\n0\r\nX-A: b\n\r\n",
		"trailer length":          post + "Transfer-Encoding: chunked\r\n\r\n0\r\nContent-Length: 50\r\n\r\n",
		"trailer forwarded":       post + "Transfer-Encoding: chunked\r\nTrailer: X-Forwarded-For\r\n\r\n0\r\nX-Forwarded-For: 1.2.3.4\r\n\r\n",
		"trailer flood":           post + "Transfer-Encoding: chunked\r\n\r\n0\r\n" + strings.Repeat("X-A: b\r\n", 1000) + "\r\n",
		"header flood":            get + strings.Repeat("X-A: b\r\n", 5000) + "\r\n",
		"header huge":             get + "X-A: " + strings.Repeat("a", 200_000) + "\r\n\r\n",
		"path huge":               "GET /" + strings.Repeat("a", 200_000) + " HTTP/1.1\r\nHost: app.test\r\n\r\n",
		"expect unknown":          post + "Expect: 200-maybe\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc",
		"preface after a request": get + "\r\nPRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
	} {
		for _, whole := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/%v", name, whole), func(t *testing.T) {
				c := dial(t, f.http)
				done := make(chan struct{})
				go func() {
					defer close(done)
					all := raw + "GET /second HTTP/1.1\r\nHost: app.test\r\n\r\n"
					if whole {
						c.send(all)
						return
					}
					for _, b := range []byte(all[:min(len(all), 2000)]) { // byte by byte
						if _, err := c.Conn.Write([]byte{b}); err != nil {
							return
						}
					}
					if len(all) > 2000 {
						c.send(all[2000:])
					}
				}()
				got := c.ended()
				<-done
				answers := strings.Count(got, "HTTP/1.1 ")
				if name == "preface after a request" {
					answers--
				}
				if answers > 1 || strings.HasPrefix(got, "HTTP/1.1 200") && name != "preface after a request" || strings.Contains(got, "\napp") && answers > 0 && strings.Count(got, "200 OK") > 1 {
					t.Errorf("got %q", got)
				}
				if got != "" && !strings.HasPrefix(got, "HTTP/1.1 4") && !strings.HasPrefix(got, "HTTP/1.1 5") && name != "preface after a request" {
					t.Errorf("got %q", got)
				}
			})
		}
	}
}

func TestFraming_ProperIsAccepted(t *testing.T) {
	f := newFront(t, nil)
	f.serve(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		_, _ = fmt.Fprintf(w, "%s:%s", r.URL.Path, b)
	})
	for range 50 { // an instance may answer before or after we have noticed the end of a body
		pipeline(t, f.http)
	}
}

func pipeline(t *testing.T, addr string) {
	t.Helper()
	c := dial(t, addr)
	defer func() { _ = c.Close() }()
	c.send("GET /a HTTP/1.1\r\nHost: app.test\r\n\r\n" +
		"POST /b HTTP/1.1\r\nHost: app.test\r\ncontent-length:3\r\n\r\nabc" +
		"POST /c HTTP/1.1\r\nhost: app.test\r\nTRANSFER-ENCODING: Chunked\r\n\r\n3\r\nabc\r\nA;ext=\"q\"\r\n0123456789\r\n00\r\nX-T: 1\r\n\r\n" +
		"GET /d HTTP/1.1\r\nHost: app.test\r\n\r\n")
	for _, want := range []string{"/a:", "/b:abc", "/c:abc0123456789", "/d:"} {
		if res, body := c.response("GET"); body != want {
			t.Fatalf("got %d %q, want %q", res.StatusCode, body, want)
		}
	}
}

// Where the checker and net/http both accept a stream, they find the same
// requests in it, in whatever pieces it comes.
func FuzzFraming(f *testing.F) {
	for _, s := range []string{
		"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.1\r\nHost: a\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nA: b\r\n\r\nGET / HTTP/1.0\r\n\r\n",
		"GET / HTTP/1.1\r\nUpgrade: x\r\n\r\nanything", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
	} {
		f.Add([]byte(s), 7)
	}
	f.Fuzz(func(t *testing.T, data []byte, step int) {
		if len(data) > 1<<16 {
			return
		}
		whole, pieces := newFraming(4096, 100), newFraming(4096, 100)
		n, err := whole.check(data)
		step = 1 + abs(step)%64
		passed := 0
		var perr error
		for i := 0; i < len(data) && perr == nil; i += step {
			p := data[i:min(i+step, len(data))]
			var m int
			m, perr = pieces.check(p)
			passed += m
		}
		if (err == nil) != (perr == nil) || err != nil && !errors.Is(perr, err) {
			t.Fatalf("at once: %v, in pieces of %d: %v", err, step, perr)
		}
		if err == nil && n != len(data) {
			t.Fatalf("%d of %d bytes passed", n, len(data))
		}
		if err != nil || whole.state != atRequest || len(whole.partial) > 0 {
			return
		}
		// Complete requests only: net/http must end where we ended.
		r := bufio.NewReader(bytes.NewReader(data))
		for {
			if _, err := r.Peek(1); err == io.EOF {
				return
			}
			req, err := http.ReadRequest(r)
			if err != nil {
				return // it is stricter in other respects
			}
			if _, err := io.Copy(io.Discard, req.Body); err != nil {
				if errors.Is(err, io.ErrUnexpectedEOF) {
					t.Fatalf("net/http wants more than %q", data)
				}
				return
			}
		}
	})
}

func abs(n int) int {
	if n < 0 {
		return -(n + 1)
	}
	return n
}

func FuzzHostName(f *testing.F) {
	for _, s := range []string{"a.test", "A.Test.:80", "[::1]:8080", "[::1", "a..b", ":80", "a:b", "a:99999", "ü.test", "a b", "a/b", "[::ffff:1.2.3.4]"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		h, ok := hostName(s)
		if !ok {
			return
		}
		if h == "" || h != strings.ToLower(h) || strings.ContainsAny(h, "/\\ @?#[]\r\n\x00\",;") || len(h) > 253 {
			t.Fatalf("%q became %q", s, h)
		}
		again := h
		if strings.Contains(h, ":") {
			again = "[" + h + "]"
		}
		if h2, ok := hostName(again); !ok && !strings.HasSuffix(h, ".") || ok && h2 != h && !strings.HasSuffix(h, ".") {
			t.Fatalf("%q became %q, then %q %v", s, h, h2, ok)
		}
	})
}

func FuzzForwarded(f *testing.F) {
	for _, s := range []string{`for=192.0.2.43, for="[2001:db8:cafe::17]:4711"`, `for=1.2.3.4;proto=https;host="a:1";by=x`, `for="_gaz\"onk"`, `for=`, `=x`, `for=a,,`, `for="`, `for="\`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if len(s) > 4096 {
			return
		}
		elements, ok := parseForwarded([]string{s})
		if !ok {
			elements = nil
		}
		if len(elements) > 32 {
			t.Fatal("unbounded")
		}
		// Whatever a proxy sent, what goes to an app is one clean line.
		o := originOf(http.Header{"Forwarded": {s}, "X-Forwarded-Host": {s}, "X-Forwarded-Proto": {s}}, true, "10.0.0.1", "app.test", "http")
		for _, out := range []string{string(o.appendFor(nil)), string(o.appendForwarded(nil))} {
			if !validValue(out) || !strings.Contains(out, "10.0.0.1") {
				t.Fatalf("%q became %q", s, out)
			}
		}
		if back, ok := parseForwarded([]string{string(o.appendForwarded(nil))}); !ok || len(back) != len(o.before)+1 {
			t.Fatalf("%q became %q, which does not parse", s, o.appendForwarded(nil))
		}
	})
}

// A hostile instance's header block never panics and never yields a field
// that could not be sent on.
func FuzzResponseHead(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: X-A\r\nX-A: b\r\n\r\nhi"))
	f.Add([]byte("HTTP/1.0 200\nA: b\n\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 1<<16 {
			return
		}
		block, err := readHead(bufio.NewReaderSize(bytes.NewReader(data), 256), 8192)
		if err != nil {
			return
		}
		if len(block) > 8192+256 {
			t.Fatalf("%d bytes of header", len(block))
		}
		var d responseHead
		h := http.Header{}
		if d.parse(block, 50, h) != nil {
			return
		}
		if d.chunked && d.length >= 0 {
			t.Fatal("two framings")
		}
		for name, values := range h {
			if !validToken(name) || hopHeader(name) {
				t.Fatalf("field %q", name)
			}
			for _, v := range values {
				if !validValue(v) {
					t.Fatalf("value %q", v)
				}
			}
		}
	})
}

func FuzzFrames(f *testing.F) {
	f.Add([]byte("\x81\x02hi\x89\x00\x82\x7e\x00\x80"), 3)
	f.Fuzz(func(t *testing.T, data []byte, step int) {
		step = 1 + abs(step)%16
		var a, b frameTracker
		a.follow(data)
		for i := 0; i < len(data); i += step {
			b.follow(data[i:min(i+step, len(data))])
		}
		if a.boundary() != b.boundary() || a.left != b.left {
			t.Fatal("the pieces matter")
		}
	})
}
