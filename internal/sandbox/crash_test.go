package sandbox

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/sandbox/cgroup"
)

// TestMain lets the test binary play a daemon that is killed.
func TestMain(m *testing.M) {
	if os.Getenv("SANDBOX_TEST_DAEMON") != "" {
		if err := playDaemon(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

func testSpec(root, log, script string) Spec {
	return Spec{
		ID: "test.a", App: "test", Hostname: "test", Layers: []string{root}, Args: []string{"/bin/sh", "-c", script},
		UserNS: true, Log: log, Limits: Limits{CPU: 1, Memory: 64 << 20, PIDs: 100},
	}
}

// playDaemon starts one container, prints its state and goes on preparing and
// starting others until it is killed.
func playDaemon() error {
	ctx := context.Background()
	n, err := Open(ctx, Config{Cgroup: os.Getenv("SANDBOX_TEST_DAEMON"), Pool: 3})
	if err != nil {
		return err
	}
	if program := os.Getenv("SANDBOX_TEST_CRIU"); program != "" {
		n.saver = newSaver(program)
		w, err := n.employ(ctx, &errand{})
		if err != nil {
			return err
		}
		fmt.Println(w.pid)
		select {}
	}
	root, log := os.Getenv("SANDBOX_TEST_ROOT"), os.Getenv("SANDBOX_TEST_LOG")
	c, err := n.Start(ctx, testSpec(root, log, "echo one; trap 'echo two; exit 7' TERM; while true; do sleep 0.01; done"))
	if err != nil {
		return err
	}
	fmt.Println(string(c.State()))
	for {
		if _, err := n.Start(ctx, testSpec(root, log+"2", "sleep 1000")); err != nil {
			return err
		}
	}
}

// startDaemon plays one in a process of its own, which prints to out.
func startDaemon(t *testing.T, group string, env ...string) (daemon *exec.Cmd, out io.Reader) {
	t.Helper()
	daemon = exec.Command(os.Args[0])
	daemon.Env = append(append(os.Environ(), "SANDBOX_TEST_DAEMON="+group), env...)
	daemon.Stderr = os.Stderr
	out, err := daemon.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	return daemon, out
}

// processesIn lists what runs in the groups of a test's daemon.
func processesIn(t *testing.T, group string) map[string][]int {
	t.Helper()
	r, err := cgroup.Open(group)
	if err != nil {
		t.Fatal(err)
	}
	names, err := r.List()
	if err != nil {
		t.Fatal(err)
	}
	in := map[string][]int{}
	for _, name := range names {
		if in[name], err = r.Group(name).Processes(); err != nil {
			t.Fatal(err)
		}
	}
	return in
}

func TestNative_KilledDaemonLeavesOnlyWhatCanBeAdopted(t *testing.T) {
	const group = "/fastcontainer-test-crash"
	root, log := busyboxRoot(t), filepath.Join(t.TempDir(), "log")
	for round, wait := range []time.Duration{0, 3 * time.Millisecond, 20 * time.Millisecond} {
		daemon, out := startDaemon(t, group, "SANDBOX_TEST_ROOT="+root, "SANDBOX_TEST_LOG="+log)
		line, err := bufio.NewReader(out).ReadString('\n')
		if err != nil {
			t.Fatalf("the daemon did not start a container: %v", err)
		}
		time.Sleep(wait) // kill it at different points of its next starts
		_ = daemon.Process.Kill()
		_ = daemon.Wait()

		n, err := Open(t.Context(), Config{Cgroup: group, Pool: 1})
		if err != nil {
			t.Fatal(err)
		}
		c, err := n.Adopt(t.Context(), json.RawMessage(line))
		if err != nil {
			t.Fatalf("round %d: adopt: %v", round, err)
		}
		if removed, err := n.Clean(t.Context(), nil); err != nil || len(removed) == 0 {
			t.Errorf("round %d: clean removed %v, %v", round, removed, err)
		}
		if err := c.Signal(unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
		select {
		case <-c.Done():
		case <-testContext(t).Done():
			t.Fatalf("round %d: the end of an adopted container was not noticed", round)
		}
		if b, _ := os.ReadFile(log); !strings.HasSuffix(string(b), "one\ntwo\n") {
			t.Errorf("round %d: its log is %q: it did not outlive the daemon", round, b)
		}
		if err := c.Destroy(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
		if left := processesIn(t, group); len(left) != 0 {
			t.Errorf("round %d: left behind: %v", round, left)
		}
	}
}

// A CRIU that saves for a daemon that is killed ends before the next one looks
// at what is saved. Here it stands still, and so would go on for ever.
func TestOpen_EndsWhatSavesForAnEarlierDaemon(t *testing.T) {
	const group = "/fastcontainer-test-saver"
	daemon, out := startDaemon(t, group, "SANDBOX_TEST_CRIU="+testCRIU)
	var pid int
	if _, err := fmt.Fscan(out, &pid); err != nil {
		t.Fatalf("the daemon did not start CRIU: %v", err)
	}
	worker, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(worker) }()
	if err := unix.PidfdSendSignal(worker, unix.SIGSTOP, nil, 0); err != nil {
		t.Fatal(err)
	}
	_ = daemon.Process.Kill()
	_ = daemon.Wait()
	ended := func() bool { return pollNow([]unix.PollFd{{Fd: int32(worker), Events: unix.POLLIN}}) }
	if ended() {
		t.Fatal("it ended with its daemon, so nothing is tested")
	}
	n, err := Open(t.Context(), Config{Cgroup: group, Pool: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = n.Close() }()
	if !ended() {
		_ = unix.PidfdSendSignal(worker, unix.SIGKILL, nil, 0)
		t.Error("it goes on")
	}
	if _, err := n.Clean(t.Context(), nil); err != nil { // what was prepared ahead
		t.Error(err)
	}
	if left := processesIn(t, group); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestNative_AdoptOfAnotherProcessIsRefused(t *testing.T) {
	const group = "/fastcontainer-test-adopt"
	n, err := Open(t.Context(), Config{Cgroup: group, Pool: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = n.Close() }()
	c, err := n.Start(t.Context(), testSpec(busyboxRoot(t), filepath.Join(t.TempDir(), "log"), "sleep 1000"))
	if err != nil {
		t.Fatal(err)
	}
	var s state
	if err := json.Unmarshal(c.State(), &s); err != nil {
		t.Fatal(err)
	}
	// The number of a process that lives, but is somebody else's.
	s.PID, s.Name = os.Getpid(), "sanother"
	raw, _ := json.Marshal(s)
	if _, err := n.Adopt(t.Context(), raw); !errors.Is(err, ErrGone) {
		t.Errorf("got %v, want ErrGone", err)
	}
	if err := c.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestNative_ManyLivesLeaveNothing(t *testing.T) {
	const group, lives = "/fastcontainer-test-lives", 200
	n, err := Open(t.Context(), Config{Cgroup: group, Pool: 4})
	if err != nil {
		t.Fatal(err)
	}
	root, dir := busyboxRoot(t), t.TempDir()
	life := func(i int) {
		c, err := n.Start(t.Context(), testSpec(root, filepath.Join(dir, fmt.Sprint(i%4)), "exit 0"))
		if err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			<-c.Done()
		}
		if err := c.Destroy(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 8 { // lazily made things exist now
		life(i)
	}
	fds, threads := countDir(t, "/proc/self/fd"), countDir(t, "/proc/self/task")
	mounts := countLines(t, "/proc/self/mountinfo")
	for i := range lives {
		life(i)
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if got := countDir(t, "/proc/self/fd"); got > fds {
		t.Errorf("%d descriptors before, %d after %d lives", fds, got, lives)
	}
	if got := countDir(t, "/proc/self/task"); got > threads+4 {
		t.Errorf("%d threads before, %d after %d lives", threads, got, lives)
	}
	if got := countLines(t, "/proc/self/mountinfo"); got != mounts {
		t.Errorf("%d mounts before, %d after %d lives", mounts, got, lives)
	}
	if left := processesIn(t, group); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func countDir(t *testing.T, name string) int {
	t.Helper()
	entries, err := os.ReadDir(name)
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func countLines(t *testing.T, name string) int {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(b), "\n")
}

// The program that all sandboxes are born from may be killed by anybody who
// may kill the daemon: it is started again.
func TestStart_AfterTheInitProgramWasKilled(t *testing.T) {
	const group = "/fastcontainer-test-mother"
	n, err := Open(t.Context(), Config{Cgroup: group, Pool: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	}()
	first := n.mother.pid
	if err := unix.Kill(first, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-n.motherGone
	c, err := n.Start(t.Context(), Spec{ID: "test.again", App: "test", Layers: []string{busyboxRoot(t)}, Args: []string{"/bin/sleep", "100"}, UserNS: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Destroy(t.Context()); err != nil {
		t.Error(err)
	}
	if n.mother.pid == first {
		t.Error("it is still the same")
	}
}
