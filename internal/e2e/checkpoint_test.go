package e2e

import (
	"strings"
	"testing"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/appfile"
	"github.com/fastcontainer/fastcontainer/internal/e2e/realapps"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// saves is the configuration of a daemon that saves processes; see hack/criu.sh.
const saves = "checkpoint: {criu: /usr/local/lib/fastcontainer/criu/criu}"

// asleep ends an app's instances.
func (d *daemon) asleep(app fleet.AppName) {
	d.t.Helper()
	d.must("stop", string(app))
	d.must("start", string(app))
	d.until("asleep", func() bool { return len(d.instances(app)) == 0 })
}

// saved waits until an app's processes are saved, and fails if they cannot be.
func (d *daemon) saved(app fleet.AppName) {
	d.t.Helper()
	e := d.await(app, fleet.EventCheckpoint, func(fleet.Event) bool { return true })
	if !strings.Contains(e.Detail, " in ") {
		d.t.Fatalf("%s: %s: %s %v", app, e.Cause, e.Detail, e.Log)
	}
}

// kind of the last start that is ready.
func (d *daemon) kind(app fleet.AppName) fleet.StartKind {
	d.t.Helper()
	list := d.events(app, fleet.EventReady)
	if len(list) == 0 {
		return ""
	}
	return list[len(list)-1].Kind
}

// Real apps are saved after their first start, and restored from then on.
func TestCheckpoint_RealApps(t *testing.T) {
	d := newDaemon(t, saves)
	tar, err := realapps.Debian(t.Context(), "../../.cache/rootfs")
	if err != nil {
		t.Fatal(err)
	}
	site := t.TempDir()
	apps, err := realapps.Make(t.Context(), site)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range apps {
		t.Run(a.Name, func(t *testing.T) {
			s := appfile.Default(a.Name)
			s.Image, s.Port, s.Command, s.Volumes, s.Start = "tar:"+tar, 8080, a.Command, a.Volumes, fleet.StartCheckpoint
			s.Resources.Memory.Rest = 512 << 20
			appfile.Complete(&s)
			if _, err := d.client.Deploy(t.Context(), s, nil); err != nil {
				t.Fatal(err)
			}
			name := fleet.AppName(a.Name)
			d.expect(a.Name+".localhost", "/", a.Want)
			d.saved(name)
			for range 3 {
				d.asleep(name)
				began := time.Now()
				d.expect(a.Name+".localhost", "/", a.Want)
				t.Logf("answered in %v", time.Since(began))
				time.Sleep(100 * time.Millisecond)
				if k := d.kind(name); k != fleet.CheckpointStart {
					for _, e := range d.events(name, fleet.EventCheckpoint) {
						t.Log(e.Cause, e.Detail)
					}
					t.Errorf("a %s start", k)
				}
			}
			t.Log(d.must("inspect", a.Name))
		})
	}
}
