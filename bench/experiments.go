package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/fastcontainer/fastcontainer/bench/load"
	"github.com/fastcontainer/fastcontainer/internal/events"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/plot"
)

// crowd is one run of the papers' scenario: a hundred clients come to an app of
// Apache and PHP at once.
func (b *bench) crowd(r *report, name, label string, change func(*fleet.Spec)) (line string, err error) {
	span := 25 * time.Second
	if b.quick {
		span = 8 * time.Second
	}
	n, err := b.start("", "")
	if err != nil {
		return "", err
	}
	defer n.end()
	if err := n.php("php", change); err != nil {
		return "", err
	}
	time.Sleep(2 * time.Second) // it comes to rest
	w, stop := n.watch("php", time.Now())
	run := load.Closed(b.ctx, n.target("php", "/"), 100, span, 0)
	stop()
	c, err := n.counts("php")
	if err != nil {
		return "", err
	}
	from, steady := served(run, span)
	last := run.Between(span*3/4, span)
	rate := float64(len(last.Shots)) / (span / 4).Seconds()
	r.say("## %s\n", label)
	if err := r.draw(name, label, plot.Chart{XLabel: "seconds", Panels: append(panels(run, 500*time.Millisecond), w.panels()...)}); err != nil {
		return "", err
	}
	r.say("Why: %s\n", list(c, "start", "resize", "retire"))
	return fmt.Sprintf("| %s | %.0f/s | %s | %s | %s | %d | %.1f | %s |", label, rate, short(last.Quantile(.5)), short(steady), short(from), w.most(), slices.Max(append([]float64{0}, w.limit...)), failed(run)), nil
}

const crowdHead = "| | answers at the end | p50 | p95 | served well after | instances | cores allowed | failed |\n|---|---|---|---|---|---|---|---|"

func thirty(peak float64, most int) func(*fleet.Spec) {
	return func(s *fleet.Spec) {
		s.Resources.CPU = fleet.CPU{Rest: .3, Peak: peak}
		s.Scale.Max = most
	}
}

func scaleOut(b *bench, r *report) error {
	r.say("A hundred clients ask an app of Apache and PHP (Debian's) again and again, each as soon as it has its answer. An instance may use 30 %% of a")
	r.say("core. First nothing else is allowed, then up to ten siblings. This is the setup of the papers' scale-out experiment, whose numbers are not public.\n")
	alone, err := b.crowd(r, "alone", "one instance, 30 % of a core", thirty(.3, 1))
	if err != nil {
		return err
	}
	many, err := b.crowd(r, "siblings", "up to ten instances, 30 % of a core each", thirty(.3, 10))
	if err != nil {
		return err
	}
	r.say("## Side by side\n\n%s\n%s\n%s\n", crowdHead, alone, many)
	r.say("`served well after`: the first second from which the p95 of each further one stays within one and a half times that of the last quarter.")
	r.say("The load is made on the same two cores, which bounds what siblings can add.")
	r.figure("siblings are added; throughput, latency and instances over time", "see the table there")
	return nil
}

func scaleUp(b *bench, r *report) error {
	r.say("The same clients and the same app as in [scale-out](scale-out.md), with one instance only. First it keeps its 30 %% of a core, then its limit may")
	r.say("move to a whole one while it runs.\n")
	fixed, err := b.crowd(r, "fixed", "30 % of a core", thirty(.3, 1))
	if err != nil {
		return err
	}
	moved, err := b.crowd(r, "moved", "from 30 % to 100 % of a core", thirty(1, 1))
	if err != nil {
		return err
	}
	both, err := b.crowd(r, "both", "to 100 % and up to ten instances", thirty(1, 10))
	if err != nil {
		return err
	}
	r.say("## Side by side\n\n%s\n%s\n%s\n%s\n", crowdHead, fixed, moved, both)
	r.say("The limit moves first, within some tens of milliseconds; siblings follow where the peak of those there are is used up and cores are spare.")
	r.figure("the limit moves without a restart", "see the table there")
	return nil
}

