package dispatch

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// fakeRouter is a fleet of apps whose instances are servers of the test.
type fakeRouter struct {
	mu      sync.Mutex
	targets map[string]*fakeTarget
}

func (f *fakeRouter) Route(host string) (Target, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	t, ok := f.targets[host]
	return t, ok
}

// fakeTarget is an app. With awake set it holds requests until that is
// closed; err refuses them.
type fakeTarget struct {
	app   fleet.AppName
	awake chan struct{}

	mu        sync.Mutex
	err       error
	stages    *fleet.Stages
	answered  chan [2]time.Duration // of a request that has stages
	instances []*fakeInstance

	waiting  atomic.Int64
	gaveUp   atomic.Int64
	acquired atomic.Int64
	released atomic.Int64
	failed   atomic.Int64
	refused  atomic.Int64
}

type fakeInstance struct {
	addr     netip.AddrPort
	upstream io.Closer
	closing  chan struct{}
}

func (f *fakeTarget) App() fleet.AppName { return f.app }

func (f *fakeTarget) Acquire(ctx context.Context, _ time.Time) (Lease, error) {
	if f.awake != nil {
		f.waiting.Add(1)
		defer f.waiting.Add(-1)
		select {
		case <-f.awake:
		case <-ctx.Done():
			f.gaveUp.Add(1)
			return nil, ctx.Err()
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		return nil, f.err
	}
	if len(f.instances) == 0 {
		return nil, fleet.ErrUnavailable
	}
	f.acquired.Add(1)
	return &fakeLease{t: f, in: f.instances[0], stages: f.stages}, nil
}

type fakeLease struct {
	t      *fakeTarget
	in     *fakeInstance
	stages *fleet.Stages
	over   atomic.Bool
}

func (l *fakeLease) Instance() fleet.InstanceID { return fleet.InstanceID(l.t.app + ".aaaaaaaa") }
func (l *fakeLease) Address() netip.AddrPort    { return l.in.addr }
func (l *fakeLease) Upstream() io.Closer        { return l.in.upstream }
func (l *fakeLease) Stages() *fleet.Stages      { return l.stages }
func (l *fakeLease) Answered(connect, firstByte time.Duration) {
	if l.t.answered != nil {
		l.t.answered <- [2]time.Duration{connect, firstByte}
	}
}
func (l *fakeLease) Closing() <-chan struct{} { return l.in.closing }

func (l *fakeLease) end() {
	if !l.over.CompareAndSwap(false, true) {
		panic("lease given back twice")
	}
}

func (l *fakeLease) Streams() {}

func (l *fakeLease) Release(failed bool) {
	l.end()
	l.t.released.Add(1)
	if failed {
		l.t.failed.Add(1)
	}
}

// Refused takes the instance out, as the real one does.
func (l *fakeLease) Refused() {
	l.end()
	l.t.refused.Add(1)
	l.t.mu.Lock()
	defer l.t.mu.Unlock()
	for i, in := range l.t.instances {
		if in == l.in {
			l.t.instances = append(l.t.instances[:i:i], l.t.instances[i+1:]...)
		}
	}
}

// front is a front door under test with one app, app.test, on it.
type front struct {
	t      testing.TB
	srv    *Server
	cfg    Config
	router *fakeRouter
	app    *fakeTarget
	http   string // address
	https  string
	roots  *x509.CertPool
	certs  []Certificate
	reg    *prometheus.Registry
	stop   func() // ends Serve and waits
}

func testConfig() Config {
	cfg := DefaultConfig()
	cfg.DrainTimeout = 3 * time.Second
	cfg.CloseGrace = time.Second
	return cfg
}

func newFront(t testing.TB, change func(*Config)) *front {
	t.Helper()
	f := &front{t: t, cfg: testConfig(), roots: x509.NewCertPool(), reg: prometheus.NewRegistry()}
	dir := t.TempDir()
	for _, names := range [][]string{{"app.test", "127.0.0.1"}, {"other.test", "*.wild.test"}} {
		f.certs = append(f.certs, makeCert(t, dir, f.roots, names...))
	}
	f.cfg.Certificates = f.certs
	if change != nil {
		change(&f.cfg)
	}
	f.app = &fakeTarget{app: "app"}
	f.router = &fakeRouter{targets: map[string]*fakeTarget{"app.test": f.app, "127.0.0.1": f.app}}
	var err error
	f.srv, err = New(f.cfg, f.router, slog.New(slog.DiscardHandler), f.reg)
	if err != nil {
		t.Fatal(err)
	}
	plain, secure := listen(t), listen(t)
	f.http, f.https = plain.Addr().String(), secure.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.srv.Serve(ctx, Listener{Listener: plain}, Listener{Listener: secure, TLS: true}) }()
	f.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
		if n := f.srv.conns.Load(); n != 0 {
			t.Errorf("%d client connections left after Serve", n)
		}
		if a, r := f.app.acquired.Load(), f.app.released.Load()+f.app.refused.Load(); a != r {
			t.Errorf("%d leases taken, %d given back", a, r)
		}
	})
	t.Cleanup(func() {
		f.stop()
		for _, in := range f.app.instances {
			_ = in.upstream.Close()
		}
	})
	return f
}

