// Package release makes, changes and ends revisions: it turns what a user
// asks for into durable state, pulls the image first so that no request ever
// waits for a registry, and makes a new revision when a tag has moved.
//
// Whatever it decides is one transaction of the store; every node learns of it
// by its watch.
package release

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/image"
	"github.com/fastcontainer/fastcontainer/internal/store"
)

// Images is what releases need of the image store.
type Images interface {
	Pull(ctx context.Context, ref string, p image.Progress) (image.Image, error)
	// Resolve tells what a reference means now.
	Resolve(ctx context.Context, ref string) (fleet.Digest, error)
	Get(fleet.Digest) (image.Image, error)
}

// Config of releases.
type Config struct {
	Store  store.Store
	Images Images
	Logger *slog.Logger
	Events func(fleet.Event)
	// Check reports why an app cannot run on this node: its runtime is
	// missing, its limits are larger than the machine.
	Check func(fleet.Spec) error
	// Refresh is how often a tag is looked up again. 0: never.
	Refresh time.Duration
}

// Releases changes the apps of a fleet.
type Releases struct{ cfg Config }

// New makes releases.
func New(c Config) *Releases {
	if c.Check == nil {
		c.Check = func(fleet.Spec) error { return nil }
	}
	return &Releases{cfg: c}
}

const (
	// keptRevisions of an app, beyond its current and previous one.
	keptRevisions = 10
	// conflicts is how often a transaction is tried again that somebody else
	// was quicker than.
	conflicts = 10
)

// Causes of a revision.
const (
	CauseDeploy       = "deploy"
	CauseRollback     = "rollback"
	CauseImageChanged = "image changed"
)

// Deploy pulls the image and makes a revision of the app. A spec and image
// that are current already make none; the app is started if it was stopped.
func (r *Releases) Deploy(ctx context.Context, spec fleet.Spec, p image.Progress) (fleet.Revision, error) {
	if err := r.cfg.Store.Ping(ctx); err != nil { // before a long pull
		return fleet.Revision{}, r.failed("deploy", spec.Name, err)
	}
	if len(spec.Hosts) == 0 {
		spec.Hosts = []string{string(spec.Name) + ".localhost"}
	}
	if err := r.cfg.Check(spec); err != nil {
		return fleet.Revision{}, err
	}
	img, err := r.cfg.Images.Pull(ctx, spec.Image, p)
	if err != nil {
		return fleet.Revision{}, err
	}
	return r.release(ctx, spec, img, CauseDeploy, "")
}

// same compares specs as the store keeps them.
func same(a, b fleet.Spec) bool {
	x, err := json.Marshal(a)
	y, err2 := json.Marshal(b)
	return err == nil && err2 == nil && bytes.Equal(x, y)
}

// release makes a revision of a spec and an image that is on disk. With from,
// it does nothing unless that is still the app's current revision.
func (r *Releases) release(ctx context.Context, spec fleet.Spec, img image.Image, cause string, from fleet.RevisionID) (fleet.Revision, error) {
	spec, err := complete(spec, img)
	if err != nil {
		return fleet.Revision{}, err
	}
	var rev fleet.Revision
	unchanged := false
	err = r.change(ctx, "deploy", spec.Name, func(app fleet.App, found bool) (fleet.App, []store.Op, error) {
		now := time.Now().UTC()
		if from != "" && app.Current != from {
			unchanged = true
			return app, nil, nil
		}
		if !found {
			app = fleet.App{Name: spec.Name, CreatedAt: now}
		} else {
			current, err := store.Revision(ctx, r.cfg.Store, app.Current)
			if err != nil && !errors.Is(err, fleet.ErrNotFound) {
				return app, nil, err
			}
			if err == nil && current.Image == img.Digest && same(current.Spec, spec) {
				rev, unchanged = current, !app.Stopped
				app.Stopped = false
				return app, nil, nil
			}
		}
		unchanged = false
		app.Latest++
		rev = fleet.Revision{ID: fleet.MakeRevisionID(spec.Name, app.Latest), App: spec.Name, Spec: spec, Image: img.Digest, CreatedAt: now, Cause: cause}
		app.Previous, app.Current = app.Current, rev.ID
		app.Stopped = app.Stopped && cause == CauseImageChanged
		app.UpdatedAt = now
		ops, err := r.hosts(ctx, app.Name, spec.Hosts, found)
		if err != nil {
			return app, nil, err
		}
		put, err := store.PutRevision(rev)
		if err != nil {
			return app, nil, err
		}
		trim, err := r.trim(ctx, app)
		return app, slices.Concat(ops, []store.Op{put}, trim), err
	})
	if err != nil || unchanged {
		return rev, err
	}
	r.cfg.Events(fleet.Event{Type: fleet.EventDeploy, App: rev.App, Revision: rev.ID, Cause: cause, Detail: fmt.Sprintf("image %s is %s", spec.Image, img.Digest.Short())})
	return rev, nil
}

