package main

import (
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"sync"
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
	return field(fmt.Sprintf("/proc/%d/smaps_rollup", n.cmd.Process.Pid), "Pss"), heap / 1024, nil
}

// server is where the daemon's management interface is.
func (n *node) server() string {
	return "unix://" + strings.TrimSuffix(n.log.Name(), "/log") + "/run/api.sock"
}

// apps: what ten thousand sleeping apps cost.
func (b *bench) apps() error {
	all, span := 10000, 4*time.Second
	if b.quick {
		all, span = 1000, 2*time.Second
	}
	n, err := b.start("")
	if err != nil {
		return err
	}
	defer n.end()
	other, err := b.start("") // with ten, to compare with
	if err != nil {
		return err
	}
	defer other.end()
	for _, n := range []*node{n, other} {
		if _, err := b.awake(n, "warm"); err != nil {
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
	var few, many flow
	for range 4 { // in turn: the machine's own pace drifts
		for _, who := range []struct {
			n    *node
			best *flow
		}{{other, &few}, {n, &many}} {
			f, err := b.wrk(who.n.http, "warm.localhost", 32, span)
			if err != nil {
				return err
			}
			if f.rate > who.best.rate {
				*who.best = f
			}
		}
	}
	// One of the last is asked for the first time.
	woken, err := get(n.http, fmt.Sprintf("app-%d.localhost", all-1))
	if err != nil {
		return err
	}
	per := (heap1 - heap0) / float64(all-9)
	b.say("## %d apps\n", all)
	b.say("Deployed one by one by four clients at once; etcd runs inside the daemon, whose memory holds its copy of them, too.\n")
	b.say("The warm rates are the best of 4 loads of each of two daemons in turn, one with 10 apps.\n")
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

// available memory of the machine in KiB.
func available() float64 { return field("/proc/meminfo", "MemAvailable") }

// instances: what five hundred running ones cost beside what they use.
func (b *bench) instances() error {
	all := 500
	if b.quick {
		all = 50
	}
	n, err := b.start("")
	if err != nil {
		return err
	}
	defer n.end()
	for i := range all {
		if err := n.deploy(b.ctx, fmt.Sprintf("i%d", i), func(s *fleet.Spec) { s.Idle, s.Lifetime = 0, 0; s.Resources.Memory.Rest = 32 << 20 }); err != nil {
			return err
		}
	}
	pss0, _, err := n.memory()
	if err != nil {
		return err
	}
	free0 := available()
	for i := range all {
		if _, err := get(n.http, fmt.Sprintf("i%d.localhost", i)); err != nil {
			return err
		}
	}
	time.Sleep(2 * time.Second)
	pss1, _, err := n.memory()
	if err != nil {
		return err
	}
	used := free0 - available()
	list, err := n.client.Instances(b.ctx, "")
	if err != nil || len(list) != all {
		return fmt.Errorf("%d instances: %w", len(list), err)
	}
	own := 0.0
	for _, i := range list {
		own += field(fmt.Sprintf("/proc/%d/smaps_rollup", i.PID), "Pss")
	}
	each := func(kib float64) float64 { return kib / float64(all) }
	b.say("## %d running instances\n", all)
	b.say("Of the static server, each with a process, a user namespace, a network, an overlay and a cgroup of its own. There is no helper process.\n")
	b.say("| KiB for an instance | |\n|---|---|")
	b.say("| the app's own process (PSS) | %.0f |", each(own))
	b.say("| the daemon (PSS) | %.1f |", each(pss1-pss0))
	b.say("| all that the machine has less available, kernel included | %.0f |", each(used))
	b.say("| of that neither the app's process nor the daemon: the kernel's namespaces, network devices, cgroups, mounts, page tables | %.0f |", each(used-own-(pss1-pss0)))
	b.say("\nAimed at: the platform's own memory ≤ 256 KiB (the daemon alone: %s; with everything that the kernel holds for it: %s).\n", verdict(each(pss1-pss0) <= 256), verdict(each(used-own) <= 256))
	b.say("A plain container has most of the kernel's share, too: a network namespace with its tables is the largest part. Instances that share a namespace would be")
	b.say("smaller, and could see each other.\n")
	return nil
}
