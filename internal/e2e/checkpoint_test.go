package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/fastcontainer/fastcontainer/internal/api"
	"github.com/fastcontainer/fastcontainer/internal/appfile"
	"github.com/fastcontainer/fastcontainer/internal/e2e/realapps"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// saves is the configuration of a daemon that saves processes; see hack/criu.sh.
const saves = "checkpoint: {criu: /usr/local/lib/fastcontainer/criu/criu}"

// newSaver starts a node that saves processes.
func newSaver(t *testing.T) *daemon {
	t.Helper()
	d := newDaemon(t, saves)
	d.knowsCRIU()
	return d
}

// knowsCRIU waits until a daemon that was just started has looked at its CRIU,
// and keeps a namespace for it. Until then it saves and restores nothing.
func (d *daemon) knowsCRIU() {
	d.t.Helper()
	d.until("CRIU is known", func() bool {
		fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", d.cmd.Process.Pid))
		return slices.ContainsFunc(fds, func(fd string) bool {
			to, _ := os.Readlink(fd)
			return strings.HasPrefix(to, "mnt:")
		})
	})
}

// in is the daemon in a subtest.
func (d *daemon) in(t *testing.T) *daemon {
	c := *d
	c.t = t
	return &c
}

// asleep ends an app's instances.
func (d *daemon) asleep(app fleet.AppName) {
	d.t.Helper()
	for _, stopped := range []bool{true, false} {
		if err := d.client.SetStopped(d.t.Context(), app, stopped); err != nil {
			d.t.Fatal(err)
		}
		d.until("asleep", func() bool { return len(d.instances(app)) == 0 })
	}
}

// saved waits until an app's processes are saved, and fails if they cannot be.
func (d *daemon) saved(app fleet.AppName) fleet.Event {
	d.t.Helper()
	e := d.await(app, fleet.EventCheckpoint, nil)
	if !strings.Contains(e.Detail, " in ") {
		d.t.Fatalf("%s: %s: %s %v", app, e.Cause, e.Detail, e.Log)
	}
	return e
}

// started checks the kind of the start of an app's only instance.
func (d *daemon) started(app fleet.AppName, want fleet.StartKind) api.Instance {
	d.t.Helper()
	list := d.instances(app)
	if len(list) != 1 {
		d.t.Fatalf("instances: %+v", list)
	}
	e := d.await(app, fleet.EventReady, func(e fleet.Event) bool { return e.Instance == list[0].ID })
	if e.Kind != want || list[0].Kind != want {
		d.t.Fatalf("a %s start, want a %s one: %+v", e.Kind, want, d.events(app, fleet.EventCheckpoint))
	}
	return list[0]
}

// who is what an instance of a real app says of itself.
type who struct {
	Hostname string `json:"hostname"`
	Secure   string `json:"secure"`
}

// siblings brings a sleeping app to ten restored instances, and asks each.
func (d *daemon) siblings(app fleet.AppName) []who {
	d.t.Helper()
	stop := d.storm(string(app)+".localhost", "/who", 10)
	var list []api.Instance
	d.until("ten siblings", func() bool {
		list = d.instances(app)
		return len(list) == 10 && !slices.ContainsFunc(list, func(i api.Instance) bool { return i.State != fleet.StateReady })
	})
	if seen := stop(); len(seen) != 1 || seen[http.StatusOK] == 0 {
		d.t.Errorf("answers: %v", seen)
	}
	differ(d.t, "address", list, func(i api.Instance) string { return i.Address })
	answers := make([]who, len(list))
	for n, i := range list {
		if i.Kind != fleet.CheckpointStart {
			d.t.Errorf("%s: a %s start: %+v", i.ID, i.Kind, d.events(app, fleet.EventCheckpoint))
		}
		resp, err := http.Get("http://" + i.Address + "/who") //nolint:noctx // it answers at once
		if err != nil {
			d.t.Error(err)
			continue
		}
		text, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err == nil {
			err = json.Unmarshal(text, &answers[n])
		}
		if err != nil {
			d.t.Errorf("%s: %q, %v", i.ID, text, err)
		}
		if answers[n].Hostname != string(app) {
			d.t.Errorf("%s: its host is called %q", i.ID, answers[n].Hostname)
		}
	}
	return answers
}

// differ checks that no two of a list have the same of something.
func differ[T any](t *testing.T, what string, list []T, of func(T) string) {
	t.Helper()
	seen := map[string]bool{}
	for _, x := range list {
		v := of(x)
		if v == "" || seen[v] {
			t.Errorf("%s: %q, and not alone", what, v)
		}
		seen[v] = true
	}
}

// Real apps are saved after their first start, and restored from then on. Ten
// that are restored at once differ in what they ask the kernel for.
func TestCheckpoint_RealApps(t *testing.T) {
	d := newSaver(t)
	light, err := realapps.Debian(t.Context(), "../../.cache/rootfs")
	if err != nil {
		t.Fatal(err)
	}
	heavy, err := realapps.Heavy(t.Context(), "../../.cache/rootfs")
	if err != nil {
		t.Fatal(err)
	}
	apps, err := realapps.Make(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "db") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	db, err := realapps.StartMariaDB(t.Context(), heavy, dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	image := map[string]string{"rails": heavy, "jvm": heavy, "wordpress": heavy}
	for _, a := range append(apps, realapps.Rails(), realapps.JVM(), realapps.WordPress(db)) {
		t.Run(a.Name, func(t *testing.T) {
			d, name := d.in(t), fleet.AppName(a.Name)
			s := appfile.Default(a.Name)
			s.Image, s.Port, s.Command, s.Volumes, s.Start = "tar:"+light, 8080, a.Command, a.Volumes, fleet.StartCheckpoint
			if file := image[a.Name]; file != "" {
				s.Image = "tar:" + file
			}
			s.Resources.Memory.Rest, s.Resources.CPU.Rest, s.Resources.CPU.Peak = 512<<20, .1, 1
			s.Concurrency, s.Scale.Max = 1, 10
			appfile.Complete(&s)
			if _, err := d.client.Deploy(t.Context(), s, nil); err != nil {
				t.Fatal(err)
			}
			host := a.Name + ".localhost"
			d.expect(host, "/", a.Want)
			d.started(name, fleet.ColdStart)
			d.saved(name)
			d.asleep(name)
			d.expect(host, "/", a.Want)
			d.started(name, fleet.CheckpointStart)
			d.asleep(name)
			if a.Name == "nginx" { // it has nothing to say
				return
			}
			answers := d.siblings(name)
			// OpenSSL's generator, which node uses, has its seed when node listens, and
			// all siblings have that: docs/checkpoint.md tells their owners.
			if a.Name != "express" {
				differ(t, "secure random number", answers, func(w who) string { return w.Secure })
			}
			d.asleep(name)
		})
	}
}
