package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/checkpoint"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/sandbox"
)

// saver starts real sandboxes, and saves and restores as a test says.
type saver struct {
	sandbox.Runtime
	host    func(ctx context.Context) (string, error)
	save    func(s sandbox.Spec) error
	restore func() error // nil, or without an error: a sandbox like any other
}

func (s *saver) CheckpointHost(ctx context.Context) (string, error) {
	if s.host == nil {
		return "host", nil
	}
	return s.host(ctx)
}

func (s *saver) Checkpoint(_ context.Context, spec sandbox.Spec, _ sandbox.Capture, dir string) error {
	if s.save != nil {
		if err := s.save(spec); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(dir, "image"), []byte("processes"), 0o600)
}

func (s *saver) Restore(ctx context.Context, spec sandbox.Spec, _ string) (sandbox.Sandbox, error) {
	if s.restore != nil {
		if err := s.restore(); err != nil {
			return nil, err
		}
	}
	return s.Start(ctx, spec)
}

// saves has the bench's node save processes.
func (b *bench) saves() *saver {
	b.t.Helper()
	s := &saver{Runtime: b.box}
	store, err := checkpoint.Open(checkpoint.Config{Dir: filepath.Join(b.dir, "checkpoints"), Budget: 1 << 30})
	if err != nil {
		b.t.Fatal(err)
	}
	b.node.cfg.Runtimes[fleet.RuntimeNative], b.node.cfg.Checkpoints = s, store
	return s
}

// anyRoom is a machine with room.
func anyRoom() (func(), bool) { return func() {}, true }

// kind starts an instance, restored if that is possible, and tells how it was.
func (b *bench) kind(rev fleet.Revision) fleet.StartKind {
	b.t.Helper()
	i, err := b.node.Start(b.t.Context(), Order{Revision: rev, Kind: fleet.CheckpointStart, Cause: "test", Stages: &fleet.Stages{}})
	if err != nil {
		b.t.Fatal(err)
	}
	if err := b.node.Stop(b.t.Context(), i, "test"); err != nil {
		b.t.Error(err)
	}
	return i.Info().Kind
}

// What the machine lacks for a moment costs a cold start, and no more. Only what
// is of no use is not tried again.
func TestRestore_OnlyWhatIsOfNoUseIsRefused(t *testing.T) {
	b := newBench(t)
	s := b.saves()
	for name, c := range map[string]struct {
		err     error
		refused bool
	}{
		"CRIU says no":   {fmt.Errorf("restore: %w: CRIU failed", sandbox.ErrUnrestorable), true},
		"no memory":      {unix.ENOMEM, false},
		"no descriptors": {fmt.Errorf("restore: %w", unix.EMFILE), false},
		"try again":      {unix.EAGAIN, false},
		"too slow":       {errNotReady, false},
		"no address":     {&fleet.Error{Op: "attach", Kind: fleet.ErrOverloaded, Err: errors.New("all addresses are in use")}, false},
	} {
		t.Run(name, func(t *testing.T) {
			rev := b.revision(nil, server...)
			if b.node.Save(t.Context(), rev, "test", nil, anyRoom) == 0 {
				t.Fatalf("it is not saved: %+v", b.last(fleet.EventCheckpoint))
			}
			s.restore = func() error { return c.err }
			if k := b.kind(rev); k != fleet.ColdStart {
				t.Errorf("a %s start", k)
			}
			want, again := causeMissed, fleet.CheckpointStart
			if c.refused {
				want, again = causeUnrestore, fleet.ColdStart
			}
			if e := b.last(fleet.EventCheckpoint); e.Cause != want || !strings.Contains(e.Detail, c.err.Error()) {
				t.Errorf("told %+v", e)
			}
			s.restore = nil
			b.node.unpause(b.key(rev)) // it is over
			if k := b.kind(rev); k != again {
				t.Errorf("then a %s start", k)
			}
		})
	}
}

func (b *bench) key(rev fleet.Revision) string {
	b.t.Helper()
	key, err := b.node.SavedKey(b.t.Context(), rev)
	if err != nil {
		b.t.Fatal(err)
	}
	return key
}

// An image that fails again and again is tried less and less.
func TestPause_GrowsUntilARestoreSucceeds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &Node{pauses: map[string]pause{}}
		var got []time.Duration
		for range 3 {
			n.pause("a", time.Second)
			n.pause("a", time.Minute) // of those that failed together
			began := time.Now()
			for n.paused("a") {
				time.Sleep(time.Second)
			}
			got = append(got, time.Since(began))
			if n.paused("b") {
				t.Error("another one waits, too")
			}
		}
		if got[0] != 2*time.Second || got[1] != 4*time.Second || got[2] != 8*time.Second {
			t.Errorf("it waits %v", got)
		}
		n.unpause("a")
		if n.pause("a", time.Second); n.pauses["a"].failed != 1 {
			t.Error("a success does not count")
		}
		for range 20 {
			n.pause("c", time.Minute)
			time.Sleep(longestPause)
		}
		if n.paused("c") {
			t.Error("it is not tried again within an hour")
		}
		time.Sleep(2 * longestPause)
		if n.pause("d", time.Second); len(n.pauses) != 1 {
			t.Errorf("%d that nobody tries any more are kept", len(n.pauses)-1)
		}
	})
}

