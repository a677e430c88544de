package sandboxtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/sandbox"
)

func (s *suite) memory(t *testing.T) {
	r := s.runtime(t, nil)
	spec := s.spec("", newOutput())
	spec.Args = []string{"/bin/dd", "if=/dev/zero", "of=/dev/null", "bs=256M", "count=1"}
	spec.Limits.Memory = 96 << 20
	c := start(t, r, spec)
	if e := wait(t, c); !e.OOM || e.Code == 0 {
		t.Errorf("got %+v, want killed for lack of memory", e)
	}
	// The kernel lets a dying process exceed its limit by some pages.
	if st, err := c.Stats(); err != nil || st.OOMKills == 0 || st.MemoryPeak > spec.Limits.Memory+1<<20 {
		t.Errorf("got %+v, %v, want a kill and no more than the limit", st, err)
	}
}

func (s *suite) pids(t *testing.T) {
	r, out := s.runtime(t, nil), newOutput()
	spec := s.spec("i=0; while [ $i -lt 60 ]; do sleep 100 & i=$((i+1)); done; echo all; wait", out)
	spec.Limits.PIDs = 30
	c := start(t, r, spec)
	out.await(t, "can't fork")
	if st, err := c.Stats(); err != nil || st.PIDs > 30 {
		t.Errorf("got %d processes, %v, want at most 30", st.PIDs, err)
	}
}

func (s *suite) log(t *testing.T) {
	r := s.runtime(t, nil)
	name := filepath.Join(t.TempDir(), "log")
	spec := s.spec("echo out; echo err >&2; echo again >> /dev/stdout; read line || echo no input", nil)
	spec.Log, spec.User = name, "app"
	c := start(t, r, spec)
	wait(t, c)
	destroy(t, c)
	if b, err := os.ReadFile(name); err != nil || string(b) != "out\nerr\nagain\nno input\n" {
		t.Errorf("log holds %q, %v", b, err)
	}
	if st, err := os.Stat(name); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("log has mode %v, %v, want 0600", st.Mode(), err)
	}

	// It is appended to, and its newest part is kept.
	spec.Args = []string{"/bin/sh", "-c", "i=0; while [ $i -lt 400 ]; do echo $i-0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789; i=$((i+1)); done; echo last"}
	spec.LogMax = 16 << 10
	c = start(t, r, spec)
	wait(t, c)
	destroy(t, c)
	b, err := os.ReadFile(name)
	if err != nil || len(b) > 16<<10 || !strings.HasSuffix(string(b), "\nlast\n") {
		t.Errorf("log holds %d bytes, %v, want at most 16 KiB of the newest", len(b), err)
	}
}

func (s *suite) signals(t *testing.T) {
	r := s.runtime(t, nil)
	const script = "trap 'exit 7' TERM; echo ready; while true; do sleep 0.01; done"
	for name, c := range map[string]struct {
		end  func(sandbox.Sandbox) error
		want sandbox.Exit
	}{
		"SIGTERM": {func(c sandbox.Sandbox) error { return c.Signal(syscall.SIGTERM) }, sandbox.Exit{Code: 7}},
		"SIGKILL": {func(c sandbox.Sandbox) error { return c.Signal(syscall.SIGKILL) }, sandbox.Exit{Code: 137, Signal: "SIGKILL"}},
		"Kill":    {func(c sandbox.Sandbox) error { return c.Kill() }, sandbox.Exit{Code: 137, Signal: "SIGKILL"}},
	} {
		out := newOutput()
		box := start(t, r, s.spec(script, out))
		if box.ID() != "test.a" || !alive(box.PID()) {
			t.Errorf("%s: got id %s, pid %d", name, box.ID(), box.PID())
		}
		out.await(t, "ready")
		select {
		case <-box.Done():
			t.Errorf("%s: done before its end", name)
		default:
		}
		must(t, c.end(box))
		got := wait(t, box)
		if since := time.Since(got.At); since < 0 || since > timeout {
			t.Errorf("%s: it ended %s ago", name, since)
		}
		got.At = time.Time{}
		if got != c.want {
			t.Errorf("%s: got %+v, want %+v", name, got, c.want)
		}
		if err := box.Signal(syscall.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
			t.Errorf("%s: signal after the end: got %v, want ErrProcessDone", name, err)
		}
		if _, err := box.Exec(testContext(t), sandbox.Process{Args: []string{"true"}}); !errors.Is(err, fleet.ErrNotFound) {
			t.Errorf("%s: exec after the end: got %v, want not found", name, err)
		}
		destroy(t, box)
	}
}

