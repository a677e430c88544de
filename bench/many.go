package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// memory of the daemon in KiB: what is resident, and what its heap holds after
// a collection.
func (n *node) memory() (rss, heap float64, err error) {
	socket := "--unix-socket"
	path := strings.TrimPrefix(n.server(), "unix://")
	for _, what := range []string{"debug/pprof/heap?gc=1", "metrics"} {
		out, err := exec.CommandContext(n.b.ctx, "curl", "-sS", socket, path, "http://x/"+what).Output() //nolint:gosec // a benchmark
		if err != nil {
			return 0, 0, fmt.Errorf("curl: %w", err)
		}
		for line := range strings.Lines(string(out)) {
			if v, ok := strings.CutPrefix(line, "go_memstats_heap_alloc_bytes "); ok {
				heap, _ = strconv.ParseFloat(strings.TrimSpace(v), 64)
			}
		}
	}
	return pss(n.cmd.Process.Pid), heap / 1024, nil
}

// server is where the daemon's management interface is.
func (n *node) server() string {
	return "unix:///run/" + n.name + "/api.sock"
}

// apps: what ten thousand sleeping apps cost.
func (b *bench) apps() error {
	all, span := 10000, 4*time.Second
	if b.quick {
		all, span = 1000, 2*time.Second
	}
	n, err := b.start("", "")
	if err != nil {
		return err
	}
	defer n.end()
	other, err := b.start("", "") // with ten, to compare with
	if err != nil {
		return err
	}
	defer other.end()
	for _, n := range []*node{n, other} {
		if err := b.awake(n, "warm"); err != nil {
			return err
		}
	}
	for i := range 9 {
		if err := other.deploy(b.ctx, fmt.Sprintf("app-%d", i), nil); err != nil {
			return err
		}
	}
	var mu sync.Mutex
	var took times
	deploy := func(from, to int) error {
		var wg sync.WaitGroup
		var first error
		jobs := make(chan int)
		for range 4 {
			wg.Go(func() {
				for i := range jobs {
					began := time.Now()
					err := n.deploy(b.ctx, fmt.Sprintf("app-%d", i), nil)
					mu.Lock()
					took = append(took, time.Since(began))
					if err != nil && first == nil {
						first = err
					}
					mu.Unlock()
				}
			})
		}
		for i := from; i < to; i++ {
			jobs <- i
		}
		close(jobs)
		wg.Wait()
		return first
	}
	if err := deploy(0, 9); err != nil {
		return err
	}
	rss0, heap0, err := n.memory()
	if err != nil {
		return err
	}
	took = nil
	began := time.Now()
	if err := deploy(9, all); err != nil {
		return err
	}
	deployed := time.Since(began)
	time.Sleep(2 * time.Second)
	rss1, heap1, err := n.memory()
	if err != nil {
		return err
	}
	few, many, err := b.paces(other, n, span)
	if err != nil {
		return err
	}
	// One of the last is asked for the first time.
	woken, err := get(n.http, fmt.Sprintf("app-%d.localhost", all-1))
	if err != nil {
		return err
	}
	per := (heap1 - heap0) / float64(all-9)
	b.say("## %d apps\n", all)
	b.say("Deployed one by one by four clients at once; etcd runs inside the daemon, whose memory holds its copy of them, too.\n")
	b.say("The warm rates are the best of %d loads of each of two daemons in turn, one with 10 apps.\n", loads)
	b.say("| | |\n|---|---|")
	b.say("| heap for a sleeping app, with etcd's own | %.1f KiB |", per)
	b.say("| resident memory for a sleeping app, with etcd's pages | %.1f KiB |", (rss1-rss0)/float64(all-9))
	b.say("| deploy until routable, p50 / p95 | %s / %s ms |", ms(took.at(.5)), ms(took.at(.95)))
	b.say("| deploys a second | %.0f |", float64(all-9)/deployed.Seconds())
	b.say("| warm requests/s with 10 apps | %.0f |", few.rate)
	b.say("| warm requests/s with %d apps | %.0f (%+.1f %%) |", all, many.rate, 100*(many.rate/few.rate-1))
	b.say("| first request to the last of them | %s ms |", ms(woken))
	b.say("\nAimed at: ≤ 4 KiB for a sleeping app (%s), p95 ≤ 100 ms (%s), warm within 5 %% (%s).\n", verdict(per <= 4), verdict(took.at(.95) <= 100*time.Millisecond), verdict(many.rate >= .95*few.rate))
	b.say("etcd keeps the app, its revision and an index of both in this process; an external etcd (`--etcd`) would take that share away.\n")
	return nil
}

