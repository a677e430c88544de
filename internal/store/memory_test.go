package store_test

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/store"
	"github.com/fastcontainer/fastcontainer/internal/store/storetest"
)

func TestMemory(t *testing.T) {
	storetest.Run(t, func(t *testing.T) store.Store {
		m := store.NewMemory()
		t.Cleanup(func() { _ = m.Close() })
		return m
	})
}

func TestMemory_AwayAndBack(t *testing.T) {
	m := store.NewMemory()
	m.SetAway(true)
	if err := m.Ping(t.Context()); !errors.Is(err, store.ErrAway) || !errors.Is(err, fleet.ErrUnavailable) {
		t.Errorf("got %v", err)
	}
	m.SetAway(false)
	if err := m.Ping(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestMemory_WhatASessionWroteEndsWithIt(t *testing.T) {
	m := store.NewMemory()
	op, err := store.PutNode(fleet.Node{Name: "n"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Commit(t.Context(), op); err != nil {
		t.Fatal(err)
	}
	gone := make(chan bool, 1)
	go func() {
		_ = m.Watch(t.Context(), "/nodes/", 1, func(c store.Change) error { gone <- c.Deleted; return nil })
	}()
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if !<-gone {
		t.Error("it was not deleted")
	}
}

func deploy(t *testing.T, s store.Store, name fleet.AppName, n int) {
	t.Helper()
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
	if _, err := s.Commit(t.Context(), a, r); err != nil {
		t.Fatal(err)
	}
}

func TestWatchApps_OutlivesAnInterruption(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := store.NewMemory()
		m.SetAway(true)
		ctx, cancel := context.WithCancel(t.Context())
		told := make(chan string, 100)
		go func() {
			_ = store.WatchApps(ctx, m, func(c store.AppChange) error {
				told <- fmt.Sprintf("%s %v", c.Revision.ID, c.Synced)
				return nil
			})
		}()
		time.Sleep(time.Minute)
		m.SetAway(false)
		if got := <-told; got != " true" {
			t.Errorf("told %q", got)
		}
		m.SetAway(true)
		m.SetAway(false)
		deploy(t, m, "a", 1)
		if got := <-told; got != "a@1 false" {
			t.Errorf("told %q", got)
		}
		cancel()
		synctest.Wait()
	})
}

func TestMemory_KeepsBoundedHistory(t *testing.T) {
	m := store.NewMemory()
	const kept = 10_000
	for range kept + 1 {
		if _, err := m.Commit(t.Context(), store.Op{Key: "/k", Value: []byte("v"), If: store.AnyRev}); err != nil {
			t.Fatal(err)
		}
	}
	errSeen := errors.New("seen")
	seen := func(store.Change) error { return errSeen }
	if err := m.Watch(t.Context(), "/", 0, seen); !errors.Is(err, store.ErrCompacted) {
		t.Errorf("older than what is kept: %v", err)
	}
	if err := m.Watch(t.Context(), "/", 1, seen); !errors.Is(err, errSeen) {
		t.Errorf("the oldest that is kept: %v", err)
	}
}

// It falls behind: while it tells of Synced, more happens than a history holds.
func TestWatchApps_OutlivesCompaction(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := store.NewMemory()
		deploy(t, m, "stays", 1)
		deploy(t, m, "vanishes", 1)
		ctx, cancel := context.WithCancel(t.Context())
		told, release := make(chan string), make(chan bool)
		go func() {
			_ = store.WatchApps(ctx, m, func(c store.AppChange) error {
				told <- fmt.Sprintf("%s %s %v %v", c.App.Name, c.Revision.ID, c.Deleted, c.Synced)
				if c.Synced {
					<-release
				}
				return nil
			})
		}()
		expect := func(want string) {
			t.Helper()
			if got := <-told; got != want {
				t.Fatalf("told %q, want %q", got, want)
			}
		}
		expect("stays stays@1 false false")
		expect("vanishes vanishes@1 false false")
		expect("  false true")
		if _, err := m.Commit(t.Context(), store.DeleteApp("vanishes", store.AnyRev)); err != nil {
			t.Fatal(err)
		}
		deploy(t, m, "comes", 1)
		for range 10_000 {
			if _, err := m.Commit(t.Context(), store.Op{Key: "/k", Value: []byte("v"), If: store.AnyRev}); err != nil {
				t.Fatal(err)
			}
		}
		release <- true
		expect("comes comes@1 false false")
		expect("vanishes  true false")
		deploy(t, m, "stays", 2)
		expect("stays stays@2 false false")
		cancel()
		synctest.Wait()
	})
}

// counted counts the calls to a store.
type counted struct {
	store.Store
	gets, lists atomic.Int32
}

func (c *counted) Get(ctx context.Context, key string) (store.Entry, error) {
	c.gets.Add(1)
	return c.Store.Get(ctx, key)
}

func (c *counted) List(ctx context.Context, prefix string) ([]store.Entry, store.Rev, error) {
	c.lists.Add(1)
	return c.Store.List(ctx, prefix)
}

func TestWatchApps_ManyAppsAreTwoLists(t *testing.T) {
	const apps = 10_000
	s := &counted{Store: store.NewMemory()}
	var ops []store.Op
	for i := range apps {
		name := fleet.AppName(fmt.Sprintf("app%d", i))
		a, _ := store.PutApp(fleet.App{Name: name, Current: fleet.MakeRevisionID(name, 1)}, 0)
		r, _ := store.PutRevision(fleet.Revision{ID: fleet.MakeRevisionID(name, 1), App: name})
		if ops = append(ops, a, r); len(ops) >= store.MaxOps || i == apps-1 {
			if _, err := s.Commit(t.Context(), ops...); err != nil {
				t.Fatal(err)
			}
			ops = ops[:0]
		}
	}
	told := 0
	errSynced := errors.New("synced")
	err := store.WatchApps(t.Context(), s, func(c store.AppChange) error {
		if c.Synced {
			return errSynced
		}
		told++
		return nil
	})
	if !errors.Is(err, errSynced) || told != apps {
		t.Errorf("told %d of %d apps, %v", told, apps, err)
	}
	if s.lists.Load() != 2 || s.gets.Load() != 0 {
		t.Errorf("%d lists and %d gets, want 2 and none", s.lists.Load(), s.gets.Load())
	}
}