func (s *suite) terminal(t *testing.T) {
	r, out := s.runtime(t, nil), newOutput()
	resize := make(chan sandbox.WindowSize, 1)
	spec := s.spec("test -t 0 && test -t 2 && echo terminal; echo ready; read size; stty size; read line; echo got $line", nil)
	in, typed := io.Pipe()
	spec.Stdio = &sandbox.Stdio{Stdin: in, Stdout: out, TTY: true, Resize: resize}
	c := start(t, r, spec)
	typeLines(t, out, typed, resize)
	if e := wait(t, c); e.Code != 0 {
		t.Errorf("got %+v", e)
	}
}

// typeLines plays the caller of a terminal whose program is as in terminal.
func typeLines(t *testing.T, out *output, typed io.WriteCloser, resize chan<- sandbox.WindowSize) {
	t.Helper()
	out.await(t, "ready")
	if !strings.Contains(out.String(), "terminal") {
		t.Errorf("got %q, want a terminal", out)
	}
	resize <- sandbox.WindowSize{Rows: 33, Cols: 111}
	// The size is set beside the input: ask until it is there.
	for len(resize) > 0 {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(20 * time.Millisecond)
	_, err := io.WriteString(typed, "go\n")
	must(t, err)
	out.await(t, "33 111")
	_, err = io.WriteString(typed, "hello\n")
	must(t, err)
	out.await(t, "got hello")
	must(t, typed.Close())
}

// idle is a container that does nothing.
func (s *suite) idle(t *testing.T, r sandbox.Runtime, change func(*sandbox.Spec)) sandbox.Sandbox {
	t.Helper()
	out := newOutput()
	spec := s.spec("trap 'exit 7' TERM; echo ready; while true; do sleep 0.05; done", out)
	if change != nil {
		change(&spec)
	}
	c := start(t, r, spec)
	out.await(t, "ready")
	return c
}

func (s *suite) exec(t *testing.T) {
	c := s.idle(t, s.runtime(t, nil), func(s *sandbox.Spec) { s.Env, s.Dir, s.User = []string{"PATH=/bin", "OWN=yes"}, "/tmp", "app" })
	out, errOut := newOutput(), newOutput()
	code, err := c.Exec(testContext(t), sandbox.Process{
		Args:  []string{"sh", "-c", "cat; echo $OWN; pwd; id -u; hostname; echo wrong >&2; exit 5"},
		Stdio: sandbox.Stdio{Stdin: strings.NewReader("input\n"), Stdout: out, Stderr: errOut},
	})
	if want := "input\nyes\n/tmp\n1000\ninside\n"; err != nil || code != 5 || out.String() != want || errOut.String() != "wrong\n" {
		t.Errorf("got %d, %v, %q, %q, want 5 and %q", code, err, out, errOut, want)
	}
	out = newOutput()
	code, err = c.Exec(testContext(t), sandbox.Process{
		Args: []string{"sh", "-c", "echo $OWN$OTHER; pwd; id -u; id -g; kill -9 $$"}, Env: []string{"OTHER=too", "PATH=/bin"}, Dir: "/etc", User: "0:staff",
		Stdio: sandbox.Stdio{Stdout: out},
	})
	if want := "too\n/etc\n0\n2000\n"; err != nil || code != 137 || out.String() != want {
		t.Errorf("got %d, %v, %q, want 137 and %q", code, err, out, want)
	}
	for _, p := range []sandbox.Process{{Args: []string{"nothing"}}, {Args: []string{"true"}, User: "nobody-here"}, {}} {
		if _, err := c.Exec(testContext(t), p); !errors.Is(err, fleet.ErrInvalid) || fleet.Hint(err) == "" {
			t.Errorf("exec %v: got %v, want invalid with a hint", p, err)
		}
	}
	if !alive(c.PID()) {
		t.Error("the container has ended")
	}
}

func (s *suite) execConfined(t *testing.T) {
	c := s.idle(t, s.runtime(t, nil), func(s *sandbox.Spec) { s.CapDrop = []string{"CHOWN"} })
	out := newOutput()
	_, err := c.Exec(testContext(t), sandbox.Process{
		Args:  []string{"sh", "-c", "grep -E 'CapBnd|NoNew|Seccomp:' /proc/self/status; unshare -U true; ls /proc/self/fd; ls -A /sys/firmware 2>/dev/null | wc -l"},
		Stdio: sandbox.Stdio{Stdout: out, Stderr: out},
	})
	if want := "CapBnd:\t00000000a00405fa\nNoNewPrivs:\t1\nSeccomp:\t2\nunshare: unshare(0x10000000): Operation not permitted\n0\n1\n2\n3\n0\n"; err != nil || out.String() != want {
		t.Errorf("got %q, %v, want %q", out, err, want)
	}
}

func (s *suite) execTerminal(t *testing.T) {
	c := s.idle(t, s.runtime(t, nil), nil)
	out, resize := newOutput(), make(chan sandbox.WindowSize, 1)
	in, typed := io.Pipe()
	code := make(chan int, 1)
	go func() {
		n, err := c.Exec(testContext(t), sandbox.Process{
			Args:  []string{"sh", "-c", "test -t 0 && test -t 2 && echo terminal; echo ready; read size; stty size; read line; echo got $line; exit 4"},
			Stdio: sandbox.Stdio{Stdin: in, Stdout: out, TTY: true, Resize: resize},
		})
		if err != nil {
			t.Error(err)
		}
		code <- n
	}()
	typeLines(t, out, typed, resize)
	if n := <-code; n != 4 {
		t.Errorf("got %d, want 4", n)
	}
}

func (s *suite) execCanceled(t *testing.T) {
	c := s.idle(t, s.runtime(t, nil), nil)
	ctx, cancel := context.WithCancel(testContext(t))
	out := newOutput()
	done := make(chan error, 1)
	go func() {
		_, err := c.Exec(ctx, sandbox.Process{Args: []string{"sh", "-c", "echo ready; exec tail -f /dev/null"}, Stdio: sandbox.Stdio{Stdout: out}})
		done <- err
	}()
	out.await(t, "ready")
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want canceled", err)
	}
	out = newOutput()
	if _, err := c.Exec(testContext(t), sandbox.Process{Args: []string{"sh", "-c", "for p in /proc/[0-9]*; do grep -q ^tail $p/cmdline && echo $p; done"}, Stdio: sandbox.Stdio{Stdout: out, Stderr: io.Discard}}); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(out.String(), "/proc/") {
		t.Errorf("the canceled program still runs: %q", out)
	}
}

