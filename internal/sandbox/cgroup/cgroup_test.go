package cgroup

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

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
