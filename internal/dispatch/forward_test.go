package dispatch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

func TestForward_EveryProtocol(t *testing.T) {
	f := newFront(t, nil)
	f.serve(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		w.Header().Add("X-Two", "a")
		w.Header().Add("X-Two", "b")
		w.Header().Set("X-Saw", fmt.Sprintf("%s %s host=%s len=%d proto=%s", r.Method, r.RequestURI, r.Host, len(b), r.Header.Get("X-Forwarded-Proto")))
		w.WriteHeader(http.StatusTeapot)
		_, _ = w.Write(b)
	})
	for _, kind := range kinds {
		for _, size := range []int{0, 1, 5000, maxSmallBody, maxSmallBody + 1, 300_000} {
			for _, known := range []bool{true, false} {
				t.Run(fmt.Sprintf("%s/%d/%v", kind, size, known), func(t *testing.T) {
					want := bytes.Repeat([]byte("x"), size)
					var body io.Reader = bytes.NewReader(want)
					if !known {
						body = io.MultiReader(body)
					}
					req, _ := http.NewRequest("POST", f.url(kind, "/a%2Fb/../c?q=1"), body)
					res, err := f.client(kind).Do(req)
					if err != nil {
						t.Fatal(err)
					}
					defer func() { _ = res.Body.Close() }()
					got, err := io.ReadAll(res.Body)
					if err != nil || !bytes.Equal(got, want) || res.StatusCode != http.StatusTeapot {
						t.Fatalf("got %d with %d bytes, %v", res.StatusCode, len(got), err)
					}
					proto := "http"
					if strings.HasPrefix(f.url(kind, ""), "https") {
						proto = "https"
					}
					if saw, want := res.Header.Get("X-Saw"), fmt.Sprintf("POST /a%%2Fb/../c?q=1 host=app.test len=%d proto=%s", size, proto); saw != want {
						t.Errorf("app saw %q, want %q", saw, want)
					}
					if v := res.Header["X-Two"]; len(v) != 2 {
						t.Errorf("repeated field came as %q", v)
					}
				})
			}
		}
	}
}