func (s *suite) resize(t *testing.T) {
	r, out := s.runtime(t, nil), newOutput()
	spec := s.spec("echo ready; read line; exec dd if=/dev/zero of=/dev/null bs=192M count=1", out)
	in, typed := io.Pipe()
	spec.Stdio.Stdin = in
	spec.Limits = sandbox.Limits{CPU: 1, Memory: 512 << 20, PIDs: 100}
	c := start(t, r, spec)
	out.await(t, "ready")
	for _, l := range []sandbox.Limits{{}, {CPU: 2, CPUWeight: 200, Memory: 400 << 20, PIDs: 50}, {CPU: 0.5, CPUWeight: sandbox.IdleWeight, Memory: 128 << 20}, {CPU: 0.5, CPUWeight: 10, Memory: 96 << 20, PIDs: 60}} {
		if err := c.Resize(l); err != nil {
			t.Errorf("resize to %+v: %v", l, err)
		}
	}
	_, err := io.WriteString(typed, "go\n")
	must(t, err)
	must(t, typed.Close())
	if e := wait(t, c); !e.OOM {
		t.Errorf("got %+v, want killed for lack of memory", e)
	}
}

func (s *suite) stats(t *testing.T) {
	r, out := s.runtime(t, nil), newOutput()
	c := start(t, r, s.spec("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo ready; read line; sleep 100", out))
	out.await(t, "ready")
	st, err := c.Stats()
	if err != nil || st.CPUTime <= 0 || st.Memory <= 0 || st.PIDs < 1 || st.MemoryPeak < st.Memory || st.OOMKills != 0 {
		t.Errorf("got %+v, %v", st, err)
	}
	if got := c.Timings(); got.Exec <= 0 || got.Exec > timeout {
		t.Errorf("got timings %+v", got)
	}
}

