// Package storetest is what every body of store.Store must pass.
package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/store"
)

// Run checks the contract. open gives an empty store, and closes it when the
// test ends.
func Run(t *testing.T, open func(t *testing.T) store.Store) {
	for name, f := range map[string]func(*testing.T, store.Store){
		"read what was written":         readBack,
		"conditions":                    conditions,
		"all or nothing":                atomic,
		"bounds":                        bounds,
		"random operations and a model": model,
		"watch":                         watch,
		"watch among many writers":      concurrent,
		"a watch of the future":         future,
		"ended contexts":                ended,
		"typed words":                   typed,
		"apps are watched":              watchApps,
	} {
		t.Run(name, func(t *testing.T) { f(t, open(t)) })
	}
}

func commit(t *testing.T, s store.Store, ops ...store.Op) store.Rev {
	t.Helper()
	rev, err := s.Commit(t.Context(), ops...)
	if err != nil {
		t.Fatal(err)
	}
	return rev
}

func set(key, value string) store.Op {
	return store.Op{Key: key, Value: []byte(value), If: store.AnyRev}
}

func remove(key string) store.Op { return store.Op{Key: key, If: store.AnyRev} }

func readBack(t *testing.T, s store.Store) {
	if err := s.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(t.Context(), "/a"); !errors.Is(err, fleet.ErrNotFound) {
		t.Errorf("a missing key: %v", err)
	}
	first := commit(t, s, set("/a", "1"), set("/b", ""))
	e, err := s.Get(t.Context(), "/a")
	if err != nil || string(e.Value) != "1" || e.Rev != first || e.Key != "/a" {
		t.Errorf("got %+v, %v", e, err)
	}
	second := commit(t, s, set("/a", "2"))
	if second <= first {
		t.Errorf("revisions go from %d to %d", first, second)
	}
	commit(t, s, set("/ab", "3"), set("/c", "4"))
	list, at, err := s.List(t.Context(), "/a")
	if err != nil || len(list) != 2 || list[0].Key != "/a" || list[1].Key != "/ab" || at <= second {
		t.Errorf("list: %+v at %d, %v", list, at, err)
	}
	commit(t, s, remove("/a"), remove("/missing"))
	if _, err := s.Get(t.Context(), "/a"); !errors.Is(err, fleet.ErrNotFound) {
		t.Errorf("a deleted key: %v", err)
	}
}

func conditions(t *testing.T, s store.Store) {
	rev := commit(t, s, store.Op{Key: "/k", Value: []byte("1")})
	for name, op := range map[string]store.Op{
		"exists already":     {Key: "/k", Value: []byte("x")},
		"changed meanwhile":  {Key: "/k", Value: []byte("x"), If: rev + 1},
		"delete a newer one": {Key: "/k", If: rev + 1},
		"change a missing":   {Key: "/missing", Value: []byte("x"), If: rev},
	} {
		if _, err := s.Commit(t.Context(), op); !errors.Is(err, store.ErrConflict) || !errors.Is(err, fleet.ErrConflict) {
			t.Errorf("%s: %v", name, err)
		}
	}
	commit(t, s, store.Op{Key: "/k", Value: []byte("2"), If: rev})
	if e, err := s.Get(t.Context(), "/k"); err != nil || string(e.Value) != "2" {
		t.Errorf("got %+v, %v", e, err)
	}
}

func atomic(t *testing.T, s store.Store) {
	rev := commit(t, s, set("/x", "1"))
	if _, err := s.Commit(t.Context(), set("/y", "1"), store.Op{Key: "/x", Value: []byte("2"), If: rev + 5}); !errors.Is(err, store.ErrConflict) {
		t.Errorf("got %v", err)
	}
	if _, err := s.Get(t.Context(), "/y"); !errors.Is(err, fleet.ErrNotFound) {
		t.Errorf("half a transaction was carried out: %v", err)
	}
	rev = commit(t, s, set("/x", "2"), set("/y", "2"))
	for _, k := range []string{"/x", "/y"} {
		if e, err := s.Get(t.Context(), k); err != nil || e.Rev != rev {
			t.Errorf("%s: %+v, %v; want revision %d", k, e, err, rev)
		}
	}
}

