package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/image"
	"github.com/fastcontainer/fastcontainer/internal/network"
	"github.com/fastcontainer/fastcontainer/internal/sandbox"
)

// adapter gives the sandboxes of a test the real network.
type adapter struct{ *network.Network }

func (a adapter) Attach(ctx context.Context, name string, netns int) (sandbox.Link, error) {
	l, err := a.Network.Attach(ctx, name, netns)
	if err != nil {
		return sandbox.Link{}, err
	}
	state, err := json.Marshal(l)
	return sandbox.Link{Name: name, Address: l.Address, State: state}, err
}

func (a adapter) lease(l sandbox.Link) network.Lease {
	var lease network.Lease
	_ = json.Unmarshal(l.State, &lease)
	return lease
}

func (a adapter) Detach(ctx context.Context, l sandbox.Link) error {
	return a.Network.Detach(ctx, a.lease(l))
}
func (a adapter) Adopt(l sandbox.Link) error { return a.Network.Adopt(a.lease(l)) }

// bench is a node with real sandboxes, a real network and one busybox image.
type bench struct {
	t       *testing.T
	node    *Node
	box     *sandbox.Native
	net     *network.Network
	images  *image.Store
	img     image.Image
	dir     string
	gone    chan *Instance
	mu      sync.Mutex
	events  []fleet.Event
	numbers int
}