func (s *suite) cpu(t *testing.T) {
	r, out := s.runtime(t, nil), newOutput()
	spec := s.spec("echo ready; while :; do :; done", out)
	spec.Limits.CPU = 0.2
	c := start(t, r, spec)
	out.await(t, "ready")
	for began := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		all, err := c.Stats()
		must(t, err)
		st, err := c.CPU()
		must(t, err)
		if st.CPUTime < all.CPUTime || st.Memory != 0 {
			t.Fatalf("got %+v after %+v", st, all)
		}
		if st.CPUTime > 30*time.Millisecond && st.Periods > 2 && st.ThrottledPers > 0 {
			return
		}
		if time.Since(began) > timeout {
			t.Fatalf("got %+v: it is not stopped at its limit", st)
		}
	}
}

// Two share one processor: alike, or one after the other.
func (s *suite) weights(t *testing.T) {
	r := s.runtime(t, nil)
	var both [2]sandbox.Sandbox
	for i := range both {
		out := newOutput()
		spec := s.spec("echo ready; while :; do :; done", out)
		spec.ID += fleet.InstanceID(strconv.Itoa(i))
		spec.Limits = sandbox.Limits{}
		both[i] = start(t, r, spec)
		out.await(t, "ready")
		pin(t, both[i].PID())
	}
	used := func(i int) time.Duration {
		st, err := both[i].CPU()
		must(t, err)
		return st.CPUTime
	}
	for _, c := range []struct {
		weight      uint64
		least, most float64 // of what the other gets; kernels before 6.6 have no less than a quarter
	}{{100, 0.5, 2}, {sandbox.IdleWeight, 0, 0.5}, {100, 0.5, 2}, {1000, 3, 30}, {sandbox.IdleWeight, 0, 0.5}, {20, 0.07, 0.5}} {
		must(t, both[0].Resize(sandbox.Limits{CPUWeight: c.weight}))
		must(t, both[1].Resize(sandbox.Limits{CPUWeight: 100}))
		time.Sleep(50 * time.Millisecond) // what was owed is settled
		before := [2]time.Duration{used(0), used(1)}
		began := time.Now()
		var part [2]float64
		for part[0]+part[1] < 0.3 {
			if time.Since(began) > timeout {
				t.Fatalf("they used %v seconds", part)
			}
			time.Sleep(20 * time.Millisecond)
			part = [2]float64{(used(0) - before[0]).Seconds(), (used(1) - before[1]).Seconds()}
		}
		if got := part[0] / part[1]; got < c.least || got > c.most {
			t.Errorf("weight %d beside 100: %.2f of what the other gets, want %.2f to %.2f", c.weight, got, c.least, c.most)
		}
	}
}

// pin keeps a process, its threads and its descendants on the first processor.
func pin(t *testing.T, pid int) {
	t.Helper()
	var first unix.CPUSet
	first.Set(0)
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	must(t, err)
	for _, task := range tasks {
		tid, err := strconv.Atoi(task.Name())
		must(t, err)
		if err := unix.SchedSetaffinity(tid, &first); err != nil && !errors.Is(err, unix.ESRCH) {
			t.Fatal(err)
		}
		children, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, tid))
		for _, child := range strings.Fields(string(children)) {
			n, err := strconv.Atoi(child)
			must(t, err)
			pin(t, n)
		}
	}
}

