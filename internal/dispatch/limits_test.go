package dispatch

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
)

func curl(t *testing.T, args ...string) string {
	t.Helper()
	path, err := exec.LookPath("curl")
	if err != nil {
		t.Fatal("curl is needed: apt-get install curl")
	}
	out, err := exec.CommandContext(t.Context(), path, append([]string{"-sS", "--max-time", "10"}, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("curl %v: %v\n%s", args, err, out)
	}
	return string(out)
}

func TestCurl(t *testing.T) {
	f := newFront(t, nil)
	f.serve(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		_, _ = io.WriteString(w, r.Method+" "+r.RequestURI+" "+string(b)+" "+r.Header.Get("X-Forwarded-Proto"))
	})
	_, port, _ := net.SplitHostPort(f.http)
	_, tlsPort, _ := net.SplitHostPort(f.https)
	plain, secure := "http://app.test:"+port, "https://app.test:"+tlsPort
	common := []string{"--connect-to", "::127.0.0.1:", "--cacert", f.certs[0].CertFile, "-w", " v%{http_version} %{http_code}"}
	for name, e := range map[string]struct {
		args []string
		want string
	}{
		"h1":           {[]string{"--http1.1", plain + "/a?b"}, "GET /a?b  http v1.1 200"},
		"h1.0":         {[]string{"--http1.0", plain + "/a"}, "GET /a  http v1 200"},
		"h2c":          {[]string{"--http2-prior-knowledge", plain + "/a"}, "GET /a  http v2 200"},
		"h2c upgrade":  {[]string{"--http2", plain + "/a"}, "GET /a  http v1.1 200"},
		"h1 over tls":  {[]string{"--http1.1", secure + "/a"}, "GET /a  https v1.1 200"},
		"h2":           {[]string{"--http2", secure + "/a"}, "GET /a  https v2 200"},
		"post":         {[]string{"--http2", "-d", "body", secure + "/a"}, "POST /a body https v2 200"},
		"expect":       {[]string{"--http1.1", "-H", "Expect: 100-continue", "-d", "body", plain + "/a"}, "POST /a body http v1.1 200"},
		"chunked":      {[]string{"--http1.1", "-H", "Transfer-Encoding: chunked", "-d", "body", plain + "/a"}, "POST /a body http v1.1 200"},
		"unknown host": {[]string{"-H", "Host: nobody.test", plain + "/"}, " v1.1 404"},
		"head":         {[]string{"-I", "-o", "/dev/null", plain + "/"}, " v1.1 200"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := curl(t, append(common, e.args...)...); !strings.HasSuffix(got, e.want) {
				t.Errorf("got %q, want %q", got, e.want)
			}
		})
	}
}

// Clients that send a header byte by byte, or not at all, are cut off; a
// sleeping app is not woken by them, and others are served meanwhile.
func TestSlowLoris_Header(t *testing.T) {
	for _, sleeping := range []bool{true, false} {
		f := newFront(t, func(c *Config) { c.HeaderTimeout = 200 * time.Millisecond })
		f.serve(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, "ok") })
		if sleeping {
			f.app.awake = make(chan struct{})
		}
		var wg sync.WaitGroup
		for i := range 20 {
			c := dial(t, f.http)
			wg.Go(func() {
				if i%2 == 0 {
					c.send("GET / HTTP/1.1\r\nHost: app.test\r\nX-A: ")
				}
				for {
					if _, err := c.Conn.Write([]byte("a")[:i%2]); err != nil {
						return
					}
					if i%2 == 0 {
						break
					}
					if _, err := c.Conn.Read(make([]byte, 1)); err != nil {
						return
					}
				}
				c.ended()
			})
		}
		if !sleeping {
			if _, body := get(t, f.client("h1"), "http://app.test/"); body != "ok" {
				t.Errorf("got %q", body)
			}
		}
		wg.Wait()
		if n := f.app.waiting.Load(); n != 0 {
			t.Errorf("%d requests reached a sleeping app", n)
		}
		f.stop()
	}
}