func TestForward_ResponseForms(t *testing.T) {
	forms := map[string]struct {
		answer string
		close  bool
		body   string
		code   int
	}{
		"length":           {"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", false, "hi", 200},
		"lf only":          {"HTTP/1.1 200 OK\nContent-Length: 2\n\nhi", false, "hi", 200},
		"chunked":          {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n1;x=y\r\n!\r\n0\r\n\r\n", false, "hi!", 200},
		"until close":      {"HTTP/1.1 200 OK\r\n\r\nhi", true, "hi", 200},
		"http 1.0":         {"HTTP/1.0 200 OK\r\n\r\nhi", true, "hi", 200},
		"empty":            {"HTTP/1.1 204 No Content\r\n\r\n", false, "", 204},
		"not modified":     {"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", false, "", 304},
		"continue first":   {"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", false, "", 200},
		"no reason":        {"HTTP/1.1 200\r\nContent-Length: 1\r\n\r\nx", false, "x", 200},
		"large header":     {"HTTP/1.1 200 OK\r\nX-A: " + strings.Repeat("a", 9000) + "\r\nContent-Length: 1\r\n\r\nx", false, "x", 200},
		"closed at once":   {"", true, "", 502},
		"garbage":          {"SSH-2.0-OpenSSH\r\n\r\n", true, "", 502},
		"two lengths":      {"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx", true, "", 502},
		"length and te":    {"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", true, "", 502},
		"folded":           {"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n", true, "", 502},
		"space in name":    {"HTTP/1.1 200 OK\r\nA : b\r\n\r\n", true, "", 502},
		"bad value":        {"HTTP/1.1 200 OK\r\nA: b\x00c\r\n\r\n", true, "", 502},
		"unasked switch":   {"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", true, "", 502},
		"header too large": {"HTTP/1.1 200 OK\r\n" + strings.Repeat("X-A: "+strings.Repeat("a", 4000)+"\r\n", 40) + "\r\n", true, "", 502},
		"header too many":  {"HTTP/1.1 200 OK\r\n" + strings.Repeat("X-A: b\r\n", 400) + "\r\n", true, "", 502},
		"bad code":         {"HTTP/1.1 2x0 OK\r\n\r\n", true, "", 502},
	}
	for name, form := range forms {
		t.Run(name, func(t *testing.T) {
			f := newFront(t, nil)
			f.raw(func(c net.Conn) {
				buf := make([]byte, 4096)
				for {
					if _, err := c.Read(buf); err != nil {
						return
					}
					_, _ = io.WriteString(c, form.answer)
					if form.close {
						return
					}
				}
			})
			c := f.client("h1")
			for range 2 { // the second time on a kept connection
				res, body := get(t, c, "http://app.test/")
				if res.StatusCode != form.code || form.code < 500 && body != form.body {
					t.Fatalf("got %d %q, want %d %q", res.StatusCode, body, form.code, form.body)
				}
				if strings.HasPrefix(name, "no reason") && res.Header["Content-Type"] != nil {
					t.Errorf("a content type was made up: %q", res.Header["Content-Type"])
				}
			}
			if form.code == 502 && f.app.failed.Load() == 0 {
				t.Error("the lease was not told that the instance failed")
			}
		})
	}
}

func TestForward_TruncatedBodyIsCut(t *testing.T) {
	for name, answer := range map[string]string{
		"length":  "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhi",
		"chunked": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhi",
		"bad":     "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhi",
	} {
		for _, kind := range []string{"h1", "h2"} {
			t.Run(name+"/"+kind, func(t *testing.T) {
				f := newFront(t, nil)
				f.raw(func(c net.Conn) {
					_, _ = c.Read(make([]byte, 4096))
					_, _ = io.WriteString(c, answer)
				})
				res, err := f.client(kind).Get(f.url(kind, "/"))
				if err == nil {
					_, err = io.ReadAll(res.Body)
					_ = res.Body.Close()
				}
				if err == nil {
					t.Fatal("a truncated response looked complete")
				}
				eventually(t, "the instance is reported", func() bool { return f.app.failed.Load() == 1 })
			})
		}
	}
}

func TestForward_TrailersBothWays(t *testing.T) {
	f := newFront(t, nil)
	f.serve(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "X-Sum")
		_, _ = io.Copy(w, r.Body)
		w.Header().Set("X-Sum", r.Trailer.Get("X-Client-Sum"))
		w.Header().Set(http.TrailerPrefix+"X-Late", "yes")
	})
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			req, _ := http.NewRequest("POST", f.url(kind, "/"), io.MultiReader(strings.NewReader("body")))
			req.Trailer = http.Header{"X-Client-Sum": {"42"}}
			res, err := f.client(kind).Do(req)
			if err != nil {
				t.Fatal(err)
			}
			b, _ := io.ReadAll(res.Body)
			_ = res.Body.Close()
			if string(b) != "body" || res.Trailer.Get("X-Sum") != "42" || res.Trailer.Get("X-Late") != "yes" {
				t.Errorf("got %q, trailer %v", b, res.Trailer)
			}
		})
	}
}

func TestForward_FullDuplex(t *testing.T) {
	f := newFront(t, nil)
	f.serve(func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		_ = rc.EnableFullDuplex()
		w.WriteHeader(200)
		_ = rc.Flush()
		buf := make([]byte, 100)
		for {
			n, err := r.Body.Read(buf)
			if n > 0 {
				_, _ = w.Write(bytes.ToUpper(buf[:n]))
				_ = rc.Flush()
			}
			if err != nil {
				return
			}
		}
	})
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			pr, pw := io.Pipe()
			req, _ := http.NewRequest("POST", f.url(kind, "/"), pr)
			res, err := f.client(kind).Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = res.Body.Close() }()
			buf := make([]byte, 4)
			for range 5 {
				_, _ = io.WriteString(pw, "ping")
				if _, err := io.ReadFull(res.Body, buf); err != nil || string(buf) != "PING" {
					t.Fatalf("got %q, %v", buf, err)
				}
			}
			_ = pw.Close()
			if rest, err := io.ReadAll(res.Body); err != nil || len(rest) != 0 {
				t.Fatalf("then %q, %v", rest, err)
			}
		})
	}
}

