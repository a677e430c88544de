package e2e

import (
	"context"
	"fmt"
	"net/http"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/api"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/homeostat"
)

// laborer is an app whose requests cost what they are told to. /most tells the
// most requests that this instance had at once.
func laborer(t *testing.T) string {
	t.Helper()
	return goApp(t, `package main

import (
	"fmt"
	"net/http"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

var (
	now, most atomic.Int64
	mu        sync.Mutex
	kept      [][]byte
)

func eat(mebibytes int) {
	mu.Lock()
	defer mu.Unlock()
	for range mebibytes {
		b := make([]byte, 1<<20)
		for i := 0; i < len(b); i += 1024 {
			b[i] = 1
		}
		kept = append(kept, b)
		time.Sleep(5 * time.Millisecond)
	}
}

func main() {
	n, _ := strconv.Atoi(os.Getenv("EAT"))
	eat(n)
	number := func(r *http.Request) int { n, _ := strconv.Atoi(r.FormValue("n")); return n }
	handle := func(path string, f func(n int)) {
		http.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			have := now.Add(1)
			defer now.Add(-1)
			for old := most.Load(); have > old && !most.CompareAndSwap(old, have); old = most.Load() {
			}
			f(number(r))
			fmt.Fprint(w, "most ", most.Load())
		})
	}
	handle("/", func(int) {})
	handle("/sleep", func(n int) { time.Sleep(time.Duration(n) * time.Millisecond) })
	handle("/burn", func(n int) {
		for end := time.Now().Add(time.Duration(n) * time.Millisecond); time.Now().Before(end); {
		}
	})
	handle("/eat", eat)
	http.ListenAndServe(":"+os.Getenv("PORT"), nil)
}
`)
}

// deployFile deploys an app file.
func (d *daemon) deployFile(name, image, more string) {
	d.t.Helper()
	file := filepath.Join(d.t.TempDir(), name+".yaml")
	write(d.t, file, fmt.Sprintf("name: %s\nimage: %s\ncommand: [/app]\n%s", name, image, more))
	d.must("deploy", "-f", file)
}

// storm sends requests from n clients until stop is called, which gives the
// number of answers by their status.
func (d *daemon) storm(host, path string, n int) (stop func() map[int]int) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	var mu sync.Mutex
	seen := map[int]int{}
	for range n {
		wg.Go(func() {
			for ctx.Err() == nil {
				code, body := d.get(host, path)
				mu.Lock()
				seen[code]++
				mu.Unlock()
				if code == http.StatusServiceUnavailable {
					time.Sleep(20 * time.Millisecond)
				} else if code != http.StatusOK {
					d.t.Logf("%s%s: %d %.200q", host, path, code, body)
				}
			}
		})
	}
	return func() map[int]int {
		cancel()
		wg.Wait()
		return seen
	}
}

// Three requests at once for an app that takes one at a time: three instances,
// each with one, and what is surplus dies.
func TestLoad_ScalesOutAndBack(t *testing.T) {
	d := newDaemon(t, "")
	d.deployFile("single", laborer(t), "concurrency: 1\nscale: {max: 3}\nidle: 5s\nstart: cold\n")
	d.expect("single.localhost", "/", "most 1")
	stop := d.storm("single.localhost", "/sleep?n=200", 6)
	d.until("three instances", func() bool { return len(d.instances("single")) == 3 })
	time.Sleep(time.Second)
	seen := stop()
	if len(seen) != 1 || seen[200] < 12 {
		t.Errorf("answers: %v", seen)
	}
	for range 6 {
		if _, body := d.get("single.localhost", "/"); body != "most 1" {
			t.Errorf("an instance had more than one request at once: %s", body)
		}
	}
	for _, e := range d.events("single", fleet.EventStart)[1:] {
		if e.Cause != homeostat.CauseLoad || len(e.Inputs) == 0 {
			t.Errorf("start: %+v", e)
		}
	}
	d.until("the surplus is gone", func() bool { return len(d.instances("single")) <= 1 })
}