// A body that stops coming, or comes too slowly, ends in 408; a small one
// before any instance was asked for.
func TestSlowLoris_Body(t *testing.T) {
	for name, e := range map[string]struct {
		length string
		drip   bool
	}{"small, silent": {"100", false}, "small, drip": {"100", true}, "large, silent": {"1000000", false}, "large, drip": {"1000000", true}} {
		t.Run(name, func(t *testing.T) {
			f := newFront(t, func(c *Config) { c.BodyTimeout = 100 * time.Millisecond; c.MinBodyRate = 1000 })
			f.serve(func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) })
			c := dial(t, f.http)
			c.send("POST / HTTP/1.1\r\nHost: app.test\r\nContent-Length: " + e.length + "\r\n\r\nab")
			stop := make(chan struct{})
			var wg sync.WaitGroup
			if e.drip {
				wg.Go(func() {
					tick := time.NewTicker(20 * time.Millisecond)
					defer tick.Stop()
					for {
						select {
						case <-tick.C:
							if _, err := c.Conn.Write([]byte("a")); err != nil {
								return
							}
						case <-stop:
							return
						}
					}
				})
			}
			if res, _ := c.response("POST"); res.StatusCode != http.StatusRequestTimeout {
				t.Errorf("got %d", res.StatusCode)
			}
			close(stop)
			wg.Wait()
			small := e.length == "100"
			if n := f.app.acquired.Load(); small && n != 0 {
				t.Errorf("%d instances were asked for", n)
			}
			if f.app.failed.Load() != 0 {
				t.Error("the instance was blamed")
			}
		})
	}
}

// A client that does not read its response cannot hold an instance for ever.
func TestSlowLoris_Response(t *testing.T) {
	for _, kind := range []string{"h1", "h2"} {
		t.Run(kind, func(t *testing.T) {
			f := newFront(t, func(c *Config) { c.WriteTimeout = 200 * time.Millisecond })
			f.serve(func(w http.ResponseWriter, r *http.Request) {
				b := make([]byte, 1<<20)
				for range 64 {
					if _, err := w.Write(b); err != nil {
						return
					}
				}
			})
			res, err := f.client(kind).Get(f.url(kind, "/"))
			if err != nil {
				t.Fatal(err)
			}
			eventually(t, "the lease is given back", func() bool { return f.app.released.Load() == 1 })
			_ = res.Body.Close()
		})
	}
}

// A client that closes its sending half has left; nothing stays behind.
func TestHalfClosed(t *testing.T) {
	f := newFront(t, nil)
	f.app.awake = make(chan struct{})
	c := dial(t, f.http)
	c.send("GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
	eventually(t, "it waits", func() bool { return f.app.waiting.Load() == 1 })
	_ = c.Conn.(*net.TCPConn).CloseWrite()
	eventually(t, "the hold ends", func() bool { return f.app.gaveUp.Load() == 1 })
	c.ended()
	eventually(t, "the connection ends", func() bool { return f.srv.conns.Load() == 0 })
}

func TestConnectionLimits(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"per client": func(c *Config) { c.MaxConnsPerIP = 3 },
		"in total":   func(c *Config) { c.MaxConns = 3 },
	} {
		t.Run(name, func(t *testing.T) {
			f := newFront(t, change)
			f.serve(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, "ok") })
			var kept []*rawConn
			for range 3 {
				c := dial(t, f.http)
				c.send("GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
				c.response("GET")
				kept = append(kept, c)
			}
			more := dial(t, f.http)
			if got := more.ended(); got != "" {
				t.Errorf("one more got %q", got)
			}
			_ = kept[0].Close()
			eventually(t, "there is room again", func() bool { return f.srv.conns.Load() == 2 })
			c := dial(t, f.http)
			c.send("GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
			if _, body := c.response("GET"); body != "ok" {
				t.Errorf("got %q", body)
			}
		})
	}
}

