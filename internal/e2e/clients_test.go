package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// everything is an app that speaks whatever clients speak.
func everything(t *testing.T) string {
	t.Helper()
	return goApp(t, `package main

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/coder/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

func main() {
	rpc := grpc.NewServer()
	state := health.NewServer()
	healthpb.RegisterHealthServer(rpc, state)
	go func() {
		for n := 0; ; n++ {
			time.Sleep(20 * time.Millisecond)
			state.SetServingStatus("turn", []healthpb.HealthCheckResponse_ServingStatus{1, 2}[n%2])
		}
	}()
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, "plain", r.Header.Get("X-Forwarded-Proto")) })
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) { n, _ := io.Copy(io.Discard, r.Body); fmt.Fprint(w, n) })
	mux.HandleFunc("/events", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for n := range 3 {
			fmt.Fprintf(w, "data: %d\n\n", n)
			w.(http.Flusher).Flush()
			time.Sleep(50 * time.Millisecond)
		}
	})
	mux.HandleFunc("/ws", func(w http.ResponseWriter, r *http.Request) {
		c, err := websocket.Accept(w, r, nil)
		if err != nil {
			return
		}
		defer c.CloseNow()
		for {
			kind, b, err := c.Read(r.Context())
			if err != nil {
				return
			}
			c.Write(r.Context(), kind, b)
		}
	})
	s := http.Server{Addr: ":8080", Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
			rpc.ServeHTTP(w, r)
			return
		}
		mux.ServeHTTP(w, r)
	}), Protocols: new(http.Protocols)}
	s.Protocols.SetHTTP1(true)
	s.Protocols.SetUnencryptedHTTP2(true)
	s.ListenAndServe()
}
`)
}

// certificate for *.localhost, as PEM files.
func certificate(t *testing.T, dir string) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, DNSNames: []string{"all.localhost", "*.localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &k.PublicKey, k)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	write(t, cert, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	write(t, key, string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw})))
	return cert, key
}

// Each kind of client meets the app asleep, and then awake.
func TestClients(t *testing.T) {
	cert, key := certificate(t, t.TempDir())
	https := freeAddr(t)
	d := newDaemon(t, fmt.Sprintf("https: %s\ntls: {certificates: [{cert: %s, key: %s}]}\ndoor: {max_body: 1Mi}\n", https, cert, key))
	d.deploy("all", everything(t), "--", "/app")
	_, httpPort, _ := net.SplitHostPort(d.http)
	_, httpsPort, _ := net.SplitHostPort(https)
	curl := func(t *testing.T, want string, args ...string) {
		t.Helper()
		all := append([]string{"-sS", "--max-time", "20", "--cacert", cert, "--resolve", "all.localhost:" + httpPort + ":127.0.0.1", "--resolve", "all.localhost:" + httpsPort + ":127.0.0.1"}, args...)
		if out, err := exec.Command("curl", all...).CombinedOutput(); err != nil || string(out) != want {
			t.Errorf("curl %q: %q, %v; want %q", args, out, err, want)
		}
	}
	plain, secure := "http://all.localhost:"+httpPort, "https://all.localhost:"+httpsPort
	for name, client := range map[string]func(t *testing.T){
		"curl h1": func(t *testing.T) { curl(t, "plain http\n1.1", "--http1.1", "-w", "%{http_version}", plain) },
		"curl h2c": func(t *testing.T) {
			curl(t, "plain http\n2", "--http2-prior-knowledge", "-w", "%{http_version}", plain)
		},
		"curl h2": func(t *testing.T) { curl(t, "plain https\n2", "--http2", "-w", "%{http_version}", secure) },
		"curl tls h1": func(t *testing.T) {
			curl(t, "plain https\n1.1", "--http1.1", "-w", "%{http_version}", "-H", "X-Forwarded-Proto: gopher", secure)
		},
		"upload": func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "body")
			write(t, file, strings.Repeat("x", 900_000))
			curl(t, "900000", "-T", file, plain+"/echo")
		},
		"upload beyond the limit": func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "body")
			write(t, file, strings.Repeat("x", 2<<20))
			curl(t, "413", "-o", "/dev/null", "-w", "%{http_code}", "-T", file, plain+"/echo")
		},
		"events":    func(t *testing.T) { curl(t, "data: 0\n\ndata: 1\n\ndata: 2\n\n", "-N", plain+"/events") },
		"websocket": func(t *testing.T) { echoWebSocket(t, d) },
		"grpc":      func(t *testing.T) { streamGRPC(t, d) },
	} {
		t.Run(name, func(t *testing.T) {
			d.must("stop", "all")
			d.must("start", "all")
			before := len(d.events("all", fleet.EventStart))
			client(t)
			client(t)
			want := 1
			if name == "upload beyond the limit" {
				want = 0 // refused before anybody was woken
			}
			if n := len(d.events("all", fleet.EventStart)) - before; n != want {
				t.Errorf("%d starts, want %d", n, want)
			}
		})
	}
}