func saturation(b *bench, r *report) error {
	repeats := 50
	if b.quick {
		repeats = 10
	}
	n, err := b.start("", "")
	if err != nil {
		return err
	}
	defer n.end()
	r.say("An app with `concurrency: 1` answers a long request; the next one finds no free slot. How long until a second instance has answered it?\n")
	var second []time.Duration
	for i := range repeats {
		name := fmt.Sprintf("one%d", i)
		if err := n.worker(name, func(s *fleet.Spec) { s.Concurrency, s.Scale.Max = 1, 2 }); err != nil {
			return err
		}
		if err := n.once(name); err != nil {
			return err
		}
		ctx, cancel := context.WithCancel(b.ctx)
		var wg sync.WaitGroup
		wg.Go(func() { load.Closed(ctx, n.target(name, "/sleep?ms=1000"), 1, time.Minute, 1) })
		time.Sleep(50 * time.Millisecond)
		run := load.Closed(b.ctx, n.target(name, "/"), 1, time.Minute, 1)
		cancel()
		wg.Wait()
		if len(run.Failed()) > 0 {
			return fmt.Errorf("the second request failed: %v", run.Failed())
		}
		second = append(second, run.Shots[0].Took)
		if err := n.client.Delete(b.ctx, fleet.AppName(name), true); err != nil {
			return err
		}
	}
	r.say("| repeats | p50 | p99 | most |\n|---|---|---|---|\n| %d | %s | %s | %s |\n", repeats, short(load.Quantile(second, .5)), short(load.Quantile(second, .99)), short(load.Quantile(second, 1)))
	r.figure("saturation to the first answer of a second instance: p50 at most 50 ms", short(load.Quantile(second, .5)))
	r.say("An app at rest with 30 %% of a core and a peak of a whole one gets eight requests at once which cost 100 ms of processor time each. How long")
	r.say("until its cgroup has another limit?\n")
	if err := n.worker("up", func(s *fleet.Spec) { s.Resources.CPU, s.Scale.Max = fleet.CPU{Rest: .3, Peak: 1}, 1 }); err != nil {
		return err
	}
	var up []time.Duration
	for range repeats {
		if err := n.once("up"); err != nil {
			return err
		}
		file, err := n.quotaFile(rested)
		if err != nil {
			return err
		}
		time.Sleep(300 * time.Millisecond)
		began := time.Now()
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() { load.Closed(b.ctx, n.target("up", "/burn?ms=100"), 1, time.Minute, 1) })
		}
		for quota(file) == rested && time.Since(began) < 10*time.Second {
			time.Sleep(200 * time.Microsecond)
		}
		up = append(up, time.Since(began))
		wg.Wait()
		if err := until(time.Minute, func() bool { return quota(file) == rested }); err != nil {
			return err
		}
	}
	r.say("| repeats | p50 | p99 | most |\n|---|---|---|---|\n| %d | %s | %s | %s |\n", repeats, short(load.Quantile(up, .5)), short(load.Quantile(up, .99)), short(load.Quantile(up, 1)))
	r.figure("saturation to a changed cgroup limit: p50 at most 20 ms", short(load.Quantile(up, .5)))
	return nil
}

// rested is the quota of 30 % of a core, in µs of each period of 10 ms.
const rested = "3000"

// quotaFile finds the group of the only instance with that quota.
func (n *node) quotaFile(want string) (string, error) {
	for _, pattern := range []string{"/sys/fs/cgroup/cpu/" + n.name + "/*/cpu.cfs_quota_us", "/sys/fs/cgroup/" + n.name + "/*/cpu.max"} {
		files, _ := filepath.Glob(pattern)
		for _, f := range files {
			if quota(f) == want {
				return f, nil
			}
		}
	}
	return "", fmt.Errorf("no cgroup has the quota %s", want)
}

// quota of a group, in µs of each period.
func quota(file string) string {
	b, _ := os.ReadFile(file) //nolint:gosec // of the kernel
	q, _, _ := strings.Cut(strings.TrimSpace(string(b)), " ")
	return q
}