// loads of each daemon, of which the best counts: what else runs on the machine
// only ever slows one.
const loads = 8

// paces are the best of some loads of the warm app of each of two daemons, in
// turn, and each of them first as often as the other: the machine's own pace
// drifts.
func (b *bench) paces(one, other *node, span time.Duration) (first, second flow, err error) {
	type side struct {
		n    *node
		best *flow
	}
	order := []side{{one, &first}, {other, &second}}
	for range loads {
		slices.Reverse(order)
		for _, who := range order {
			f, err := b.wrk(who.n.http, "warm.localhost", 32, span)
			if err != nil {
				return first, second, err
			}
			if f.rate > who.best.rate {
				*who.best = f
			}
		}
	}
	return first, second, nil
}

// kernel is the memory in KiB that the kernel holds for itself, and taken what
// the machine has less available than it has.
func kernel() (held, taken float64) {
	for _, name := range []string{"Slab", "KernelStack", "PageTables", "Percpu", "VmallocUsed"} {
		held += field("/proc/meminfo", name)
	}
	return held, field("/proc/meminfo", "MemTotal") - field("/proc/meminfo", "MemAvailable")
}

// pss is a process's share of memory in KiB.
func pss(pid int) float64 { return field(fmt.Sprintf("/proc/%d/smaps_rollup", pid), "Pss") }

// platform is the memory in KiB of the daemon and of its own processes: those
// children of it that are no app's.
func (n *node) platform() float64 {
	if _, _, err := n.memory(); err != nil { // it collects garbage
		return 0
	}
	sum := pss(n.cmd.Process.Pid)
	all, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range all {
		pid, _ := strconv.Atoi(filepath.Base(dir))
		comm, _ := os.ReadFile(dir + "/comm")
		if strings.HasPrefix(string(comm), "fastcontainer") && int(field(dir+"/status", "PPid")) == n.cmd.Process.Pid {
			sum += pss(pid)
		}
	}
	return sum
}

// footprint is the memory of something that is there many times, in KiB for
// each.
type footprint struct{ app, platform, kernel, taken float64 }

// bare measures the server as a process in the same kinds of namespace that an
// instance has, empty ones, and with nothing else.
func (b *bench) bare(count int, namespaces uintptr) (f footprint, err error) {
	var cmds []*exec.Cmd
	defer func() {
		for _, c := range cmds {
			_ = c.Process.Kill()
			_ = c.Wait()
		}
		time.Sleep(2 * time.Second) // the kernel removes namespaces later
	}()
	held, taken := kernel()
	for i := range count {
		cmd := exec.CommandContext(b.ctx, b.root+"/server") //nolint:gosec // ours
		cmd.Env = []string{"PORT=" + strconv.Itoa(12000+i)}
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: namespaces}
		if err := cmd.Start(); err != nil {
			return f, err
		}
		cmds = append(cmds, cmd)
	}
	time.Sleep(2 * time.Second)
	for _, c := range cmds {
		f.app += pss(c.Process.Pid)
	}
	held1, taken1 := kernel()
	f.kernel, f.taken = held1-held, taken1-taken
	return f.each(count), nil
}

func (f footprint) each(count int) footprint {
	n := float64(count)
	return footprint{f.app / n, f.platform / n, f.kernel / n, f.taken / n}
}

// part is a thing that each instance has in the kernel.
type part struct {
	name         string
	make, remove func(i int) error
}

