package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/events"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// plain runs the server as a process until it answers, and tells how long that
// took.
func (b *bench) plain() (time.Duration, error) {
	port := ownPort()
	addr := "127.0.0.1:" + port
	cmd := exec.CommandContext(b.ctx, b.root+"/server") //nolint:gosec // ours
	cmd.Env = []string{"PORT=" + port}
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	err := answer(addr, hello)
	took := time.Since(began)
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	return took, err
}

var ports, bundles atomic.Int64

// ownPort is below those that the kernel gives away, and no two are the same
// at a time.
func ownPort() string { return strconv.Itoa(12000 + int(ports.Add(1)%18000)) }

// oci runs the server with an OCI runtime until it answers; the container is
// removed afterwards. It shares the host's network, so that the runtime need
// not make one: that favours it.
func (b *bench) oci(runtime string) (took time.Duration, err error) {
	count := bundles.Add(1)
	port := ownPort()
	addr := "127.0.0.1:" + port
	id := fmt.Sprintf("bench-%d-%d", os.Getpid(), count)
	dir := filepath.Join(b.dir, id)
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // a bundle
		return 0, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	if err := b.bundle(runtime, dir, content{root: b.root, readonly: true, args: []string{"/server"}, env: []string{"PORT=" + port}}); err != nil {
		return 0, err
	}
	state := filepath.Join("/run", runtime)
	began := time.Now()
	cmd := exec.CommandContext(b.ctx, runtime, "--root", state, "run", "--bundle", dir, id) //nolint:gosec // a benchmark
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	err = answer(addr, hello)
	took = time.Since(began)
	// Its run command removes the container once it has ended. The program may
	// answer before the runtime has written down that it runs.
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		out, kerr := exec.CommandContext(b.ctx, runtime, "--root", state, "kill", id, "KILL").CombinedOutput() //nolint:gosec // a benchmark
		if kerr == nil {
			break
		}
		if time.Now().After(deadline) {
			_ = cmd.Process.Kill()
			err = errors.Join(err, fmt.Errorf("%s kill: %w: %s%s", runtime, kerr, out, said.String()))
			break
		}
	}
	_ = cmd.Wait()
	return took, err
}

// content of a bundle.
type content struct {
	root      string
	readonly  bool
	args, env []string
}

// bundle writes what runtime's own spec command says, with our program, on the
// host's network.
func (b *bench) bundle(runtime, dir string, what content) error {
	cmd := exec.CommandContext(b.ctx, runtime, "spec") //nolint:gosec // a benchmark
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s spec: %w: %s", runtime, err, out)
	}
	file := filepath.Join(dir, "config.json")
	raw, err := os.ReadFile(file) //nolint:gosec // ours
	if err != nil {
		return err
	}
	var c map[string]any
	if err := json.Unmarshal(raw, &c); err != nil {
		return err
	}
	process, _ := c["process"].(map[string]any)
	process["args"], process["env"], process["terminal"] = what.args, what.env, false
	c["root"] = map[string]any{"path": what.root, "readonly": what.readonly}
	linux, _ := c["linux"].(map[string]any)
	var spaces []any
	list, _ := linux["namespaces"].([]any)
	for _, n := range list {
		if m, ok := n.(map[string]any); ok && m["type"] != "network" {
			spaces = append(spaces, n)
		}
	}
	linux["namespaces"] = spaces
	if raw, err = json.Marshal(c); err != nil {
		return err
	}
	return os.WriteFile(file, raw, 0o600)
}

