package release

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/image"
	"github.com/fastcontainer/fastcontainer/internal/store"
)

// registry is a fake of images whose tags move on cue.
type registry struct {
	mu    sync.Mutex
	means map[string]fleet.Digest
	pulls int
	away  error
	ports []int
}

func (r *registry) Resolve(_ context.Context, ref string) (fleet.Digest, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.away != nil {
		return "", r.away
	}
	return r.means[ref], nil
}

func (r *registry) Pull(ctx context.Context, ref string, _ image.Progress) (image.Image, error) {
	d, err := r.Resolve(ctx, ref)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pulls++
	return image.Image{Digest: d, Config: image.Config{Cmd: []string{"/app"}, Ports: r.ports}}, err
}

func (r *registry) Get(d fleet.Digest) (image.Image, error) { return image.Image{Digest: d}, nil }

func (r *registry) set(ref string, d fleet.Digest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.means[ref] = d
}

type fixture struct {
	*Releases
	store  *store.Memory
	images *registry
	events []fleet.Event
}

func newFixture(t *testing.T, change func(*Config)) *fixture {
	t.Helper()
	f := &fixture{store: store.NewMemory(), images: &registry{means: map[string]fleet.Digest{"app:1": "sha256:a"}}}
	c := Config{Store: f.store, Images: f.images, Logger: slog.New(slog.DiscardHandler), Events: func(e fleet.Event) { f.events = append(f.events, e) }}
	if change != nil {
		change(&c)
	}
	f.Releases = New(c)
	return f
}

func spec(name fleet.AppName, change ...func(*fleet.Spec)) fleet.Spec {
	s := fleet.Spec{Name: name, Image: "app:1", Env: map[string]string{"A": "1"}}
	for _, f := range change {
		f(&s)
	}
	return s
}

func (f *fixture) deploy(t *testing.T, s fleet.Spec) fleet.Revision {
	t.Helper()
	rev, err := f.Deploy(t.Context(), s, nil)
	if err != nil {
		t.Fatal(err)
	}
	return rev
}

func (f *fixture) app(t *testing.T, name fleet.AppName) fleet.App {
	t.Helper()
	a, _, err := store.App(t.Context(), f.store, name)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestDeploy(t *testing.T) {
	f := newFixture(t, nil)
	rev := f.deploy(t, spec("web"))
	if rev.ID != "web@1" || rev.Image != "sha256:a" || rev.Spec.Port != 8080 || rev.Spec.Hosts[0] != "web.localhost" || rev.Cause != CauseDeploy {
		t.Errorf("got %+v", rev)
	}
	if again := f.deploy(t, spec("web")); again.ID != "web@1" || len(f.events) != 1 {
		t.Errorf("the same again made %s and %d events", again.ID, len(f.events))
	}
	if next := f.deploy(t, spec("web", func(s *fleet.Spec) { s.Env["A"] = "2" })); next.ID != "web@2" {
		t.Errorf("a changed variable made %s", next.ID)
	}
	f.images.set("app:1", "sha256:b")
	if next := f.deploy(t, spec("web", func(s *fleet.Spec) { s.Env["A"] = "2" })); next.ID != "web@3" || next.Image != "sha256:b" {
		t.Errorf("a newer image made %+v", next)
	}
	if a := f.app(t, "web"); a.Current != "web@3" || a.Previous != "web@2" || a.Latest != 3 {
		t.Errorf("app: %+v", a)
	}
	f.images.ports = []int{3000}
	if rev := f.deploy(t, spec("node")); rev.Spec.Port != 3000 {
		t.Errorf("the image's only port is not taken: %d", rev.Spec.Port)
	}
	f.images.ports = []int{3000, 4000}
	if rev := f.deploy(t, spec("two")); rev.Spec.Port != 8080 {
		t.Errorf("one of two ports is taken: %d", rev.Spec.Port)
	}
}

func TestDeploy_Refuses(t *testing.T) {
	errOwn := &fleet.Error{Op: "check", Kind: fleet.ErrInvalid, Err: errors.New("no")}
	for name, c := range map[string]struct {
		spec   fleet.Spec
		change func(*fixture)
		kind   error
		text   string
	}{
		"somebody's host": {spec("b", func(s *fleet.Spec) { s.Hosts = []string{"x", "taken"} }), nil, fleet.ErrConflict, "belongs to app a"},
		"check":           {spec("bad"), nil, fleet.ErrInvalid, "no"},
		"registry away":   {spec("b"), func(f *fixture) { f.images.away = fleet.ErrUnavailable }, fleet.ErrUnavailable, ""},
		"store away":      {spec("b"), func(f *fixture) { f.store.SetAway(true) }, fleet.ErrUnavailable, "away"},
	} {
		f := newFixture(t, func(c *Config) {
			c.Check = func(s fleet.Spec) error {
				if s.Name == "bad" {
					return errOwn
				}
				return nil
			}
		})
		f.deploy(t, spec("a", func(s *fleet.Spec) { s.Hosts = []string{"taken"} }))
		pulls := f.images.pulls
		if c.change != nil {
			c.change(f)
		}
		_, err := f.Deploy(t.Context(), c.spec, nil)
		if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", name, err)
		}
		if name == "store away" && (f.images.pulls != pulls || fleet.Hint(err) == "") {
			t.Errorf("%s: %d pulls, hint %q", name, f.images.pulls-pulls, fleet.Hint(err))
		}
		f.store.SetAway(false)
		if _, _, err := store.App(t.Context(), f.store, c.spec.Name); !errors.Is(err, fleet.ErrNotFound) {
			t.Errorf("%s: half of it is there: %v", name, err)
		}
	}
}

