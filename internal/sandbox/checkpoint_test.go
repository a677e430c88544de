package sandbox

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/sandbox/criu"
)

// testCRIU is where hack/criu.sh puts it.
const testCRIU = "/usr/local/lib/fastcontainer/criu/criu"

const checkpointGroup = "/fastcontainer-test-checkpoint"

func openForCheckpoints(t *testing.T) *Native {
	t.Helper()
	n, err := Open(t.Context(), Config{Cgroup: checkpointGroup, CRIU: testCRIU, Pool: -1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.Clean(t.Context(), nil); err != nil { // what a test left that was killed
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
		if left := processesIn(t, checkpointGroup); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	})
	return n
}

// serves is a spec of a program that writes a file, says something and answers on 8080.
func serves(t *testing.T) Spec {
	t.Helper()
	s := testSpec(busyboxRoot(t), filepath.Join(t.TempDir(), "log"),
		"mkdir -m 700 /www; echo hello > /www/index.html; echo started as $FASTCONTAINER_INSTANCE; busybox httpd -f -p 8080 -h /www; echo over")
	s.Env = []string{"FASTCONTAINER_INSTANCE=" + string(s.ID)}
	return s
}

// another is the spec of one more container from the same checkpoint.
func another(t *testing.T, s Spec, name string) Spec {
	t.Helper()
	s.ID = fleet.InstanceID("test." + name)
	s.Log = filepath.Join(t.TempDir(), name)
	return s
}

func save(t *testing.T, n *Native, s Spec) string {
	t.Helper()
	dir := t.TempDir()
	if err := n.Checkpoint(t.Context(), s, Capture{Port: 8080}, dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

// within runs a script in a container, and gives what it prints.
func within(t *testing.T, c Sandbox, script string) string {
	t.Helper()
	var out bytes.Buffer
	code, err := c.Exec(t.Context(), Process{Args: []string{"/bin/sh", "-c", script}, Stdio: Stdio{Stdout: &out, Stderr: &out}})
	if err != nil || code != 0 {
		t.Fatalf("%s: exit code %d, %v: %s", script, code, err, out.String())
	}
	return out.String()
}

func destroy(t *testing.T, c Sandbox) {
	t.Helper()
	if err := c.Destroy(context.Background()); err != nil {
		t.Error(err)
	}
}

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

const get = "busybox wget -q -O - http://127.0.0.1:8080/"

func TestCheckpoint_ARestoredProgramGoesOnAsItListens(t *testing.T) {
	n, spec := openForCheckpoints(t), serves(t)
	dir := save(t, n, spec)
	if left := processesIn(t, checkpointGroup); len(left) > 0 {
		t.Errorf("the one that was saved is still there: %v", left)
	}
	spec = another(t, spec, "b")
	c, err := n.Restore(t.Context(), spec, dir)
	if err != nil {
		t.Fatal(err)
	}
	defer destroy(t, c)
	if got := within(t, c, get); got != "hello\n" {
		t.Errorf("it answers %q", got)
	}
	for name, want := range map[string]string{
		"cat /proc/1/comm":                                                     "sh",
		"busybox stat -c %a.%u /www":                                           "700.0",
		"cat /proc/1/environ | tr '\\0' '\\n' | grep INSTANCE":                 "FASTCONTAINER_INSTANCE=test.a",
		"busybox hostname":                                                     "test",
		"grep -c . /etc/hosts":                                                 "2",
		"grep Seccomp_filters /proc/1/status | busybox tr -d '\\t'":            "Seccomp_filters:1",
		"grep NoNewPrivs /proc/1/status | busybox tr -d '\\t'":                 "NoNewPrivs:1",
		"grep CapBnd /proc/1/status | busybox tr -d '\\t'":                     "CapBnd:00000000a00405fb",
		"grep -c ' /proc ' /proc/mounts":                                       "1",
		"busybox head -c 1 /proc/keys | busybox wc -c":                         "0",
		"echo x > /proc/sys/kernel/hostname || echo no":                        "/bin/sh: can't create /proc/sys/kernel/hostname: Read-only file system\nno",
		"ls /proc/1/fd | busybox tr '\\n' ' '":                                 "0 1 2 ",
		"busybox readlink /proc/1/fd/0":                                        "/dev/null",
		"cat /proc/self/uid_map | while read a b c; do echo $a $c; done":       "0 65536",
		"cat " + RestoredFile + " | grep -c '\"instance\":\"test.b\"'":         "1",
		"busybox stat -c %a.%u " + RestoredFile + " /etc/hosts | busybox uniq": "644.0",
	} {
		script := strings.ReplaceAll(strings.ReplaceAll(strings.ReplaceAll(name, "grep ", "busybox grep "), "| tr", "| busybox tr"), "busybox busybox", "busybox")
		if got := strings.TrimSuffix(within(t, c, script), "\n"); got != want {
			t.Errorf("%s: %q, want %q", script, got, want)
		}
	}
	// It writes to its own log, and its end is noticed.
	if _, err := c.Exec(t.Context(), Process{Args: []string{"/bin/sh", "-c", "kill $(cat /proc/1/task/1/children)"}}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-c.Done():
	case <-time.After(5 * time.Second):
		t.Fatal("its end is not noticed")
	}
	if x := c.Exit(); x.Code != 0 {
		t.Errorf("exit %+v", x)
	}
	if got := read(t, spec.Log); !strings.HasSuffix(got, "over\n") || strings.Contains(got, "started") {
		t.Errorf("it wrote %q", got)
	}
}

func TestCheckpoint_SiblingsAreTheirOwn(t *testing.T) {
	n, spec := openForCheckpoints(t), serves(t)
	dir := save(t, n, spec)
	const many = 10
	var wg sync.WaitGroup
	boxes := make([]Sandbox, many)
	for i := range boxes {
		s := another(t, spec, fmt.Sprintf("s%d", i))
		s.Hostname = fmt.Sprintf("host%d", i)
		wg.Go(func() {
			c, err := n.Restore(context.Background(), s, dir)
			if err != nil {
				t.Error(err)
				return
			}
			boxes[i] = c
		})
	}
	wg.Wait()
	seen := map[string]bool{}
	for i, c := range boxes {
		if c == nil {
			continue
		}
		defer destroy(t, c)
		within(t, c, fmt.Sprintf("echo %d > /www/index.html", i))
		for _, what := range []string{"busybox hostname", "cat " + RestoredFile, "while read a b c; do echo $b; done < /proc/self/uid_map", "busybox readlink /proc/1/ns/net", "busybox readlink /proc/1/ns/pid"} {
			got := within(t, c, what)
			if seen[got] {
				t.Errorf("%s: two have %q", what, got)
			}
			seen[got] = true
		}
	}
	for i, c := range boxes {
		if c == nil {
			continue
		}
		if got := within(t, c, get); got != fmt.Sprintf("%d\n", i) {
			t.Errorf("sibling %d answers %q", i, got)
		}
	}
}

func TestCheckpoint_OfEveryShape(t *testing.T) {
	n := openForCheckpoints(t)
	volume := t.TempDir()
	if err := os.Chmod(volume, 0o777); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Spec){
		"read-only root": func(s *Spec) {
			s.ReadonlyRoot = true
			s.Args[2] = "busybox httpd -f -p 8080 -h /"
		},
		"seccomp unconfined":     func(s *Spec) { s.Seccomp = "unconfined" },
		"without user namespace": func(s *Spec) { s.UserNS = false },
		"other user":             func(s *Spec) { s.User, s.Args[2] = "1000:1000", "busybox httpd -f -p 8080 -h /; echo over" },
		"open file on a volume": func(s *Spec) {
			s.Mounts = []Mount{{Source: volume, Target: "/data"}}
			s.Args[2] = "exec 5>>/data/file; " + s.Args[2]
		},
		"deleted file": func(s *Spec) {
			s.Args[2] = "exec 5>/deleted; busybox rm /deleted; echo x >&5; exec 6>/linked; busybox ln /linked /other; busybox rm /linked; " + s.Args[2]
		},
		"files of others": func(s *Spec) {
			s.Args[2] = "f=$(busybox printf '/www/\\377'); mkdir /www; echo > $f; busybox chown 5:6 $f; busybox chmod 4755 $f; busybox ln -s /none /www/link; busybox chown -h 7:8 /www/link; busybox httpd -f -p 8080 -h /"
		},
		"unix socket":    func(s *Spec) { s.Args[2] = "busybox syslogd -n -O /messages & " + s.Args[2] },
		"many processes": func(s *Spec) { s.Args[2] = "for i in 1 2 3 4 5 6 7 8; do sleep 1000 & done; " + s.Args[2] },
		"pipe":           func(s *Spec) { s.Args[2] = "sleep 1000 | cat & " + s.Args[2] },
		"no log":         func(s *Spec) { s.Log = "" },
		"capabilities":   func(s *Spec) { s.CapDrop, s.CapAdd = []string{"ALL"}, []string{"net_admin"} },
		"terminated child": func(s *Spec) {
			s.Args[2] = "true & exec busybox httpd -f -p 8080 -h /"
		},
	} {
		t.Run(name, func(t *testing.T) {
			spec := serves(t)
			change(&spec)
			dir := save(t, n, spec)
			log := spec.Log
			if spec = another(t, spec, "b"); log == "" {
				spec.Log = ""
			}
			c, err := n.Restore(t.Context(), spec, dir)
			if err != nil {
				t.Fatal(err)
			}
			defer destroy(t, c)
			within(t, c, "busybox wget -q -O - http://127.0.0.1:8080/ || busybox wget -q -O - http://127.0.0.1:8080/etc/hostname")
			if name == "deleted file" {
				got := within(t, c, "cat /proc/1/fd/5; ls -A / | busybox grep -c restored; ls / | busybox grep -c link_remap; cat /other; true")
				if got != "x\n0\n0\n" {
					t.Errorf("its deleted files: %q", got)
				}
			}
			if name == "files of others" {
				if got := within(t, c, "busybox stat -c %a.%u.%g /www/*"); got != "777.7.8\n4755.5.6\n" {
					t.Errorf("they are %q", got)
				}
			}
			if name == "open file on a volume" {
				within(t, c, "echo more > /proc/1/fd/5")
				if got := read(t, volume+"/file"); got != "more\n" {
					t.Errorf("it wrote %q to the volume", got)
				}
			}
		})
	}
}

// A program that was asked once is saved when it has done what it does after that.
func TestCheckpoint_WarmProgramsRestBefore(t *testing.T) {
	n := openForCheckpoints(t)
	shared := t.TempDir()
	spec := testSpec(busyboxRoot(t), filepath.Join(t.TempDir(), "log"),
		"until [ -e /shared/asked ]; do sleep 0.05; done; sleep 0.5; timeout 1 sh -c 'while :; do :; done'; touch /collected; exec busybox httpd -f -p 8080 -h /")
	spec.Mounts = []Mount{{Source: shared, Target: "/shared", Readonly: true}}
	asked := false
	o := Capture{Port: 8080, Rest: time.Second, Ready: func(context.Context, netip.Addr) error { return nil }}
	o.Warm = func(context.Context, netip.Addr) error {
		asked = true
		return os.WriteFile(filepath.Join(shared, "asked"), nil, 0o600)
	}
	dir := t.TempDir()
	if err := n.Checkpoint(t.Context(), spec, o, dir); err != nil {
		t.Fatal(err)
	}
	c, err := n.Restore(t.Context(), another(t, spec, "warm"), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer destroy(t, c)
	if within(t, c, "ls /collected"); !asked {
		t.Error("it was not asked")
	}
	// Whoever has no more time is heard while it rests.
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("the app is deleted")
	o.Rest = time.Hour
	o.Warm = func(context.Context, netip.Addr) error {
		time.AfterFunc(100*time.Millisecond, func() { cancel(gone) })
		return nil
	}
	if err := n.Checkpoint(ctx, another(t, spec, "gone"), o, t.TempDir()); !errors.Is(err, gone) {
		t.Errorf("got %v", err)
	}
}

func TestCheckpoint_AdoptedAndKilled(t *testing.T) {
	n, err := Open(t.Context(), Config{Cgroup: checkpointGroup, CRIU: testCRIU, Pool: -1})
	if err != nil {
		t.Fatal(err)
	}
	spec := serves(t)
	dir := save(t, n, spec)
	c, err := n.Restore(t.Context(), another(t, spec, "b"), dir)
	if err != nil {
		t.Fatal(err)
	}
	raw := c.State()
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	next, err := Open(t.Context(), Config{Cgroup: checkpointGroup, Pool: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = next.Close() }()
	adopted, err := next.Adopt(t.Context(), raw)
	if err != nil {
		t.Fatal(err)
	}
	defer destroy(t, adopted)
	if got := within(t, adopted, get); got != "hello\n" {
		t.Errorf("it answers %q", got)
	}
	if err := adopted.Kill(); err != nil {
		t.Fatal(err)
	}
	<-adopted.Done()
}

func TestCheckpoint_WhatCannotBeSavedLeavesNothing(t *testing.T) {
	n := openForCheckpoints(t)
	for name, c := range map[string]struct {
		change func(*Spec)
		want   string
	}{
		"it ends":              {func(s *Spec) { s.Args[2] = "exit 3" }, "exit code 3"},
		"it never listens":     {func(s *Spec) { s.Args[2] = "sleep 1000" }, "took too long"},
		"it listens elsewhere": {func(s *Spec) { s.Args[2] = "busybox httpd -f -p 8081 -h /" }, "took too long"},
		"no such program":      {func(s *Spec) { s.Args = []string{"/none"} }, "/none"},
		"a deleted file that is too large": {func(s *Spec) {
			s.Limits.Memory, s.Disk = 512<<20, 256<<20
			s.Args[2] = "busybox dd if=/dev/zero of=/big bs=1M count=80; exec 5</big; rm /big; " + s.Args[2]
		}, "CRIU failed: "},
	} {
		t.Run(name, func(t *testing.T) {
			spec := serves(t)
			c.change(&spec)
			ctx, cancel := context.WithTimeoutCause(t.Context(), 3*time.Second, errors.New("took too long"))
			defer cancel()
			err := n.Checkpoint(ctx, spec, Capture{Port: 8080}, t.TempDir())
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q in it", err, c.want)
			}
			if left := processesIn(t, checkpointGroup); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

func TestRestore_DamagedImagesLeaveNothing(t *testing.T) {
	n, spec := openForCheckpoints(t), serves(t)
	for name, damage := range map[string]func(t *testing.T, dir string) error{
		"pages cut off": func(_ *testing.T, dir string) error { return os.Truncate(dir+"/images/pages-1.img", 4096) },
		"core missing":  func(_ *testing.T, dir string) error { return os.Remove(dir + "/images/core-1.img") },
		"tree garbled": func(_ *testing.T, dir string) error {
			return os.WriteFile(dir+"/images/pstree.img", []byte("nothing"), 0o600)
		},
		"images missing": func(_ *testing.T, dir string) error { return os.RemoveAll(dir + "/images") },
		"files missing":  func(_ *testing.T, dir string) error { return os.RemoveAll(dir + "/files/www") },
		"about missing":  func(_ *testing.T, dir string) error { return os.Remove(dir + "/" + savedFile) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := save(t, n, spec)
			if err := damage(t, dir); err != nil {
				t.Fatal(err)
			}
			// CRIU reads on for ever where a file ends too early.
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			defer cancel()
			c, err := n.Restore(ctx, another(t, spec, "b"), dir)
			if err == nil {
				destroy(t, c)
				t.Fatal("it was restored")
			}
			// What CRIU does not see is found by checksums before.
			if name != "pages cut off" && name != "images missing" && !errors.Is(err, ErrUnrestorable) {
				t.Errorf("as if it were of this moment: %v", err)
			}
			t.Log(err)
			if left := processesIn(t, checkpointGroup); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

// What the machine lacks says nothing about what was saved.
func TestRestore_OfTheMoment(t *testing.T) {
	n, spec := openForCheckpoints(t), serves(t)
	spec.Args[2] = "for i in 1 2 3 4 5 6 7 8; do sleep 1000 & done; " + spec.Args[2]
	dir := save(t, n, spec)
	for name, lack := range map[string]func(*Spec){
		"processes":      func(s *Spec) { s.Limits.PIDs = 5 },
		"memory":         func(s *Spec) { s.Limits.Memory = 1 << 20 },
		"a volume":       func(s *Spec) { s.Mounts = []Mount{{Source: "/none", Target: "/data"}} },
		"a log":          func(s *Spec) { s.Log = "/none/log" },
		"time":           func(s *Spec) {},
		"a user's range": func(s *Spec) { n.uids, s.UserNS = newUIDRanges(536870912, 0), true },
	} {
		t.Run(name, func(t *testing.T) {
			s, uids := another(t, spec, "b"), n.uids
			lack(&s)
			defer func() { n.uids = uids }()
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if name == "time" {
				cancel()
			}
			c, err := n.Restore(ctx, s, dir)
			if err == nil {
				destroy(t, c)
				t.Fatal("it was restored")
			}
			if errors.Is(err, ErrUnrestorable) {
				t.Error(err)
			}
			t.Log(err)
			if left := processesIn(t, checkpointGroup); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
	c, err := n.Restore(t.Context(), another(t, spec, "b"), dir)
	if err != nil {
		t.Fatal(err)
	}
	destroy(t, c)
}

func TestRestore_Canceled(t *testing.T) {
	n, spec := openForCheckpoints(t), serves(t)
	dir := save(t, n, spec)
	for wait := time.Duration(0); wait < 30*time.Millisecond; wait += 3 * time.Millisecond {
		ctx, cancel := context.WithTimeout(t.Context(), wait)
		c, err := n.Restore(ctx, another(t, spec, "b"), dir)
		cancel()
		if err == nil {
			destroy(t, c)
		}
		if left := processesIn(t, checkpointGroup); len(left) > 0 {
			t.Errorf("left behind after %v: %v", wait, left)
		}
	}
}

func TestCheckpoint_ImagesAreRootsAlone(t *testing.T) {
	n, spec := openForCheckpoints(t), serves(t)
	spec.Env = append(spec.Env, "SECRET=hunter2-of-this-test")
	dir := save(t, n, spec)
	var st unix.Stat_t
	if err := unix.Stat(dir+"/images", &st); err != nil {
		t.Fatal(err)
	}
	if st.Mode&0o077 != 0 || st.Uid != 0 {
		t.Errorf("mode %o of user %d", st.Mode, st.Uid)
	}
	pages, err := filepath.Glob(dir + "/images/pages-*.img")
	if err != nil || len(pages) == 0 {
		t.Fatal(pages, err)
	}
	found := false
	for _, p := range pages {
		found = found || strings.Contains(read(t, p), "hunter2-of-this-test")
	}
	if !found {
		t.Error("the secret is not where this test takes it to be")
	}
	// No restored program sees the images, nor the files of the host.
	c, err := n.Restore(t.Context(), another(t, spec, "b"), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer destroy(t, c)
	if got := within(t, c, "cat /proc/self/mountinfo /proc/1/maps; ls -l /proc/1/fd"); regexp.MustCompile(`images|criu|` + regexp.QuoteMeta(dir)).MatchString(got) {
		t.Errorf("it sees %s", got)
	}
}

func TestCheckpointHost_SaysWhyThereIsNone(t *testing.T) {
	for path, want := range map[string]string{"": "there is no CRIU", "/bin/true": "does not tell its version", "/none/criu": "no such file"} {
		n, err := Open(t.Context(), Config{Cgroup: checkpointGroup + "-none", CRIU: path, Pool: -1})
		if err != nil {
			t.Fatal(err)
		}
		_, err = n.CheckpointHost(t.Context()) // waits until CRIU was looked at
		if !errors.Is(err, fleet.ErrUnavailable) || !strings.Contains(err.Error(), want) || fleet.Hint(err) == "" {
			t.Errorf("%q: %v, hint %q; want %q", path, err, fleet.Hint(err), want)
		}
		if err := n.Checkpoint(t.Context(), testSpec(t.TempDir(), "", "true"), Capture{}, t.TempDir()); !errors.Is(err, fleet.ErrUnavailable) {
			t.Errorf("%q: checkpoint: %v", path, err)
		}
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	}
}

// Just after Open it is waited for CRIU, as long as the context lasts.
func TestCheckpointHost_WaitsForTheLook(t *testing.T) {
	n := &Native{saver: &saver{looked: make(chan struct{}), Program: &criu.Program{Version: "4.2"}}}
	short, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if host, err := n.CheckpointHost(short); !errors.Is(err, fleet.ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%q, %v", host, err)
	}
	time.AfterFunc(10*time.Millisecond, func() { close(n.saver.looked) })
	for _, ctx := range []context.Context{t.Context(), short} { // what is known is told at any time
		if host, err := n.CheckpointHost(ctx); err != nil || !strings.HasSuffix(host, "CRIU 4.2") {
			t.Errorf("%q, %v", host, err)
		}
	}
}

func TestSaved_RoundTrip(t *testing.T) {
	dir := t.TempDir()
	want := saved{Log: "file[1b:2c]"}
	b, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, savedFile), b, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := readSaved(dir); err != nil || got.Log != want.Log {
		t.Errorf("%+v, %v", got, err)
	}
	if err := os.WriteFile(filepath.Join(dir, savedFile), b[:5], 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readSaved(dir); err == nil {
		t.Error("a damaged file is read")
	}
}