// Just after the daemon began it is not known whether this host restores. What is
// saved is worth a short wait, and nothing else.
func TestRestore_WaitsForTheLook(t *testing.T) {
	b := newBench(t)
	s := b.saves()
	saved, other := b.revision(nil, server...), b.revision(nil, server...)
	other.App, other.ID = "other", fleet.MakeRevisionID("other", 1)
	if b.node.Save(t.Context(), saved, "test", nil, anyRoom) == 0 {
		t.Fatal("it is not saved")
	}
	asked := make(chan context.Context, 9)
	known := make(chan struct{})
	s.host = func(ctx context.Context) (string, error) {
		asked <- ctx
		select {
		case <-known:
			return "host", nil
		case <-ctx.Done():
			return "", context.Cause(ctx)
		}
	}
	if k := b.kind(other); k != fleet.ColdStart || len(asked) != 0 {
		t.Errorf("without a checkpoint: a %s start, asked %d times", k, len(asked))
	}
	if k := b.kind(saved); k != fleet.ColdStart {
		t.Errorf("a %s start where it never came to be known", k)
	}
	if until, ok := (<-asked).Deadline(); !ok || time.Until(until) > 0 {
		t.Errorf("it waited for ever, or longer: %v", until)
	}
	go func() {
		<-asked
		close(known)
	}()
	if k := b.kind(saved); k != fleet.CheckpointStart {
		t.Errorf("a %s start", k)
	}
}

func TestSave_WaitsForTheLook(t *testing.T) {
	b := newBench(t)
	s := b.saves()
	asked := 0
	s.host = func(ctx context.Context) (string, error) {
		if asked++; ctx.Err() != nil {
			return "", ctx.Err()
		}
		if until, ok := ctx.Deadline(); !ok || time.Until(until) < 10*time.Second {
			return "", context.DeadlineExceeded // it would have been dropped
		}
		return "host", nil
	}
	if b.node.Save(t.Context(), b.revision(nil, server...), "test", nil, anyRoom) == 0 || asked == 0 {
		t.Error("it is not saved")
	}
}

// Room on the machine is asked for when there is something to be saved, once, and
// given back.
func TestSave_AsksForRoom(t *testing.T) {
	b := newBench(t)
	s := b.saves()
	rev := b.revision(nil, server...)
	asked, freed := 0, 0
	save := func(ok bool) fleet.Bytes {
		return b.node.Save(t.Context(), rev, "test", nil, func() (func(), bool) {
			asked++
			return func() { freed++ }, ok
		})
	}
	s.save = func(sandbox.Spec) error {
		if freed > 0 {
			t.Error("it was given back before the processes were saved")
		}
		return nil
	}
	if save(false) != 0 || asked != 1 || freed != 0 || len(b.events) != 0 {
		t.Errorf("without room: asked %d times, gave back %d times, told %+v", asked, freed, b.events)
	}
	if save(true) == 0 || asked != 2 || freed != 1 {
		t.Errorf("with room: asked %d times, gave back %d times", asked, freed)
	}
	if save(true) == 0 || asked != 2 {
		t.Error("what is saved already is asked room for")
	}
}

// What is used up for a moment says nothing about an app.
func TestSave_WithoutDescriptors(t *testing.T) {
	b := newBench(t)
	s := b.saves()
	rev := b.revision(nil, server...)
	s.save = func(sandbox.Spec) error { return unix.EMFILE }
	if b.node.Save(t.Context(), rev, "test", nil, anyRoom) != 0 || b.last(fleet.EventCheckpoint).Cause != causeUnroomed {
		t.Errorf("told %+v", b.last(fleet.EventCheckpoint))
	}
	s.save, b.node.unroomed = nil, time.Time{}
	if b.node.Save(t.Context(), rev, "test", nil, anyRoom) == 0 {
		t.Error("it is not tried again")
	}
}

// The log of what is being saved is written to, however old it is.
func TestPruneLogs_LeavesTheSavers(t *testing.T) {
	b := newBench(t)
	s := b.saves()
	rev := b.revision(nil, server...)
	s.save = func(spec sandbox.Spec) error {
		files := []string{spec.Log}
		for range keptLogs + 1 {
			files = append(files, b.node.logPath(fleet.NewInstanceID(rev.App)))
		}
		for n, f := range files { // its own is the oldest
			at := time.Now().Add(time.Duration(n-100) * time.Second)
			if err := errors.Join(os.WriteFile(f, nil, 0o600), os.Chtimes(f, at, at)); err != nil {
				return err
			}
		}
		b.node.pruneLogs(rev.App)
		_, err := os.Stat(spec.Log)
		return err
	}
	if b.node.Save(t.Context(), rev, "test", nil, anyRoom) == 0 {
		t.Errorf("told %+v", b.last(fleet.EventCheckpoint))
	}
	if b.node.pruneLogs(rev.App); len(b.node.saving) != 0 {
		t.Error("it is saved for ever")
	}
	if files, err := b.node.logFiles(string(rev.App)); err != nil || len(files) != keptLogs {
		t.Errorf("logs left: %q, %v", files, err)
	}
}
