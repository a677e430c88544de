package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// Where the words of package fleet are kept, as JSON:
//
//	/apps/NAME               fleet.App
//	/revisions/NAME/00000001 fleet.Revision
//	/hosts/HOST              the name of the app that it belongs to
//	/nodes/NAME              fleet.Node, as long as the node's session
const (
	AppsPrefix      = "/apps/"
	RevisionsPrefix = "/revisions/"
	HostsPrefix     = "/hosts/"
	NodesPrefix     = "/nodes/"
)

// AppKey is where an app is kept.
func AppKey(name fleet.AppName) string { return AppsPrefix + string(name) }

// HostKey is where the owner of a host is kept.
func HostKey(host string) string { return HostsPrefix + host }

// NodeKey is where a node is kept.
func NodeKey(name fleet.NodeName) string { return NodesPrefix + string(name) }

// RevisionKey is where a revision is kept; keys sort as revisions follow.
func RevisionKey(id fleet.RevisionID) string {
	app, n, err := id.Split()
	if err != nil {
		return RevisionsPrefix + string(id)
	}
	return fmt.Sprintf("%s%s/%08d", RevisionsPrefix, app, n)
}

func decode[T any](e Entry) (T, error) {
	var v T
	if err := json.Unmarshal(e.Value, &v); err != nil {
		return v, fmt.Errorf("read %s from the store: %w", e.Key, err)
	}
	return v, nil
}

func put(key string, v any, at Rev, session bool) (Op, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return Op{}, fmt.Errorf("write %s to the store: %w", key, err)
	}
	return Op{Key: key, Value: b, If: at, Session: session}, nil
}

// App reads an app and when it was last changed. fleet.ErrNotFound, with 0 as
// the change, if there is none.
func App(ctx context.Context, s Store, name fleet.AppName) (fleet.App, Rev, error) {
	e, err := s.Get(ctx, AppKey(name))
	if err != nil {
		return fleet.App{}, 0, err
	}
	app, err := decode[fleet.App](e)
	return app, e.Rev, err
}

// Apps reads all apps, by name, and the revision that the list is true for.
func Apps(ctx context.Context, s Store) ([]fleet.App, Rev, error) {
	return list[fleet.App](ctx, s, AppsPrefix)
}

// Revision reads one revision.
func Revision(ctx context.Context, s Store, id fleet.RevisionID) (fleet.Revision, error) {
	e, err := s.Get(ctx, RevisionKey(id))
	if err != nil {
		return fleet.Revision{}, err
	}
	return DecodeRevision(e)
}

// DecodeRevision reads a revision from its entry.
func DecodeRevision(e Entry) (fleet.Revision, error) { return decode[fleet.Revision](e) }

// Revisions of an app, oldest first.
func Revisions(ctx context.Context, s Store, app fleet.AppName) ([]fleet.Revision, error) {
	revs, _, err := list[fleet.Revision](ctx, s, RevisionsPrefix+string(app)+"/")
	return revs, err
}

// Nodes that are alive.
func Nodes(ctx context.Context, s Store) ([]fleet.Node, error) {
	nodes, _, err := list[fleet.Node](ctx, s, NodesPrefix)
	return nodes, err
}

// list reads all values; one that cannot be read fails it.
func list[T any](ctx context.Context, s Store, prefix string) ([]T, Rev, error) {
	entries, at, err := s.List(ctx, prefix)
	if err != nil {
		return nil, 0, err
	}
	all := make([]T, 0, len(entries))
	for _, e := range entries {
		v, err := decode[T](e)
		if err != nil {
			return nil, 0, err
		}
		all = append(all, v)
	}
	return all, at, nil
}

// PutApp writes an app that was last changed at a revision; 0: it is new.
func PutApp(a fleet.App, at Rev) (Op, error) { return put(AppKey(a.Name), a, at, false) }

// PutRevision writes a new revision.
func PutRevision(r fleet.Revision) (Op, error) { return put(RevisionKey(r.ID), r, 0, false) }

// PutNode writes a node's own record, which ends with its session.
func PutNode(n fleet.Node) (Op, error) { return put(NodeKey(n.Name), n, AnyRev, true) }