func TestHosts_AreFreedAndTakenBack(t *testing.T) {
	f := newFixture(t, nil)
	host := func(h string) func(*fleet.Spec) { return func(s *fleet.Spec) { s.Hosts = []string{h} } }
	f.deploy(t, spec("a", host("old")))
	f.deploy(t, spec("a", host("new")))
	f.deploy(t, spec("b", host("old"))) // free now
	if _, err := f.Rollback(t.Context(), "a"); !errors.Is(err, fleet.ErrConflict) {
		t.Errorf("a rollback took another app's host: %v", err)
	}
	if err := f.Delete(t.Context(), "b"); err != nil {
		t.Fatal(err)
	}
	if rev, err := f.Rollback(t.Context(), "a"); err != nil || rev.ID != "a@1" {
		t.Errorf("got %+v, %v", rev, err)
	}
	f.deploy(t, spec("c", host("new")))
}

func TestRollback(t *testing.T) {
	f := newFixture(t, nil)
	if _, err := f.Rollback(t.Context(), "web"); !errors.Is(err, fleet.ErrNotFound) {
		t.Errorf("got %v", err)
	}
	f.deploy(t, spec("web"))
	if _, err := f.Rollback(t.Context(), "web"); !errors.Is(err, fleet.ErrInvalid) {
		t.Errorf("got %v", err)
	}
	f.deploy(t, spec("web", func(s *fleet.Spec) { s.Env["A"] = "2" }))
	for _, want := range []fleet.RevisionID{"web@1", "web@2"} {
		if rev, err := f.Rollback(t.Context(), "web"); err != nil || rev.ID != want || f.app(t, "web").Current != want {
			t.Errorf("got %+v, %v", rev, err)
		}
	}
}

func TestRevisions_AreBounded(t *testing.T) {
	f := newFixture(t, nil)
	for n := range 30 {
		f.deploy(t, spec("web", func(s *fleet.Spec) { s.Env["A"] = fmt.Sprint(n) }))
	}
	revs, err := store.Revisions(t.Context(), f.store, "web")
	if err != nil || len(revs) > keptRevisions+3 || revs[len(revs)-1].ID != "web@30" {
		t.Errorf("%d revisions, %v", len(revs), err)
	}
	used, err := f.UsedImages(t.Context())
	if err != nil || len(used) != 1 || used[0] != "sha256:a" {
		t.Errorf("got %q, %v", used, err)
	}
	if err := f.Delete(t.Context(), "web"); err != nil {
		t.Fatal(err)
	}
	if list, _, _ := f.store.List(t.Context(), "/"); len(list) != 0 {
		t.Errorf("left in the store: %+v", list)
	}
}