// cold: one start a second, of each in turn.
func (b *bench) cold() error {
	rounds := 60
	if b.quick {
		rounds = 12
	}
	n, err := b.start("", "")
	if err != nil {
		return err
	}
	defer n.end()
	if err := n.deploy(b.ctx, "cold", nil); err != nil {
		return err
	}
	took := map[string]times{}
	for round := range rounds + 2 {
		began := time.Now()
		for _, who := range []struct {
			name string
			f    func() (time.Duration, error)
		}{
			{"plain process", b.plain},
			{"fastcontainer", func() (time.Duration, error) { return get(n.http, "cold.localhost") }},
			{"crun run", func() (time.Duration, error) { return b.oci("crun") }},
			{"runc run", func() (time.Duration, error) { return b.oci("runc") }},
		} {
			d, err := who.f()
			if err != nil {
				return fmt.Errorf("%s: %w", who.name, err)
			}
			if round >= 2 { // the first two warm the page cache
				took[who.name] = append(took[who.name], d)
			}
			time.Sleep(150 * time.Millisecond) // what the last one leaves to be done must not cost the next
		}
		if err := errors.Join(n.client.SetStopped(b.ctx, "cold", true), n.client.SetStopped(b.ctx, "cold", false)); err != nil {
			return err
		}
		time.Sleep(time.Until(began.Add(time.Second)))
	}
	ours, crun, process := took["fastcontainer"], took["crun run"], took["plain process"]
	b.say("## A request that finds its app asleep\n")
	b.say("Arrival of the request (a new connection) to the last byte of the answer, static Go server, image unpacked, page cache warm, one start a second, %d rounds,", rounds)
	b.say("the four in turn. *plain process*: fork, exec, until it answers. *crun run*, *runc run*: of the same root filesystem, with the host's network (they")
	b.say("need not make one, which favours them), until the port answers; ours makes its network, overlay, user namespace and limits as always.\n")
	b.say("| | p50 ms | p99 ms | p50 beside crun | p50 beside plain | p99 beside plain |\n|---|---|---|---|---|---|")
	for _, who := range []string{"plain process", "fastcontainer", "crun run", "runc run"} {
		t := took[who]
		b.say("| %s | %s | %s | %.2f | %.2f | %.2f |", who, ms(t.at(.5)), ms(t.at(.99)), t.beside(crun, .5), t.beside(process, .5), t.beside(process, .99))
	}
	b.say("\nAimed at: p50 ≤ 10 ms (%s), p99 ≤ 25 ms (%s), at most half of crun's p50 (%s); at most 1.6 times a plain process's p50 (%s) and 3 times its",
		verdict(ours.at(.5) <= 10*time.Millisecond), verdict(ours.at(.99) <= 25*time.Millisecond), verdict(2*ours.at(.5) <= crun.at(.5)), verdict(ours.beside(process, .5) <= 1.6))
	b.say("p99 (%s).\n", verdict(ours.beside(process, .99) <= 3))
	return b.stages(n)
}

// beside is how many times as long the same quantile of others is.
func (t times) beside(others times, share float64) float64 {
	return float64(t.at(share)) / float64(others.at(share))
}

func verdict(ok bool) string {
	if ok {
		return "met"
	}
	return "**missed**"
}

// stages of those starts, from their ready events.
func (b *bench) stages(n *node) error {
	took := map[string]times{}
	var own times // what is the platform's, of each start
	var order []string
	err := n.client.Events(b.ctx, "cold", events.From{Last: 10000}, false, func(e fleet.Event) error {
		if e.Type == fleet.EventReady && e.Stages != nil {
			order = order[:0]
			for _, s := range e.Stages.List() {
				order = append(order, s.Name)
				took[s.Name] = append(took[s.Name], s.Took)
			}
			own = append(own, time.Duration(e.Stages.Claim+e.Stages.Rootfs+e.Stages.Network+e.Stages.Exec)*time.Microsecond)
		}
		return nil
	})
	if err != nil {
		return err
	}
	b.say("Where the time goes, by the stages of the `ready` events (*listen* is the app's own: from exec until its port accepts):\n")
	b.say("| stage | p50 ms | p99 ms |\n|---|---|---|")
	for _, s := range order {
		b.say("| %s | %.2f | %.2f |", s, millis(took[s].at(.5)), millis(took[s].at(.99)))
	}
	b.say("| *claim to exec* | %.2f | %.2f |", millis(own.at(.5)), millis(own.at(.99)))
	b.say("\n*claim to exec* is the sum of claim, rootfs, network and exec of each start. Aimed at: p50 ≤ 1.5 ms (%s).\n", verdict(own.at(.5) <= 1500*time.Microsecond))
	b.say("Most of the rest is the program's own beginning, which a plain process needs as well; thawed and restored instances skip it: see kinds of start.\n")
	return nil
}

