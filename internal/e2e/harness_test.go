package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/fastcontainer/fastcontainer/internal/api"
	"github.com/fastcontainer/fastcontainer/internal/events"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// binary is the program under test, built once, with the race detector.
var binary string

func TestMain(m *testing.M) {
	if os.Getenv("E2E_ETCD") != "" {
		serveEtcd(os.Getenv("E2E_ETCD"), os.Getenv("E2E_DIR"))
	}
	dir, err := os.MkdirTemp("", "fce2e")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	binary = filepath.Join(dir, "fastcontainer")
	build := exec.Command("go", "build", "-race", "-o", binary, "../../cmd/fastcontainer")
	build.Env = append(os.Environ(), "CGO_ENABLED=1")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build: %v\n%s", err, out)
		os.Exit(1)
	}
	// The race detector has each program wait a second at its end.
	_ = os.Setenv("GORACE", strings.TrimSpace(os.Getenv("GORACE")+" atexit_sleep_ms=0"))
	code := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// daemon is one node, whose process may be killed and started again.
type daemon struct {
	t      *testing.T
	dir    string
	config string
	name   string // of its interface and cgroup
	http   string
	args   []string
	cmd    *exec.Cmd
	log    *os.File
	client *api.Client
}

var daemons atomic.Int32

// newDaemon starts a node of its own. more is added to its configuration file.
// At the end of the test it deletes every app and checks that nothing is left
// on the host.
func newDaemon(t *testing.T, more string, args ...string) *daemon {
	t.Helper()
	// Another run of these tests may be under way on this machine.
	n := daemons.Add(1) + int32(os.Getpid()%400)*16
	dir, err := os.MkdirTemp("", "fc") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{t: t, dir: dir, name: fmt.Sprintf("fcx%d", n), http: freeAddr(t), args: args}
	d.config = filepath.Join(dir, "config.yaml")
	config := fmt.Sprintf(`node: test
data: %[1]s/data
run: %[1]s/run
http: %[2]s
network: {interface: %[3]s, subnet: 10.%[4]d.%[7]d.0/22}
sandbox: {cgroup: /%[3]s, uid_base: %[5]d, uid_count: 1024, pool: 2}
%[6]s
`, dir, d.http, d.name, 130+n/64%100, 1<<30+int(n%8)<<26, more, n%64*4)
	if err := os.WriteFile(d.config, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	if d.client, err = api.NewClient("unix://" + dir + "/run/api.sock"); err != nil {
		t.Fatal(err)
	}
	if d.log, err = os.Create(filepath.Join(dir, "log")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.end)
	d.start()
	return d
}

// freeAddr is an address where nobody listens.
func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

// start begins a process and waits until it takes requests.
func (d *daemon) start() {
	d.t.Helper()
	d.cmd = exec.Command(binary, append([]string{"serve", "--config", d.config}, d.args...)...)
	d.cmd.Stdout, d.cmd.Stderr = d.log, d.log
	if err := d.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	d.until("ready", func() bool {
		_, err := d.client.Version(d.t.Context())
		return err == nil
	})
}

// kill ends the process as a crash does.
func (d *daemon) kill() {
	_ = d.cmd.Process.Kill()
	_ = d.cmd.Wait()
}

// stop ends the process as its operator does.
func (d *daemon) stop() {
	d.t.Helper()
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		d.t.Fatal(err)
	}
	if err := d.cmd.Wait(); err != nil {
		d.t.Errorf("serve: %v\n%s", err, d.logged())
	}
}

func (d *daemon) logged() string {
	b, _ := os.ReadFile(filepath.Join(d.dir, "log"))
	return string(b)
}

// end removes everything and looks for what is left.
func (d *daemon) end() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if d.cmd.ProcessState != nil { // it was killed or stopped
		d.start()
	}
	apps, err := d.client.Apps(ctx)
	if err != nil {
		d.t.Errorf("apps: %v", err)
	}
	for _, a := range apps {
		if err := d.client.Delete(ctx, a.Name, true); err != nil {
			d.t.Errorf("delete: %v", err)
		}
	}
	d.stop()
	if log := d.logged(); strings.Contains(log, "DATA RACE") || strings.Contains(log, "panic:") {
		d.t.Errorf("the daemon's log:\n%s", log)
	} else if d.t.Failed() {
		d.t.Logf("the daemon's log:\n%s", log)
	}
	if left := d.leftovers(); len(left) > 0 {
		d.t.Errorf("left on the host: %q", left)
	}
	_ = exec.Command("ip", "netns", "delete", "fastcontainer-"+d.name).Run() // the host's interface goes with it
	_ = exec.Command("nft", "delete", "table", "ip", "fastcontainer-"+d.name).Run()
	_ = exec.Command("nft", "delete", "table", "inet", "fastcontainer-"+d.name).Run()
	for _, g := range cgroups(d.name) {
		_ = os.Remove(g)
	}
	_ = d.log.Close()
	_ = os.RemoveAll(d.dir)
}

// cgroups with a name, in every hierarchy.
func cgroups(name string) []string {
	found, _ := filepath.Glob("/sys/fs/cgroup/*/" + name)
	if _, err := os.Stat("/sys/fs/cgroup/" + name); err == nil {
		found = append(found, "/sys/fs/cgroup/"+name)
	}
	return found
}

