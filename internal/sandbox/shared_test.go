package sandbox

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// sharesMemory is a spec of testdata/sharer.c.
func sharesMemory(t *testing.T) Spec {
	t.Helper()
	spec := serves(t)
	program := spec.Layers[0] + "/bin/sharer"
	build := exec.Command("gcc", "-static", "-O2", "-w", "-o", program, "testdata/sharer.c")
	if _, err := os.Stat("testdata/sharer"); err == nil { // where there is no compiler
		build = exec.Command("cp", "testdata/sharer", program)
	}
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	spec.Args = []string{"/bin/sharer"}
	return spec
}

func TestCheckpoint_SharedMemory(t *testing.T) {
	n, spec := openForCheckpoints(t), sharesMemory(t)
	cold, err := n.Start(t.Context(), another(t, spec, "cold"))
	if err != nil {
		t.Fatal(err)
	}
	defer destroy(t, cold)
	const ask = "for i in 1 2 3 4 5 6 7 8 9; do " + get + " 2>/dev/null && break; sleep 0.1; done"
	want := within(t, cold, ask)
	sum, _, _ := strings.Cut(want, " ")
	dir := save(t, n, spec)
	about, err := readSaved(dir)
	if err != nil || len(about.Shared) != 1 || about.Shared[0].Size != 16<<20 {
		t.Fatalf("saved: %+v, %v", about, err)
	}
	for _, name := range []string{"a", "b"} { // what one of them writes is not seen by the other
		c, err := n.Restore(t.Context(), another(t, spec, name), dir)
		if err != nil {
			t.Fatal(err)
		}
		defer destroy(t, c)
		if got := within(t, c, get); got != want {
			t.Errorf("%s: %q, a cold one says %q", name, got, want)
		}
		if got := within(t, c, get); got != sum+" 4\n" {
			t.Errorf("%s: the second time %q, want %q", name, got, sum+" 4\n")
		}
		if s, err := c.Stats(); err != nil || s.Memory < 3<<20 {
			t.Errorf("%s: it has %d bytes, %v: the memory is not its own", name, s.Memory, err)
		}
		if got := within(t, c, "ls -l /proc/1/fd | busybox grep -c shared; true"); got != "0\n" {
			t.Errorf("%s: descriptors of the memory are left: %q", name, got)
		}
	}
}

func TestRestore_SharedMemoryThatIsNotThere(t *testing.T) {
	n, spec := openForCheckpoints(t), sharesMemory(t)
	dir := save(t, n, spec)
	about, err := readSaved(dir)
	if err != nil || len(about.Shared) != 1 {
		t.Fatalf("saved: %+v, %v", about, err)
	}
	little := another(t, spec, "little")
	little.Limits.Memory = 3 << 20
	if c, err := n.Restore(t.Context(), little, dir); err == nil {
		destroy(t, c)
		t.Error("3 MiB of shared memory, and all else, are restored into 3 MiB")
	} else if errors.Is(err, ErrUnrestorable) {
		t.Errorf("too little memory is no fault of what was saved: %v", err)
	} else {
		t.Log(err)
	}
	pages := filepath.Join(dir, imagesDir, about.Shared[0].Pages)
	for _, damage := range []func() error{func() error { return unix.Truncate(pages, 1<<20) }, func() error { return os.Remove(pages) }} {
		if err := damage(); err != nil {
			t.Fatal(err)
		}
		c, err := n.Restore(t.Context(), another(t, spec, "b"), dir)
		if err == nil {
			destroy(t, c)
			t.Fatal("it was restored")
		}
		if !errors.Is(err, ErrUnrestorable) {
			t.Errorf("as if it were of this moment: %v", err)
		}
		if left := processesIn(t, checkpointGroup); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	}
}