// rate: as many starts as the machine takes.
func (b *bench) rate() error {
	span := 30 * time.Second
	if b.quick {
		span = 6 * time.Second
	}
	light, err := b.lightRoot()
	if err != nil {
		return err
	}
	n, err := b.start("", "")
	if err != nil {
		return err
	}
	defer n.end()
	const clients, apps = 8, 240
	for i := range apps {
		change := func(s *fleet.Spec) {
			s.Idle, s.Start = fleet.Duration(10*time.Millisecond), fleet.StartCold
			s.Resources.Memory.Rest = 64 << 20
		}
		if err := n.deploy(b.ctx, fmt.Sprintf("r%d", i), change); err != nil {
			return err
		}
		if err := n.deploy(b.ctx, fmt.Sprintf("h%d", i), func(s *fleet.Spec) {
			change(s)
			s.Image, s.Command = "dir:"+light, []string{"/busybox", "httpd", "-f", "-p", "8080", "-h", "/www"}
		}); err != nil {
			return err
		}
	}
	ours := func(prefix string) func() (time.Duration, error) {
		var next atomic.Int64
		return func() (time.Duration, error) {
			return get(n.http, fmt.Sprintf("%s%d.localhost", prefix, next.Add(1)%apps))
		}
	}
	var starts atomic.Int64
	follow, done := context.WithCancel(b.ctx)
	defer done()
	go func() {
		_ = n.client.Events(follow, "", events.From{}, true, func(e fleet.Event) error {
			if e.Type == fleet.EventStart {
				starts.Add(1)
			}
			return nil
		})
	}()
	b.say("## Starts a second\n")
	b.say("Whole lives (start, answer one request, removed without a trace) for %s, by %d clients at once. Ours: %d apps in turn, each retired 10 ms after its answer;", span, clients, apps)
	b.say("the static Go server, and, for what is ours of it, a server that begins in next to no time. *bare*: what the kernel alone takes for such lives of the")
	b.say("Go server: a C program ([bench/bare](../bench/bare/bare.c)) makes namespaces, control groups with limits, an overlay, mounts and a pair of interfaces for each, asks once,")
	b.say("and removes them, and does nothing else. *plain process*: the Go server, without any container.\n")
	b.say("| | lives a second | p50 ms | p99 ms | failed |\n|---|---|---|---|---|")
	var said []string
	rates, slowest := map[string]float64{}, map[string]time.Duration{}
	const goServer, httpd = "fastcontainer", "fastcontainer, busybox httpd"
	const bare = "bare"
	lives := func(f func() (time.Duration, error)) func() (times, int, error) {
		return func() (times, int, error) {
			t, failed := storm(clients, span, f)
			return t, failed, nil
		}
	}
	for _, who := range []struct {
		name string
		run  func() (times, int, error)
	}{
		{goServer, lives(ours("r"))},
		{httpd, lives(ours("h"))},
		{bare, func() (times, int, error) { return b.kernelOnly(clients, span) }},
		{"crun", lives(func() (time.Duration, error) { return b.oci("crun") })},
		{"runc", lives(func() (time.Duration, error) { return b.oci("runc") })},
		{"plain process", lives(b.plain)},
	} {
		before := starts.Load()
		t, failed, err := who.run()
		if err != nil {
			return err
		}
		count := len(t)
		if who.name == goServer || who.name == httpd { // an app may have been asked again before it was retired
			time.Sleep(time.Second)
			count = min(int(starts.Load()-before), len(t))
			said = append(said, fmt.Sprintf("%d of %d", count, len(t)))
		}
		rates[who.name], slowest[who.name] = float64(count)/span.Seconds(), t.at(.99)
		b.say("| %s | %.0f | %s | %s | %d |", who.name, rates[who.name], ms(t.at(.5)), ms(t.at(.99)), failed)
	}
	b.say("\nOf our requests %s began a life: counted from the events.\n", strings.Join(said, " and "))
	aims := func(who string) string {
		return fmt.Sprintf("150 a second (%s); 300 a second (%s) with p99 ≤ 100 ms (%s)", verdict(rates[who] >= 150), verdict(rates[who] >= 300), verdict(slowest[who] <= 100*time.Millisecond))
	}
	b.say("Aimed at, with the Go server: %s. With httpd: %s.", aims(goServer), aims(httpd))
	b.say("Of *bare*'s rate ours has %.0f %%: what is beyond that only the kernel, or less isolation, could give.\n", 100*rates[goServer]/rates[bare])
	b.say("The kernel makes and removes network interfaces one at a time, and there are both in every life here; crun and runc were spared them.\n")
	return nil
}