// complete fills in what only the image knows.
func complete(s fleet.Spec, img image.Image) (fleet.Spec, error) {
	if s.Port == 0 {
		s.Port = 8080
		if len(img.Config.Ports) == 1 {
			s.Port = img.Config.Ports[0]
		}
	}
	if len(s.Entrypoint)+len(s.Command)+len(img.Config.Entrypoint)+len(img.Config.Cmd) == 0 {
		return s, &fleet.Error{
			Op: "deploy", Subject: string(s.Name), Kind: fleet.ErrInvalid, Err: errors.New("nothing says what to run: the image has neither entrypoint nor command"),
			Hint: "set entrypoint or command in the app file, or pass a command after --",
		}
	}
	return s, nil
}

// hosts claims the hosts of an app, which are nobody else's, and gives up
// those that it does not want any more.
func (r *Releases) hosts(ctx context.Context, app fleet.AppName, want []string, found bool) ([]store.Op, error) {
	var ops []store.Op
	for _, h := range want {
		e, err := r.cfg.Store.Get(ctx, store.HostKey(h))
		switch {
		case errors.Is(err, fleet.ErrNotFound):
			ops = append(ops, store.Op{Key: store.HostKey(h), Value: []byte(app)})
		case err != nil:
			return nil, err
		case string(e.Value) != string(app):
			return nil, &fleet.Error{
				Op: "deploy", Subject: string(app), Kind: fleet.ErrConflict, Err: fmt.Errorf("host %s belongs to app %s", h, e.Value),
				Hint: "choose another host, or delete that app or take the host from it",
			}
		}
	}
	if !found {
		return ops, nil
	}
	mine, err := r.hostsOf(ctx, app)
	if err != nil {
		return nil, err
	}
	for _, h := range mine {
		if !slices.Contains(want, h) {
			ops = append(ops, store.Op{Key: store.HostKey(h), If: store.AnyRev})
		}
	}
	return ops, nil
}

// hostsOf an app are those of its current revision.
func (r *Releases) hostsOf(ctx context.Context, name fleet.AppName) ([]string, error) {
	app, _, err := store.App(ctx, r.cfg.Store, name)
	if err != nil {
		return nil, ignoreMissing(err)
	}
	rev, err := store.Revision(ctx, r.cfg.Store, app.Current)
	return rev.Spec.Hosts, ignoreMissing(err)
}

func ignoreMissing(err error) error {
	if errors.Is(err, fleet.ErrNotFound) {
		return nil
	}
	return err
}

// trim removes the oldest revisions.
func (r *Releases) trim(ctx context.Context, app fleet.App) ([]store.Op, error) {
	revs, err := store.Revisions(ctx, r.cfg.Store, app.Name)
	if err != nil {
		return nil, err
	}
	revs = slices.DeleteFunc(revs, func(v fleet.Revision) bool { return v.ID == app.Current || v.ID == app.Previous })
	var ops []store.Op
	for _, v := range revs[:max(0, len(revs)-keptRevisions)] {
		ops = append(ops, store.DeleteRevision(v.ID))
	}
	return ops, nil
}