// Many deploys of one app at once: each makes its revision, none is lost.
func TestDeploy_AtOnce(t *testing.T) {
	f := newFixture(t, func(c *Config) { c.Events = func(fleet.Event) {} })
	var wg sync.WaitGroup
	for n := range 6 {
		wg.Go(func() {
			if _, err := f.Deploy(t.Context(), spec("web", func(s *fleet.Spec) { s.Env["A"] = fmt.Sprint(n) }), nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if a := f.app(t, "web"); a.Latest != 6 {
		t.Errorf("app: %+v", a)
	}
}

func TestStopped_StaysThroughANewImage(t *testing.T) {
	f := newFixture(t, nil)
	f.deploy(t, spec("web"))
	if err := f.SetStopped(t.Context(), "web", true); err != nil || !f.app(t, "web").Stopped {
		t.Fatal(err)
	}
	f.images.set("app:1", "sha256:b")
	f.refresh(t.Context(), nil)
	if a := f.app(t, "web"); !a.Stopped || a.Current != "web@2" {
		t.Errorf("app: %+v", a)
	}
	f.deploy(t, spec("web"))
	if a := f.app(t, "web"); a.Stopped || a.Current != "web@2" {
		t.Errorf("after a deploy: %+v", a)
	}
	if err := f.SetStopped(t.Context(), "nobody", true); !errors.Is(err, fleet.ErrNotFound) {
		t.Errorf("got %v", err)
	}
}

// A tag that moves makes a revision of each app that uses it, by itself; one
// that was rolled back stays, and so does one that is pinned by digest.
func TestWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, func(c *Config) { c.Refresh = time.Minute })
		pinned := func(s *fleet.Spec) {
			s.Image = "app@sha256:0000000000000000000000000000000000000000000000000000000000000000"
		}
		f.deploy(t, spec("web"))
		f.deploy(t, spec("pinned", pinned))
		f.deploy(t, spec("back"))
		f.deploy(t, spec("back", func(s *fleet.Spec) { s.Env["A"] = "2" }))
		if _, err := f.Rollback(t.Context(), "back"); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { f.Watch(ctx) })
		f.images.set("app:1", "sha256:b")
		time.Sleep(time.Minute + time.Second)
		synctest.Wait()
		rev, err := store.Revision(t.Context(), f.store, f.app(t, "web").Current)
		if err != nil || rev.Image != "sha256:b" || rev.Cause != CauseImageChanged || rev.Spec.Env["A"] != "1" {
			t.Errorf("web: %+v, %v", rev, err)
		}
		if last := f.events[len(f.events)-1]; last.Type != fleet.EventDeploy || last.Cause != CauseImageChanged {
			t.Errorf("event: %+v", last)
		}
		if a := f.app(t, "back"); a.Current != "back@1" {
			t.Errorf("back: %+v", a)
		}
		if a := f.app(t, "pinned"); a.Latest != 1 {
			t.Errorf("pinned: %+v", a)
		}
		// A registry that is away changes nothing, and is asked again.
		f.images.mu.Lock()
		f.images.away = errors.New("away")
		f.images.mu.Unlock()
		time.Sleep(5 * time.Minute)
		f.images.mu.Lock()
		f.images.away = nil
		f.images.mu.Unlock()
		f.images.set("app:1", "sha256:c")
		time.Sleep(time.Minute)
		cancel()
		wg.Wait()
		if a := f.app(t, "web"); a.Current != "web@3" {
			t.Errorf("web: %+v", a)
		}
	})
}