// kernelOnly runs lives of the server that are the kernel's work alone, in a network
// namespace apart.
func (b *bench) kernelOnly(clients int, span time.Duration) (t times, failed int, err error) {
	program, places := filepath.Join(b.dir, "bare"), filepath.Join(b.dir, "lives")
	if out, err := exec.CommandContext(b.ctx, "gcc", "-O2", "-pthread", "-o", program, "bench/bare/bare.c").CombinedOutput(); err != nil { //nolint:gosec // ours
		return nil, 0, fmt.Errorf("build bare: %w\n%s", err, out)
	}
	if err := os.Mkdir(places, 0o755); err != nil { //nolint:gosec // of containers
		return nil, 0, err
	}
	var groups []string
	for _, h := range []string{"cpu", "cpuacct", "memory", "pids", "freezer"} {
		if dir := filepath.Join("/sys/fs/cgroup", h); exists(dir) {
			groups = append(groups, filepath.Join(dir, "fcbench-bare"))
		}
	}
	if groups == nil { // v2, where the daemon has enabled the controllers below the root
		groups = []string{"/sys/fs/cgroup/fcbench-bare"}
	}
	for _, g := range groups {
		if err := os.Mkdir(g, 0o755); err != nil { //nolint:gosec // a control group
			return nil, 0, err
		}
		defer func() { _ = os.Remove(g) }()
		if control := g + "/cgroup.subtree_control"; exists(control) {
			if err := os.WriteFile(control, []byte("+cpu +memory +pids"), 0); err != nil {
				return nil, 0, err
			}
		}
	}
	args := append([]string{"/server", b.root, places, fmt.Sprint(span.Seconds()), strconv.Itoa(clients)}, groups...)
	cmd := exec.CommandContext(b.ctx, program, args...) //nolint:gosec // ours
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNET}
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, 0, fmt.Errorf("bare: %w", err)
	}
	for line := range strings.Lines(string(out)) {
		n, err := strconv.Atoi(strings.TrimSpace(line))
		if err != nil {
			failed++
			continue
		}
		t = append(t, time.Duration(n)*time.Microsecond)
	}
	return t, failed, nil
}

func exists(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}

// lightRoot is the root filesystem of a web server that needs some hundred
// microseconds to begin.
func (b *bench) lightRoot() (string, error) {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return "", err
	}
	program, err := os.ReadFile(busybox) //nolint:gosec // the host's
	if err != nil {
		return "", err
	}
	dir := filepath.Join(b.dir, "light")
	return dir, errors.Join(
		os.MkdirAll(dir+"/www", 0o755),                            //nolint:gosec // a root filesystem
		os.WriteFile(dir+"/busybox", program, 0o755),              //nolint:gosec // a program
		os.WriteFile(dir+"/www/index.html", []byte(hello), 0o644)) //nolint:gosec // a page
}

// storm calls f from several goroutines for a while.
func storm(clients int, span time.Duration, f func() (time.Duration, error)) (times, int) {
	var mu sync.Mutex
	var all times
	failed := 0
	end := time.Now().Add(span)
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			for time.Now().Before(end) {
				d, err := f()
				mu.Lock()
				if err != nil {
					if failed == 0 {
						fmt.Fprintln(os.Stderr, "first failure:", err)
					}
					failed++
				} else {
					all = append(all, d)
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return all, failed
}