func TestTLS_NamesReloadAndMisdirected(t *testing.T) {
	f := newFront(t, nil)
	f.serve(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, "ok") })
	shown := func(name string) string {
		t.Helper()
		c, err := tls.Dial("tcp", f.https, &tls.Config{ServerName: name, InsecureSkipVerify: true})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		leaf := c.ConnectionState().PeerCertificates[0]
		return leaf.Subject.CommonName + " " + leaf.SerialNumber.String()
	}
	for name, want := range map[string]string{"app.test": "app.test ", "other.test": "other.test ", "x.wild.test": "other.test ", "a.b.wild.test": "app.test ", "": "app.test "} {
		if got := shown(name); !strings.HasPrefix(got, want) {
			t.Errorf("%q was shown %q, want %q", name, got, want)
		}
	}
	before := shown("other.test")
	dir := t.TempDir()
	renewed := makeCert(t, dir, f.roots, "other.test", "*.wild.test")
	for from, to := range map[string]string{renewed.CertFile: f.certs[1].CertFile, renewed.KeyFile: f.certs[1].KeyFile} {
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	f.srv.certs.looked.Store(0)
	if got := shown("other.test"); got == before {
		t.Error("the renewed certificate is not used")
	}
	if err := os.WriteFile(f.certs[1].KeyFile, []byte("broken"), 0o600); err != nil {
		t.Fatal(err)
	}
	f.srv.certs.looked.Store(0)
	shown("other.test") // a broken file changes nothing

	req, _ := http.NewRequest("GET", f.url("h2", "/"), nil)
	req.Host = "secret.test"
	res, err := f.client("h2").Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
	if res.StatusCode != http.StatusMisdirectedRequest {
		t.Errorf("a host that the certificate is not for: %d", res.StatusCode)
	}
}

func TestAccessLogAndMetrics(t *testing.T) {
	var mu sync.Mutex
	var buf bytes.Buffer
	f := newFront(t, func(c *Config) {
		c.AccessLog = slog.New(slog.NewJSONHandler(writerFunc(func(p []byte) (int, error) {
			mu.Lock()
			defer mu.Unlock()
			return buf.Write(p)
		}), nil))
	})
	f.serve(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, "ok") })
	get(t, f.client("h2"), f.url("h2", "/path?secret=1"))
	f.stop()
	var line map[string]any
	if err := json.Unmarshal(buf.Bytes(), &line); err != nil {
		t.Fatal(err)
	}
	if line["path"] != "/path" || line["status"] != 200.0 || line["app"] != "app" || line["protocol"] != "h2" || line["client"] != "127.0.0.1" || line["bytes"] != 2.0 {
		t.Errorf("got %v", line)
	}
	var count dto.Metric
	if err := f.srv.metrics.requests[protoH2][2].Write(&count); err != nil || count.GetCounter().GetValue() != 1 {
		t.Errorf("counted %v, %v", count.GetCounter().GetValue(), err)
	}
	families, err := f.reg.Gather()
	series := 0
	for _, family := range families {
		series += len(family.GetMetric())
	}
	if err != nil || series < 20 || series > 100 {
		t.Errorf("%d series, %v", series, err)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func TestConfig_AllProblemsAtOnce(t *testing.T) {
	_, err := New(Config{MaxBody: -1}, nil, slog.Default(), nil)
	if err == nil {
		t.Fatal("accepted")
	}
	for _, word := range []string{"MaxConns", "HeaderTimeout", "MaxBody", "DrainTimeout"} {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("%s is not named in %v", word, err)
		}
	}
}

func TestServe_NeedsCertificate(t *testing.T) {
	cfg := testConfig()
	s, err := New(cfg, nil, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Serve(context.Background(), Listener{Listener: listen(t), TLS: true}); err == nil {
		t.Error("served without a certificate")
	}
}
