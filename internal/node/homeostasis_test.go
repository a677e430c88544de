package node

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/sandbox"
)

// The wall clock jumps by a day between two daemons: ages and ends are counted
// by the clock of the machine, which does not.
func TestAdopt_TheWallClockJumped(t *testing.T) {
	for _, jump := range []time.Duration{24 * time.Hour, -24 * time.Hour} {
		b := newBench(t)
		i := b.mustStart(b.revision(func(s *fleet.Spec) { s.Lifetime = fleet.Duration(time.Minute) }, server...))
		before, ready := i.Info(), i.Ready()
		b.close()
		file := filepath.Join(b.dir, "run", string(before.ID)+".json")
		raw, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var s saved
		if err := json.Unmarshal(raw, &s); err != nil {
			t.Fatal(err)
		}
		// What the clock said then is a day away from what it says now.
		s.Instance.ReadyAt, s.Instance.ExpiresAt = s.Instance.ReadyAt.Add(jump), s.Instance.ExpiresAt.Add(jump)
		if raw, err = json.Marshal(s); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		b.open()
		adopted, err := b.node.Adopt(t.Context())
		if err != nil || len(adopted) != 1 {
			t.Fatalf("adopted %v, %v", adopted, err)
		}
		a := adopted[0]
		if d := a.Ready().Sub(ready).Abs(); d > 100*time.Millisecond {
			t.Errorf("clock jumped by %v: its age moved by %v", jump, d)
		}
		if d := a.Info().ExpiresAt.Sub(before.ExpiresAt).Abs(); d > 100*time.Millisecond {
			t.Errorf("clock jumped by %v: its end moved by %v", jump, d)
		}
		if err := b.node.Stop(t.Context(), a, "test"); err != nil {
			t.Fatal(err)
		}
	}
}

func TestResize_IsToldSavedAndKeptByTheNextDaemon(t *testing.T) {
	b := newBench(t)
	i := b.mustStart(b.revision(func(s *fleet.Spec) {
		s.Resources.CPU = fleet.CPU{Rest: 0.3, Peak: 1}
		s.Resources.Memory = fleet.Memory{Rest: 64 << 20, Peak: 256 << 20}
	}, server...))
	if l := i.Limits(); l.CPU != 0.3 || l.Memory != 64<<20 {
		t.Errorf("ready with %+v, want what it has at rest", l)
	}
	if err := b.node.Resize(i, sandbox.Limits{CPU: 0.6}, "because", map[string]float64{"in_flight": 7}); err != nil {
		t.Fatal(err)
	}
	e := b.last(fleet.EventResize)
	if e.Cause != "because" || e.Detail != "cpu 0.3 to 0.6" || e.Inputs["in_flight"] != 7 {
		t.Errorf("got %+v", e)
	}
	if err := b.node.Resize(i, sandbox.Limits{CPUWeight: 50}, "weight", nil); err != nil {
		t.Fatal(err)
	}
	if e := b.last(fleet.EventResize); e.Cause != "because" {
		t.Errorf("a weight is told: %+v", e)
	}
	b.close()
	b.open()
	adopted, err := b.node.Adopt(t.Context())
	if err != nil || len(adopted) != 1 {
		t.Fatalf("adopted %v, %v", adopted, err)
	}
	if l := adopted[0].Limits(); l.CPU != 0.6 || l.CPUWeight != 50 || l.Memory != 64<<20 {
		t.Errorf("after adoption %+v", l)
	}
}

func TestVitals_ReadsWhatThereIs(t *testing.T) {
	proc := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(filepath.Join(proc, name)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(proc, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	pressure := "some avg10=0.00 avg60=0.00 avg300=0.00 total=%\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=1\n"
	write("pressure/memory", strings.Replace(pressure, "%", "1000000", 1))
	write("pressure/cpu", strings.Replace(pressure, "%", "5000000", 1))
	write("stat", "cpu  10 0 10 1000 100 0 0 0 0 0\ncpu0 1 2\n")
	write("meminfo", "MemTotal: 1000000 kB\nMemFree: 5 kB\nMemAvailable: 250000 kB\n")
	said := map[string]int{}
	v := &vitals{
		proc: proc, said: map[string]bool{}, capacity: 1 << 40, cores: 2, leastWindow: 50 * time.Millisecond,
		used:       func() (fleet.Bytes, error) { return 100_000 << 10, nil },
		unreadable: func(name string, _ error) { said[name]++ },
	}
	now := time.Now()
	if got := v.read(now); got.Idle != -1 || got.MemoryStalled != 0 {
		t.Errorf("the first reading has rates: %+v", got)
	}
	write("pressure/memory", strings.Replace(pressure, "%", "1250000", 1))
	write("pressure/cpu", strings.Replace(pressure, "%", "9000000", 1))
	write("stat", "cpu  60 0 60 1080 120 0 0 0 0 0\n")
	if got := v.read(now.Add(10 * time.Millisecond)); got.MemoryStalled != 0 {
		t.Errorf("rates of ten milliseconds: %+v", got)
	}
	got := v.read(now.Add(time.Second))
	// A quarter of the second, all of it, and 80 + 20 ticks of two cores idle.
	if got.MemoryStalled != 0.25 || got.CPUStalled != 1 || got.Idle != 1 {
		t.Errorf("got %+v", got)
	}
	// What is used, and what the machine has available less a twentieth.
	if want := int64(100_000+250_000-50_000) << 10; got.Memory != want || got.Used != 100_000<<10 {
		t.Errorf("memory %d of %d, want %d", got.Used, got.Memory, want)
	}
	// Signals that vanish are left out, and that is said once each.
	for _, name := range []string{"pressure/memory", "pressure/cpu", "stat"} {
		if err := os.Remove(filepath.Join(proc, name)); err != nil {
			t.Fatal(err)
		}
	}
	v.used = func() (fleet.Bytes, error) { return 0, errors.New("no cgroup") }
	for s := 2; s < 5; s++ {
		got = v.read(now.Add(time.Duration(s) * time.Second))
	}
	if got.Idle != -1 || got.MemoryStalled != 0 {
		t.Errorf("numbers out of nowhere: %+v", got)
	}
	for _, name := range []string{"memory pressure", "processor pressure", "idle time", "memory of the containers"} {
		if said[name] != 1 {
			t.Errorf("the lack of %s was said %d times", name, said[name])
		}
	}
}
