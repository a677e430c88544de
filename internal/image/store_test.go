package image

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	it "github.com/fastcontainer/fastcontainer/internal/image/imagetest"
)

// anonymous keeps the docker configuration of whoever runs the tests out of them.
type anonymous struct{}

func (anonymous) Resolve(authn.Resource) (authn.Authenticator, error) { return authn.Anonymous, nil }

func openStore(t testing.TB, dir string, o Options) *Store {
	t.Helper()
	if o.Keychain == nil {
		o.Keychain = anonymous{}
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.NewTextHandler(testWriter{t}, nil))
	}
	s, err := Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

func mustPull(t testing.TB, s *Store, ref string) Image {
	t.Helper()
	img, err := s.Pull(t.Context(), ref, nil)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func read(t testing.TB, img Image, name string) string {
	t.Helper()
	for _, l := range img.Layers {
		data, err := os.ReadFile(filepath.Join(l, name))
		if err == nil {
			return string(data)
		}
		if !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	t.Fatalf("no layer has %s", name)
	return ""
}

// clean fails unless the store holds nothing unfinished.
func clean(t testing.TB, s *Store, partials int) {
	t.Helper()
	for dir, want := range map[string]int{"tmp": 0, "partial": partials} {
		entries, err := os.ReadDir(s.path(dir))
		if err != nil {
			t.Fatal(err)
		}
		if len(entries) != want {
			t.Errorf("%s has %d entries, want %d: %v", dir, len(entries), want, entries)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.using) != 0 || len(s.flights) != 0 {
		t.Errorf("still in use: %v, flights: %v", s.using, s.flights)
	}
}

var testConfig = v1.Config{
	Entrypoint: []string{"/bin/app"}, Cmd: []string{"serve"}, Env: []string{"A=1"}, User: "app", WorkingDir: "/srv",
	StopSignal: "SIGQUIT", Labels: map[string]string{"k": "v"}, Volumes: map[string]struct{}{"/data": {}},
	ExposedPorts: map[string]struct{}{"8080/tcp": {}, "53/udp": {}, "80": {}, "junk": {}},
}

func twoLayers(t testing.TB, top string) v1.Image {
	return it.Image(t, testConfig,
		it.Layer(t, it.Dir("bin/", 0o755), it.Program("bin/app", "binary"), it.File("etc/motd", "base")),
		it.Layer(t, it.Dir("etc/", 0o755), it.File("etc/motd", top)))
}

func TestPull_FromRegistryByTagAndDigest(t *testing.T) {
	t.Parallel()
	reg := it.StartRegistry(t)
	img := twoLayers(t, "one")
	ref := it.Push(t, reg.Host, "team/app:v1", img)
	s := openStore(t, t.TempDir(), Options{})

	d, err := s.Resolve(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	if string(d) != it.Digest(t, img) {
		t.Fatalf("resolved %s, pushed %s", d, it.Digest(t, img))
	}
	if _, err := s.Get(d); !errors.Is(err, fleet.ErrNotFound) {
		t.Fatalf("Get before Pull: %v", err)
	}
	var steps []Step
	got, err := s.Pull(t.Context(), ref, ProgressFunc(func(st Step) { steps = append(steps, st) }))
	if err != nil {
		t.Fatal(err)
	}
	if got.Digest != d || len(got.Layers) != 2 || read(t, got, "etc/motd") != "one" || got.Architecture != "amd64" && got.Architecture != "arm64" {
		t.Errorf("image %+v", got)
	}
	c := got.Config
	if c.Entrypoint[0] != "/bin/app" || c.Cmd[0] != "serve" || c.User != "app" || c.StopSignal != "SIGQUIT" ||
		len(c.Ports) != 2 || c.Ports[0] != 80 || c.Ports[1] != 8080 || c.Volumes[0] != "/data" || c.Labels["k"] != "v" {
		t.Errorf("config %+v", c)
	}
	if last := steps[len(steps)-1]; last.Phase != PhaseDone || last.Layer != "" {
		t.Errorf("last step %+v", last)
	}
	done := 0
	for _, st := range steps {
		if st.Layer != "" && st.Phase == PhaseDone {
			done++
		}
	}
	if done != 2 {
		t.Errorf("%d layers were told to be done: %+v", done, steps)
	}
	// Again, by digest: nothing is fetched, the same image.
	byDigest := mustPull(t, s, reg.Host+"/team/app@"+string(d))
	if byDigest.Digest != d || len(byDigest.Refs) != 2 {
		t.Errorf("by digest: %+v", byDigest)
	}
	if st, err := os.Stat(s.dir); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("store directory %v %v", st.Mode(), err)
	}
	clean(t, s, 0)
}

func TestPull_MovedTagSharesLayers(t *testing.T) {
	t.Parallel()
	reg := it.StartRegistry(t)
	s := openStore(t, t.TempDir(), Options{})
	ref := it.Push(t, reg.Host, "app:latest", twoLayers(t, "one"))
	one := mustPull(t, s, ref)
	it.Push(t, reg.Host, "app:latest", twoLayers(t, "two"))
	two := mustPull(t, s, ref)
	if one.Digest == two.Digest || read(t, two, "etc/motd") != "two" {
		t.Fatalf("the tag did not move: %+v", two)
	}
	if one.Layers[1] != two.Layers[1] || one.Layers[0] == two.Layers[0] {
		t.Errorf("layers are not shared by content: %v %v", one.Layers, two.Layers)
	}
	old, err := s.Get(one.Digest)
	if err != nil || len(old.Refs) != 0 {
		t.Errorf("old image: %+v %v", old, err)
	}
	list, err := s.List()
	if err != nil || len(list) != 2 || list[0].Digest != two.Digest {
		t.Errorf("list: %v %v", list, err)
	}
	res, err := s.GC(t.Context(), []fleet.Digest{two.Digest})
	if err != nil || len(res.Images) != 1 || res.Images[0] != one.Digest || res.Layers != 1 {
		t.Errorf("gc: %+v %v", res, err)
	}
	if read(t, two, "bin/app") != "binary" {
		t.Error("gc took a shared layer")
	}
	release, err := s.Hold(two.Digest)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(t.Context(), two.Digest); !errors.Is(err, fleet.ErrConflict) {
		t.Errorf("removed while held: %v", err)
	}
	if res, err := s.GC(t.Context(), nil); err != nil || len(res.Images) != 0 {
		t.Errorf("gc while held: %+v %v", res, err)
	}
	release()
	release()
	if err := s.Remove(t.Context(), two.Digest); err != nil {
		t.Error(err)
	}
	if err := s.Remove(t.Context(), two.Digest); !errors.Is(err, fleet.ErrNotFound) {
		t.Errorf("removed twice: %v", err)
	}
	left, err := os.ReadDir(s.path("layers"))
	if err != nil || len(left) != 0 {
		t.Errorf("layers left: %v %v", left, err)
	}
	clean(t, s, 0)
}

func TestPull_LocalSources(t *testing.T) {
	t.Parallel()
	img := twoLayers(t, "local")
	rootfs := t.TempDir()
	for name, body := range map[string]string{"bin/app": "binary", "etc/motd": "local"} {
		if err := os.MkdirAll(filepath.Join(rootfs, filepath.Dir(name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(rootfs, name), []byte(body), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	plain := it.Tar(t, it.Dir("./", 0o755), it.Dir("./bin/", 0o755), it.Program("./bin/app", "binary"), it.File("./etc/motd", "local"))
	file := func(name string, data []byte) string {
		p := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(p, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	slurp := func(p string) []byte {
		data, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	docker, oci := it.DockerArchive(t, img), it.OCIArchive(t, img)
	for name, ref := range map[string]string{
		"layout":             "oci:" + it.Layout(t, img),
		"docker archive":     "tar:" + docker,
		"docker archive gz":  "tar:" + file("d.tar.gz", gz(t, slurp(docker))),
		"oci archive":        "tar:" + oci,
		"oci archive zst":    "tar:" + file("o.tar.zst", zst(t, slurp(oci))),
		"rootfs tarball":     "tar:" + file("r.tar", plain),
		"rootfs tarball gz":  "tar:" + file("r.tar.gz", gz(t, plain)),
		"rootfs tarball zst": "tar:" + file("r.tar.zst", zst(t, plain)),
		"directory":          "dir:" + rootfs,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := openStore(t, t.TempDir(), Options{})
			want, err := s.Resolve(t.Context(), ref)
			if err != nil {
				t.Fatal(err)
			}
			got := mustPull(t, s, ref)
			if got.Digest != want {
				t.Errorf("pulled %s, resolved %s", got.Digest, want)
			}
			if read(t, got, "etc/motd") != "local" || read(t, got, "bin/app") != "binary" {
				t.Errorf("content of %+v", got)
			}
			again := mustPull(t, s, ref)
			if again.Digest != want || again.PulledAt != got.PulledAt {
				t.Errorf("pulled again: %+v", again)
			}
			clean(t, s, 0)
			// And after a restart.
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s2 := openStore(t, s.dir, Options{})
			kept, err := s2.Get(want)
			if err != nil || len(kept.Refs) != 1 || kept.Refs[0] != ref || kept.Size != got.Size || len(kept.Layers) != len(got.Layers) {
				t.Errorf("after a restart: %+v %v", kept, err)
			}
		})
	}
}

func TestPull_SourceThatChanged(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := os.WriteFile(path, []byte("one"), 0o644); err != nil {
		t.Fatal(err)
	}
	s := openStore(t, t.TempDir(), Options{})
	one := mustPull(t, s, "dir:"+dir)
	if err := os.WriteFile(path, []byte("two"), 0o644); err != nil {
		t.Fatal(err)
	}
	d, err := s.Resolve(t.Context(), "dir:"+dir)
	if err != nil || d == one.Digest {
		t.Fatalf("resolved %s, %v after a change", d, err)
	}
	if two := mustPull(t, s, "dir:"+dir); two.Digest != d || read(t, two, "f") != "two" {
		t.Errorf("pulled %+v", two)
	}
}

func TestOpen_OneProcessOnly(t *testing.T) {
	t.Parallel()
	s := openStore(t, t.TempDir(), Options{})
	_, err := Open(s.dir, Options{})
	if !errors.Is(err, fleet.ErrConflict) || fleet.Hint(err) == "" {
		t.Errorf("second Open: %v", err)
	}
}

func TestPull_AfterClose(t *testing.T) {
	t.Parallel()
	s := openStore(t, t.TempDir(), Options{})
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Pull(t.Context(), "dir:/nowhere", nil); !errors.Is(err, context.Canceled) {
		t.Errorf("pull: %v", err)
	}
}