// change reads an app, has f change it, and writes it with f's further writes
// in one transaction; all again if somebody else wrote meanwhile.
func (r *Releases) change(ctx context.Context, op string, name fleet.AppName, f func(app fleet.App, found bool) (fleet.App, []store.Op, error)) error {
	for try := 1; ; try++ {
		app, at, err := store.App(ctx, r.cfg.Store, name)
		found := err == nil
		if err != nil && !errors.Is(err, fleet.ErrNotFound) {
			return r.failed(op, name, err)
		}
		next, ops, err := f(app, found)
		if err != nil {
			return r.failed(op, name, err)
		}
		if next == app && len(ops) == 0 {
			return nil
		}
		put, err := store.PutApp(next, at)
		if err != nil {
			return r.failed(op, name, err)
		}
		_, err = r.cfg.Store.Commit(ctx, append(ops, put)...)
		if errors.Is(err, fleet.ErrConflict) && try < conflicts {
			continue
		}
		return r.failed(op, name, err)
	}
}

// failed says plainly what could not be done.
func (r *Releases) failed(op string, name fleet.AppName, err error) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*fleet.Error](err); ok && !errors.Is(err, store.ErrAway) {
		return err
	}
	e := &fleet.Error{Op: op, Subject: string(name), Err: err}
	if errors.Is(err, store.ErrAway) {
		e.Kind = fleet.ErrUnavailable
		e.Hint = "the store is away: what runs goes on and what sleeps still wakes, but nothing can be changed until it is back"
	}
	return e
}

func notFound(op string, name fleet.AppName) error {
	return &fleet.Error{Op: op, Subject: string(name), Kind: fleet.ErrNotFound, Hint: "fastcontainer apps lists them"}
}

// Rollback makes the previous revision current again; a second one undoes the
// first. A rolled back app stays what it is, also if its tag moves, until the
// next deploy.
func (r *Releases) Rollback(ctx context.Context, name fleet.AppName) (fleet.Revision, error) {
	var rev fleet.Revision
	err := r.change(ctx, "roll back", name, func(app fleet.App, found bool) (fleet.App, []store.Op, error) {
		if !found {
			return app, nil, notFound("roll back", name)
		}
		if app.Previous == "" {
			return app, nil, &fleet.Error{Op: "roll back", Subject: string(name), Kind: fleet.ErrInvalid, Err: errors.New("there is no earlier revision"), Hint: "fastcontainer inspect " + string(name) + " lists them"}
		}
		var err error
		if rev, err = store.Revision(ctx, r.cfg.Store, app.Previous); err != nil {
			return app, nil, err
		}
		if _, err := r.cfg.Images.Get(rev.Image); errors.Is(err, fleet.ErrNotFound) {
			if _, err := r.cfg.Images.Pull(ctx, rev.Spec.Image, nil); err != nil {
				return app, nil, err
			}
		}
		ops, err := r.hosts(ctx, name, rev.Spec.Hosts, true)
		app.Current, app.Previous = app.Previous, app.Current
		app.UpdatedAt = time.Now().UTC()
		return app, ops, err
	})
	if err == nil {
		r.cfg.Events(fleet.Event{Type: fleet.EventDeploy, App: name, Revision: rev.ID, Cause: CauseRollback})
	}
	return rev, err
}

// SetStopped stops an app (its requests get 503 and start nothing) or starts
// it again (the next request wakes it).
func (r *Releases) SetStopped(ctx context.Context, name fleet.AppName, stopped bool) error {
	return r.change(ctx, "stop", name, func(app fleet.App, found bool) (fleet.App, []store.Op, error) {
		if !found {
			return app, nil, notFound("stop", name)
		}
		if app.Stopped != stopped {
			app.Stopped, app.UpdatedAt = stopped, time.Now().UTC()
		}
		return app, nil, nil
	})
}

