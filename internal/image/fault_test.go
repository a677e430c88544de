package image

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	it "github.com/fastcontainer/fastcontainer/internal/image/imagetest"
)

// noise does not compress.
func noise(seed uint64, n int) string {
	b := make([]byte, n)
	var key [32]byte
	key[0] = byte(seed)
	_, _ = rand.NewChaCha8(key).Read(b)
	return string(b)
}

// faulty is a registry in this process whose answers a test can spoil.
type faulty struct {
	Host  string
	mu    sync.Mutex
	spoil func(w http.ResponseWriter, r *http.Request, serve http.Handler) bool
	blobs atomic.Int64 // requests for blobs
	parts atomic.Int64 // of those, with a range
}

func startFaulty(t testing.TB) *faulty {
	t.Helper()
	f := &faulty{}
	f.serve(t, registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	return f
}

func (f *faulty) serve(t testing.TB, h http.Handler) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
			f.blobs.Add(1)
			if r.Header.Get("Range") != "" {
				f.parts.Add(1)
			}
		}
		f.mu.Lock()
		spoil := f.spoil
		f.mu.Unlock()
		if spoil == nil || !spoil(w, r, h) {
			h.ServeHTTP(w, r)
		}
	}))
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	t.Cleanup(srv.Close)
	f.Host = srv.Listener.Addr().String()
}

func (f *faulty) set(spoil func(w http.ResponseWriter, r *http.Request, serve http.Handler) bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.spoil = spoil
}

func isBlob(r *http.Request) bool {
	return r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/")
}

// cut passes a response on until limit bytes, then breaks the connection.
type cut struct {
	http.ResponseWriter
	limit int
	then  func()
}

func (c *cut) Write(p []byte) (int, error) {
	if len(p) < c.limit {
		c.limit -= len(p)
		return c.ResponseWriter.Write(p)
	}
	_, _ = c.ResponseWriter.Write(p[:c.limit])
	c.ResponseWriter.(http.Flusher).Flush()
	c.then()
	panic(http.ErrAbortHandler)
}

func bigImage(t testing.TB, seed uint64) v1.Image {
	return it.Image(t, v1.Config{}, it.Layer(t, it.File("big", noise(seed, 1<<20))), it.Layer(t, it.File("small", "small")))
}

func TestPull_ContinuesAfterBrokenConnections(t *testing.T) {
	t.Parallel()
	for name, ranges := range map[string]bool{"with ranges": true, "without ranges": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			reg := it.StartRegistry(t)
			ref := it.Push(t, reg.Host, "app", bigImage(t, 1))
			// In front of the real registry, because that one knows ranges.
			f := &faulty{}
			target, _ := url.Parse("http://" + reg.Host)
			proxy := httputil.NewSingleHostReverseProxy(target)
			proxy.ErrorLog = log.New(io.Discard, "", 0)
			f.serve(t, proxy)
			var cuts atomic.Int64
			f.set(func(w http.ResponseWriter, r *http.Request, h http.Handler) bool {
				if !ranges {
					r.Header.Del("Range")
				}
				if isBlob(r) && cuts.Add(1) <= 4 {
					h.ServeHTTP(&cut{w, 200 << 10, func() {}}, r)
					return true
				}
				return false
			})
			s := openStore(t, t.TempDir(), Options{})
			img := mustPull(t, s, strings.Replace(ref, reg.Host, f.Host, 1))
			if read(t, img, "big") != noise(1, 1<<20) {
				t.Error("other content")
			}
			if f.parts.Load() == 0 {
				t.Error("nothing was continued")
			}
			clean(t, s, 0)
		})
	}
}

