// Package sandboxtest is the contract of package sandbox as tests. Every body
// runs it (see conformance_test.go in package sandbox), as root, on a host with
// the package busybox-static.
//
// What a body cannot do is named in Features; the suite then leaves that test
// out, so what it lacks can be read where it is tested.
package sandboxtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/sandbox"
)

// Features of a body that not all have.
type Features struct {
	// Cgroup is the path of its root group, under which nothing may be left.
	Cgroup string
	// Lacks are the names of tests that it cannot pass, with the reasons.
	Lacks map[string]string
}

// Open makes a runtime ready. Called again after Close it gives one that
// finds what the first has left, like that of a new daemon.
type Open func(t *testing.T, net sandbox.Network) sandbox.Runtime

// timeout bounds each test; it is only reached by a failure.
const timeout = 20 * time.Second

// Run tests the bodies that open gives.
func Run(t *testing.T, open Open, f Features) {
	s := &suite{open: open, f: f, root: newRoot(t)}
	before := hostState(t, f.Cgroup)
	t.Cleanup(func() {
		for _, pattern := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
			groups, _ := filepath.Glob(filepath.Join(pattern, f.Cgroup))
			for _, g := range groups {
				_ = os.Remove(g)
			}
		}
	})
	for _, c := range s.tests() {
		if reason := f.Lacks[c.name]; reason != "" {
			continue
		}
		t.Run(c.name, c.test)
	}
	for name := range f.Lacks {
		if name != nothingLeft && !slices.ContainsFunc(s.tests(), func(c namedTest) bool { return c.name == name }) {
			t.Errorf("Lacks names %q, which is no test", name)
		}
	}
	if f.Lacks[nothingLeft] == "" {
		t.Run(nothingLeft, func(t *testing.T) { expectNothingLeft(t, f.Cgroup, before) })
	}
}

const nothingLeft = "nothing is left on the host"

func expectNothingLeft(t *testing.T, group string, before []string) {
	// What was killed last may still be ending.
	deadline := time.Now().Add(5 * time.Second)
	for {
		left := difference(hostState(t, group), before)
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("left on the host:\n%s", strings.Join(left, "\n"))
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

type suite struct {
	open Open
	f    Features
	root string
}

type namedTest struct {
	name string
	test func(*testing.T)
}

// newRoot makes a root filesystem of busybox.
func newRoot(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o755)) //nolint:gosec // the root of a container
	for _, d := range []string{"bin", "etc", "tmp", "home"} {
		must(t, os.Mkdir(filepath.Join(dir, d), 0o755)) //nolint:gosec // the same
	}
	must(t, os.Chmod(filepath.Join(dir, "tmp"), 0o1777)) //nolint:gosec // the same
	if out, err := exec.Command("cp", "/bin/busybox", dir+"/bin/busybox").CombinedOutput(); err != nil {
		t.Fatalf("install the package busybox-static: %v: %s", err, out)
	}
	applets, err := exec.Command("/bin/busybox", "--list").Output()
	must(t, err)
	for _, name := range strings.Fields(string(applets)) {
		if name != "busybox" {
			must(t, os.Symlink("busybox", filepath.Join(dir, "bin", name)))
		}
	}
	for name, content := range map[string]string{
		"etc/passwd":   "root:x:0:0::/:/bin/sh\napp:x:1000:1000::/home:/bin/sh\n",
		"etc/group":    "root:x:0:\napp:x:1000:\nstaff:x:2000:app\n",
		"etc/plain":    "not a program\n",
		"bin/noscript": "#!/no/such/interpreter\n",
		"bin/noexec":   "no magic\n",
	} {
		mode := fs.FileMode(0o644)
		if strings.HasPrefix(name, "bin/") {
			mode = 0o755
		}
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(content), mode)) //nolint:gosec // content of an image
	}
	return dir
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// runtime opens a runtime for one test.
func (s *suite) runtime(t *testing.T, net sandbox.Network) sandbox.Runtime {
	t.Helper()
	r := s.open(t, net)
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return r
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	t.Cleanup(cancel)
	return ctx
}

// spec of a container that runs a shell script.
func (s *suite) spec(script string, out *output) sandbox.Spec {
	spec := sandbox.Spec{
		ID: fleet.InstanceID("test.a"), App: "test", Hostname: "inside", Layers: []string{s.root},
		Args: []string{"/bin/sh", "-c", script}, Env: []string{"PATH=/bin"}, UserNS: true,
		Limits: sandbox.Limits{CPU: 2, Memory: 256 << 20, PIDs: 200},
	}
	if out != nil {
		spec.Stdio = &sandbox.Stdio{Stdout: out, Stderr: out}
	}
	return spec
}