func TestForward_ExpectContinue(t *testing.T) {
	f := newFront(t, nil)
	f.serve(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Refuse") != "" {
			http.Error(w, "no", http.StatusForbidden)
			return
		}
		b, _ := io.ReadAll(r.Body)
		_, _ = fmt.Fprintf(w, "%d", len(b))
	})
	t.Run("wanted", func(t *testing.T) {
		c := dial(t, f.http)
		c.send("POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
		if got := c.line(); got != "HTTP/1.1 100 Continue" {
			t.Fatalf("got %q", got)
		}
		c.line()
		c.send("hello")
		if res, body := c.response("POST"); res.StatusCode != 200 || body != "5" {
			t.Errorf("got %d %q", res.StatusCode, body)
		}
	})
	t.Run("refused", func(t *testing.T) {
		c := dial(t, f.http)
		c.send("POST / HTTP/1.1\r\nHost: app.test\r\nX-Refuse: 1\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
		if res, _ := c.response("POST"); res.StatusCode != 403 {
			t.Errorf("got %d, want the app's 403 without 100 before", res.StatusCode)
		}
	})
	t.Run("app does not know it", func(t *testing.T) {
		g := newFront(t, func(c *Config) { c.ContinueTimeout = 20 * time.Millisecond })
		g.raw(func(c net.Conn) {
			r := newRawConn(t, c)
			for r.line() != "" {
			}
			b := make([]byte, 5)
			_, _ = io.ReadFull(r.r, b)
			r.send("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n" + string(b))
		})
		c := dial(t, g.http)
		c.send("POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
		if got := c.line(); got != "HTTP/1.1 100 Continue" {
			t.Fatalf("got %q", got)
		}
		c.line()
		c.send("hello")
		if _, body := c.response("POST"); body != "hello" {
			t.Errorf("got %q", body)
		}
	})
}

func TestForward_EarlyHints(t *testing.T) {
	f := newFront(t, nil)
	f.serve(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Link", "</a.css>; rel=preload")
		w.WriteHeader(http.StatusEarlyHints)
		w.Header().Del("Link")
		_, _ = io.WriteString(w, "ok")
	})
	c := dial(t, f.http)
	c.send("GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
	if got := c.line(); got != "HTTP/1.1 103 Early Hints" {
		t.Fatalf("got %q", got)
	}
	if got := c.line(); got != "Link: </a.css>; rel=preload" {
		t.Errorf("got %q", got)
	}
	c.line()
	res, body := c.response("GET")
	if res.StatusCode != 200 || body != "ok" || res.Header.Get("Link") != "" {
		t.Errorf("got %d %q %v", res.StatusCode, body, res.Header)
	}
}

func TestForward_RefusedGoesToAnotherInstance(t *testing.T) {
	for _, kind := range []string{"h1", "h2"} {
		t.Run(kind, func(t *testing.T) {
			f := newFront(t, nil)
			l := listen(t)
			dead := l.Addr().String()
			_ = l.Close()
			f.instance(dead)
			f.serve(func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(w, r.Body) })
			res, err := f.client(kind).Post(f.url(kind, "/"), "text/plain", strings.NewReader("kept"))
			if err != nil {
				t.Fatal(err)
			}
			b, _ := io.ReadAll(res.Body)
			_ = res.Body.Close()
			if string(b) != "kept" || f.app.refused.Load() != 1 {
				t.Errorf("got %d %q, refused %d times", res.StatusCode, b, f.app.refused.Load())
			}
		})
	}
}

// A kept connection that the app closed must be noticed, also for requests
// that may not be repeated.
func TestForward_KeptConnectionClosedByApp(t *testing.T) {
	for _, method := range []string{"GET", "POST"} {
		t.Run(method, func(t *testing.T) {
			f := newFront(t, nil)
			closed := make(chan struct{}, 10)
			f.raw(func(c net.Conn) {
				r := newRawConn(t, c)
				for r.line() != "" {
				}
				r.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
				_ = c.Close()
				closed <- struct{}{}
			})
			c := f.client("h1")
			for range 5 {
				if res, body := do(t, c, method, "http://app.test/"); res.StatusCode != 200 || body != "ok" {
					t.Fatalf("got %d %q", res.StatusCode, body)
				}
				<-closed
			}
		})
	}
}

// Who found the instance ready leaves its connection to the first request. If
// the app has closed it meanwhile, that is no fault of the request.
func TestForward_TheConnectionThatThereIsAlready(t *testing.T) {
	for _, method := range []string{"GET", "POST"} {
		for _, open := range []bool{true, false} {
			t.Run(fmt.Sprint(method, " open=", open), func(t *testing.T) {
				f := newFront(t, nil)
				accepted := make(chan struct{}, 10)
				var conns atomic.Int64
				in := f.raw(func(c net.Conn) {
					closes := conns.Add(1) == 1 && !open
					accepted <- struct{}{}
					for r := newRawConn(t, c); !closes; {
						for l := r.line(); l != ""; l = r.line() {
						}
						if _, err := io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"); err != nil {
							return
						}
					}
				})
				offered, err := net.Dial("tcp", in.addr.String())
				if err != nil {
					t.Fatal(err)
				}
				<-accepted
				if !open { // wait for the end without taking it
					_ = offered.SetReadDeadline(time.Now().Add(10 * time.Second))
					if _, err := offered.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
						t.Fatal(err)
					}
					_ = offered.SetReadDeadline(time.Time{})
				}
				asked := 0
				in.upstream = NewAttach(f.cfg)("app.aaaaaaaa", in.addr, func() net.Conn {
					if asked++; asked > 1 {
						return nil
					}
					return offered
				})
				c := f.client("h1")
				for range 2 {
					if res, body := do(t, c, method, "http://app.test/"); res.StatusCode != 200 || body != "ok" {
						t.Fatalf("got %d %q", res.StatusCode, body)
					}
				}
				more := 0
				if !open {
					more = 1
				}
				if got := len(accepted); got != more {
					t.Errorf("%d more connections, want %d", got, more)
				}
				_ = in.upstream.Close()
			})
		}
	}
}