func TestPull_RegistryKilledInTheMiddleThenBack(t *testing.T) {
	t.Parallel()
	reg := it.StartRegistry(t)
	ref := it.Push(t, reg.Host, "app:v1", bigImage(t, 2))
	f := &faulty{}
	target, _ := url.Parse("http://" + reg.Host)
	proxy := httputil.NewSingleHostReverseProxy(target)
	proxy.ErrorLog = log.New(io.Discard, "", 0)
	f.serve(t, proxy)
	var once sync.Once
	f.set(func(w http.ResponseWriter, r *http.Request, h http.Handler) bool {
		if isBlob(r) && !strings.Contains(r.URL.Path, "config") {
			h.ServeHTTP(&cut{w, 300 << 10, func() { once.Do(reg.Kill) }}, r)
			return true
		}
		return false
	})
	s := openStore(t, t.TempDir(), Options{})
	ref = strings.Replace(ref, reg.Host, f.Host, 1)
	_, err := s.Pull(t.Context(), ref, nil)
	if !errors.Is(err, fleet.ErrUnavailable) || fleet.Hint(err) == "" {
		t.Fatalf("registry down: %v (hint %q)", err, fleet.Hint(err))
	}
	partial := 0
	for _, e := range readDir(t, s.path("partial")) {
		info, _ := e.Info()
		partial += int(info.Size())
	}
	if partial < 200<<10 {
		t.Errorf("%d bytes were kept to continue with", partial)
	}
	if got := len(readDir(t, s.path("images"))); got != 0 {
		t.Errorf("%d images", got)
	}
	if _, err := s.Resolve(t.Context(), ref); !errors.Is(err, fleet.ErrUnavailable) {
		t.Errorf("resolve with the registry down: %v", err)
	}
	f.set(nil)
	reg.Restart()
	before := f.parts.Load()
	img := mustPull(t, s, ref)
	if read(t, img, "big") != noise(2, 1<<20) || f.parts.Load() == before {
		t.Error("the pull did not go on where it stopped")
	}
	clean(t, s, 0)
}

func readDir(t testing.TB, dir string) []os.DirEntry {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return entries
}

func TestPull_Stall(t *testing.T) {
	t.Parallel()
	f := startFaulty(t)
	ref := it.Push(t, f.Host, "app", bigImage(t, 3))
	release := make(chan struct{})
	t.Cleanup(func() { close(release) })
	var stalls atomic.Int64
	f.set(func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
		if isBlob(r) && stalls.Add(1) == 1 {
			select {
			case <-release:
			case <-r.Context().Done():
			}
			return true
		}
		return false
	})
	s := openStore(t, t.TempDir(), Options{Stall: 200 * time.Millisecond})
	mustPull(t, s, ref)
	if stalls.Load() < 2 {
		t.Error("nothing stalled")
	}
}

