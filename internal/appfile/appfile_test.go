package appfile

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

const head = "name: a\nimage: nginx\n" // two lines; slips follow in line 3

func problems(t *testing.T, err error) Problems {
	t.Helper()
	var ps Problems
	if !errors.Is(err, fleet.ErrInvalid) || !errors.As(err, &ps) {
		t.Errorf("got %v, want problems", err)
		return Problems{{}}
	}
	return ps
}

func TestParse_Defaults(t *testing.T) {
	got, err := Parse("/srv/a.yaml", []byte(head))
	if err != nil {
		t.Fatal(err)
	}
	want := fleet.Spec{
		Name: "a", Image: "nginx", Hosts: []string{"a.localhost"},
		Ready:    fleet.Ready{Timeout: fleet.Duration(30 * time.Second)},
		Lifetime: fleet.Duration(20 * time.Minute), Idle: fleet.Duration(5 * time.Minute), Drain: fleet.Duration(30 * time.Second),
		Scale: fleet.Scale{Max: 10},
		Resources: fleet.Resources{
			CPU: fleet.CPU{Rest: 1, Peak: 1}, Memory: fleet.Memory{Rest: 256 << 20, Peak: 256 << 20}, Disk: 128 << 20, PIDs: 1024,
		},
		Priority: 50, Start: "auto",
		Isolation: fleet.Isolation{Runtime: "native", UserNS: true, Seccomp: "default"},
	}
	if len(got) != 1 || !reflect.DeepEqual(got[0], want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestParse_Values(t *testing.T) {
	specs, err := Parse("/srv/x/apps.yaml", []byte("\uFEFF# two apps\r\n"+`---
name: one
image: oci:images/one:v2
hosts: &hosts [WWW.Example.COM, "*.example.com", _x.a]
env: {PORT: 8080, DEBUG: true, V: 1.10, OCT: 007, EMPTY: "", "a b": c}
command: [sleep, 10, 1e3]
entrypoint:
- /bin/sh
- -c
- |
  echo "hello
  world"
user: 1000:1000
stop_signal: quit
idle: 0
lifetime: "0"
drain: 1h30m
concurrency: 8
priority: 0
port: 81
resources: {cpu: {rest: 0.5}, memory: {rest: 64Mi, peak: 1.5Gi}}
volumes:
  - name: data
    mount: /data
  - {bind: ../y, mount: "/y", readonly: true}
isolation: {userns: false, readonly: true, capabilities: {add: [cap_net_admin], drop: [ALL]}}
---
# nothing here
---
name: two
image: dir:.
scale: {min: 1, max: 1}
...
`))
	if err != nil {
		t.Fatal(err)
	}
	if len(specs) != 2 {
		t.Fatalf("%d apps", len(specs))
	}
	s := specs[0]
	for i, c := range []struct{ got, want any }{
		{s.Image, "oci:/srv/x/images/one:v2"},
		{s.Hosts, []string{"www.example.com", "*.example.com", "_x.a"}},
		{s.Env, map[string]string{"PORT": "8080", "DEBUG": "true", "V": "1.10", "OCT": "007", "EMPTY": "", "a b": "c"}},
		{s.Command, []string{"sleep", "10", "1e3"}},
		{s.Entrypoint, []string{"/bin/sh", "-c", "echo \"hello\nworld\"\n"}},
		{s.User, "1000:1000"}, {s.StopSignal, "quit"}, {s.Idle.Std(), time.Duration(0)}, {s.Lifetime.Std(), time.Duration(0)},
		{s.Drain.Std(), 90 * time.Minute}, {s.Concurrency, 8}, {s.Priority, 0}, {s.Port, 81},
		{s.Resources.CPU, fleet.CPU{Rest: 0.5, Peak: 0.5}},
		{s.Resources.Memory, fleet.Memory{Rest: 64 << 20, Peak: 1536 << 20}},
		{s.Resources.Disk, fleet.Bytes(768 << 20)},
		{s.Volumes, []fleet.Volume{{Name: "data", Mount: "/data"}, {Bind: "/srv/y", Mount: "/y", Readonly: true}}},
		{s.Isolation, fleet.Isolation{Runtime: "native", Readonly: true, Seccomp: "default", Capabilities: fleet.Capabilities{Add: []string{"cap_net_admin"}, Drop: []string{"ALL"}}}},
		{specs[1].Image, "dir:/srv/x"}, {specs[1].Scale, fleet.Scale{Min: 1, Max: 1}},
	} {
		if !reflect.DeepEqual(c.got, c.want) {
			t.Errorf("%d: got %+v, want %+v", i, c.got, c.want)
		}
	}
}

func TestParse_Refuses(t *testing.T) {
	for slip, want := range map[string]string{
		// The form.
		"prot: 80":                       "3:1: prot: unknown key; did you mean port?",
		"environment: {}":                "3:1: environment: unknown key; did you mean env?",
		"memory: 64Mi":                   "3:1: memory: unknown key; did you mean resources.memory?",
		"resources: {cpu: {max: 2}}":     "3:19: resources.cpu.max: unknown key; did you mean peak? allowed: peak, rest",
		"Port: 80":                       "3:1: Port: unknown key; did you mean port?",
		"xyzzy: 80":                      "3:1: xyzzy: unknown key; allowed: command,",
		"port: 80\nport: 81":             "4:1: port: is given twice, first in line 3; give it once",
		"env: {A: 1, A: 2}":              "3:13: env.A: is given twice",
		"port:":                          "3:1: port: has no value",
		"env: {A: }":                     "3:7: env.A: has no value",
		"port: \"80\"":                   "3:7: port: is a text; it takes a whole number",
		"port: [80]":                     "3:1: port: is a list; it takes a whole number",
		"port: 0x50":                     "3:7: port: 0x50 is not a plain whole number",
		"port: 010":                      "3:7: port: 010 is not a plain whole number",
		"port: 80.5":                     "3:7: port: is a number; it takes a whole number",
		"priority: 99999999999999999999": "3:11: priority: ",
		"hosts: a.b":                     "3:8: hosts: is a text; it takes a list, as in [a, b]",
		"hosts: [[a]]":                   "3:9: hosts[0]: is a list; it takes one text",
		"env: [A=1]":                     "3:1: env: is a list; it takes keys with values",
		"env: {A: {B: C}}":               "3:7: env.A: is a mapping; it takes one text",
		"isolation: {userns: yes}":       "3:21: isolation.userns: is a text; it takes true or false",
		"scale: 3":                       "3:8: scale: is a number; it takes keys with values",
		"env: {<<: {A: B}}":              "3:7: env: merge keys",
		"workdir: *nowhere":              "3:10: workdir: there is no anchor &nowhere before this",
		"user: !!str 5":                  "3:7: user: has a tag",
		"port: [":                        "not YAML",
		"\tport: 80":                     "not YAML",
		"env: {? [a] : b}":               "not YAML: found an invalid key",
		"command: " + deep(40):           "3:42: not YAML: nested too deep; at most 32 levels",
		"command:\n" + strings.Repeat("- ", 40) + "x": "4:65: not YAML: nested too deep",
		"workdir: \xff": "3:1: the line is not text",
		// Values.
		"port: 0":                                "3:7: port: is 0; leave the key out for the default",
		"port: 65536":                            "3:7: port: is 65536; 1 to 65535",
		"port: -1":                               "3:7: port: is -1; 1 to 65535",
		"priority: 101":                          "3:11: priority: is 101; 0 to 100",
		"concurrency: -1":                        "3:14: concurrency: is -1; 0 to 1000000",
		"idle: 5":                                "3:7: idle: \"5\" is not a duration",
		"idle: -5s":                              "3:7: idle: \"-5s\" is negative",
		"idle: true":                             "3:7: idle: is true or false; it takes a number with its unit",
		"lifetime: 90000h":                       "3:11: lifetime: is 90000h; 0 to 8760h",
		"ready: {timeout: 0}":                    "3:18: ready.timeout: is 0; leave the key out",
		"ready: {http: healthz}":                 "3:15: ready.http: \"healthz\" is not a path",
		"warm: page":                             "3:7: warm: \"page\" is not a path",
		"restored_signal: SIGNONE":               "3:18: restored_signal: \"SIGNONE\" is no signal",
		"ready: {http: //evil/x}":                "3:15: ready.http: \"//evil/x\" is not a path",
		"scale: {min: 3, max: 2}":                "3:22: scale.max: is 2, below scale.min (3)",
		"scale: {min: 11}":                       "3:1: scale.max: is 10, below scale.min (11)",
		"scale: {max: 10001}":                    "3:14: scale.max: is 10001; 1 to 10000",
		"resources: {cpu: {rest: 2, peak: 1.5}}": "3:34: resources.cpu.peak: is 1.5, below resources.cpu.rest (2)",
		"resources: {cpu: {rest: .inf}}":         "3:25: resources.cpu.rest: is a number; it takes a number of cores",
		"resources: {cpu: {rest: 5000}}":         "3:25: resources.cpu.rest: is 5000; 0.01 to 4096 cores",
		"resources: {memory: {rest: 1Mi}}":       "3:28: resources.memory.rest: is 1Mi; 4Mi to 64Ti",
		"resources: {memory: {rest: 64MB}}":      "3:28: resources.memory.rest: \"64MB\" is not an amount of bytes",
		"resources: {memory: {peak: 64Mi}}":      "3:28: resources.memory.peak: is 64Mi, below resources.memory.rest (256Mi)",
		"resources: {memory: {rest: 99999999999999999Ti}}": "is too large",
		"resources: {pids: -3}":                            "3:19: resources.pids: is -3; 1 to 4194304",
		"resources: {disk: 1}":                             "3:19: resources.disk: is 1; 64Ki to 64Ti",
		"hosts: [a.b, A.B]":                                "3:14: hosts[1]: \"a.b\" is given twice",
		"hosts: [http://a.b]":                              "3:9: hosts[0]: \"http://a.b\" is not a host name; write it without scheme",
		"hosts: ['a.b:80']":                                "3:9: hosts[0]: \"a.b:80\" is not a host name; write it without port",
		"hosts: [a.*.b]":                                   "3:9: hosts[0]: \"a.*.b\" is not a host name",
		"hosts: [\"*\"]":                                   "3:9: hosts[0]: \"*\" is not a host name",
		"hosts: [bücher.example]":                          "3:9: hosts[0]: \"bücher.example\" is not ASCII; write it in its xn-- form",
		"hosts: [-a.b]":                                    "3:9: hosts[0]: \"-a.b\" is not a host name",
		"hosts: [a..b]":                                    "3:9: hosts[0]: \"a..b\" is not a host name",
		"hosts: [\"\"]":                                    "3:9: hosts[0]: is empty",
		"env: {\"A=B\": c}":                                "env.A=B: the name has '=' in it",
		"env: {\"A\\0B\": c}":                              "the name has a NUL in it",
		"env: {A: \"x\\0y\"}":                              "3:10: env.A: has a NUL in it",
		"command: [\"x\\0y\"]":                             "3:11: command[0]: has a NUL in it",
		"entrypoint: [\"\"]":                               "3:14: entrypoint[0]: is empty",
		"workdir: srv":                                     "3:10: workdir: \"srv\" is no absolute path",
		"user: a b":                                        "3:7: user: \"a b\" is no user",
		"user: 4294967295":                                 "3:7: user: 4294967295 is too large",
		"stop_signal: SIGFOO":                              "3:14: stop_signal: \"SIGFOO\" is no signal",
		"stop_signal: 65":                                  "3:14: stop_signal: \"65\" is no signal",
		"start: warm":                                      "3:8: start: \"warm\" is unknown; allowed: auto, cold, standby, checkpoint",
		"start: stanby":                                    "3:8: start: \"stanby\" is unknown; did you mean standby?",
		"isolation: {runtime: docker}":                     "3:22: isolation.runtime: \"docker\" is unknown; allowed: native,",
		"isolation: {seccomp: off}":                        "3:22: isolation.seccomp: \"off\" is unknown",
		"isolation: {capabilities: {add: [NET_BIND]}}":     "3:34: isolation.capabilities.add[0]: \"NET_BIND\" is no capability",
		"volumes: [{mount: /x}]":                           "volumes[0]: has neither name nor bind",
		"volumes:\n- mount: /x":                            "4:3: volumes[0]: has neither name nor bind",
		"volumes: [{name: a, bind: /b, mount: /x}]":        "volumes[0]: has both name and bind",
		"volumes: [{name: A, mount: /x}]":                  "3:18: volumes[0].name: \"A\" is not a DNS label",
		"volumes: [{name: a}]":                             "volumes[0].mount: is missing",
		"volumes: [{name: a, mount: x}]":                   "3:28: volumes[0].mount: \"x\" is no absolute path",
		"volumes: [{name: a, mount: /x/../proc}]":          "is no absolute path",
		"volumes: [{name: a, mount: /proc/sys}]":           "\"/proc/sys\" belongs to the container itself",
		"volumes: [{name: a, mount: /}]":                   "belongs to the container itself",
		"volumes: [{name: a, mount: /x}, {name: b, mount: /x/}]": "volumes[1].mount: \"/x/\" has a volume already",
	} {
		_, err := Parse("/srv/f.yaml", []byte(head+slip+"\n"))
		ps := problems(t, err)
		if got := fmt.Sprint(err); len(ps) != 1 || !strings.Contains(got, want) || !strings.HasPrefix(got, "read app file: /srv/f.yaml:") {
			t.Errorf("%q:\n got %s\nwant %s", slip, got, want)
		}
	}
}

func deep(n int) string { return strings.Repeat("[", n) + strings.Repeat("]", n) }

func TestParse_RefusesFiles(t *testing.T) {
	bomb := head + "volumes:\n- &v {name: a, bind: b, mount: c}\n" + strings.Repeat("- *v\n", 4_000)
	wide := head + "volumes: [&v {name: a, bind: b, mount: c}" + strings.Repeat(",*v", 30_000) + "]\n"
	chain := head + "command: &a [x, x]\nenv: &b {A: *a}\nentrypoint: *b\nhosts: &h [*h]\n"
	for name, c := range map[string]struct{ data, want string }{
		"empty":            {"", "1:1: the file describes no app"},
		"comment":          {"# soon\n", "1:1: the file describes no app"},
		"null":             {"~\n---\n", "1:1: the file describes no app"},
		"list":             {"- name: a\n", "1:1: is a list; it takes keys with values"},
		"word":             {"hello\n", "1:1: is a text; it takes keys with values"},
		"no name":          {"image: x\n", "1:1: name: is missing; every app has one"},
		"no image":         {"\n\nname: x\n", "3:1: image: is missing; write it as"},
		"bad image":        {"name: x\nimage: a b\n", "2:8: image: \"a b\" is no image reference"},
		"no path":          {"name: x\nimage: 'oci:'\n", "2:8: image: oci: has no path"},
		"same name":        {head + "---\n" + head, "4:7: name: \"a\" is the name of another app of this file"},
		"same host":        {head + "---\nname: b\nimage: x\nhosts: [a.localhost]\n", "6:9: hosts[0]: \"a.localhost\" belongs to app a of this file"},
		"too large":        {head + strings.Repeat("# long\n", maxFile/7), "1:1: the file is too large; at most 1Mi"},
		"alias bomb":       {bomb, "has 4001 entries; at most 64"},
		"wide alias bomb":  {wide, "too many values; at most 100000"},
		"aliases that lie": {chain, "4:"},
		"too long":         {strings.Repeat("\n", maxLines+1), "20001:1: the file is too long; at most 20000 lines"},
		"blank literal":    {"a: |\n" + strings.Repeat("\n", 10_000), "1:1: not YAML: the document is too large; at most 4096 lines and 128Ki"},
		"mark in quotes":   {head + "env: {A: \"\n---\n\"}\n", "not YAML"},
		"later place":      {head + "--- # b\n\nname: b\nimage: x\nprot: 1\n", "7:1: prot"},
		"many":             {head + strings.Repeat("x: 1\n", 1000), "and"},
	} {
		start := time.Now()
		_, err := Parse("f.yaml", []byte(c.data))
		problems(t, err)
		if !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s:\n got %.500s\nwant %s", name, err.Error(), c.want)
		}
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("%s took %v", name, took)
		}
		if n := strings.Count(err.Error(), "\n"); n > maxProblems+1 {
			t.Errorf("%s: %d lines", name, n)
		}
	}
}