// A request that ends the instance it meets is tried once more, as every GET that
// has no answer, and not on as many instances as there are.
func TestForward_NotRepeatedOnTheConnectionThatThereIsAlready(t *testing.T) {
	f := newFront(t, nil)
	var seen atomic.Int64
	in := f.raw(func(c net.Conn) {
		r := newRawConn(t, c)
		for r.line() != "" {
		}
		seen.Add(1) // read it, then close without a word
	})
	offered, err := net.Dial("tcp", in.addr.String())
	if err != nil {
		t.Fatal(err)
	}
	given := false
	in.upstream = NewAttach(f.cfg)("app.aaaaaaaa", in.addr, func() net.Conn {
		if given {
			return nil
		}
		given = true
		return offered
	})
	if res, _ := get(t, f.client("h1"), "http://app.test/"); res.StatusCode != http.StatusBadGateway || seen.Load() != 2 {
		t.Errorf("got %d, the app saw it %d times", res.StatusCode, seen.Load())
	}
}

func TestForward_NotRepeatedIfSeen(t *testing.T) {
	f := newFront(t, nil)
	var seen atomic.Int64
	f.raw(func(c net.Conn) {
		r := newRawConn(t, c)
		for i := 0; ; i++ {
			for {
				l, err := r.r.ReadString('\n')
				if err != nil {
					return
				}
				if l == "\r\n" {
					break
				}
			}
			if i == 1 {
				seen.Add(1)
				return // read it, then close without a word
			}
			r.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		}
	})
	c := f.client("h1")
	if res, _ := get(t, c, "http://app.test/"); res.StatusCode != 200 {
		t.Fatal(res.Status)
	}
	res, err := c.Post("http://app.test/", "text/plain", nil)
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
	if res.StatusCode != 502 || seen.Load() != 1 {
		t.Errorf("got %d, the app saw it %d times", res.StatusCode, seen.Load())
	}
}