// An alarm rings before the limit is reached, in time to raise it.
func (s *suite) alarm(t *testing.T) {
	r := s.runtime(t, nil)
	// Files in memory count: 4 MiB at a time, 56 MiB in all.
	spec := s.spec("i=0; while [ $i -lt 14 ]; do dd if=/dev/zero of=/dev/shm/$i bs=1M count=4 2>/dev/null || exit 3; i=$((i+1)); sleep 0.05; done; exit 7", newOutput())
	spec.Limits.Memory = 40 << 20
	c := start(t, r, spec)
	rung := make(chan struct{}, 1000)
	stop, err := c.Alarm(24<<20, func() {
		if err := c.Resize(sandbox.Limits{CPU: 1, Memory: 256 << 20, PIDs: 100}); err != nil {
			t.Error(err)
		}
		rung <- struct{}{}
	})
	must(t, err)
	defer stop()
	select {
	case <-rung:
	case <-time.After(timeout):
		t.Fatal("it does not ring")
	}
	stop()
	if e := wait(t, c); e.Code != 7 {
		t.Errorf("got %+v, want it to have had room", e)
	}
}

func (s *suite) freeze(t *testing.T) {
	c := s.idle(t, s.runtime(t, nil), nil)
	f, ok := c.(sandbox.Freezer)
	if !ok {
		t.Fatal("it cannot be frozen")
	}
	must(t, f.Freeze(testContext(t)))
	must(t, c.Signal(syscall.SIGTERM))
	select {
	case <-c.Done():
		t.Error("it ended although it was frozen")
	case <-time.After(100 * time.Millisecond):
	}
	must(t, f.Thaw())
	if e := wait(t, c); e.Code != 7 {
		t.Errorf("got %+v, want 7", e)
	}
	// A frozen one can be removed.
	c = s.idle(t, s.runtime(t, nil), nil)
	must(t, c.(sandbox.Freezer).Freeze(testContext(t))) //nolint:forcetypeassert // as above
	destroy(t, c)
}

func (s *suite) adopt(t *testing.T) {
	first := s.open(t, nil)
	log := filepath.Join(t.TempDir(), "log")
	spec := s.spec("trap 'echo term; exit 7' TERM; echo ready; while true; do sleep 0.02; done", nil)
	spec.Log, spec.Env = log, []string{"PATH=/bin", "SECRET=hidden"}
	old, err := first.Start(testContext(t), spec)
	must(t, err)
	state := old.State()
	if strings.Contains(string(state), "hidden") {
		t.Errorf("the state holds a secret: %s", state)
	}
	must(t, first.Close())

	r := s.runtime(t, nil)
	c, err := r.Adopt(testContext(t), state)
	must(t, err)
	if removed, err := r.Clean(testContext(t), []fleet.InstanceID{c.ID()}); err != nil || len(removed) != 0 {
		t.Errorf("clean removed %v, %v", removed, err)
	}
	if c.ID() != "test.a" || c.PID() != old.PID() || c.Timings() != (sandbox.Timings{}) {
		t.Errorf("got %s, pid %d, timings %+v", c.ID(), c.PID(), c.Timings())
	}
	if string(c.State()) != string(state) {
		t.Errorf("got state %s, want %s", c.State(), state)
	}
	out := newOutput()
	if code, err := c.Exec(testContext(t), sandbox.Process{Args: []string{"sh", "-c", "echo $SECRET; exit 3"}, Stdio: sandbox.Stdio{Stdout: out}}); err != nil || code != 3 || out.String() != "hidden\n" {
		t.Errorf("exec: got %d, %v, %q", code, err, out)
	}
	must(t, c.Resize(sandbox.Limits{Memory: 300 << 20}))
	if _, err := c.Stats(); err != nil {
		t.Error(err)
	}
	must(t, c.Signal(syscall.SIGTERM))
	if e := wait(t, c); e.Code != 7 && e.Code != -1 {
		t.Errorf("got %+v, want 7 or unknown", e)
	}
	destroy(t, c)
	if b, err := os.ReadFile(log); err != nil || !strings.HasSuffix(string(b), "term\n") {
		t.Errorf("log holds %q, %v", b, err)
	}
	if _, err := r.Adopt(testContext(t), state); !errors.Is(err, sandbox.ErrGone) {
		t.Errorf("adopt again: got %v, want ErrGone", err)
	}
	if _, err := r.Adopt(testContext(t), []byte("{")); err == nil {
		t.Error("a broken state was adopted")
	}
}

