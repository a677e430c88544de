package e2e

import (
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// savers are the processes of CRIU that work for a daemon: they have something
// of it open, or are in a cgroup of it.
func (d *daemon) savers() []string {
	var found []string
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range procs {
		if name, _ := os.ReadFile(p + "/comm"); string(name) != "criu\n" {
			continue
		}
		group, _ := os.ReadFile(p + "/cgroup")
		if strings.Contains(string(group), "/"+d.name+"/") {
			found = append(found, p)
			continue
		}
		fds, _ := filepath.Glob(p + "/fd/*")
		for _, fd := range fds {
			if to, _ := os.Readlink(fd); strings.HasPrefix(to, d.dir+"/") {
				found = append(found, p)
				break
			}
		}
	}
	return found
}

// recovered starts the daemon after a crash, and checks that it serves an app
// and that nothing is left of what the crash interrupted.
func (d *daemon) recovered(app string) {
	d.t.Helper()
	d.start()
	d.knowsCRIU()
	d.expect(app+".localhost", "/", "hello")
	d.until("no CRIU of the earlier daemon works", func() bool { return len(d.savers()) == 0 })
	d.until("no orphans", func() bool {
		_, groups, links := d.kept()
		return groups <= len(d.instances(""))+4 && links <= len(d.instances(""))+4
	})
}

// The daemon is killed while it saves processes, at any stage. The next one
// serves the app and knows nothing of the half checkpoint, and in the end there
// is a whole one.
func TestCheckpoint_DaemonKilledWhileItSaves(t *testing.T) {
	d := newSaver(t)
	d.deployFile("app", sluggish(t), "start: checkpoint\nenv: {BOOT: 100ms, BALLAST: \"64\"}\n")
	half := 0
	for _, stage := range []string{"", "/content/images/*", "/content/images/pages-1.img", "/content/images/inventory.img", "/content/saved.json"} {
		d.expect("app.localhost", "/", "hello")
		d.until("it is saved as far as "+stage, func() bool { return len(d.stored("tmp/*"+stage))+len(d.stored("kept/*")) > 0 })
		for _, p := range d.savers() { // it must not matter that a CRIU does not come to its end
			if pid, err := strconv.Atoi(filepath.Base(p)); err == nil {
				_ = unix.Kill(pid, unix.SIGSTOP)
			}
		}
		d.kill()
		half += len(d.stored("tmp/*"))
		d.recovered("app")
		for _, e := range d.events("app", fleet.EventCheckpoint) {
			if !strings.Contains(e.Detail, " in ") {
				t.Errorf("killed at %q: %+v", stage, e)
			}
		}
		d.until("no half one is left", func() bool { return len(d.stored("tmp/*"))+len(d.stored("trash/*")) == 0 })
		d.asleep("app")
	}
	if half < 3 {
		t.Errorf("only %d kills came in the middle", half)
	}
	d.expect("app.localhost", "/", "hello")
	d.until("it is saved", func() bool { return len(d.stored("kept/app.*/manifest.json")) == 1 })
	d.asleep("app")
	d.expect("app.localhost", "/", "hello")
	d.started("app", fleet.CheckpointStart)
}

// The same while it restores them.
func TestCheckpoint_DaemonKilledWhileItRestores(t *testing.T) {
	d := newSaver(t)
	d.deployFile("app", sluggish(t), "start: checkpoint\n")
	d.expect("app.localhost", "/", "hello")
	d.saved("app")
	half := 0
	for round := range 8 {
		d.asleep("app")
		before := len(d.events("app", fleet.EventStart))
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { d.poke(ctx, "app.localhost") })
		time.Sleep(time.Duration(round) * 4 * time.Millisecond)
		d.kill()
		cancel()
		wg.Wait()
		d.recovered("app")
		half += len(d.events("app", fleet.EventStart)) - before - 1
		// One that was adopted has no ready event if its daemon ended just before.
		if list := d.instances("app"); len(list) != 1 || list[0].Kind != fleet.CheckpointStart {
			t.Errorf("killed after %d ms: %+v", 4*round, list)
		}
	}
	if half == 0 {
		t.Error("no kill came in the middle")
	}
	if list := d.events("app", fleet.EventCheckpoint); len(list) != 1 {
		t.Errorf("checkpoints: %+v", list)
	}
}

// A restored instance outlives its daemon, also in the middle of a freeze or a
// thaw, and the next one takes it over as it is.
func TestCheckpoint_RestoredOnesAreAdopted(t *testing.T) {
	d := newSaver(t)
	// What is idle is always frozen then, and never ended.
	d.deployFile("app", sluggish(t), "start: standby\nrestored_signal: USR2\nidle: 30ms\nenv: {BOOT: 300ms}\n")
	d.isStandby("app")
	d.saved("app")
	d.must("stop", "app")
	d.until("stopped", func() bool { return len(d.instances("app")) == 0 })
	d.must("start", "app")
	d.isStandby("app")
	first := d.started("app", fleet.CheckpointStart)
	for range 6 {
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			for ctx.Err() == nil {
				d.poke(ctx, "app.localhost")
				time.Sleep(time.Duration(25+rand.IntN(10)) * time.Millisecond)
			}
		})
		time.Sleep(time.Duration(50+rand.IntN(150)) * time.Millisecond)
		d.kill()
		cancel()
		wg.Wait()
		d.recovered("app")
		if i := d.started("app", fleet.CheckpointStart); i.ID != first.ID || i.PID != first.PID {
			t.Fatalf("it is %+v, and was %+v", i, first)
		}
	}
	// It stands on its checkpoint yet, and that goes with it.
	d.isStandby("app")
	if err := d.client.Delete(t.Context(), "app", true); err != nil {
		t.Error(err)
	}
	d.until("nothing is left", func() bool { return len(d.stored("*/*")) == 0 })
}