func TestHold_ClientLeavesBeforeReady(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			f := newFront(t, nil)
			f.app.awake = make(chan struct{})
			ctx, cancel := context.WithCancel(t.Context())
			req, _ := http.NewRequestWithContext(ctx, "POST", f.url(kind, "/"), strings.NewReader("small"))
			go func() {
				for f.app.waiting.Load() == 0 && ctx.Err() == nil {
					time.Sleep(time.Millisecond)
				}
				cancel()
			}()
			if _, err := f.client(kind).Do(req); err == nil {
				t.Fatal("it was answered")
			}
			eventually(t, "Acquire gives up", func() bool { return f.app.gaveUp.Load() == 1 })
		})
	}
}

func TestHold_ManyWaitAndAllAreAnswered(t *testing.T) {
	f := newFront(t, func(c *Config) { c.ServerTiming = true })
	f.app.awake = make(chan struct{})
	f.app.stages = &fleet.Stages{Hold: 1000, Listen: 2500}
	f.app.answered = make(chan [2]time.Duration, 40)
	f.serve(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, "woke") })
	type answer struct {
		body, timing string
		err          error
	}
	answers := make(chan answer, 40)
	for i := range cap(answers) {
		go func() {
			kind := kinds[i%len(kinds)]
			res, err := f.client(kind).Get(f.url(kind, "/"))
			if err != nil {
				answers <- answer{err: err}
				return
			}
			b, err := io.ReadAll(res.Body)
			_ = res.Body.Close()
			answers <- answer{string(b), res.Header.Get("Server-Timing"), err}
		}()
	}
	eventually(t, "all wait", func() bool { return f.app.waiting.Load() == int64(cap(answers)) })
	close(f.app.awake)
	for range cap(answers) {
		a := <-answers
		if a.err != nil || a.body != "woke" || !strings.HasPrefix(a.timing, "hold;dur=1.000, place;dur=0.000, ") || !strings.Contains(a.timing, "listen;dur=2.500, connect;dur=") {
			t.Fatalf("got %+v", a)
		}
	}
	if took := <-f.app.answered; took[0] == 0 || took[1] == 0 {
		t.Errorf("connection and first byte took %v", took)
	}
}

func TestForward_ClientLeavesDuringRequest(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			f := newFront(t, nil)
			in, out := make(chan struct{}), make(chan struct{})
			f.serve(func(w http.ResponseWriter, r *http.Request) {
				close(in)
				<-r.Context().Done()
				close(out)
			})
			ctx, cancel := context.WithCancel(t.Context())
			go func() { <-in; cancel() }()
			req, _ := http.NewRequestWithContext(ctx, "GET", f.url(kind, "/"), nil)
			if _, err := f.client(kind).Do(req); err == nil {
				t.Fatal("it was answered")
			}
			select {
			case <-out:
			case <-time.After(5 * time.Second):
				t.Fatal("the instance was not told")
			}
			eventually(t, "the lease is given back", func() bool { return f.app.released.Load() == 1 })
			if f.app.failed.Load() != 0 {
				t.Error("the instance was blamed")
			}
		})
	}
}

func TestForward_SilentInstance(t *testing.T) {
	f := newFront(t, func(c *Config) { c.ResponseTimeout = 30 * time.Millisecond })
	f.raw(func(c net.Conn) { _, _ = io.Copy(io.Discard, c) })
	res, _ := get(t, f.client("h1"), "http://app.test/")
	if res.StatusCode != 504 || f.app.failed.Load() != 1 {
		t.Errorf("got %d", res.StatusCode)
	}
}

func TestForward_InstanceLeavesWhileBusy(t *testing.T) {
	f := newFront(t, nil)
	got := make(chan struct{})
	in := f.raw(func(c net.Conn) {
		_, _ = c.Read(make([]byte, 1))
		close(got)
		_, _ = io.Copy(io.Discard, c)
	})
	go func() { <-got; _ = in.upstream.Close() }()
	res, _ := get(t, f.client("h1"), "http://app.test/")
	if res.StatusCode != 502 {
		t.Errorf("got %d", res.StatusCode)
	}
}