// ports are the links that lead to containers, in their namespace.
func (d *daemon) ports() []string {
	d.t.Helper()
	ns, err := netns.GetFromName("fastcontainer-" + d.name)
	if err != nil {
		return nil // it never began
	}
	defer func() { _ = ns.Close() }()
	kernel, err := netlink.NewHandleAt(ns)
	if err != nil {
		d.t.Fatal(err)
	}
	defer kernel.Close()
	links, err := kernel.LinkList()
	for errors.Is(err, netlink.ErrDumpInterrupted) { // one came or went meanwhile
		links, err = kernel.LinkList()
	}
	if err != nil {
		d.t.Fatal(err)
	}
	var names []string
	for _, l := range links {
		if l.Type() == "veth" && l.Attrs().Name != "uplink" {
			names = append(names, l.Attrs().Name)
		}
	}
	return names
}

// leftovers are the links, cgroups and mounts that belong to the daemon's
// containers.
func (d *daemon) leftovers() []string {
	var left []string
	for _, name := range d.ports() {
		left = append(left, "link "+name)
	}
	for _, g := range cgroups(d.name) {
		entries, _ := os.ReadDir(g)
		for _, e := range entries {
			if e.IsDir() {
				left = append(left, "cgroup "+g+"/"+e.Name())
			}
		}
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, d.dir) {
			left = append(left, "mount "+line)
		}
	}
	return left
}

// until waits for something that no event tells of.
func (d *daemon) until(what string, ok func() bool) {
	d.t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			d.t.Fatalf("it never came to: %s\n%s", what, d.logged())
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// cli runs the command line against the daemon.
func (d *daemon) cli(args ...string) (out string, code int) {
	cmd := exec.Command(binary, args...)
	cmd.Env = append(os.Environ(), "FASTCONTAINER_SERVER=unix://"+d.dir+"/run/api.sock")
	b, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		d.t.Errorf("run %q: %v", args, err)
	}
	return string(b), cmd.ProcessState.ExitCode()
}

// must runs the command line and fails the test if it does.
func (d *daemon) must(args ...string) string {
	d.t.Helper()
	out, code := d.cli(args...)
	if code != 0 {
		d.t.Fatalf("fastcontainer %s: exit code %d\n%s", strings.Join(args, " "), code, out)
	}
	return out
}

// do asks an app, as a client that knows only the front door.
func (d *daemon) do(req *http.Request) (*http.Response, error) {
	tr := &http.Transport{DisableKeepAlives: true}
	return (&http.Client{Transport: tr, Timeout: time.Minute}).Do(req)
}

// get asks an app and reads the whole answer.
func (d *daemon) get(host, path string) (int, string) {
	d.t.Helper()
	req, err := http.NewRequestWithContext(d.t.Context(), http.MethodGet, "http://"+d.http+path, nil)
	if err != nil {
		d.t.Fatal(err)
	}
	req.Host = host
	resp, err := d.do(req)
	if err != nil {
		d.t.Errorf("get %s%s: %v", host, path, err)
		return 0, ""
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		d.t.Errorf("get %s%s: %v", host, path, err)
	}
	return resp.StatusCode, string(b)
}

// expect asks an app and compares the answer.
func (d *daemon) expect(host, path, want string) {
	d.t.Helper()
	if code, body := d.get(host, path); code != http.StatusOK || !strings.Contains(body, want) {
		d.t.Fatalf("get %s%s: %d %q, want %q", host, path, code, body, want)
	}
}

// events of an app, of one type.
func (d *daemon) events(app fleet.AppName, kind fleet.EventType) []fleet.Event {
	d.t.Helper()
	var list []fleet.Event
	err := d.client.Events(d.t.Context(), app, events.From{Last: 10000}, false, func(e fleet.Event) error {
		if e.Type == kind {
			list = append(list, e)
		}
		return nil
	})
	if err != nil {
		d.t.Fatal(err)
	}
	return list
}

// await waits until an app has an event of a type that f accepts.
func (d *daemon) await(app fleet.AppName, kind fleet.EventType, f func(fleet.Event) bool) fleet.Event {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.t.Context(), time.Minute)
	defer cancel()
	var found fleet.Event
	errFound := errors.New("found")
	err := d.client.Events(ctx, app, events.From{Last: 10000}, true, func(e fleet.Event) error {
		if e.Type == kind && (f == nil || f(e)) {
			found = e
			return errFound
		}
		return nil
	})
	if !errors.Is(err, errFound) {
		d.t.Fatalf("no %s event of %s came: %v\n%s", kind, app, err, d.must("events", string(app)))
	}
	return found
}

// instances of an app.
func (d *daemon) instances(app fleet.AppName) []api.Instance {
	d.t.Helper()
	list, err := d.client.Instances(d.t.Context(), app)
	if err != nil {
		d.t.Fatal(err)
	}
	return list
}

// busybox is a root filesystem with a web server and a shell, as an image.
func busybox(t *testing.T, pages map[string]string) string {
	t.Helper()
	root := filepath.Join(t.TempDir(), "rootfs")
	for _, dir := range []string{"bin", "www", "tmp"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatalf("install the package busybox-static: %v", err)
	}
	if err := os.WriteFile(filepath.Join(root, "bin/busybox"), b, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"sh", "sleep", "httpd", "cat", "echo", "id", "ls", "dd", "rm", "head", "yes", "nc", "wget"} {
		if err := os.Symlink("busybox", filepath.Join(root, "bin", name)); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range pages {
		if err := os.WriteFile(filepath.Join(root, "www", name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return "dir:" + root
}

// httpd is the command of a static web server in busybox.
var httpd = []string{"--", "httpd", "-f", "-p", "8080", "-h", "/www"}

// deploy deploys an app by the command line.
func (d *daemon) deploy(name, image string, more ...string) {
	d.t.Helper()
	d.must(append([]string{"deploy", name, "--image", image}, more...)...)
}

// names of instances.
func names(list []api.Instance) []fleet.InstanceID {
	var ids []fleet.InstanceID
	for _, i := range list {
		ids = append(ids, i.ID)
	}
	slices.Sort(ids)
	return ids
}
