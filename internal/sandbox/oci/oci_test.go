package oci

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// That containers run is tested by the contract's tests: see
// conformance_test.go in package sandbox.

func TestOpen_MissingRuntimeSaysHowToInstallIt(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	for _, name := range []string{"crun", "runc", "runsc", "/opt/none/crun"} {
		_, err := Open(t.Context(), Config{Runtime: name, Dir: t.TempDir(), Cgroup: "/fastcontainer-test-oci"})
		want := "apt-get install " + filepath.Base(name)
		if !errors.Is(err, fleet.ErrUnavailable) || len(fleet.Hint(err)) < len(want) || fleet.Hint(err)[len("install it: "):][:len(want)] != want {
			t.Errorf("%s: got %v, hint %q, want %q in it", name, err, fleet.Hint(err), want)
		}
	}
}

func TestOnThread_NeverChangesTheProcess(t *testing.T) {
	before, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	for range 50 {
		err := onStage(nil, func() error {
			if unix.Gettid() == unix.Getpid() {
				return errors.New("on the first thread")
			}
			inside, err := os.Readlink("/proc/thread-self/ns/mnt")
			if err == nil && inside == before {
				err = errors.New("in the host's namespace")
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if after, err := os.Readlink("/proc/self/ns/mnt"); err != nil || after != before {
		t.Errorf("the process is in %s, %v, and was in %s", after, err, before)
	}
}

func TestLastError(t *testing.T) {
	for name, c := range map[string]struct{ log, want string }{
		"none":         {"", ""},
		"one a line":   {`{"level":"warning","msg":"w"}` + "\n" + `{"level":"error","msg":"first"}` + "\n" + `{"level":"error","msg":"last"}` + "\n", "last"},
		"without ends": {`{"msg":"a","level":"error"}{"msg":"b","level":"error"}`, "b"},
		"cut off":      {`{"msg":"a","level":"error"}{"msg":"b","lev`, "a"},
		"no JSON":      {"panic: oh", ""},
	} {
		file := filepath.Join(t.TempDir(), "log")
		if err := os.WriteFile(file, []byte(c.log), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := lastError(file); got != c.want {
			t.Errorf("%s: got %q, want %q", name, got, c.want)
		}
	}
}

func TestIDRanges_AreNotGivenTwice(t *testing.T) {
	u := newIDRanges(1<<20, 3)
	u.adopt(idRange{Base: 1<<20 + idsPerContainer, Size: idsPerContainer})
	a, err1 := u.take()
	b, err2 := u.take()
	if err1 != nil || err2 != nil || a.Base != 1<<20 || b.Base != 1<<20+2*idsPerContainer {
		t.Fatalf("got %+v, %v, %+v, %v", a, err1, b, err2)
	}
	if _, err := u.take(); !errors.Is(err, fleet.ErrOverloaded) || fleet.Hint(err) == "" {
		t.Errorf("got %v, want overloaded", err)
	}
	u.free(a)
	if c, err := u.take(); err != nil || c != a {
		t.Errorf("got %+v, %v, want %+v again", c, err, a)
	}
}