func bounds(t *testing.T, s store.Store) {
	commit(t, s, store.Op{Key: "/big", Value: bytes.Repeat([]byte("x"), store.MaxValue), If: store.AnyRev})
	many := make([]store.Op, store.MaxOps+1)
	for i := range many {
		many[i] = set(fmt.Sprintf("/many/%d", i), "x")
	}
	commit(t, s, many[:store.MaxOps]...)
	// All bounds at once: the largest transaction of all.
	for i := range many[:store.MaxOps] {
		many[i].Key = fmt.Sprintf("/%0*d", store.MaxKey-1, i)
		many[i].Value = bytes.Repeat([]byte("x"), store.MaxValue/store.MaxOps)
	}
	commit(t, s, many[:store.MaxOps]...)
	for name, ops := range map[string][]store.Op{
		"too large": {{Key: "/huge", Value: make([]byte, store.MaxValue+1), If: store.AnyRev}},
		"too large together": {
			{Key: "/half", Value: make([]byte, store.MaxValue/2), If: store.AnyRev},
			{Key: "/more", Value: make([]byte, store.MaxValue/2+1), If: store.AnyRev},
		},
		"a long key": {set("/"+strings.Repeat("k", store.MaxKey), "x")},
		"no key":     {set("", "x")},
		"twice":      {set("/t", "1"), set("/t", "2")},
		"too many":   many,
	} {
		if _, err := s.Commit(t.Context(), ops...); !errors.Is(err, fleet.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func model(t *testing.T, s store.Store) {
	r := rand.New(rand.NewPCG(1, 2))
	truth := map[string]store.Entry{}
	for step := range 400 {
		var ops []store.Op
		good := true
		for _, i := range r.Perm(12)[:1+r.IntN(3)] {
			op := store.Op{Key: fmt.Sprintf("/m/%d", i), If: store.AnyRev}
			if r.IntN(3) > 0 {
				op.Value = []byte(fmt.Sprint(step))
			}
			switch r.IntN(3) {
			case 0:
				op.If = truth[op.Key].Rev
			case 1:
				op.If = store.Rev(r.IntN(step + 1))
			}
			good = good && (op.If == store.AnyRev || op.If == truth[op.Key].Rev)
			ops = append(ops, op)
		}
		rev, err := s.Commit(t.Context(), ops...)
		if good != (err == nil) {
			t.Fatalf("step %d: %+v: %v, want success: %v", step, ops, err, good)
		}
		if !good {
			continue
		}
		for _, op := range ops {
			if op.Value == nil {
				delete(truth, op.Key)
			} else {
				truth[op.Key] = store.Entry{Key: op.Key, Value: op.Value, Rev: rev}
			}
		}
		if step%20 != 0 {
			continue
		}
		list, _, err := s.List(t.Context(), "/m/")
		if err != nil || len(list) != len(truth) {
			t.Fatalf("step %d: %d entries, want %d; %v", step, len(list), len(truth), err)
		}
		for i, key := range slices.Sorted(maps.Keys(truth)) {
			if list[i].Key != key || !bytes.Equal(list[i].Value, truth[key].Value) || list[i].Rev != truth[key].Rev {
				t.Fatalf("step %d: got %+v, want %+v", step, list[i], truth[key])
			}
		}
	}
}

// follow collects changes until stop says that they are enough.
func follow(t *testing.T, s store.Store, prefix string, after store.Rev, enough func([]store.Change) bool) []store.Change {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	errEnough := errors.New("enough")
	var got []store.Change
	err := s.Watch(ctx, prefix, after, func(c store.Change) error {
		got = append(got, c)
		if enough(got) {
			return errEnough
		}
		return nil
	})
	if !errors.Is(err, errEnough) {
		t.Fatalf("watch ended with %v after %d changes", err, len(got))
	}
	return got
}

func watch(t *testing.T, s store.Store) {
	before := commit(t, s, set("/w/a", "1"), set("/v", "1"))
	commit(t, s, set("/w/a", "2"))
	commit(t, s, set("/other", "2"))
	commit(t, s, remove("/w/a"))
	done := make(chan []store.Change)
	go func() {
		done <- follow(t, s, "/w/", before, func(c []store.Change) bool { return c[len(c)-1].Key == "/w/end" })
	}()
	commit(t, s, set("/w/b", "3"))
	commit(t, s, set("/w/end", "4"))
	var text []string
	for _, c := range <-done {
		text = append(text, fmt.Sprintf("%s=%s,%v", c.Key, c.Value, c.Deleted))
	}
	if got, want := strings.Join(text, " "), "/w/a=2,false /w/a=,true /w/b=3,false /w/end=4,false"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	// A function that fails ends the watch with its error.
	errOwn := errors.New("own")
	if err := s.Watch(t.Context(), "/w/", before, func(store.Change) error { return errOwn }); !errors.Is(err, errOwn) {
		t.Errorf("got %v", err)
	}
}

// A watch after a revision that is not yet there tells nothing before it.
func future(t *testing.T, s store.Store) {
	rev := commit(t, s, set("/f/0", "x"))
	done := make(chan []store.Change)
	go func() {
		done <- follow(t, s, "/f/", rev+2, func(c []store.Change) bool { return c[len(c)-1].Key == "/f/4" })
	}()
	for i := range 4 {
		commit(t, s, set(fmt.Sprintf("/f/%d", i+1), "x"))
	}
	if got := <-done; got[0].Key != "/f/3" || len(got) != 2 {
		t.Errorf("got %+v", got)
	}
}

func concurrent(t *testing.T, s store.Store) {
	const writers, each = 4, 50
	_, start, err := s.List(t.Context(), "/c/")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				if _, err := s.Commit(t.Context(), set(fmt.Sprintf("/c/%d", w), fmt.Sprint(i))); err != nil {
					t.Error(err)
				}
			}
		})
	}
	got := follow(t, s, "/c/", start, func(c []store.Change) bool { return len(c) == writers*each })
	wg.Wait()
	next := map[string]int{}
	last := start
	for _, c := range got {
		if string(c.Value) != fmt.Sprint(next[c.Key]) {
			t.Fatalf("%s: got %s, want %d: one was lost or told twice", c.Key, c.Value, next[c.Key])
		}
		if c.Rev <= last {
			t.Fatalf("revision %d after %d", c.Rev, last)
		}
		next[c.Key]++
		last = c.Rev
	}
}