func TestPull_Refusals(t *testing.T) {
	t.Parallel()
	f := startFaulty(t)
	good := twoLayers(t, "x")
	ref := it.Push(t, f.Host, "good:v1", good)
	it.Push(t, f.Host, "arch:v1", it.ImageFor(t, "s390x", v1.Config{}, it.Layer(t, it.File("f", ""))))
	it.Push(t, f.Host, "nolayers:v1", it.Image(t, v1.Config{}))
	it.Push(t, f.Host, "hostile:v1", it.Image(t, v1.Config{}, it.Layer(t, it.File("ok", "x")), it.Layer(t, it.File("../../up", "x"))))
	it.Push(t, f.Host, "bomb:v1", it.Image(t, v1.Config{}, it.Layer(t, it.File("zeros", strings.Repeat("\x00", 40<<20)))))
	it.Push(t, f.Host, "notar:v1", it.Image(t, v1.Config{}, it.LayerOf(t, []byte(strings.Repeat("no tar", 1000)))))
	var many []it.Entry
	for i := range 3000 {
		many = append(many, it.File(fmt.Sprint("f", i), ""))
	}
	it.Push(t, f.Host, "many:v1", it.Image(t, v1.Config{}, it.Layer(t, many...)))
	// The manifest promises another diff id.
	cf, err := good.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cf = cf.DeepCopy()
	cf.RootFS.DiffIDs[0].Hex = strings.Repeat("0", 64)
	lie, err := mutate.ConfigFile(good, cf)
	if err != nil {
		t.Fatal(err)
	}
	it.Push(t, f.Host, "lie:v1", lie)
	artifact := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), "application/vnd.acme.config")
	it.Push(t, f.Host, "artifact:v1", artifact)
	index := mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: it.ImageFor(t, "s390x", v1.Config{}, it.Layer(t, it.File("f", ""))), Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "s390x"}}})
	pushIndex(t, f.Host+"/index:v1", index)

	closed := httptest.NewServer(nil)
	gone := closed.Listener.Addr().String()
	closed.Close()
	dir := t.TempDir()
	for name, c := range map[string]struct {
		ref, says string
		kind      error
	}{
		"bad reference":     {"UPPER/Case:x:y", "", fleet.ErrInvalid},
		"empty":             {"", "", fleet.ErrInvalid},
		"relative path":     {"dir:rootfs", "not absolute", fleet.ErrInvalid},
		"no such image":     {f.Host + "/nothing:v1", "", fleet.ErrNotFound},
		"no such tag":       {f.Host + "/good:v2", "", fleet.ErrNotFound},
		"no such digest":    {f.Host + "/good@sha256:" + strings.Repeat("a", 64), "", fleet.ErrNotFound},
		"registry down":     {gone + "/x:v1", "refused", fleet.ErrUnavailable},
		"architecture":      {f.Host + "/arch:v1", "linux/s390x", fleet.ErrInvalid},
		"index without":     {f.Host + "/index:v1", "offered: linux/s390x", fleet.ErrInvalid},
		"no layers":         {f.Host + "/nolayers:v1", "no layers", fleet.ErrInvalid},
		"hostile":           {f.Host + "/hostile:v1", "outside of the layer", fleet.ErrInvalid},
		"bomb":              {f.Host + "/bomb:v1", "too large", fleet.ErrInvalid},
		"many entries":      {f.Host + "/many:v1", "2000 entries", fleet.ErrInvalid},
		"not a tar":         {f.Host + "/notar:v1", "damaged archive", fleet.ErrInvalid},
		"wrong diff id":     {f.Host + "/lie:v1", "diff id", fleet.ErrInvalid},
		"artifact":          {f.Host + "/artifact:v1", "not a container image", fleet.ErrInvalid},
		"no such directory": {"dir:" + dir + "/none", "", fleet.ErrNotFound},
		"no such file":      {"tar:" + dir + "/none.tar", "", fleet.ErrNotFound},
		"no such layout":    {"oci:" + dir + "/none", "", fleet.ErrNotFound},
		"not a layout":      {"oci:" + dir, "not an OCI layout", fleet.ErrInvalid},
		"tar of directory":  {"tar:" + dir, "not a file", fleet.ErrInvalid},
		"whole host":        {"dir:/", "image store itself", fleet.ErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := openStore(t, t.TempDir(), Options{MaxSize: 32 << 20, MaxEntries: 2000})
			_, err := s.Pull(t.Context(), c.ref, nil)
			if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.says) {
				t.Fatalf("got %v, want %v with %q", err, c.kind, c.says)
			}
			t.Logf("%v — %s", err, fleet.Hint(err))
			if fleet.Hint(err) == "" && name != "bad reference" {
				t.Errorf("no hint: %v", err)
			}
			if n := len(readDir(t, s.path("layers"))); n != 0 && name != "hostile" && name != "wrong diff id" {
				t.Errorf("%d layers are left", n)
			}
			if _, err := s.GC(t.Context(), nil); err != nil {
				t.Error(err)
			}
			if n := len(readDir(t, s.path("layers"))) + len(readDir(t, s.path("images"))) + len(readDir(t, s.path("refs"))); n != 0 {
				t.Errorf("%d objects are left after gc", n)
			}
			clean(t, s, 0)
		})
	}
	_ = ref
}

func pushIndex(t testing.TB, ref string, index v1.ImageIndex) {
	t.Helper()
	if err := remote.WriteIndex(mustTag(t, ref), index); err != nil {
		t.Fatal(err)
	}
}