func TestErrors_KindsBecomeStatus(t *testing.T) {
	secret := "panic: password=hunter2"
	for _, e := range []struct {
		err   error
		code  int
		retry string
	}{
		{fleet.ErrOverloaded, 503, "1"}, {fleet.ErrFailing, 502, ""}, {fleet.ErrTimeout, 504, ""}, {fleet.ErrUnavailable, 503, "1"},
	} {
		t.Run(e.err.Error(), func(t *testing.T) {
			f := newFront(t, nil)
			f.app.err = &fleet.Error{Op: "start", Kind: e.err, Err: errors.New(secret)}
			for accept, kind := range map[string]string{"text/html,*/*;q=0.8": "text/html; charset=utf-8", "application/json": "application/json", "": "text/plain; charset=utf-8",
				"text/html;q=0.1, application/problem+json": "application/json"} {
				req, _ := http.NewRequest("GET", "http://app.test/", nil)
				req.Header.Set("Accept", accept)
				res, err := f.client("h1").Do(req)
				if err != nil {
					t.Fatal(err)
				}
				b, _ := io.ReadAll(res.Body)
				_ = res.Body.Close()
				id := res.Header.Get("X-Request-Id")
				if res.StatusCode != e.code || res.Header.Get("Retry-After") != e.retry || res.Header.Get("Content-Type") != kind ||
					len(id) != 32 || !strings.Contains(string(b), id) || strings.Contains(string(b), "hunter2") {
					t.Errorf("Accept %q: got %d, %v\n%s", accept, res.StatusCode, res.Header, b)
				}
			}
		})
	}
}

func TestForward_BodyLimits(t *testing.T) {
	f := newFront(t, func(c *Config) { c.MaxBody = 50_000 })
	f.serve(func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) })
	for _, kind := range kinds {
		for size, code := range map[int]int{50_000: 200, 50_001: 413} {
			for _, known := range []bool{true, false} {
				t.Run(fmt.Sprintf("%s/%d/%v", kind, size, known), func(t *testing.T) {
					var body io.Reader = bytes.NewReader(make([]byte, size))
					if !known {
						body = io.MultiReader(body)
					}
					res, err := f.client(kind).Post(f.url(kind, "/"), "a/b", body)
					if err != nil {
						t.Fatal(err)
					}
					_ = res.Body.Close()
					if res.StatusCode != code {
						t.Errorf("got %d, want %d", res.StatusCode, code)
					}
				})
			}
		}
	}
	if f.app.failed.Load() != 0 {
		t.Error("the instance was blamed")
	}
}

func TestForward_UnknownHostAndMethods(t *testing.T) {
	f := newFront(t, nil)
	f.serve(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.Host+" "+r.RequestURI) })
	for name, e := range map[string]struct {
		request string
		code    int
		body    string
	}{
		"unknown host":     {"GET / HTTP/1.1\r\nHost: nobody.test\r\n\r\n", 404, ""},
		"upper case, port": {"GET /x HTTP/1.1\r\nHost: APP.test.:8080\r\n\r\n", 200, "APP.test.:8080 /x"},
		"absolute form":    {"GET http://app.test/y?z HTTP/1.1\r\nHost: nobody.test\r\n\r\n", 200, "app.test /y?z"},
		"absolute other":   {"GET http://nobody.test/y HTTP/1.1\r\nHost: app.test\r\n\r\n", 404, ""},
		"user info":        {"GET http://a:b@app.test/y HTTP/1.1\r\nHost: app.test\r\n\r\n", 400, ""},
		"other scheme":     {"GET ftp://app.test/y HTTP/1.1\r\nHost: app.test\r\n\r\n", 400, ""},
		"connect":          {"CONNECT app.test:443 HTTP/1.1\r\nHost: app.test:443\r\n\r\n", 405, ""},
		"trace":            {"TRACE / HTTP/1.1\r\nHost: app.test\r\n\r\n", 405, ""},
		"options star":     {"OPTIONS * HTTP/1.1\r\nHost: app.test\r\n\r\n", 200, ""},
		"get star":         {"GET * HTTP/1.1\r\nHost: app.test\r\n\r\n", 400, ""},
		"fragment":         {"GET /a#b HTTP/1.1\r\nHost: app.test\r\n\r\n", 400, ""},
		"host with slash":  {"GET / HTTP/1.1\r\nHost: app.test/x\r\n\r\n", 400, ""},
		"many headers":     {"GET / HTTP/1.1\r\nHost: app.test\r\n" + strings.Repeat("A: b\r\n", 130) + "\r\n", 431, ""},
		"http 1.0":         {"GET /old HTTP/1.0\r\nHost: app.test\r\n\r\n", 200, "app.test /old"},
	} {
		t.Run(name, func(t *testing.T) {
			c := dial(t, f.http)
			c.send(e.request)
			res, body := c.response(strings.Fields(e.request)[0])
			if res.StatusCode != e.code || e.body != "" && body != e.body {
				t.Errorf("got %d %q, want %d %q", res.StatusCode, body, e.code, e.body)
			}
		})
	}
}