// parts measures what the kernel holds for such things, in KiB for each.
func (b *bench) parts(count int) (map[string]float64, error) {
	groups := "/sys/fs/cgroup/memory/fcbench-parts"
	if !exists("/sys/fs/cgroup/memory") {
		groups = "/sys/fs/cgroup/fcbench-parts"
	}
	if err := os.Mkdir(groups, 0o755); err != nil { //nolint:gosec // a cgroup
		return nil, err
	}
	defer func() { _ = os.Remove(groups) }()
	space := func(i int) string { return fmt.Sprintf("fcbench-part%d", i) }
	group := func(i int) string { return filepath.Join(groups, strconv.Itoa(i)) }
	each := map[string]float64{}
	for _, p := range []part{
		{"network namespace", func(i int) error { return b.ip("netns add " + space(i)) }, nil},
		{"veth pair", func(i int) error {
			return b.ip(fmt.Sprintf("link add fcbpart%d type veth peer name eth0 netns %s", i, space(i)))
		}, func(i int) error { return b.ip("netns delete " + space(i)) }},
		{"memory cgroup", func(i int) error { return os.Mkdir(group(i), 0o755) }, func(i int) error { return os.Remove(group(i)) }}, //nolint:gosec // a cgroup
	} {
		held, _ := kernel()
		for i := range count {
			if err := p.make(i); err != nil {
				return nil, err
			}
		}
		held1, _ := kernel()
		each[p.name] = (held1 - held) / float64(count)
		if p.remove == nil {
			continue
		}
		for i := range count {
			if err := p.remove(i); err != nil {
				return nil, err
			}
		}
		time.Sleep(2 * time.Second) // the kernel removes them later
	}
	return each, nil
}

// instances: what five hundred running ones cost beside what they use.
func (b *bench) instances() error {
	all := 500
	if b.quick {
		all = 100
	}
	process, err := b.bare(all, 0)
	if err != nil {
		return err
	}
	spaces, err := b.bare(all, syscall.CLONE_NEWNET|syscall.CLONE_NEWPID|syscall.CLONE_NEWNS|syscall.CLONE_NEWIPC|syscall.CLONE_NEWUTS|syscall.CLONE_NEWUSER)
	if err != nil {
		return err
	}
	parts, err := b.parts(all)
	if err != nil {
		return err
	}
	n, err := b.start("", "")
	if err != nil {
		return err
	}
	defer n.end()
	for i := range all {
		if err := n.deploy(b.ctx, fmt.Sprintf("i%d", i), func(s *fleet.Spec) { s.Idle, s.Lifetime = 0, 0; s.Resources.Memory.Rest = 32 << 20 }); err != nil {
			return err
		}
	}
	var ours footprint
	before := n.platform()
	held, taken := kernel()
	for i := range all {
		if _, err := get(n.http, fmt.Sprintf("i%d.localhost", i)); err != nil {
			return err
		}
	}
	time.Sleep(2 * time.Second)
	held1, taken1 := kernel()
	ours.platform, ours.kernel, ours.taken = n.platform()-before, held1-held, taken1-taken
	list, err := n.client.Instances(b.ctx, "")
	if err != nil || len(list) != all {
		return fmt.Errorf("%d instances: %w", len(list), err)
	}
	for _, i := range list {
		ours.app += pss(i.PID)
	}
	ours = ours.each(all)
	b.say("## %d running instances\n", all)
	b.say("Of the static server, each with a process, namespaces, a network, an overlay and a cgroup of its own; beside as many plain processes of the same")
	b.say("server, and as many in empty namespaces of the same kinds (no network device, no overlay, no cgroup). KiB for each.\n")
	b.say("| | the app's process (PSS) | the daemon and its own processes (PSS) | the kernel's counters | all that the machine has less available |\n|---|---|---|---|---|")
	for _, r := range []struct {
		name string
		f    footprint
	}{{"fastcontainer", ours}, {"processes in empty namespaces", spaces}, {"plain processes", process}} {
		b.say("| %s | %.0f | %.1f | %.0f | %.0f |", r.name, r.f.app, r.f.platform, r.f.kernel, r.f.taken)
	}
	b.say("\nAimed at: the platform's own memory ≤ 256 KiB (daemon: %s; daemon and what the kernel holds more than for a plain process, %.0f KiB: %s).\n",
		verdict(ours.platform <= 256), ours.platform+ours.kernel-process.kernel, verdict(ours.platform+ours.kernel-process.kernel <= 256))
	b.say("The kernel's counters are slab, stacks, page tables, per-processor memory and vmalloc. Of them, measured alone, %d of each: a network namespace %.0f KiB, a", all, parts["network namespace"])
	b.say("veth pair %.0f KiB, a memory cgroup %.0f KiB. No container with a network and a memory limit of its own is below their sum; the rest of ours is its other", parts["veth pair"], parts["memory cgroup"])
	b.say("namespaces, cgroups and mounts.\n")
	return nil
}