func step(b *bench, r *report) error {
	span := 20 * time.Second
	if b.quick {
		span = 5 * time.Second
	}
	n, err := b.start("", "")
	if err != nil {
		return err
	}
	defer n.end()
	if err := n.worker("step", func(s *fleet.Spec) { s.Resources.CPU = fleet.CPU{Rest: .3, Peak: 1} }); err != nil {
		return err
	}
	w, stop := n.watch("step", time.Now())
	run := load.Open(b.ctx, n.target("step", "/"), 3000, span)
	stop()
	c, err := n.counts("step")
	if err != nil {
		return err
	}
	steady := run.Between(span/2, span).Quantile(.95)
	worst := time.Duration(0)
	for at := time.Second; at < span; at += time.Second {
		worst = max(worst, run.Between(at, at+time.Second).Quantile(.95))
	}
	first := run.Between(0, time.Second)
	r.say("An app that sleeps gets 3,000 requests a second from one moment to the next, and for %.0f s. (The load comes from an open loop: a request counts from", span.Seconds())
	r.say("when it should have been sent. The same step is the gate of Knative's own performance tests.)\n")
	if err := r.draw("", "3,000 requests a second", plot.Chart{XLabel: "seconds", Panels: append(panels(run, 250*time.Millisecond), w.panels()...)}); err != nil {
		return err
	}
	r.say("| requests | failed | longest in the first second | p95 of the first second | worst p95 of a later second | steady p95 |\n|---|---|---|---|---|---|")
	r.say("| %d | %s | %s | %s | %s | %s |\n", len(run.Shots), failed(run), short(first.Quantile(1)), short(first.Quantile(.95)), short(worst), short(steady))
	r.say("Why: %s", list(c, "start", "resize", "retire"))
	r.figure("0 → 3,000/s: no errors, p95 within 15 ms of the steady one after the first second, longest hold at most 1 s",
		fmt.Sprintf("failed %s; %s above; %s", failed(run), short(worst-steady), short(first.Quantile(1))))
	return nil
}

func circulation(b *bench, r *report) error {
	most := 100000
	if b.quick {
		most = 10000
	}
	n, err := b.start("", "")
	if err != nil {
		return err
	}
	defer n.end()
	if err := n.worker("mortal", func(s *fleet.Spec) { s.Lifetime, s.Drain = fleet.Duration(time.Second), fleet.Duration(5*time.Second) }); err != nil {
		return err
	}
	w, stop := n.watch("mortal", time.Now())
	run := load.Closed(b.ctx, n.target("mortal", "/"), 10, 5*time.Minute, most)
	stop()
	c, err := n.counts("mortal")
	if err != nil {
		return err
	}
	r.say("Ten clients ask an app whose instances live for one second each, until there were %d answers.\n", most)
	if err := r.draw("", "circulation", plot.Chart{XLabel: "seconds", Panels: append(panels(run, 250*time.Millisecond), w.panels()...)}); err != nil {
		return err
	}
	r.say("| requests | failed | p50 | p99 | longest |\n|---|---|---|---|---|\n| %d | %s | %s | %s | %s |\n", len(run.Shots), failed(run), short(run.Quantile(.5)), short(run.Quantile(.99)), short(run.Quantile(1)))
	r.say("Lives: %s", list(c, "ready", "stop"))
	r.figure("100,000 requests while instances live 1 s: 0 failed", fmt.Sprintf("%d requests, failed %s", len(run.Shots), failed(run)))
	return nil
}

func deploys(b *bench, r *report) error {
	span := 20 * time.Second
	if b.quick {
		span = 6 * time.Second
	}
	n, err := b.start("", "")
	if err != nil {
		return err
	}
	defer n.end()
	change := func(s *fleet.Spec) { s.Resources.CPU = fleet.CPU{Rest: 1, Peak: 1} }
	if err := n.worker("web", change); err != nil {
		return err
	}
	if err := n.once("web"); err != nil {
		return err
	}
	var wg sync.WaitGroup
	var failure error
	began := time.Now()
	wg.Go(func() {
		time.Sleep(span / 4)
		failure = n.worker("web", func(s *fleet.Spec) { change(s); s.Env = map[string]string{"VERSION": "2"} })
		time.Sleep(time.Until(began.Add(span / 2)))
		if failure == nil {
			_, failure = n.client.Rollback(b.ctx, "web")
		}
	})
	w, stop := n.watch("web", began)
	run := load.Open(b.ctx, n.target("web", "/"), 1000, span)
	stop()
	wg.Wait()
	if failure != nil {
		return failure
	}
	r.say("1,000 requests a second for %.0f s; a deploy after a quarter of it, and a rollback after half.\n", span.Seconds())
	if err := r.draw("", "a deploy and a rollback", plot.Chart{
		XLabel: "seconds", Panels: append(panels(run, 250*time.Millisecond), w.panels()...),
		Marks: []plot.Mark{{Name: "deploy", X: (span / 4).Seconds()}, {Name: "rollback", X: (span / 2).Seconds()}},
	}); err != nil {
		return err
	}
	r.say("| | requests | failed | p50 | p95 | p99 | longest |\n|---|---|---|---|---|---|---|")
	row := func(name string, from, to time.Duration) time.Duration {
		p := run.Between(from, to)
		r.say("| %s | %d | %s | %s | %s | %s | %s |", name, len(p.Shots), failed(p), short(p.Quantile(.5)), short(p.Quantile(.95)), short(p.Quantile(.99)), short(p.Quantile(1)))
		return p.Quantile(.95)
	}
	before := row("before", time.Second, span/4)
	d := row("deploy, 2 s", span/4, span/4+2*time.Second)
	back := row("rollback, 2 s", span/2, span/2+2*time.Second)
	row("after", span*3/4, span)
	r.figure("a deploy and a rollback at 1,000/s: 0 failed, p95 at most 10 ms above before", fmt.Sprintf("failed %s; %s and %s above", failed(run), short(d-before), short(back-before)))
	return nil
}