// An app at its processor limit gets more without being restarted, and gives it
// back; one whose memory grows gets more before the kernel kills it.
func TestLoad_ScalesUpAndBack(t *testing.T) {
	d := newDaemon(t, "")
	d.deployFile("grow", laborer(t), "scale: {max: 1}\nresources: {cpu: {rest: 0.2, peak: 1}, memory: {rest: 48Mi, peak: 160Mi}}\n")
	d.expect("grow.localhost", "/", "most 1")
	before := d.instances("grow")[0]
	stop := d.storm("grow.localhost", "/burn?n=20", 4)
	raised := d.await("grow", fleet.EventResize, func(e fleet.Event) bool { return e.Cause == homeostat.CauseCPU })
	d.until("the limit is at its peak", func() bool { return d.instances("grow")[0].CPU.Limit == 1 })
	if seen := stop(); len(seen) != 1 {
		t.Errorf("answers: %v", seen)
	}
	if len(raised.Inputs) == 0 {
		t.Errorf("nothing explains the limit: %+v", raised)
	}
	d.until("the limit is back at rest", func() bool { return d.instances("grow")[0].CPU.Limit == .2 })

	d.expect("grow.localhost", "/eat?n=90", "most")
	d.await("grow", fleet.EventResize, func(e fleet.Event) bool { return e.Cause == homeostat.CauseMemory })
	if after := d.instances("grow")[0]; after.PID != before.PID || after.Memory.Limit <= 48<<20 {
		t.Errorf("before %+v, after %+v", before, after)
	}
	if n := len(d.events("grow", fleet.EventStart)); n != 1 {
		t.Errorf("%d starts", n)
	}
}

// Who has more than at rest has it from others, and comes after them; but what
// he has at rest is his, also when they take all of the machine.
func TestLoad_WhatIsBorrowedGoesBackAndTheRestIsKept(t *testing.T) {
	d := newDaemon(t, "")
	img := laborer(t)
	d.deployFile("borrower", img, "scale: {max: 1}\nresources: {cpu: {rest: 0.4, peak: 2}}\n")
	d.expect("borrower.localhost", "/", "most 1")
	one := func() api.Instance { return d.instances("borrower")[0] }
	defer d.storm("borrower.localhost", "/burn?n=5", 4)()
	d.until("it has more than at rest", func() bool { return one().CPU.Limit > 1 })
	for n := range runtime.NumCPU() {
		name := fmt.Sprintf("owner%d", n)
		d.deployFile(name, img, "scale: {max: 1}\nresources: {cpu: {rest: 1, peak: 1}}\n")
		d.expect(name+".localhost", "/", "most 1")
		defer d.storm(name+".localhost", "/burn?n=50", 4)()
	}
	d.until("it is back at rest", func() bool { return one().CPU.Limit == 0.4 })
	const span = 4 * time.Second
	before := one()
	time.Sleep(span)
	after := one()
	if used := (after.CPUSeconds - before.CPUSeconds) / span.Seconds(); after.PID != before.PID || used < 0.1 {
		t.Errorf("it used %.2f cores while others had all of them; before %+v, after %+v", used, before, after)
	}
}

// What is beyond the peak is killed, and the event says so.
func TestMemory_BeyondThePeak(t *testing.T) {
	d := newDaemon(t, "")
	d.deployFile("glutton", laborer(t), "resources: {memory: {rest: 32Mi, peak: 48Mi}}\n")
	d.expect("glutton.localhost", "/", "most 1")
	if code, _ := d.get("glutton.localhost", "/eat?n=200"); code != http.StatusBadGateway {
		t.Errorf("answer: %d", code)
	}
	d.await("glutton", fleet.EventFail, func(e fleet.Event) bool { return strings.Contains(e.Cause, homeostat.CauseOOM) })
	d.until("it is started again", func() bool { code, _ := d.get("glutton.localhost", "/"); return code == http.StatusOK })
	d.expect("glutton.localhost", "/", "most 1")
}

