package checkpoint

import (
	"testing"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

func keySpec() fleet.Spec {
	return fleet.Spec{
		Name: "blog", Image: "docker.io/library/nginx:1", Hosts: []string{"blog.localhost"}, Port: 80,
		Entrypoint: []string{"/bin/app"}, Command: []string{"serve", "now"},
		Env:     map[string]string{"A": "1", "B": "2", "C": "3", "D": "4"},
		Workdir: "/srv", User: "app",
		Resources: fleet.Resources{Disk: 1 << 20, CPU: fleet.CPU{Rest: 1}, Memory: fleet.Memory{Rest: 1 << 20}, PIDs: 5},
		Volumes:   []fleet.Volume{{Name: "data", Mount: "/data"}},
		Isolation: fleet.Isolation{Runtime: fleet.RuntimeNative, UserNS: true, Seccomp: "default"},
	}
}

func TestKey_ChangesWithWhatMatters(t *testing.T) {
	const host, image, rev = "linux 6.18", fleet.Digest("sha256:aa"), fleet.RevisionID("blog@1")
	base := Key(host, image, rev, keySpec())
	if !hexKey.MatchString(base) {
		t.Fatalf("%q is no key", base)
	}
	seen := map[string]string{base: "nothing"}
	differs := func(name, key string) {
		t.Helper()
		if other, ok := seen[key]; ok {
			t.Errorf("%s gives the same key as %s", name, other)
		}
		seen[key] = name
	}
	differs("host", Key("linux 6.19", image, rev, keySpec()))
	differs("image", Key(host, "sha256:ab", rev, keySpec()))
	differs("revision", Key(host, image, "blog@2", keySpec()))
	for name, change := range map[string]func(*fleet.Spec){
		"entrypoint":              func(s *fleet.Spec) { s.Entrypoint = []string{"/bin/other"} },
		"no entrypoint":           func(s *fleet.Spec) { s.Entrypoint = nil },
		"command":                 func(s *fleet.Spec) { s.Command = []string{"serve now"} },
		"entrypoint for command":  func(s *fleet.Spec) { s.Entrypoint, s.Command = s.Command, s.Entrypoint },
		"env":                     func(s *fleet.Spec) { s.Env["A"] = "2" },
		"one env more":            func(s *fleet.Spec) { s.Env["E"] = "" },
		"workdir":                 func(s *fleet.Spec) { s.Workdir = "/" },
		"user":                    func(s *fleet.Spec) { s.User = "root" },
		"port":                    func(s *fleet.Spec) { s.Port = 81 },
		"disk":                    func(s *fleet.Spec) { s.Resources.Disk++ },
		"volume":                  func(s *fleet.Spec) { s.Volumes[0].Readonly = true },
		"bind":                    func(s *fleet.Spec) { s.Volumes[0] = fleet.Volume{Bind: "/data", Mount: "/data"} },
		"runtime":                 func(s *fleet.Spec) { s.Isolation.Runtime = fleet.RuntimeCrun },
		"userns":                  func(s *fleet.Spec) { s.Isolation.UserNS = false },
		"readonly":                func(s *fleet.Spec) { s.Isolation.Readonly = true },
		"seccomp":                 func(s *fleet.Spec) { s.Isolation.Seccomp = "unconfined" },
		"capability added":        func(s *fleet.Spec) { s.Isolation.Capabilities.Add = []string{"KILL"} },
		"capability dropped":      func(s *fleet.Spec) { s.Isolation.Capabilities.Drop = []string{"KILL"} },
		"workdir and user joined": func(s *fleet.Spec) { s.Workdir, s.User = "/srvapp", "" },
	} {
		spec := keySpec()
		change(&spec)
		differs(name, Key(host, image, rev, spec))
	}
}

func TestKey_StaysWithWhatDoesNot(t *testing.T) {
	base := Key("h", "i", "blog@1", keySpec())
	for name, change := range map[string]func(*fleet.Spec){
		"nothing":         func(*fleet.Spec) {},
		"hosts":           func(s *fleet.Spec) { s.Hosts = nil },
		"image reference": func(s *fleet.Spec) { s.Image = "nginx" },
		"lifetime":        func(s *fleet.Spec) { s.Lifetime, s.Idle, s.Drain = 1, 2, fleet.Duration(time.Hour) },
		"scale":           func(s *fleet.Spec) { s.Scale.Min, s.Concurrency = 1, 7 },
		"cpu":             func(s *fleet.Spec) { s.Resources.CPU.Peak = 4 },
		"memory":          func(s *fleet.Spec) { s.Resources.Memory.Peak = 1 << 30 },
		"pids":            func(s *fleet.Spec) { s.Resources.PIDs = 9 },
		"priority":        func(s *fleet.Spec) { s.Priority = 9 },
		"start":           func(s *fleet.Spec) { s.Start = fleet.StartCheckpoint },
		"ready":           func(s *fleet.Spec) { s.Ready.HTTP = "/" },
		"stop signal":     func(s *fleet.Spec) { s.StopSignal, s.RestoredSignal = "SIGINT", "SIGUSR1" },
		"empty for none":  func(s *fleet.Spec) { s.Isolation.Capabilities.Add = []string{} },
	} {
		spec := keySpec()
		change(&spec)
		for range 20 { // maps have an order of the moment
			if got := Key("h", "i", "blog@1", spec); got != base {
				t.Errorf("%s: another key", name)
				break
			}
		}
	}
	empty, none := keySpec(), keySpec()
	empty.Entrypoint, empty.Command, empty.Env, empty.Volumes = []string{}, []string{}, map[string]string{}, []fleet.Volume{}
	none.Entrypoint, none.Command, none.Env, none.Volumes = nil, nil, nil, nil
	if Key("h", "i", "r", empty) != Key("h", "i", "r", none) {
		t.Error("an empty list gives another key than none, as the store makes of it")
	}
}