func neighbour(b *bench, r *report) error {
	part, long := 12*time.Second, time.Minute
	if b.quick {
		part, long = 4*time.Second, 8*time.Second
	}
	end := part + long
	n, err := b.start("", "")
	if err != nil {
		return err
	}
	defer n.end()
	change := func(s *fleet.Spec) { s.Resources.CPU = fleet.CPU{Rest: .5, Peak: 1} }
	for _, name := range []string{"tenant1", "tenant2"} {
		if err := n.worker(name, change); err != nil {
			return err
		}
	}
	if err := n.once("tenant1"); err != nil {
		return err
	}
	var wg sync.WaitGroup
	var flood *load.Run
	var broken error
	began := time.Now()
	w, stop := n.watch("tenant2", began)
	wg.Go(func() {
		time.Sleep(part)
		flood, broken = b.clients(clients{Target: n.target("tenant2", "/burn?ms=20"), Count: 200, Span: long}, 19)
	})
	run, err := b.clients(clients{Target: n.target("tenant1", "/burn?ms=2"), Rate: 50, Span: end + part}, -20)
	wg.Wait()
	stop()
	if err = errors.Join(err, broken); err != nil {
		return err
	}
	r.say("Tenant 1 gets 50 requests a second, each of which costs 2 ms of processor time. After %.0f s tenant 2 is flooded for %.0f: 200 clients, each", part.Seconds(), long.Seconds())
	r.say("request 20 ms of processor time. Both have 0.5 cores at rest, a peak of one, up to ten instances, and the same priority, on a machine of two cores. Clients would be elsewhere,")
	r.say("so the flood's are a process of the lowest priority, and tenant 1's, who measure, one of the highest.\n")
	ps := panels(run, 500*time.Millisecond)
	ps[0].Title, ps[1].Title = "Tenant 1: answers per second", "Tenant 1: time of the answers"
	wp := w.panels()
	wp[0].Title = "Tenant 2: instances and their cores"
	if err := r.draw("", "the noisy neighbour", plot.Chart{XLabel: "seconds", Panels: append(ps, wp...), Marks: []plot.Mark{{Name: "flood", X: part.Seconds()}, {Name: "its end", X: end.Seconds()}}}); err != nil {
		return err
	}
	r.say("| tenant 1 | requests | failed | p50 | p95 | p99 |\n|---|---|---|---|---|---|")
	row := func(name string, from, to time.Duration) time.Duration {
		p := run.Between(from, to)
		r.say("| %s | %d | %s | %s | %s | %s |", name, len(p.Shots), failed(p), short(p.Quantile(.5)), short(p.Quantile(.95)), short(p.Quantile(.99)))
		return p.Quantile(.99)
	}
	before := row("before", time.Second, part)
	during := row("during", part, end)
	row("of that the first second, in which the 200 connect", part, part+time.Second)
	row("of that the rest", part+time.Second, end)
	row("after", end+time.Second, end+part)
	r.say("\nTenant 2: %d requests, %s a second, failed %s, p50 %s.", len(flood.Shots), fmt.Sprintf("%.0f", float64(len(flood.Shots))/long.Seconds()), failed(flood), short(flood.Quantile(.5)))
	r.figure("tenant 1's p99 during the flood at most twice that before, none refused", fmt.Sprintf("%s → %s (%.1f times), failed %s", short(before), short(during), during.Seconds()/before.Seconds(), failed(run)))
	return nil
}