// start a container, which is destroyed when the test ends.
func start(t *testing.T, r sandbox.Runtime, spec sandbox.Spec) sandbox.Sandbox {
	t.Helper()
	c, err := r.Start(testContext(t), spec)
	if err != nil {
		t.Fatalf("start: %v (%s)", err, fleet.Hint(err))
	}
	t.Cleanup(func() { destroy(t, c) })
	return c
}

func destroy(t *testing.T, c sandbox.Sandbox) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	if err := c.Destroy(ctx); err != nil {
		t.Errorf("destroy: %v", err)
	}
}

func wait(t *testing.T, c sandbox.Sandbox) sandbox.Exit {
	t.Helper()
	select {
	case <-c.Done():
		return c.Exit()
	case <-time.After(timeout):
		t.Fatal("the container does not end")
		return sandbox.Exit{}
	}
}

// run runs a script to its end and gives what it printed.
func (s *suite) run(t *testing.T, r sandbox.Runtime, script string, change func(*sandbox.Spec)) string {
	t.Helper()
	out := newOutput()
	spec := s.spec(script, out)
	if change != nil {
		change(&spec)
	}
	c := start(t, r, spec)
	wait(t, c)
	destroy(t, c)
	return out.String()
}

// output collects what a program prints.
type output struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	more chan struct{}
}

func newOutput() *output { return &output{more: make(chan struct{}, 1)} }

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	select {
	case o.more <- struct{}{}:
	default:
	}
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// await waits until the output holds some text.
func (o *output) await(t *testing.T, text string) {
	t.Helper()
	deadline := time.After(timeout)
	for !strings.Contains(o.String(), text) {
		select {
		case <-o.more:
		case <-deadline:
			t.Fatalf("output is %q, want %q in it", o.String(), text)
		}
	}
}

// hostState is what a container might leave behind: mounts, children of this
// process, threads of it in other namespaces, network links, and groups.
func hostState(t *testing.T, group string) []string {
	t.Helper()
	var state []string
	mounts, err := os.ReadFile("/proc/thread-self/mountinfo")
	must(t, err)
	for line := range strings.Lines(string(mounts)) {
		state = append(state, "mount "+strings.TrimSpace(line))
	}
	for _, pid := range children(t) {
		name, _ := os.ReadFile("/proc/" + pid + "/comm")
		state = append(state, fmt.Sprintf("child %s %s", pid, bytes.TrimSpace(name)))
	}
	spaces, err := filepath.Glob("/proc/self/task/*/ns/[mn]*")
	must(t, err)
	for _, s := range spaces {
		if ns, err := os.Readlink(s); err == nil && !slices.Contains(state, "thread in "+ns) {
			state = append(state, "thread in "+ns)
		}
	}
	links, err := netlink.LinkList()
	for errors.Is(err, netlink.ErrDumpInterrupted) { // one came or went meanwhile
		links, err = netlink.LinkList()
	}
	must(t, err)
	for _, l := range links {
		if l.Attrs().Group == linkGroup { // others come and go on a host
			state = append(state, "link "+l.Attrs().Name)
		}
	}
	for _, pattern := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
		groups, err := filepath.Glob(filepath.Join(pattern, group, "*"))
		must(t, err)
		for _, g := range groups {
			if st, err := os.Stat(g); err == nil && st.IsDir() {
				state = append(state, "cgroup "+g)
			}
		}
	}
	return state
}

// children of this process, dead ones too.
func children(t *testing.T) []string {
	t.Helper()
	lists, err := filepath.Glob("/proc/self/task/*/children")
	must(t, err)
	var all []string
	for _, l := range lists {
		b, _ := os.ReadFile(l)
		all = append(all, strings.Fields(string(b))...)
	}
	return all
}

func difference(a, b []string) []string {
	var more []string
	for _, s := range a {
		if !slices.Contains(b, s) {
			more = append(more, s)
		}
	}
	return more
}

// alive tells whether a process still runs.
func alive(pid int) bool {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return false
	}
	after := stat[bytes.LastIndexByte(stat, ')')+1:]
	return !bytes.HasPrefix(bytes.TrimSpace(after), []byte("Z"))
}