// DeleteApp removes an app that was last changed at a revision.
func DeleteApp(name fleet.AppName, at Rev) Op { return Op{Key: AppKey(name), If: at} }

// DeleteRevision removes a revision.
func DeleteRevision(id fleet.RevisionID) Op { return Op{Key: RevisionKey(id), If: AnyRev} }

// AppChange is one step of WatchApps.
type AppChange struct {
	App fleet.App
	// Revision is the app's current one.
	Revision fleet.Revision
	// Deleted: App has only its name.
	Deleted bool
	// Synced tells, with nothing else, that every app has been told once.
	Synced bool
}

// WatchApps tells every app with its current revision, then Synced, then every
// change, until ctx ends or f fails. It outlives interruptions of the store,
// which it waits for. What cannot be read is passed over, so that one damaged
// app does not hide the others; reading it by its name says what is wrong.
func WatchApps(ctx context.Context, s Store, f func(AppChange) error) error {
	w := appWatch{s: s, f: f, known: map[fleet.AppName]fleet.App{}}
	for pause := 50 * time.Millisecond; ; {
		err := w.run(ctx, &pause)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case w.failed != nil:
			return w.failed
		case errors.Is(err, ErrCompacted):
			continue
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
		pause = min(2*pause, 2*time.Second)
	}
}

type appWatch struct {
	s      Store
	f      func(AppChange) error
	known  map[fleet.AppName]fleet.App
	synced bool
	failed error // f's
}

func (w *appWatch) tell(c AppChange) error {
	w.failed = w.f(c)
	return w.failed
}

// run lists everything and follows it until something is in the way.
func (w *appWatch) run(ctx context.Context, pause *time.Duration) error {
	apps, at, err := w.s.List(ctx, AppsPrefix)
	if err != nil {
		return err
	}
	revs, _, err := w.s.List(ctx, RevisionsPrefix)
	if err != nil {
		return err
	}
	byKey := make(map[string]Entry, len(revs))
	for _, e := range revs {
		byKey[e.Key] = e
	}
	found := make(map[fleet.AppName]bool, len(apps))
	for _, e := range apps {
		found[appName(e.Key)] = true
		app, err := decode[fleet.App](e)
		if err != nil || w.known[app.Name] == app {
			continue
		}
		rev, err := DecodeRevision(byKey[RevisionKey(app.Current)])
		if err != nil {
			continue // deleted between the two lists: the watch will tell
		}
		if err := w.set(app, rev); err != nil {
			return err
		}
	}
	for name := range w.known {
		if !found[name] {
			if err := w.delete(name); err != nil {
				return err
			}
		}
	}
	if !w.synced {
		w.synced = true
		if err := w.tell(AppChange{Synced: true}); err != nil {
			return err
		}
	}
	*pause = 50 * time.Millisecond
	return w.s.Watch(ctx, AppsPrefix, at, func(c Change) error {
		if c.Deleted {
			return w.delete(appName(c.Key))
		}
		app, err := decode[fleet.App](c.Entry)
		if err != nil {
			return nil //nolint:nilerr // passed over
		}
		e, err := w.s.Get(ctx, RevisionKey(app.Current))
		if errors.Is(err, fleet.ErrNotFound) {
			return nil // changed again meanwhile: the watch will tell
		}
		if err != nil {
			return err
		}
		rev, err := DecodeRevision(e)
		if err != nil {
			return nil //nolint:nilerr // passed over
		}
		return w.set(app, rev)
	})
}

func appName(key string) fleet.AppName { return fleet.AppName(strings.TrimPrefix(key, AppsPrefix)) }

func (w *appWatch) set(app fleet.App, rev fleet.Revision) error {
	w.known[app.Name] = app
	return w.tell(AppChange{App: app, Revision: rev})
}

func (w *appWatch) delete(name fleet.AppName) error {
	if _, ok := w.known[name]; !ok {
		return nil
	}
	delete(w.known, name)
	return w.tell(AppChange{App: fleet.App{Name: name}, Deleted: true})
}