func autophagy(b *bench, r *report) error {
	part, sleepers := 10*time.Second, 36
	if b.quick {
		part = 5 * time.Second
	}
	n, err := b.start("", "capacity: {memory: 1Gi}\n")
	if err != nil {
		return err
	}
	defer n.end()
	eater := func(priority int) func(*fleet.Spec) {
		return func(s *fleet.Spec) {
			s.Env = map[string]string{"EAT": "50"}
			s.Resources.Memory = fleet.Memory{Rest: 96 << 20, Peak: 128 << 20}
			s.Resources.CPU = fleet.CPU{Rest: .3, Peak: 1}
			s.Priority = priority
		}
	}
	busy := []string{"busy0", "busy1", "busy2"}
	for i, name := range busy {
		if err := n.worker(name, eater(20+30*i)); err != nil {
			return err
		}
		if err := n.once(name); err != nil {
			return err
		}
	}
	for i := range sleepers {
		if err := n.worker(fmt.Sprintf("idle%d", i), eater(10+i%5*20)); err != nil {
			return err
		}
	}
	began := time.Now()
	w, stop := n.watch("", began)
	var wg sync.WaitGroup
	var woken error
	wg.Go(func() {
		time.Sleep(part)
		for i := range sleepers {
			if err := n.once(fmt.Sprintf("idle%d", i)); err != nil {
				woken = err
			}
			time.Sleep(part / time.Duration(sleepers))
		}
	})
	runs := make([]*load.Run, len(busy))
	for i, name := range busy {
		wg.Go(func() {
			// Strangers do not keep step: or the three would queue for each
			// other twenty times a second, also where nothing happens.
			time.Sleep(time.Duration(i) * time.Second / 20 / time.Duration(len(busy)))
			runs[i] = load.Open(b.ctx, n.target(name, "/burn?ms=1"), 20, 3*part)
		})
	}
	wg.Wait()
	stop()
	if woken != nil {
		return fmt.Errorf("an app could not be woken on the full machine: %w", woken)
	}
	c, err := n.counts("")
	if err != nil {
		return err
	}
	var lastBite time.Time
	kills := 0
	if err := n.client.Events(b.ctx, "", events.From{Last: 100000}, false, func(e fleet.Event) error {
		if e.Type == fleet.EventDigest {
			lastBite = e.Time
		}
		if e.Type == fleet.EventFail {
			kills++
		}
		return nil
	}); err != nil {
		return err
	}
	all := &load.Run{Began: began}
	for _, run := range runs {
		all.Shots = append(all.Shots, run.Shots...)
	}
	slices.SortFunc(all.Shots, func(x, y load.Shot) int { return int(x.At - y.At) })
	r.say("A machine may give 1 GiB to instances (`capacity.memory`). Three apps of different priority get 20 requests a second each. Then %d further apps of mixed", sleepers)
	r.say("priority are woken one after the other within %.0f s, and every one takes 50 MiB: together twice what there is.\n", part.Seconds())
	ps := panels(all, 500*time.Millisecond)
	ps[0].Title, ps[1].Title = "Apps with traffic: answers per second", "Apps with traffic: time of the answers"
	ps = append(ps, plot.Panel{Title: "All instances", Series: []plot.Series{{Name: "ready instances", X: w.at, Y: w.ready, Step: true}}},
		plot.Panel{Title: "Their memory", YLabel: "MiB", Series: []plot.Series{{Name: "used", X: w.at, Y: w.mem}, {Name: "allowed", X: []float64{0, 3 * part.Seconds()}, Y: []float64{1024, 1024}}}})
	if err := r.draw("", "autophagy", plot.Chart{XLabel: "seconds", Panels: ps, Marks: []plot.Mark{{Name: "the others wake", X: part.Seconds()}, {Name: "all are awake", X: (2 * part).Seconds()}}}); err != nil {
		return err
	}
	r.say("| apps with traffic | requests | failed | p50 | p95 | p99 |\n|---|---|---|---|---|---|")
	row := func(name string, from, to time.Duration) time.Duration {
		p := all.Between(from, to)
		r.say("| %s | %d | %s | %s | %s | %s |", name, len(p.Shots), failed(p), short(p.Quantile(.5)), short(p.Quantile(.95)), short(p.Quantile(.99)))
		return p.Quantile(.99)
	}
	before := row("before", time.Second, part)
	during := row("while the others wake", part, 2*part)
	row("after", 2*part+time.Second, 3*part)
	calm := max(lastBite.Sub(began)-2*part, 0)
	r.say("\nThe most memory in use: %.0f MiB. Digested: %s. Instances that were killed or failed: %d. The last digestion was %s after the last app had been woken.",
		slices.Max(append([]float64{0}, w.mem...)), list(c, "digest"), kills, short(calm))
	r.figure("twice the memory: no OOM kill of an instance with traffic, its p99 at most doubled, back to normal within 10 s",
		fmt.Sprintf("%d killed; p99 %s → %s; %s", kills, short(before), short(during), short(calm)))
	return nil
}