const (
	testNetwork = "fctest-node"
	testGroup   = "/fastcontainer-test-node"
)

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{t: t, dir: t.TempDir(), gone: make(chan *Instance, 10)}
	root := filepath.Join(b.dir, "rootfs")
	for _, d := range []string{"bin", "www", "tmp"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("cp", "/bin/busybox", root+"/bin/busybox").CombinedOutput(); err != nil {
		t.Fatalf("install the package busybox-static: %v: %s", err, out)
	}
	for _, name := range []string{"sh", "sleep", "httpd", "cat", "echo"} {
		if err := os.Symlink("busybox", filepath.Join(root, "bin", name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, "www", "index.html"), []byte("hello\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	var err error
	if b.images, err = image.Open(filepath.Join(b.dir, "images"), image.Options{}); err != nil {
		t.Fatal(err)
	}
	if b.img, err = b.images.Pull(t.Context(), "dir:"+root, nil); err != nil {
		t.Fatal(err)
	}
	b.open()
	t.Cleanup(func() {
		for _, i := range b.node.List() {
			_ = b.node.remove(context.Background(), i)
		}
		b.close()
		_ = b.images.Close()
		if err := errors.Join(b.net.Remove(), b.net.Close()); err != nil {
			t.Error(err)
		}
	})
	return b
}

// open begins the life of a daemon.
func (b *bench) open() {
	b.t.Helper()
	var err error
	log := slog.New(slog.NewTextHandler(b.t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	b.net, err = network.Open(b.t.Context(), network.Config{Interface: testNetwork, Table: testNetwork, Subnet: netip.MustParsePrefix("10.231.0.0/20")})
	if err != nil {
		b.t.Fatal(err)
	}
	b.box, err = sandbox.Open(b.t.Context(), sandbox.Config{Logger: log, Cgroup: testGroup, Network: adapter{b.net}, Pool: 2})
	if err != nil {
		b.t.Fatal(err)
	}
	b.node, err = New(Config{
		Name: "test", Runtimes: map[fleet.Runtime]sandbox.Runtime{fleet.RuntimeNative: b.box}, Images: b.images,
		RunDir: filepath.Join(b.dir, "run"), LogDir: filepath.Join(b.dir, "logs"), VolumeDir: filepath.Join(b.dir, "volumes"),
		Logger: log, Gone: func(i *Instance) { b.gone <- i }, Control: b.net.Control,
		Events: func(e fleet.Event) {
			b.mu.Lock()
			b.events = append(b.events, e)
			b.mu.Unlock()
		},
	})
	if err != nil {
		b.t.Fatal(err)
	}
}

// close ends the daemon's life; its instances go on.
func (b *bench) close() {
	b.node.Close()
	if err := b.box.Close(); err != nil {
		b.t.Error(err)
	}
}

func (b *bench) revision(change func(*fleet.Spec), command ...string) fleet.Revision {
	b.numbers++
	s := fleet.Spec{
		Name: "app", Port: 8080, Command: command, Hosts: []string{"app.test"},
		Ready: fleet.Ready{Timeout: fleet.Duration(10 * time.Second)}, Drain: fleet.Duration(5 * time.Second), Lifetime: fleet.Duration(time.Hour),
		Resources: fleet.Resources{CPU: fleet.CPU{Rest: 1, Peak: 1}, Memory: fleet.Memory{Rest: 64 << 20, Peak: 64 << 20}, PIDs: 64},
		Isolation: fleet.Isolation{Runtime: fleet.RuntimeNative, UserNS: true, Seccomp: "default"},
	}
	if change != nil {
		change(&s)
	}
	return fleet.Revision{ID: fleet.MakeRevisionID("app", b.numbers), App: "app", Image: b.img.Digest, Spec: s}
}

var server = []string{"httpd", "-f", "-p", "8080", "-h", "/www"}

func (b *bench) start(rev fleet.Revision) (*Instance, *fleet.Stages, error) {
	stages := &fleet.Stages{}
	i, err := b.node.Start(b.t.Context(), Order{Revision: rev, Cause: "test", Stages: stages})
	return i, stages, err
}

func (b *bench) mustStart(rev fleet.Revision) *Instance {
	b.t.Helper()
	i, _, err := b.start(rev)
	if err != nil {
		b.t.Fatalf("start: %v (%s)", err, fleet.Hint(err))
	}
	return i
}

func (b *bench) last(t fleet.EventType) fleet.Event {
	b.t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, e := range slices.Backward(b.events) {
		if e.Type == t {
			return e
		}
	}
	b.t.Fatalf("there is no %s event in %v", t, b.events)
	return fleet.Event{}
}

func get(t *testing.T, i *Instance) string {
	t.Helper()
	c := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := c.Get("http://" + i.Info().Address.String() + "/")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

func TestStart_ReadyMeansThatItAnswers(t *testing.T) {
	b := newBench(t)
	i, stages, err := b.start(b.revision(nil, server...))
	if err != nil {
		t.Fatal(err)
	}
	if got := get(t, i); got != "hello\n" {
		t.Errorf("got %q", got)
	}
	if stages.Exec == 0 || stages.Listen == 0 || stages.Rootfs == 0 {
		t.Errorf("stages are missing: %+v", stages)
	}
	if s, err := i.Stats(); err != nil || s.Memory == 0 || s.PIDs == 0 {
		t.Errorf("stats: %+v, %v", s, err)
	}
	var out bytes.Buffer
	code, err := i.Exec(t.Context(), sandbox.Process{Args: []string{"sh", "-c", "echo $PORT $FASTCONTAINER_APP; exit 4"}, Stdio: sandbox.Stdio{Stdout: &out}})
	if err != nil || code != 4 || out.String() != "8080 app\n" {
		t.Errorf("exec: code %d, %q, %v", code, out.String(), err)
	}
	if err := b.node.Stop(t.Context(), i, "test"); err != nil {
		t.Fatal(err)
	}
	if n := len(b.node.List()); n != 0 {
		t.Errorf("%d instances after stop", n)
	}
}

// The connection that found an instance ready is there for one request, and
// soon gone if there is none.
func TestStart_LeavesItsConnectionToTheFirstRequest(t *testing.T) {
	b := newBench(t)
	i := b.mustStart(b.revision(nil, server...))
	c := i.Dialed()
	if c == nil {
		t.Fatal("there is no connection")
	}
	defer func() { _ = c.Close() }()
	if again := i.Dialed(); again != nil {
		t.Error("it is given away twice")
	}
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.WriteString(c, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if all, err := io.ReadAll(c); err != nil || !strings.HasSuffix(string(all), "hello\n") {
		t.Errorf("got %q, %v", all, err)
	}
	unused := b.mustStart(b.revision(nil, server...))
	stopped := b.mustStart(b.revision(nil, server...))
	if err := b.node.Stop(t.Context(), stopped, "test"); err != nil {
		t.Fatal(err)
	}
	if stopped.Dialed() != nil {
		t.Error("a connection is left of an instance that is not")
	}
	time.Sleep(dialedFor + dialedFor/4)
	if unused.Dialed() != nil {
		t.Error("nobody asked for a second, and the connection is still open")
	}
	checked := b.mustStart(b.revision(func(s *fleet.Spec) { s.Ready.HTTP = "/" }, server...))
	if checked.Dialed() != nil {
		t.Error("the connection of its HTTP check is given away")
	}
}

func TestStart_WhatCanGoWrongIsExplained(t *testing.T) {
	b := newBench(t)
	quick := func(s *fleet.Spec) { s.Ready.Timeout = fleet.Duration(700 * time.Millisecond) }
	for name, c := range map[string]struct {
		rev    fleet.Revision
		kind   error
		detail string
		log    string
	}{
		"exits at once":       {b.revision(nil, "sh", "-c", "echo out of luck; exit 3"), fleet.ErrFailing, "exit code 3", "out of luck"},
		"never listens":       {b.revision(quick, "sleep", "1000"), fleet.ErrTimeout, "port 8080 is not open", ""},
		"listens elsewhere":   {b.revision(quick, "httpd", "-f", "-p", "9090"), fleet.ErrTimeout, "but [9090]", ""},
		"listens on loopback": {b.revision(quick, "httpd", "-f", "-p", "127.0.0.1:8080"), fleet.ErrTimeout, "127.0.0.1 only", ""},
		"check fails":         {b.revision(func(s *fleet.Spec) { quick(s); s.Ready.HTTP = "/no" }, server...), fleet.ErrTimeout, "answered 404", ""},
		"no such program":     {b.revision(nil, "nosuch"), fleet.ErrInvalid, "nosuch", ""},
		"no such user":        {b.revision(func(s *fleet.Spec) { s.User = "nobody-here" }, server...), fleet.ErrInvalid, "nobody-here", ""},
		"no such runtime":     {b.revision(func(s *fleet.Spec) { s.Isolation.Runtime = "runq" }, server...), fleet.ErrInvalid, "runq", ""},
		"eats memory":         {b.revision(nil, "sh", "-c", "x=a; while true; do x=$x$x; done"), fleet.ErrFailing, "lack of memory", ""},
		"missing bind":        {b.revision(func(s *fleet.Spec) { s.Volumes = []fleet.Volume{{Bind: "/no/such/dir", Mount: "/data"}} }, server...), fleet.ErrInvalid, "/no/such/dir", ""},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := b.start(c.rev)
			if !errors.Is(err, c.kind) {
				t.Errorf("got %v, want kind %v", err, c.kind)
			}
			e := b.last(fleet.EventFail)
			if !strings.Contains(e.Detail, c.detail) {
				t.Errorf("detail is %q, want it to tell of %q", e.Detail, c.detail)
			}
			if c.log != "" && !slices.Contains(e.Log, c.log) {
				t.Errorf("log is %q", e.Log)
			}
		})
	}
	if n := len(b.node.List()); n != 0 {
		t.Errorf("%d instances are left", n)
	}
}

func TestStop_OneThatIgnoresItsSignalIsKilled(t *testing.T) {
	b := newBench(t)
	rev := b.revision(func(s *fleet.Spec) { s.Drain = fleet.Duration(200 * time.Millisecond) }, "sh", "-c", "trap 'echo no' TERM; httpd -p 8080 -h /www; while true; do sleep 1; done")
	i := b.mustStart(rev)
	began := time.Now()
	if err := b.node.Stop(t.Context(), i, "test"); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(began); d < 200*time.Millisecond {
		t.Errorf("killed after %v: its drain was not respected", d)
	}
	if e := b.last(fleet.EventStop); !strings.Contains(e.Detail, "killed") {
		t.Errorf("stop event: %+v", e)
	}
}

func TestStop_OneThatCannotHearIsNotWaitedFor(t *testing.T) {
	b := newBench(t)
	i := b.mustStart(b.revision(func(s *fleet.Spec) { s.Drain = fleet.Duration(time.Hour) }, server...)) // busybox handles no SIGTERM
	if err := b.node.Stop(t.Context(), i, "test"); err != nil {
		t.Fatal(err)
	}
	if e := b.last(fleet.EventStop); !strings.Contains(e.Detail, "no handler") {
		t.Errorf("stop event: %+v", e)
	}
}

func TestCrash_IsNoticedAtOnce(t *testing.T) {
	b := newBench(t)
	i := b.mustStart(b.revision(nil, "sh", "-c", "httpd -p 8080 -h /www; sleep 0.1; echo last words; exit 9"))
	select {
	case got := <-b.gone:
		if got != i {
			t.Error("another instance is gone")
		}
	case <-time.After(10 * time.Second):
		t.Fatal("its end was not noticed")
	}
	<-i.stopped
	if e := b.last(fleet.EventFail); !strings.Contains(e.Detail, "exit code 9") || !slices.Contains(e.Log, "last words") {
		t.Errorf("fail event: %+v", e)
	}
}

func TestForkBomb_IsBounded(t *testing.T) {
	b := newBench(t)
	i := b.mustStart(b.revision(func(s *fleet.Spec) { s.Resources.PIDs = 20 }, "sh", "-c", "(while true; do sleep 100 & done) & exec httpd -f -p 8080 -h /www"))
	deadline := time.Now().Add(10 * time.Second)
	for {
		s, err := i.Stats()
		if err != nil {
			t.Fatal(err)
		}
		if s.PIDs > 20 {
			t.Fatalf("%d processes, at most 20", s.PIDs)
		}
		if s.PIDs >= 19 { // the bomb itself ends when it may not fork
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the bomb made %d processes only", s.PIDs)
		}
	}
	if err := b.node.Stop(t.Context(), i, "test"); err != nil {
		t.Fatal(err)
	}
}

func TestAdopt_ANewDaemonTakesOver(t *testing.T) {
	b := newBench(t)
	i := b.mustStart(b.revision(nil, server...))
	dead := b.mustStart(b.revision(nil, "sh", "-c", "httpd -p 8080 -h /www; while true; do sleep 1; done"))
	before := i.Info()
	b.close()
	// One ends while no daemon runs.
	pidfd, err := unix.PidfdOpen(dead.Info().PID, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(pidfd) }()
	if err := unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 10_000); err != nil { // until it has ended
		t.Fatal(err)
	}
	// And a start was half done.
	if err := os.WriteFile(filepath.Join(b.dir, "run", "app.half.json.tmp"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	b.open()
	adopted, err := b.node.Adopt(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(adopted) != 1 || adopted[0].Info().ID != before.ID {
		t.Fatalf("adopted %v", adopted)
	}
	a := adopted[0]
	if d := a.Info().ExpiresAt.Sub(before.ExpiresAt).Abs(); d > 100*time.Millisecond {
		t.Errorf("its end moved by %v", d)
	}
	if got := get(t, a); got != "hello\n" {
		t.Errorf("got %q", got)
	}
	b.last(fleet.EventAdopt)
	if code, err := a.Exec(t.Context(), sandbox.Process{Args: []string{"sh", "-c", "test $PORT = 8080"}}); err != nil || code != 0 {
		t.Errorf("exec after adoption: %d, %v", code, err)
	}
	if err := b.node.Stop(t.Context(), a, "test"); err != nil {
		t.Fatal(err)
	}
	if entries, _ := os.ReadDir(filepath.Join(b.dir, "run")); len(entries) != 0 {
		t.Errorf("state files are left: %v", entries)
	}
}

func TestVolumes_OutliveInstances(t *testing.T) {
	b := newBench(t)
	withVolume := func(s *fleet.Spec) { s.Volumes = []fleet.Volume{{Name: "data", Mount: "/var/data"}} }
	i := b.mustStart(b.revision(withVolume, "sh", "-c", "echo kept > /var/data/file; httpd -f -p 8080"))
	if err := b.node.Stop(t.Context(), i, "test"); err != nil {
		t.Fatal(err)
	}
	i = b.mustStart(b.revision(withVolume, "httpd", "-f", "-p", "8080", "-h", "/var/data"))
	var out bytes.Buffer
	if _, err := i.Exec(t.Context(), sandbox.Process{Args: []string{"cat", "/var/data/file"}, Stdio: sandbox.Stdio{Stdout: &out}}); err != nil || out.String() != "kept\n" {
		t.Errorf("got %q, %v", out.String(), err)
	}
	if err := b.node.Stop(t.Context(), i, "test"); err != nil {
		t.Fatal(err)
	}
}

func TestLogs_TailFollowAndBound(t *testing.T) {
	b := newBench(t)
	i := b.mustStart(b.revision(nil, "sh", "-c", "for i in 1 2 3; do echo line $i; done; httpd -p 8080 -h /www; sleep 0.5; echo later; sleep 100"))
	var out bytes.Buffer
	if err := b.node.Logs(t.Context(), "app", 2, false, &out); err != nil || out.String() != "line 2\nline 3\n" {
		t.Errorf("tail: %q, %v", out.String(), err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	r, w := io.Pipe()
	var wg sync.WaitGroup
	wg.Go(func() {
		_ = b.node.Logs(ctx, string(i.Info().ID), 0, true, w)
		_ = w.Close()
	})
	buf := make([]byte, 6)
	if _, err := io.ReadFull(r, buf); err != nil || string(buf) != "later\n" {
		t.Errorf("follow: %q, %v", buf, err)
	}
	cancel()
	_ = r.Close()
	wg.Wait()
	if err := b.node.Logs(t.Context(), "other", 10, false, io.Discard); !errors.Is(err, fleet.ErrNotFound) {
		t.Errorf("logs of an app that never ran: %v", err)
	}
	if err := b.node.Stop(t.Context(), i, "test"); err != nil {
		t.Fatal(err)
	}
}

func TestLives_LeaveNothing(t *testing.T) {
	b := newBench(t)
	life := func(n int) {
		i := b.mustStart(b.revision(nil, server...))
		if n%2 == 0 {
			_ = i.box.Kill()
			<-b.gone
			<-i.stopped
			return
		}
		if err := b.node.Stop(t.Context(), i, "test"); err != nil {
			t.Fatal(err)
		}
	}
	for n := range 6 {
		life(n)
	}
	count := func() map[string]int {
		c := map[string]int{}
		for name, dir := range map[string]string{"descriptors": "/proc/self/fd", "logs": b.dir + "/logs/app", "states": b.dir + "/run"} {
			entries, err := os.ReadDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			c[name] = len(entries)
		}
		mounts, _ := os.ReadFile("/proc/self/mountinfo")
		c["mounts"] = bytes.Count(mounts, []byte("\n"))
		return c
	}
	space, err := netns.GetFromPath("/run/netns/" + testNetwork) // where the ports are
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = space.Close() }()
	fabric, err := netlink.NewHandleAt(space)
	if err != nil {
		t.Fatal(err)
	}
	defer fabric.Close()
	settle := func() (links, groups int) { // what is prepared ahead varies for a moment
		for range 200 {
			ls, _ := fabric.LinkList()
			links = 0
			for _, l := range ls {
				if n := l.Attrs().Name; n != "lo" && n != "uplink" {
					links++
				}
			}
			entries, _ := os.ReadDir("/sys/fs/cgroup/memory" + testGroup)
			groups = 0
			for _, e := range entries {
				if e.IsDir() {
					groups++
				}
			}
			if links <= 2 {
				return links, groups
			}
			time.Sleep(50 * time.Millisecond)
		}
		return links, groups
	}
	settle()
	before := count()
	for n := range 100 {
		life(n)
	}
	if links, groups := settle(); links > 2 || groups > 2 {
		t.Errorf("%d links and %d cgroups are left; 2 are prepared ahead", links, groups)
	}
	after := count()
	for name, n := range before {
		if after[name] > n+4 { // a prepared sandbox more or less has a few descriptors
			t.Errorf("%s: %d before, %d after 100 lives", name, n, after[name])
		}
	}
}

func TestArgs_AsOCISays(t *testing.T) {
	img := image.Config{Entrypoint: []string{"/entry"}, Cmd: []string{"cmd"}}
	for name, c := range map[string]struct {
		s    fleet.Spec
		want []string
	}{
		"the image's":              {fleet.Spec{}, []string{"/entry", "cmd"}},
		"command replaces command": {fleet.Spec{Command: []string{"x"}}, []string{"/entry", "x"}},
		"entrypoint drops command": {fleet.Spec{Entrypoint: []string{"/mine"}}, []string{"/mine"}},
		"both":                     {fleet.Spec{Entrypoint: []string{"/mine"}, Command: []string{"x"}}, []string{"/mine", "x"}},
	} {
		if got := Args(c.s, img); !slices.Equal(got, c.want) {
			t.Errorf("%s: got %q, want %q", name, got, c.want)
		}
	}
}

func TestEnvironment_TheUserWins(t *testing.T) {
	s := fleet.Spec{Name: "app", Port: 80, Env: map[string]string{"A": "mine", "PATH": "/p"}}
	got := environment(s, image.Config{Env: []string{"A=image", "B=image", "broken"}}, "app.x", "app@1")
	want := []string{"PATH=/p", "A=mine", "B=image", "HOSTNAME=app", "PORT=80", "FASTCONTAINER_APP=app", "FASTCONTAINER_INSTANCE=app.x", "FASTCONTAINER_REVISION=app@1", "FASTCONTAINER_RESTORED=" + sandbox.RestoredFile}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %q, want %q", got, want)
	}
}
