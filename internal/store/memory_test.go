package store_test

import (
	"context"
	"errors"
	"fmt"
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

func TestWatchApps_OutlivesAnInterruption(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := store.NewMemory()
		deploy := func(n int) {
			_, at, _ := store.App(t.Context(), m, "a")
			rev := fleet.Revision{ID: fleet.MakeRevisionID("a", n), App: "a"}
			a, _ := store.PutApp(fleet.App{Name: "a", Current: rev.ID, Latest: n}, at)
			r, _ := store.PutRevision(rev)
			if _, err := m.Commit(t.Context(), a, r); err != nil {
				t.Fatal(err)
			}
		}
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
		deploy(1)
		if got := <-told; got != "a@1 false" {
			t.Errorf("told %q", got)
		}
		cancel()
		synctest.Wait()
	})
}