func (s *suite) adoptGone(t *testing.T) {
	first := s.open(t, nil)
	spec := s.spec("sleep 1000", nil)
	spec.Log = filepath.Join(t.TempDir(), "log")
	old, err := first.Start(testContext(t), spec)
	must(t, err)
	pidfd, err := unix.PidfdOpen(old.PID(), 0)
	must(t, err)
	defer func() { _ = unix.Close(pidfd) }()
	must(t, first.Close())
	must(t, unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0))
	ended := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}} //nolint:gosec // a descriptor
	n, err := unix.Poll(ended, int(timeout.Milliseconds()))
	for errors.Is(err, unix.EINTR) {
		n, err = unix.Poll(ended, int(timeout.Milliseconds()))
	}
	if err != nil || n != 1 {
		t.Fatalf("it does not end: %v", err)
	}
	r := s.runtime(t, nil)
	if _, err := r.Adopt(testContext(t), old.State()); !errors.Is(err, sandbox.ErrGone) {
		t.Errorf("got %v, want ErrGone", err)
	}
	if removed, err := r.Clean(testContext(t), nil); err != nil || len(removed) != 0 {
		t.Errorf("clean removed %v, %v, though its remains were removed", removed, err)
	}
}

func (s *suite) clean(t *testing.T) {
	first := s.open(t, nil)
	spec := s.spec("sleep 1000 & sleep 1000", nil)
	before := children(t)
	old, err := first.Start(testContext(t), spec)
	must(t, err)
	must(t, first.Close())
	r := s.runtime(t, nil)
	kept := s.idle(t, r, nil)
	removed, err := r.Clean(testContext(t), nil)
	if err != nil || len(removed) != 1 {
		t.Errorf("clean removed %v, %v, want one", removed, err)
	}
	if alive(old.PID()) {
		t.Error("the orphan lives")
	}
	if !alive(kept.PID()) {
		t.Error("clean ended a container of this runtime")
	}
	if removed, err := r.Clean(testContext(t), nil); err != nil || len(removed) != 0 {
		t.Errorf("clean again removed %v, %v", removed, err)
	}
	// This process is also the orphan's parent, which a new daemon is not.
	destroy(t, kept)
	for _, pid := range difference(children(t), before) {
		if n, err := strconv.Atoi(pid); err == nil && !alive(n) {
			var ws unix.WaitStatus
			_, _ = unix.Wait4(n, &ws, unix.WNOHANG, nil)
		}
	}
}

func (s *suite) destroyTwice(t *testing.T) {
	c := s.idle(t, s.runtime(t, nil), nil)
	var all sync.WaitGroup
	for range 3 {
		all.Go(func() { destroy(t, c) })
	}
	all.Wait()
	destroy(t, c)
	select {
	case <-c.Done():
	default:
		t.Error("destroyed, but not done")
	}
	if alive(c.PID()) {
		t.Error("its process lives")
	}
}

func (s *suite) canceledStart(t *testing.T) {
	r := s.runtime(t, nil)
	ctx, cancel := context.WithCancel(testContext(t))
	cancel()
	if c, err := r.Start(ctx, s.spec("sleep 1000", nil)); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want canceled", err)
		if err == nil {
			destroy(t, c)
		}
	}
	if removed, err := r.Clean(testContext(t), nil); err != nil || len(removed) != 0 {
		t.Errorf("left behind: %v, %v", removed, err)
	}
}

func (s *suite) many(t *testing.T) {
	r := s.runtime(t, nil)
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			out := newOutput()
			c, err := r.Start(testContext(t), s.spec("cat /proc/self/uid_map", out))
			if err != nil {
				t.Error(err)
				return
			}
			defer destroy(t, c)
			<-c.Done()
			if c.Exit().Code != 0 || len(strings.Fields(out.String())) != 3 {
				t.Errorf("got %+v, %q", c.Exit(), out)
			}
		})
	}
	all.Wait()
}
