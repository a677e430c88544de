package cgroup

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// enterOrder makes this test be the process that enters.
const enterOrder = "TEST_ENTER"

// A process goes into a group of its own beside the containers', wherever it was before:
// on v2 also from the group that is to be theirs, which may have no processes.
func TestEnter(t *testing.T) {
	if parent := os.Getenv(enterOrder); parent != "" {
		if err := Enter(parent, 300); err != nil {
			t.Fatal(err)
		}
		if err := Enter(parent, 300); err != nil { // the next daemon
			t.Fatal(err)
		}
		own, err := os.ReadFile("/proc/self/cgroup")
		if err != nil {
			t.Fatal(err)
		}
		fmt.Printf("%s", own)
		return
	}
	for _, from := range []string{"elsewhere", "the parent itself"} {
		t.Run(from, func(t *testing.T) {
			parent := fmt.Sprintf("/fct-enter-%d/below", os.Getpid())
			r, _, err := find(parent)
			if err != nil {
				t.Fatal(err)
			}
			own := r.Group(own).file("cpu", "")
			t.Cleanup(func() {
				for _, dir := range append([]string{own}, r.dirs...) {
					for _, dir := range []string{dir, filepath.Dir(dir)} {
						_ = os.Remove(dir)
					}
				}
				if _, err := os.Stat(filepath.Dir(filepath.Dir(own))); err == nil {
					t.Error("groups are left")
				}
			})
			script := `exec "$@"`
			if from != "elsewhere" {
				dir := filepath.Dir(own)
				if err := os.MkdirAll(dir, 0o755); err != nil {
					t.Fatal(err)
				}
				script = "echo 0 > " + dir + "/cgroup.procs; " + script
			}
			cmd := exec.Command("sh", "-e", "-c", script, "sh", os.Args[0], "-test.run=^TestEnter$") //nolint:gosec,noctx // this program
			cmd.Env = append(os.Environ(), enterOrder+"="+parent)
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			for line := range strings.Lines(string(out)) {
				_, at, _ := strings.Cut(line, ":")
				controllers, at, _ := strings.Cut(at, ":")
				processors := controllers == "" && r.v2 || strings.Contains(","+controllers+",", ",cpu,")
				if in := strings.TrimSpace(at) == parent+"/"+filepath.Base(own); strings.Contains(line, ":") && in != processors {
					t.Errorf("it is in %s", line)
				}
			}
			file, want := "cpu.shares", "3072"
			if r.v2 {
				file, want = "cpu.weight", "300"
			}
			if got, err := os.ReadFile(filepath.Join(own, file)); err != nil || strings.TrimSpace(string(got)) != want {
				t.Errorf("%s is %q, want %s: %v", file, got, want, err)
			}
			r, err = Open(parent)
			if err != nil {
				t.Fatal(err)
			}
			if names, err := r.List(); len(names) != 0 || err != nil {
				t.Errorf("the containers' groups: %q, %v", names, err)
			}
		})
	}
}

// A limit that is so already is not written again, and one that the kernel
// changed by itself (the weight of a group that was idle) is.
func TestGroup_SetWritesWhatDiffers(t *testing.T) {
	r, err := Open(fmt.Sprintf("/fct-set-%d", os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	g := r.Group("one")
	t.Cleanup(func() {
		for _, dir := range append(g.dirs(), r.dirs...) {
			if err := os.Remove(dir); err != nil {
				t.Error(err)
			}
		}
	})
	if err := g.Create(); err != nil {
		t.Fatal(err)
	}
	set := func(l Limits) {
		t.Helper()
		if err := g.Set(l); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(controller, file, want string) {
		t.Helper()
		if got, err := os.ReadFile(g.file(controller, file)); err != nil || strings.TrimSpace(string(got)) != want {
			t.Errorf("%s is %q, want %s: %v", file, got, want, err)
		}
	}
	weight, usual, light := "cpu.shares", "1024", "512"
	if r.v2 {
		weight, usual, light = "cpu.weight", "100", "50"
	}
	l := Limits{CPU: 1, CPUWeight: 100, Memory: 64 << 20, PIDs: 10}
	set(l)
	if err := write(g.file("pids", "pids.max"), "7"); err != nil {
		t.Fatal(err)
	}
	set(l)
	expect("pids", "pids.max", "7") // nobody wrote
	l.PIDs = 12
	set(l)
	expect("pids", "pids.max", "12")
	for range 2 {
		l.CPUWeight = IdleWeight
		set(l)
		if idles() {
			expect("cpu", "cpu.idle", "1")
		}
		l.CPUWeight = 100
		set(l)
		expect("cpu", weight, usual)
		l.CPUWeight = 50
		set(l)
		expect("cpu", weight, light)
	}
	// Refused: then it is not taken for what is there.
	if err := g.put("pids", "pids.max", "many"); err == nil {
		t.Error("no number is taken for one")
	}
	set(l)
	expect("pids", "pids.max", "12")
}