func echoWebSocket(t *testing.T, d *daemon) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	c, _, err := websocket.Dial(ctx, "ws://"+d.http+"/ws", &websocket.DialOptions{Host: "all.localhost"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.CloseNow() }()
	for _, text := range []string{"one", "two", strings.Repeat("long", 5000)} {
		if err := c.Write(ctx, websocket.MessageText, []byte(text)); err != nil {
			t.Fatal(err)
		}
		if _, b, err := c.Read(ctx); err != nil || string(b) != text {
			t.Fatalf("echo of %.10q: %.10q, %v", text, b, err)
		}
	}
	if err := c.Close(websocket.StatusNormalClosure, ""); err != nil {
		t.Errorf("close: %v", err)
	}
}

func streamGRPC(t *testing.T, d *daemon) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	conn, err := grpc.NewClient("passthrough:///"+d.http, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("all.localhost"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	client := healthpb.NewHealthClient(conn)
	if r, err := client.Check(ctx, &healthpb.HealthCheckRequest{}); err != nil || r.Status != healthpb.HealthCheckResponse_SERVING {
		t.Fatalf("call: %v, %v", r, err)
	}
	stream, err := client.Watch(ctx, &healthpb.HealthCheckRequest{Service: "turn"})
	if err != nil {
		t.Fatal(err)
	}
	last := healthpb.HealthCheckResponse_ServingStatus(-1)
	for range 5 {
		r, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if r.Status == last {
			t.Errorf("twice %v", last)
		}
		last = r.Status
	}
}

// Many clients that send a byte of a header now and then hold nobody else up,
// neither while the app sleeps nor while it runs, and are cut off.
func TestSlowLoris(t *testing.T) {
	d := newDaemon(t, "")
	d.deploy("app", busybox(t, map[string]string{"index.html": "served"}), httpd...)
	loris := func(n int) *sync.WaitGroup {
		var wg sync.WaitGroup
		for range n {
			c, err := net.Dial("tcp", d.http)
			if err != nil {
				t.Fatal(err)
			}
			wg.Go(func() {
				defer func() { _ = c.Close() }()
				go func() {
					for _, b := range []byte("GET / HTTP/1.1\r\nHost: app.localhost\r\nX-Slow: " + strings.Repeat("x", 1000)) {
						if _, err := c.Write([]byte{b}); err != nil {
							return
						}
						time.Sleep(100 * time.Millisecond)
					}
				}()
				_ = c.SetReadDeadline(time.Now().Add(40 * time.Second))
				answer, err := io.ReadAll(c)
				if err != nil && !strings.Contains(err.Error(), "reset") {
					t.Errorf("a slow client is not cut off: %v", err)
				}
				if line, _, _ := bufio.NewReader(bytes.NewReader(answer)).ReadLine(); len(line) > 0 && !bytes.Contains(line, []byte("408")) {
					t.Errorf("a slow client got %q", line)
				}
			})
		}
		return &wg
	}
	first := loris(100)
	if n := len(d.events("app", fleet.EventStart)); n != 0 {
		t.Errorf("half a header started %d", n)
	}
	d.expect("app.localhost", "/", "served") // it slept
	second := loris(100)
	for range 20 {
		d.expect("app.localhost", "/", "served")
	}
	first.Wait()
	second.Wait()
}

// A hundred first requests of all kinds at once make one start.
func TestFirstRequests_Mixed(t *testing.T) {
	d := newDaemon(t, "")
	d.deploy("all", everything(t), "--", "/app")
	var wg sync.WaitGroup
	for n := range 100 {
		wg.Go(func() {
			tr := &http.Transport{Protocols: new(http.Protocols)}
			tr.Protocols.SetHTTP1(n%2 == 0)
			tr.Protocols.SetUnencryptedHTTP2(n%2 == 1)
			defer tr.CloseIdleConnections()
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+d.http+"/", nil)
			if err != nil {
				t.Error(err)
				return
			}
			req.Host = "all.localhost"
			resp, err := tr.RoundTrip(req)
			if err != nil {
				t.Error(err)
				return
			}
			defer func() { _ = resp.Body.Close() }()
			if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "plain http\n" {
				t.Errorf("got %q, %v", b, err)
			}
		})
	}
	wg.Wait()
	if n := len(d.events("all", fleet.EventStart)); n != 1 {
		t.Errorf("%d starts", n)
	}
}