func TestPull_IndexOfPlatforms(t *testing.T) {
	t.Parallel()
	f := startFaulty(t)
	mine := it.ImageFor(t, "amd64", v1.Config{}, it.Layer(t, it.File("who", "amd64")))
	other := it.ImageFor(t, "arm64", v1.Config{}, it.Layer(t, it.File("who", "arm64")))
	attestation := it.ImageFor(t, "unknown", v1.Config{}, static.NewLayer([]byte("{}"), "application/vnd.in-toto+json"))
	index := mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: attestation, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "unknown", Architecture: "unknown"}}},
		mutate.IndexAddendum{Add: other, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}}},
		mutate.IndexAddendum{Add: mine, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "amd64"}}})
	pushIndex(t, f.Host+"/multi:v1", index)
	want, err := index.Digest()
	if err != nil {
		t.Fatal(err)
	}
	for _, arch := range []string{"amd64", "arm64"} {
		s := openStore(t, t.TempDir(), Options{Platform: "linux/" + arch})
		img := mustPull(t, s, f.Host+"/multi:v1")
		d, err := s.Resolve(t.Context(), f.Host+"/multi:v1")
		if err != nil || read(t, img, "who") != arch || string(img.Digest) != want.String() || d != img.Digest || img.Architecture != arch {
			t.Errorf("%s: %+v, resolved %s %v", arch, img, d, err)
		}
	}
}

func TestPull_DamagedBlobs(t *testing.T) {
	t.Parallel()
	f := startFaulty(t)
	img := bigImage(t, 4)
	ref := it.Push(t, f.Host, "app", img)
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	digest, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	size, err := layers[0].Size()
	if err != nil {
		t.Fatal(err)
	}
	s := openStore(t, t.TempDir(), Options{})
	for name, body := range map[string]string{"same length": noise(9, int(size)), "longer": noise(9, int(size)+10)} {
		f.set(func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
			if !strings.HasSuffix(r.URL.Path, digest.Hex) {
				return false
			}
			_, _ = io.WriteString(w, body)
			return true
		})
		_, err := s.Pull(t.Context(), ref, nil)
		if !errors.Is(err, fleet.ErrInvalid) || fleet.Hint(err) == "" {
			t.Errorf("%s: %v", name, err)
		}
		clean(t, s, 0)
	}
	f.set(nil)
	// What a power cut may leave: the right length, other content.
	if err := os.WriteFile(s.path("partial", digest.Hex), []byte(noise(8, 4000)), 0o600); err != nil {
		t.Fatal(err)
	}
	mustPull(t, s, ref)
	clean(t, s, 0)
}

func TestPull_ServerErrorsAreTriedAgain(t *testing.T) {
	t.Parallel()
	f := startFaulty(t)
	ref := it.Push(t, f.Host, "app", bigImage(t, 5))
	var n atomic.Int64
	f.set(func(w http.ResponseWriter, _ *http.Request, _ http.Handler) bool {
		if n.Add(1)%3 != 0 {
			return false
		}
		w.WriteHeader([]int{http.StatusServiceUnavailable, http.StatusTooManyRequests, http.StatusBadGateway}[n.Load()/3%3])
		return true
	})
	s := openStore(t, t.TempDir(), Options{})
	mustPull(t, s, ref)
	f.set(func(w http.ResponseWriter, _ *http.Request, _ http.Handler) bool {
		w.WriteHeader(http.StatusInternalServerError)
		return true
	})
	if _, err := s.Pull(t.Context(), f.Host+"/other", nil); !errors.Is(err, fleet.ErrUnavailable) {
		t.Error(err)
	}
}

func TestPull_Credentials(t *testing.T) {
	reg := it.StartPrivateRegistry(t, "alice", "s3cret")
	auth := &authn.Basic{Username: "alice", Password: "s3cret"}
	ref := it.Push(t, reg.Host, "private:v1", twoLayers(t, "secret"), remote.WithAuth(auth))

	s := openStore(t, t.TempDir(), Options{})
	for name, try := range map[string]func() error{
		"pull":    func() error { _, err := s.Pull(t.Context(), ref, nil); return err },
		"resolve": func() error { _, err := s.Resolve(t.Context(), ref); return err },
	} {
		if err := try(); !errors.Is(err, fleet.ErrDenied) || !strings.Contains(fleet.Hint(err), "docker login") {
			t.Errorf("%s without credentials: %v", name, err)
		}
	}
	// As the docker configuration file has them.
	for password, want := range map[string]error{"s3cret": nil, "wrong": fleet.ErrDenied} {
		dir := t.TempDir()
		conf := fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, reg.Host, base64.StdEncoding.EncodeToString([]byte("alice:"+password)))
		if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(conf), 0o600); err != nil {
			t.Fatal(err)
		}
		t.Setenv("DOCKER_CONFIG", dir)
		s := openStore(t, t.TempDir(), Options{Keychain: authn.DefaultKeychain})
		if _, err := s.Pull(t.Context(), ref, nil); !errors.Is(err, want) {
			t.Errorf("with password %q: %v", password, err)
		}
	}
}