// Delete removes an app, its revisions and its hosts.
func (r *Releases) Delete(ctx context.Context, name fleet.AppName) error {
	for try := 1; ; try++ {
		app, at, err := store.App(ctx, r.cfg.Store, name)
		if errors.Is(err, fleet.ErrNotFound) {
			return notFound("delete", name)
		}
		if err != nil {
			return r.failed("delete", name, err)
		}
		hosts, err := r.hostsOf(ctx, name)
		if err != nil {
			return r.failed("delete", name, err)
		}
		revs, err := store.Revisions(ctx, r.cfg.Store, name)
		if err != nil {
			return r.failed("delete", name, err)
		}
		ops := []store.Op{store.DeleteApp(app.Name, at)}
		for _, v := range revs {
			ops = append(ops, store.DeleteRevision(v.ID))
		}
		for _, h := range hosts {
			ops = append(ops, store.Op{Key: store.HostKey(h), If: store.AnyRev})
		}
		_, err = r.cfg.Store.Commit(ctx, ops...)
		if errors.Is(err, fleet.ErrConflict) && try < conflicts {
			continue
		}
		if err != nil {
			return r.failed("delete", name, err)
		}
		r.cfg.Events(fleet.Event{Type: fleet.EventDelete, App: name, Cause: "delete"})
		return nil
	}
}

// UsedImages are the images of every revision that an app may still run.
func (r *Releases) UsedImages(ctx context.Context) ([]fleet.Digest, error) {
	entries, _, err := r.cfg.Store.List(ctx, store.RevisionsPrefix)
	if err != nil {
		return nil, r.failed("list", "images in use", err)
	}
	var used []fleet.Digest
	for _, e := range entries {
		rev, err := store.DecodeRevision(e)
		if err != nil {
			return nil, err
		}
		used = append(used, rev.Image)
	}
	slices.Sort(used)
	return slices.Compact(used), nil
}

// moves tells whether a reference can mean another image later. References by
// digest cannot; local paths change when somebody means it, by a deploy.
func moves(ref string) bool {
	if strings.Contains(ref, "@sha256:") {
		return false
	}
	scheme, _, _ := strings.Cut(ref, ":")
	return !slices.Contains([]string{"oci", "tar", "dir"}, scheme)
}

// Watch looks tags up again on schedule until ctx ends, and makes a revision
// of every app whose tag has moved.
func (r *Releases) Watch(ctx context.Context) {
	if r.cfg.Refresh <= 0 {
		return
	}
	ticks := time.NewTicker(r.cfg.Refresh)
	defer ticks.Stop()
	failing := map[string]string{} // told once
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticks.C:
		}
		failing = r.refresh(ctx, failing)
	}
}

// refresh looks each distinct tag up once.
func (r *Releases) refresh(ctx context.Context, told map[string]string) map[string]string {
	failing := map[string]string{}
	apps, _, err := store.Apps(ctx, r.cfg.Store)
	if err != nil {
		r.cfg.Logger.Warn("look for newer images", "error", err)
		return told
	}
	byRef := map[string][]fleet.Revision{}
	for _, app := range apps {
		if app.Current != fleet.MakeRevisionID(app.Name, app.Latest) {
			continue // rolled back
		}
		rev, err := store.Revision(ctx, r.cfg.Store, app.Current)
		if err == nil && moves(rev.Spec.Image) {
			byRef[rev.Spec.Image] = append(byRef[rev.Spec.Image], rev)
		}
	}
	for ref, revs := range byRef {
		if ctx.Err() != nil {
			return told
		}
		if err := r.renew(ctx, ref, revs); err != nil {
			failing[ref] = err.Error()
			if told[ref] != err.Error() {
				r.cfg.Logger.Warn("look for a newer image", "image", ref, "apps", len(revs), "error", err)
			}
		}
	}
	return failing
}

func (r *Releases) renew(ctx context.Context, ref string, revs []fleet.Revision) error {
	digest, err := r.cfg.Images.Resolve(ctx, ref)
	if err != nil {
		return err
	}
	revs = slices.DeleteFunc(revs, func(v fleet.Revision) bool { return v.Image == digest })
	if len(revs) == 0 {
		return nil
	}
	img, err := r.cfg.Images.Pull(ctx, ref, nil)
	if err != nil {
		return err
	}
	var errs []error
	for _, v := range revs {
		if v.Image == img.Digest {
			continue
		}
		if _, err := r.release(ctx, v.Spec, img, CauseImageChanged, v.ID); err != nil {
			errs = append(errs, errors.New(string(v.App)+": "+err.Error()))
		}
	}
	return errors.Join(errs...)
}