func listen(t testing.TB) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// instance adds one that listens at addr.
func (f *front) instance(addr string) *fakeInstance {
	ap := netip.MustParseAddrPort(addr)
	in := &fakeInstance{addr: ap, upstream: NewAttach(f.cfg)("app.aaaaaaaa", ap, func() net.Conn { return nil }), closing: make(chan struct{})}
	f.app.mu.Lock()
	defer f.app.mu.Unlock()
	f.app.instances = append(f.app.instances, in)
	return in
}

// serve adds an instance that runs h, with HTTP/1.1 and HTTP/2 without TLS.
func (f *front) serve(h http.HandlerFunc) *fakeInstance {
	f.t.Helper()
	srv := httptest.NewUnstartedServer(h)
	srv.Config.Protocols = new(http.Protocols)
	srv.Config.Protocols.SetHTTP1(true)
	srv.Config.Protocols.SetUnencryptedHTTP2(true)
	srv.Start()
	f.t.Cleanup(func() { srv.CloseClientConnections(); srv.Close() })
	return f.instance(srv.Listener.Addr().String())
}

// raw adds an instance whose every connection is given to h.
func (f *front) raw(h func(net.Conn)) *fakeInstance {
	l := listen(f.t)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { defer func() { _ = c.Close() }(); h(c) })
		}
	})
	in := f.instance(l.Addr().String())
	f.t.Cleanup(func() { _ = l.Close(); _ = in.upstream.Close(); wg.Wait() })
	return in
}

// client speaks to the front door; kind is h1, h2 (TLS) or h2c.
func (f *front) client(kind string) *http.Client {
	tr := &http.Transport{Protocols: new(http.Protocols), DisableCompression: true}
	switch kind {
	case "h1":
		tr.Protocols.SetHTTP1(true)
	case "h1s":
		tr.Protocols.SetHTTP1(true)
	case "h2":
		tr.Protocols.SetHTTP2(true)
	case "h2c":
		tr.Protocols.SetUnencryptedHTTP2(true)
	}
	tr.TLSClientConfig = &tls.Config{RootCAs: f.roots}
	tr.DialContext = func(ctx context.Context, _, addr string) (net.Conn, error) {
		to := f.http
		if _, port, _ := net.SplitHostPort(addr); port == "443" {
			to = f.https
		}
		var d net.Dialer
		return d.DialContext(ctx, "tcp", to)
	}
	f.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

func (f *front) url(kind, path string) string {
	if kind == "h2" || kind == "h1s" {
		return "https://app.test" + path
	}
	return "http://app.test" + path
}

var kinds = []string{"h1", "h1s", "h2", "h2c"}

func makeCert(t testing.TB, dir string, roots *x509.CertPool, names ...string) Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial, _ := rand.Int(rand.Reader, big.NewInt(1<<62))
	tmpl := &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: names[0]}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			tmpl.IPAddresses = append(tmpl.IPAddresses, ip)
		} else {
			tmpl.DNSNames = append(tmpl.DNSNames, n)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, _ := x509.ParseCertificate(der)
	roots.AddCert(leaf)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	c := Certificate{CertFile: filepath.Join(dir, names[0]+".crt"), KeyFile: filepath.Join(dir, names[0]+".key")}
	for name, b := range map[string]*pem.Block{c.CertFile: {Type: "CERTIFICATE", Bytes: der}, c.KeyFile: {Type: "PRIVATE KEY", Bytes: keyDER}} {
		if err := os.WriteFile(name, pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

// eventually waits for something that another goroutine will do.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	limit := time.After(5 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("not within 5 s: %s", what)
		}
	}
}

func get(t testing.TB, c *http.Client, url string) (*http.Response, string) {
	t.Helper()
	return do(t, c, http.MethodGet, url)
}

func do(t testing.TB, c *http.Client, method, url string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequest(method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(res.Body)
	_ = res.Body.Close()
	if err != nil {
		t.Fatal(err)
	}
	return res, string(b)
}