func TestForward_TrustedProxies(t *testing.T) {
	show := func(w http.ResponseWriter, r *http.Request) {
		for _, n := range []string{"X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "Forwarded", "X-Forwarded-Port", "X_forwarded_for", "Proxy", "X-Real-Ip", "X-Secret-Hop", "Te"} {
			if v := r.Header[n]; v != nil {
				_, _ = fmt.Fprintf(w, "%s=%s\n", n, strings.Join(v, "|"))
			}
		}
		_, _ = fmt.Fprintf(w, "id=%s\n", r.Header.Get("X-Request-Id"))
	}
	request := "GET / HTTP/1.1\r\nHost: app.test:80\r\nX-Forwarded-For: 10.1.1.1\r\nX-Forwarded-For: [2001:db8::1]:99, bogus\r\nX-Forwarded-Host: shop.example\r\n" +
		"X-Forwarded-Proto: https\r\nX-Forwarded-Port: 1\r\nX_Forwarded_For: 6.6.6.6\r\nProxy: evil\r\nX-Real-IP: 7.7.7.7\r\nForwarded: for=9.9.9.9\r\n" +
		"X-Request-Id: abc-1\r\nConnection: X-Secret-Hop, keep-alive\r\nX-Secret-Hop: 1\r\nTE: gzip, trailers\r\n\r\n"
	for name, e := range map[string]struct {
		trust []netip.Prefix
		want  []string
		not   []string
	}{
		"untrusted": {nil, []string{"X-Forwarded-For=127.0.0.1\n", "X-Forwarded-Host=app.test:80\n", "X-Forwarded-Proto=http\n",
			"Forwarded=for=127.0.0.1;host=\"app.test:80\";proto=http\n", "Te=trailers\n"}, []string{"abc-1"}},
		"trusted": {[]netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}, []string{"X-Forwarded-For=10.1.1.1, 2001:db8::1, 127.0.0.1\n", "X-Forwarded-Host=shop.example\n",
			"X-Forwarded-Proto=https\n", "Forwarded=for=10.1.1.1, for=\"[2001:db8::1]\", for=127.0.0.1;host=shop.example;proto=https\n", "id=abc-1\n"}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFront(t, func(c *Config) { c.TrustedProxies = e.trust })
			f.serve(show)
			c := dial(t, f.http)
			c.send(request)
			_, body := c.response("GET")
			for _, w := range e.want {
				if !strings.Contains(body, w) {
					t.Errorf("%q is missing", w)
				}
			}
			for _, n := range append(e.not, "6.6.6.6", "7.7.7.7", "9.9.9.9", "evil", "X-Secret-Hop", "X-Forwarded-Port") {
				if strings.Contains(body, n) {
					t.Errorf("%q came through", n)
				}
			}
			if t.Failed() {
				t.Log(body)
			}
		})
	}
}