// An app that floods a full machine is told to come again; the other one is
// served, each time.
func TestAdmission_AFloodLeavesTheRest(t *testing.T) {
	d := newDaemon(t, "capacity: {memory: 320Mi, memory_overcommit: 1}\nholds: {per_app: 20, timeout: 5s}")
	img := laborer(t)
	const small = "concurrency: 1\nscale: {max: 50}\nresources: {memory: {rest: 64Mi, peak: 64Mi}}\nidle: 200ms\nstart: cold\n"
	d.deployFile("flood", img, small)
	d.deployFile("calm", img, small)
	stop := d.storm("flood.localhost", "/sleep?n=100", 40)
	d.until("the machine is full", func() bool { return len(d.instances("")) >= 4 })
	for range 20 {
		d.expect("calm.localhost", "/", "most 1")
		time.Sleep(100 * time.Millisecond) // some with an instance, some without
	}
	seen := stop()
	if seen[200] == 0 || seen[503] == 0 || len(seen) != 2 {
		t.Errorf("answers to the flood: %v", seen)
	}
	if n := len(d.events("calm", fleet.EventFail)); n != 0 {
		t.Errorf("%d failed starts of the calm app", n)
	}
}

// A starving machine digests what is idle, and never what serves.
func TestAutophagy_WhatServesLives(t *testing.T) {
	d := newDaemon(t, "capacity: {memory: 256Mi}")
	img := laborer(t)
	const big = "resources: {memory: {rest: 64Mi, peak: 96Mi}}\nenv: {EAT: \"40\"}\n"
	d.deployFile("busy", img, big+"priority: 10\n")
	for i := range 9 {
		d.deployFile(fmt.Sprintf("idle%d", i), img, fmt.Sprintf("%spriority: %d\n", big, 20+10*i))
	}
	d.expect("busy.localhost", "/", "most 1")
	first := d.instances("busy")[0].ID
	stop := d.storm("busy.localhost", "/sleep?n=5", 2)
	for i := range 9 {
		d.expect(fmt.Sprintf("idle%d.localhost", i), "/", "most 1")
	}
	d.until("something is digested", func() bool { return len(d.events("", fleet.EventDigest)) > 0 })
	d.until("the pressure is gone", func() bool {
		var used fleet.Bytes
		for _, i := range d.instances("") {
			used += fleet.Bytes(i.Memory.Used)
		}
		return used < 256<<20
	})
	if seen := stop(); len(seen) != 1 || seen[200] == 0 {
		t.Errorf("answers: %v", seen)
	}
	if now := d.instances("busy"); len(now) == 0 || now[0].ID != first {
		t.Errorf("the instance with traffic, %s, is not there: %+v", first, now)
	}
	if n := len(d.events("", fleet.EventFail)); n != 0 {
		t.Errorf("%d failed", n)
	}
}

// The daemon is killed again and again while it scales an app out and up. The
// next one reads the facts and makes a new plan: never more than the most, every
// limit between rest and peak, and calm ends what is surplus.
func TestKill_InTheMiddleOfAPlan(t *testing.T) {
	d := newDaemon(t, "")
	d.deployFile("plan", laborer(t), "concurrency: 2\nscale: {max: 4}\nidle: 2s\nstart: cold\nresources: {cpu: {rest: 0.2, peak: 0.5}}\n")
	d.expect("plan.localhost", "/", "most 1")
	for round := range 5 {
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		var answers atomic.Int64
		for range 10 {
			wg.Go(func() {
				for ctx.Err() == nil {
					req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+d.http+"/burn?n=10", nil)
					if err != nil {
						return
					}
					req.Host = "plan.localhost"
					if resp, err := d.do(req); err == nil {
						_ = resp.Body.Close()
						answers.Add(1)
					} else {
						time.Sleep(10 * time.Millisecond)
					}
				}
			})
		}
		time.Sleep(time.Duration(30+70*round) * time.Millisecond)
		d.kill()
		d.start()
		had := answers.Load()
		d.until("answers after the crash", func() bool { return answers.Load() > had+20 })
		list := d.instances("plan")
		if len(list) > 4 {
			t.Errorf("%d instances, the most is 4", len(list))
		}
		for _, i := range list {
			if i.CPU.Limit < .2 || i.CPU.Limit > .5 {
				t.Errorf("limit of %s: %v cores", i.ID, i.CPU.Limit)
			}
		}
		cancel()
		wg.Wait()
	}
	d.until("calm", func() bool { return len(d.instances("plan")) == 0 })
	d.until("no orphans", func() bool { _, groups, _ := d.kept(); return groups <= 4 })
}