func ended(t *testing.T, s store.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Get(ctx, "/a"); !errors.Is(err, context.Canceled) {
		t.Errorf("get: %v", err)
	}
	if _, err := s.Commit(ctx, set("/a", "1")); !errors.Is(err, context.Canceled) {
		t.Errorf("commit: %v", err)
	}
	if err := s.Watch(ctx, "/", 0, func(store.Change) error { return nil }); !errors.Is(err, context.Canceled) && !errors.Is(err, store.ErrCompacted) {
		t.Errorf("watch: %v", err)
	}
}

func typed(t *testing.T, s store.Store) {
	app := fleet.App{Name: "blog", Current: "blog@2", Latest: 2}
	put, err := store.PutApp(app, 0)
	if err != nil {
		t.Fatal(err)
	}
	ops := []store.Op{put}
	for n := range 2 {
		op, err := store.PutRevision(fleet.Revision{ID: fleet.MakeRevisionID("blog", n+1), App: "blog", Spec: fleet.Spec{Name: "blog", Lifetime: 7}})
		if err != nil {
			t.Fatal(err)
		}
		ops = append(ops, op)
	}
	rev := commit(t, s, ops...)
	got, at, err := store.App(t.Context(), s, "blog")
	if err != nil || got != app || at != rev {
		t.Errorf("got %+v at %d, %v", got, at, err)
	}
	revs, err := store.Revisions(t.Context(), s, "blog")
	if err != nil || len(revs) != 2 || revs[1].ID != "blog@2" || revs[1].Spec.Lifetime != 7 {
		t.Errorf("got %+v, %v", revs, err)
	}
	node, err := store.PutNode(fleet.Node{Name: "n1", CPUs: 2})
	if err != nil {
		t.Fatal(err)
	}
	commit(t, s, node)
	if nodes, err := store.Nodes(t.Context(), s); err != nil || len(nodes) != 1 || nodes[0].CPUs != 2 {
		t.Errorf("got %+v, %v", nodes, err)
	}
	commit(t, s, store.DeleteApp("blog", rev), store.DeleteRevision("blog@1"))
	if _, _, err := store.App(t.Context(), s, "blog"); !errors.Is(err, fleet.ErrNotFound) {
		t.Errorf("got %v", err)
	}
}

func watchApps(t *testing.T, s store.Store) {
	deploy := func(name fleet.AppName, n int) {
		_, at, _ := store.App(t.Context(), s, name)
		rev := fleet.Revision{ID: fleet.MakeRevisionID(name, n), App: name}
		a, err := store.PutApp(fleet.App{Name: name, Current: rev.ID, Latest: n}, at)
		if err != nil {
			t.Fatal(err)
		}
		r, err := store.PutRevision(rev)
		if err != nil {
			t.Fatal(err)
		}
		commit(t, s, a, r)
	}
	deploy("a", 1)
	deploy("b", 1)
	told := make(chan string, 100)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() {
		_ = store.WatchApps(ctx, s, func(c store.AppChange) error {
			switch {
			case c.Synced:
				told <- "synced"
			case c.Deleted:
				told <- "-" + string(c.App.Name)
			default:
				told <- string(c.Revision.ID)
			}
			return nil
		})
	})
	expect := func(want string) {
		t.Helper()
		select {
		case got := <-told:
			if got != want {
				t.Fatalf("told %s, want %s", got, want)
			}
		case <-ctx.Done():
			t.Fatalf("not told of %s", want)
		}
	}
	expect("a@1")
	expect("b@1")
	expect("synced")
	commit(t, s, set(store.AppKey("damaged"), "{"))
	deploy("a", 2)
	expect("a@2")
	_, at, err := store.App(t.Context(), s, "b")
	if err != nil {
		t.Fatal(err)
	}
	commit(t, s, store.DeleteApp("b", at))
	expect("-b")
	cancel()
	wg.Wait()
}