func TestParse_TellsEverythingInOrder(t *testing.T) {
	_, err := Parse("f.yaml", []byte("nam: A\nport: x\nidle: 3\nimage: nginx\n---\nname: B\nimage: x\n"))
	var got []string
	for _, p := range problems(t, err) {
		got = append(got, fmt.Sprint(p.Line, p.Key))
	}
	if want := "1nam 1name 2port 3idle 6name"; strings.Join(got, " ") != want {
		t.Errorf("got %v, want %s", got, want)
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "a.yaml")
	if err := os.WriteFile(file, []byte("name: a\nimage: tar:a.tar\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	specs, err := Load(file)
	if err != nil || specs[0].Image != "tar:"+filepath.Join(dir, "a.tar") {
		t.Errorf("%v, %v", specs, err)
	}
	if _, err := Load(file + "x"); !errors.Is(err, fleet.ErrNotFound) {
		t.Errorf("missing file: %v", err)
	}
	if _, err := Load(dir); err == nil {
		t.Error("a directory was read")
	}
}

func TestValidate_HostileClient(t *testing.T) {
	good := Default("a")
	good.Image = "nginx"
	Complete(&good)
	if err := Validate(&good); err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(*fleet.Spec){
		"the path \"x\" is relative":            func(s *fleet.Spec) { s.Image = "oci:x" },
		"volumes[0].bind: \"x\" is no absolute": func(s *fleet.Spec) { s.Volumes = []fleet.Volume{{Bind: "x", Mount: "/x"}} },
		"resources.cpu.rest: is 0":              func(s *fleet.Spec) { s.Resources.CPU.Rest = 0 },
		"resources.memory.rest: is -1":          func(s *fleet.Spec) { s.Resources.Memory.Rest = -1 },
		"lifetime: is -1ns":                     func(s *fleet.Spec) { s.Lifetime = -1 },
		"start: \"\" is unknown":                func(s *fleet.Spec) { s.Start = "" },
		"command: has 100000 entries":           func(s *fleet.Spec) { s.Command = make([]string, 100_000) },
		"hosts: has 100000 entries":             func(s *fleet.Spec) { s.Hosts = make([]string, 100_000) },
		"is too long":                           func(s *fleet.Spec) { s.Env = map[string]string{"A": strings.Repeat("x", 1<<20)} },
		"env: has a variable without a name":    func(s *fleet.Spec) { s.Env = map[string]string{"": "x"} },
		"name: \"" + strings.Repeat("x", 61):    func(s *fleet.Spec) { s.Name = fleet.AppName(strings.Repeat("x", 1<<20)) },
	} {
		s := good
		change(&s)
		err := Validate(&s)
		problems(t, err)
		if got := err.Error(); !strings.Contains(got, want) || len(got) > 1<<16 || strings.Contains(got, ".yaml") {
			t.Errorf("got %.300s, want %s", got, want)
		}
	}
}

func TestSpec_ReadsEveryKey(t *testing.T) {
	r := &reader{}
	var s fleet.Spec
	keys := map[string]bool{}
	for k := range r.spec(&s) {
		keys[k] = true
	}
	for f := range reflect.TypeFor[fleet.Spec]().Fields() {
		key, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		if !keys[key] {
			t.Errorf("key %s of fleet.Spec is not read", key)
		}
		delete(keys, key)
	}
	if len(keys) > 0 {
		t.Errorf("read, but not in fleet.Spec: %v", keys)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{head, head + "hosts: &a [*a]", "a: &b\n  <<: *b", "? - : x", "{[", "name: |\n  x", "%TAG ! x\n---\n", "- - - a", "\"\\x", "a: !!binary |"} {
		f.Add([]byte(s))
	}
	example, err := os.ReadFile("gen/example.yaml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(example)
	f.Fuzz(func(t *testing.T, data []byte) {
		specs, err := Parse("/srv/f.yaml", data)
		if err != nil {
			problems(t, err)
			return
		}
		if len(specs) == 0 {
			t.Fatal("no apps and no error")
		}
		for _, s := range specs {
			if err := Validate(&s); err != nil {
				t.Fatalf("what was parsed is not valid: %v", err)
			}
			again := s
			Complete(&again)
			if !reflect.DeepEqual(again, s) {
				t.Fatal("what was parsed is not complete")
			}
			if _, err := json.Marshal(s); err != nil {
				t.Fatal(err)
			}
		}
	})
}
