package sandbox

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// newTestMachine starts the init program alone, in the test's own namespaces.
func newTestMachine(t *testing.T) *machine {
	t.Helper()
	program, err := newInitProgram()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = program.Close() }()
	m, err := startMachine(program)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		m.close()
		reapTestChild(t, m.pid)
	})
	return m
}

func reapTestChild(t *testing.T, pid int) {
	t.Helper()
	var ws unix.WaitStatus
	if _, err := unix.Wait4(pid, &ws, 0, nil); err != nil {
		t.Errorf("wait for machine %d: %v", pid, err)
	}
	if !ws.Exited() || ws.ExitStatus() != 0 {
		t.Errorf("machine ended with %v, want exit 0", ws)
	}
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestMachine_PlaysTapesOneAfterAnother(t *testing.T) {
	m := newTestMachine(t)
	ctx := testContext(t)
	var r [2]int
	if err := unix.Pipe2(r[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer closeAll(r[:])
	for i := range 3 {
		word := "hello " + strconv.Itoa(i)
		tape := &tape{}
		tape.call("write", unix.SYS_WRITE, num(firstFD), tape.bytes([]byte(word)), num(len(word)))
		tape.call("close", unix.SYS_CLOSE, num(firstFD))
		tape.done()
		if err := m.play(ctx, tape, r[1]); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 64)
		n, err := unix.Read(r[0], buf)
		if err != nil || string(buf[:n]) != word {
			t.Fatalf("got %q, %v, want %q", buf[:n], err, word)
		}
	}
}

func TestMachine_ResultFeedsALaterArgument(t *testing.T) {
	m := newTestMachine(t)
	ctx := testContext(t)
	name := t.TempDir() + "/file"
	tape := &tape{}
	open := tape.call("open", unix.SYS_OPENAT, num(unix.AT_FDCWD), tape.str(name), num(unix.O_CREAT|unix.O_WRONLY), num(0o600))
	write := tape.call("write", unix.SYS_WRITE, num(999), tape.bytes([]byte("fed")), num(3))
	tape.feed(open, write)
	tape.done()
	if err := m.play(ctx, tape); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(name); err != nil || string(got) != "fed" {
		t.Fatalf("got %q, %v", got, err)
	}
}

func TestMachine_FailureNamesTheCall(t *testing.T) {
	m := newTestMachine(t)
	tape := &tape{}
	tape.call("may fail", unix.SYS_CHDIR|opMayFail, tape.str("/no/such/place"))
	tape.call("must not fail", unix.SYS_CHDIR, tape.str("/no/such/place"))
	tape.call("never", unix.SYS_EXIT, num(9))
	tape.done()
	err := m.play(testContext(t), tape)
	e, ok := errors.AsType[*callError](err)
	if !ok || e.op != "must not fail" || e.errno != unix.ENOENT {
		t.Fatalf("got %v", err)
	}
}

func TestMachine_ChildHasOneDescriptorAndItsMotherStaysClean(t *testing.T) {
	m := newTestMachine(t)
	ctx := testContext(t)
	for range 3 {
		child, err := m.spawn(ctx, 0, -1)
		if err != nil {
			t.Fatal(err)
		}
		// An answered tape proves that the child is past its own clean-up.
		tape := &tape{}
		tape.done()
		if err := child.play(ctx, tape); err != nil {
			t.Fatal(err)
		}
		if err := m.play(ctx, tape); err != nil {
			t.Fatal(err)
		}
		for _, pid := range []int{m.pid, child.pid} {
			fds, err := os.ReadDir("/proc/" + strconv.Itoa(pid) + "/fd")
			if err != nil || len(fds) != 4 {
				t.Errorf("process %d has %d descriptors (%v), want 4", pid, len(fds), err)
			}
		}
		child.close()
		reapTestChild(t, child.pid)
	}
}

func TestMachine_IsSmallAndSealed(t *testing.T) {
	m := newTestMachine(t)
	// Only an answered tape proves that execve is over: Linux closes what is
	// close-on-exec, which is what ForkExec waits for, and then leaves our memory.
	tape := &tape{}
	tape.done()
	if err := m.play(testContext(t), tape); err != nil {
		t.Fatal(err)
	}
	exe := "/proc/" + strconv.Itoa(m.pid) + "/exe"
	if f, err := os.OpenFile(exe, os.O_WRONLY, 0); err == nil {
		_, werr := f.Write([]byte("x"))
		_ = f.Close()
		if !errors.Is(werr, unix.EPERM) {
			t.Errorf("write to the program: got %v, want EPERM", werr)
		}
	} else if !errors.Is(err, unix.ETXTBSY) {
		t.Errorf("open the program for writing: got %v, want ETXTBSY", err)
	}
	status, err := os.ReadFile("/proc/" + strconv.Itoa(m.pid) + "/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if kb, ok := strings.CutPrefix(line, "VmSize:"); ok {
			n, _ := strconv.Atoi(strings.Fields(kb)[0])
			if n == 0 || n > 512 {
				t.Errorf("the init program is %d KiB large, want at most 512", n)
			}
		}
	}
}

func TestMachine_CanceledCallerDoesNotWait(t *testing.T) {
	m := newTestMachine(t)
	ctx, cancel := context.WithCancel(testContext(t))
	tape := &tape{}
	tape.call("nothing", unix.SYS_GETPID) // and no word to us
	if err := m.send(ctx, tape); err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := m.receive(ctx, tape); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v, want canceled", err)
	}
}

func TestTape_TooLargeIsRefused(t *testing.T) {
	tape := &tape{}
	tape.bytes(bytes.Repeat([]byte{1}, initTapeMax))
	if _, err := tape.seal(); !errors.Is(err, errTapeFull) {
		t.Fatalf("got %v", err)
	}
}

func TestReaper_TellsTheEndOfAChild(t *testing.T) {
	r, err := newReaper(slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer r.close()
	program, err := newInitProgram()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = program.Close() }()
	for name, c := range map[string]struct {
		end  func(*machine)
		want status
	}{
		"exit":   {func(m *machine) { m.close() }, status{}},
		"signal": {func(m *machine) { _ = unix.Kill(m.pid, unix.SIGKILL) }, status{signal: unix.SIGKILL}},
	} {
		m, err := startMachine(program)
		if err != nil {
			t.Fatal(err)
		}
		pidfd, err := unix.PidfdOpen(m.pid, 0)
		if err != nil {
			t.Fatal(err)
		}
		got := make(chan status, 1)
		if err := r.watch(pidfd, func(s status, known bool) {
			if !known {
				t.Errorf("%s: a child's status is not known", name)
			}
			got <- s
		}); err != nil {
			t.Fatal(err)
		}
		c.end(m)
		select {
		case s := <-got:
			if s != c.want {
				t.Errorf("%s: got %+v, want %+v", name, s, c.want)
			}
		case <-testContext(t).Done():
			t.Fatalf("%s: its end was not noticed", name)
		}
		m.close()
	}
}