func TestPull_PlainHTTPOnlyWhereAllowed(t *testing.T) {
	t.Parallel()
	f := startFaulty(t)
	ref := it.Push(t, f.Host, "app", twoLayers(t, "x"))
	s := openStore(t, t.TempDir(), Options{Insecure: func(string) bool { return false }})
	if _, err := s.Pull(t.Context(), ref, nil); err == nil || fleet.Hint(err) == "" {
		t.Errorf("pulled without TLS: %v", err)
	}
	if f.blobs.Load() != 0 {
		t.Error("blobs were asked for")
	}
	for host, want := range map[string]bool{"127.0.0.1:5000": true, "localhost": true, "[::1]:5000": true, "reg.localhost:1": true,
		"10.0.0.1:5000": false, "example.com": false, "localhost.example.com": false} {
		if loopback(host) != want {
			t.Errorf("loopback(%q) = %v", host, !want)
		}
	}
}

func TestPull_ConcurrentPullsAreOne(t *testing.T) {
	t.Parallel()
	f := startFaulty(t)
	shared := it.Layer(t, it.File("shared", noise(6, 300<<10)))
	a := it.Push(t, f.Host, "a", it.Image(t, v1.Config{User: "a"}, shared, it.Layer(t, it.File("a", "a"))))
	b := it.Push(t, f.Host, "b", it.Image(t, v1.Config{User: "b"}, shared, it.Layer(t, it.File("b", "b"))))
	s := openStore(t, t.TempDir(), Options{Parallel: 2})
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			ref := a
			if i%2 == 1 {
				ref = b
			}
			img, err := s.Pull(t.Context(), ref, nil)
			if err != nil || len(img.Layers) != 2 {
				t.Errorf("%+v %v", img, err)
			}
		})
		// Collections run all the time; none takes what a pull needs.
		wg.Go(func() {
			if _, err := s.GC(t.Context(), []fleet.Digest{}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	mustPull(t, s, a)
	clean(t, s, 0)
}

func TestPull_LayerOfTwoPullsIsFetchedOnce(t *testing.T) {
	t.Parallel()
	f := startFaulty(t)
	shared := it.Layer(t, it.File("shared", noise(7, 300<<10)))
	refs := []string{}
	for _, n := range []string{"a", "b", "c"} {
		refs = append(refs, it.Push(t, f.Host, n, it.Image(t, v1.Config{User: n}, shared)))
	}
	s := openStore(t, t.TempDir(), Options{})
	var wg sync.WaitGroup
	for i := range 15 {
		wg.Go(func() {
			if _, err := s.Pull(t.Context(), refs[i%3], nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got := f.blobs.Load(); got < 4 || got > 1+15 {
		t.Errorf("%d requests for blobs", got)
	}
	if n := len(readDir(t, s.path("layers"))); n != 1 {
		t.Errorf("%d layers", n)
	}
	clean(t, s, 0)
}

func TestPull_OnlyTheLastCallerInterrupts(t *testing.T) {
	t.Parallel()
	f := startFaulty(t)
	ref := it.Push(t, f.Host, "app", bigImage(t, 10))
	asked := make(chan struct{}, 100)
	goOn := make(chan struct{})
	f.set(func(_ http.ResponseWriter, r *http.Request, _ http.Handler) bool {
		if isBlob(r) {
			asked <- struct{}{}
			select {
			case <-goOn:
			case <-r.Context().Done():
			}
		}
		return false
	})
	s := openStore(t, t.TempDir(), Options{})
	first, leave := context.WithCancel(t.Context())
	errs := make(chan error, 2)
	var wg sync.WaitGroup
	wg.Go(func() { _, err := s.Pull(first, ref, nil); errs <- err })
	<-asked
	joined := make(chan struct{})
	var once sync.Once
	wg.Go(func() {
		_, err := s.Pull(t.Context(), ref, ProgressFunc(func(Step) { once.Do(func() { close(joined) }) }))
		errs <- err
	})
	<-joined
	leave()
	if err := <-errs; !errors.Is(err, context.Canceled) {
		t.Errorf("who left: %v", err)
	}
	close(goOn)
	if err := <-errs; err != nil {
		t.Errorf("who stayed: %v", err)
	}
	wg.Wait()
	clean(t, s, 0)
}

func TestGC_OldPartialsOnly(t *testing.T) {
	t.Parallel()
	s := openStore(t, t.TempDir(), Options{})
	for name, age := range map[string]time.Duration{strings.Repeat("a", 64): 48 * time.Hour, strings.Repeat("b", 64): time.Hour} {
		p := s.path("partial", name)
		if err := os.WriteFile(p, []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
		when := time.Now().Add(-age)
		if err := os.Chtimes(p, when, when); err != nil {
			t.Fatal(err)
		}
	}
	res, err := s.GC(t.Context(), nil)
	if err != nil || res.Partials != 1 || res.Freed != 4 {
		t.Errorf("gc: %+v %v", res, err)
	}
	clean(t, s, 1)
}

func TestOpen_CleansWhatACrashLeft(t *testing.T) {
	t.Parallel()
	f := startFaulty(t)
	ref := it.Push(t, f.Host, "app", twoLayers(t, "x"))
	dir := t.TempDir()
	s := openStore(t, dir, Options{})
	img := mustPull(t, s, ref)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"tmp/layer-1/layer/fs", "layers/junk", "layers/" + strings.Repeat("e", 64)} {
		if err := os.MkdirAll(filepath.Join(dir, p), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range []string{"images/junk.json", "refs/junk.json", "tmp/record-1"} {
		if err := os.WriteFile(filepath.Join(dir, p), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.RemoveAll(filepath.Dir(img.Layers[0])); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, dir, Options{})
	if _, err := s.Get(img.Digest); !errors.Is(err, fleet.ErrNotFound) {
		t.Errorf("an image without a layer: %v", err)
	}
	clean(t, s, 0)
	if n := len(readDir(t, s.path("layers"))); n != 1 {
		t.Errorf("%d layers, want the one that is whole", n)
	}
	if again := mustPull(t, s, ref); again.Digest != img.Digest || read(t, again, "etc/motd") != "x" {
		t.Errorf("pulled again: %+v", again)
	}
	// A layer removed under a running store is made again, too.
	if err := os.RemoveAll(filepath.Dir(img.Layers[1])); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(img.Digest); !errors.Is(err, fleet.ErrNotFound) {
		t.Errorf("an image without a layer: %v", err)
	}
	mustPull(t, s, ref)
}

// A disk of 4 MiB: the pull fails with a reason, and takes nothing with it.
func TestPull_DiskFull(t *testing.T) {
	if !inMountNamespace(t) {
		return
	}
	f := startFaulty(t)
	small := it.Push(t, f.Host, "small", twoLayers(t, "x"))
	blob := it.Push(t, f.Host, "blob", it.Image(t, v1.Config{}, it.Layer(t, it.File("f", noise(11, 6<<20)))))
	unpacked := it.Push(t, f.Host, "unpacked", it.Image(t, v1.Config{}, it.Layer(t, it.File("f", strings.Repeat("compresses", 600<<10)))))
	var many []it.Entry
	for i := range 2000 {
		many = append(many, it.File(fmt.Sprint("f", i), ""))
	}
	inodes := it.Push(t, f.Host, "inodes", it.Image(t, v1.Config{}, it.Layer(t, many...)))
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=4m,nr_inodes=500"); err != nil {
		t.Fatalf("mount tmpfs: %v (the tests need root)", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	s := openStore(t, dir, Options{})
	mustPull(t, s, small)
	var before, after unix.Statfs_t
	if err := unix.Statfs(dir, &before); err != nil {
		t.Fatal(err)
	}
	for _, ref := range []string{blob, unpacked, inodes} {
		_, err := s.Pull(t.Context(), ref, nil)
		if !errors.Is(err, fleet.ErrUnavailable) || !errors.Is(err, unix.ENOSPC) || !strings.Contains(fleet.Hint(err), "image gc") {
			t.Errorf("%s: %v (hint %q)", ref, err, fleet.Hint(err))
		}
		clean(t, s, 0)
	}
	if err := unix.Statfs(dir, &after); err != nil {
		t.Fatal(err)
	}
	if after.Bfree != before.Bfree || after.Ffree != before.Ffree {
		t.Errorf("free blocks %d → %d, free inodes %d → %d", before.Bfree, after.Bfree, before.Ffree, after.Ffree)
	}
	mustPull(t, s, small)
}

// kill -9 of the process that pulls, again and again at other moments.
func TestPull_KillNine(t *testing.T) {
	const mark = "IMAGE_TEST_PULL"
	if v := os.Getenv(mark); v != "" {
		dir, ref, _ := strings.Cut(v, "|")
		s, err := Open(dir, Options{Keychain: anonymous{}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Pull(t.Context(), ref, nil); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Parallel()
	reg := it.StartRegistry(t)
	var layers []v1.Layer
	for i := range 4 {
		layers = append(layers, it.Layer(t, it.File(fmt.Sprint("f", i), noise(uint64(20+i), 1<<20)), it.Dir("d/", 0o755)))
	}
	ref := it.Push(t, reg.Host, "app", it.Image(t, v1.Config{}, layers...))
	f := &faulty{}
	target, _ := url.Parse("http://" + reg.Host)
	proxy := httputil.NewSingleHostReverseProxy(target)
	proxy.ErrorLog = log.New(io.Discard, "", 0)
	f.serve(t, proxy)
	ref = strings.Replace(ref, reg.Host, f.Host, 1)
	dir := t.TempDir()
	for i := range 8 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestPull_KillNine$", "-test.timeout=60s")
		cmd.Env = append(os.Environ(), mark+"="+dir+"|"+ref)
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		// Killed by what it asks for: each life gets some hundred KiB further.
		left := atomic.Int64{}
		left.Store(int64(100<<10 + i*700<<10))
		far := make(chan struct{})
		fire := sync.OnceFunc(func() { close(far) })
		f.set(func(w http.ResponseWriter, r *http.Request, h http.Handler) bool {
			if !isBlob(r) {
				return false
			}
			h.ServeHTTP(&trigger{w, &left, fire}, r)
			return true
		})
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		var err error
		select {
		case <-far:
			_ = cmd.Process.Kill()
			err = <-ended
		case err = <-ended:
		}
		s := openStore(t, dir, Options{})
		if n := len(readDir(t, s.path("tmp"))); n != 0 {
			t.Errorf("life %d: %d leftovers", i, n)
		}
		if list, lerr := s.List(); lerr != nil || (err != nil && len(list) != 0 && left.Load() > 0) {
			t.Errorf("life %d: %v %v", i, list, lerr)
		}
		if cerr := s.Close(); cerr != nil {
			t.Fatal(cerr)
		}
	}
	f.set(nil)
	s := openStore(t, dir, Options{})
	img := mustPull(t, s, ref)
	for i := range 4 {
		if read(t, img, fmt.Sprint("f", i)) != noise(uint64(20+i), 1<<20) {
			t.Errorf("f%d has other content", i)
		}
	}
	if f.parts.Load() == 0 {
		t.Error("no life continued where the one before was killed")
	}
	clean(t, s, 0)
}

// trigger calls fire once that many bytes went through.
type trigger struct {
	http.ResponseWriter
	left *atomic.Int64
	fire func()
}

func (g *trigger) Write(p []byte) (int, error) {
	n, err := g.ResponseWriter.Write(p)
	if f, ok := g.ResponseWriter.(http.Flusher); ok {
		f.Flush()
	}
	if g.left.Add(-int64(n)) <= 0 {
		g.fire()
	}
	return n, err
}

func TestResolve_WhereHeadIsNotAllowed(t *testing.T) {
	t.Parallel()
	f := startFaulty(t)
	img := twoLayers(t, "x")
	ref := it.Push(t, f.Host, "app", img)
	f.set(func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
		if r.Method == http.MethodHead {
			w.WriteHeader(http.StatusMethodNotAllowed)
		}
		return r.Method == http.MethodHead
	})
	s := openStore(t, t.TempDir(), Options{})
	if d, err := s.Resolve(t.Context(), ref); err != nil || string(d) != it.Digest(t, img) {
		t.Errorf("resolved %s: %v", d, err)
	}
	if f.blobs.Load() != 0 {
		t.Error("resolving downloaded blobs")
	}
}

func TestGC_GraceCountsFromTheLastPull(t *testing.T) {
	t.Parallel()
	f := startFaulty(t)
	ref := it.Push(t, f.Host, "app", twoLayers(t, "x"))
	s := openStore(t, t.TempDir(), Options{Grace: time.Hour})
	img := mustPull(t, s, ref)
	age := func(touched time.Time) {
		s.mu.Lock()
		defer s.mu.Unlock()
		rec := s.images[img.Digest]
		rec.PulledAt = time.Now().Add(-2 * time.Hour)
		s.images[img.Digest] = rec
		s.touched[img.Digest] = touched
	}
	age(time.Now().Add(-2 * time.Hour))
	mustPull(t, s, ref)
	if res, err := s.GC(t.Context(), nil); err != nil || len(res.Images) != 0 {
		t.Errorf("collected in its grace: %+v %v", res, err)
	}
	age(time.Now().Add(-2 * time.Hour))
	if res, err := s.GC(t.Context(), nil); err != nil || len(res.Images) != 1 {
		t.Errorf("not collected after its grace: %+v %v", res, err)
	}
}

// Not parallel: it counts the file descriptors of the whole process.
func TestStore_LeavesNoFileOpen(t *testing.T) {
	good := it.DockerArchive(t, twoLayers(t, "x"))
	layout := it.Layout(t, twoLayers(t, "y"))
	bad := filepath.Join(t.TempDir(), "bad.tar.gz")
	if err := os.WriteFile(bad, gz(t, it.Tar(t, it.File("ok", "x"), it.File("../up", "x"))), 0o600); err != nil {
		t.Fatal(err)
	}
	open := func() int { return len(readDir(t, "/proc/self/fd")) }
	life := func() {
		s := openStore(t, t.TempDir(), Options{})
		for _, ref := range []string{"tar:" + good, "oci:" + layout, "tar:" + bad, "dir:" + layout, "dir:/nowhere"} {
			_, _ = s.Resolve(t.Context(), ref)
			_, _ = s.Pull(t.Context(), ref, nil)
		}
		if _, err := s.GC(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	life()
	before := open()
	for range 5 {
		life()
	}
	if after := open(); after != before {
		t.Errorf("%d file descriptors before, %d after", before, after)
	}
}

// Registries of the public kind hand out tokens, which expire in mid pull.
func TestPull_Tokens(t *testing.T) {
	t.Parallel()
	f := startFaulty(t)
	ref := it.Push(t, f.Host, "app", bigImage(t, 12))
	var given atomic.Int64
	f.set(func(w http.ResponseWriter, r *http.Request, h http.Handler) bool {
		if r.URL.Path == "/token" {
			user, password, _ := r.BasicAuth()
			if user != "alice" || password != "s3cret" {
				w.WriteHeader(http.StatusUnauthorized)
				return true
			}
			_, _ = fmt.Fprintf(w, `{"token":"token-%d"}`, given.Add(1))
			return true
		}
		token := r.Header.Get("Authorization")
		// The first token is good for the manifest only.
		if token == "" || isBlob(r) && token == "Bearer token-1" {
			w.Header().Set("WWW-Authenticate", `Bearer realm="http://`+f.Host+`/token",service="test",scope="repository:app:pull"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		return false
	})
	s := openStore(t, t.TempDir(), Options{Keychain: fixed{authn.AuthConfig{Username: "alice", Password: "s3cret"}}})
	mustPull(t, s, ref)
	if given.Load() < 2 {
		t.Error("the token was not renewed")
	}
	s = openStore(t, t.TempDir(), Options{Keychain: fixed{authn.AuthConfig{Username: "alice", Password: "wrong"}}})
	if _, err := s.Pull(t.Context(), ref, nil); !errors.Is(err, fleet.ErrDenied) {
		t.Errorf("with a wrong password: %v", err)
	}
}

// fixed knows one login for every registry.
type fixed struct{ c authn.AuthConfig }

func (f fixed) Resolve(authn.Resource) (authn.Authenticator, error) {
	return authn.FromConfig(f.c), nil
}
