package simulate

import (
	"compress/gzip"
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/homeostat"
)

func policy(idle, lifetime time.Duration, least int) homeostat.Policy {
	return homeostat.Policy{
		Min: least, Max: 10, Idle: idle, Lifetime: lifetime,
		CPU: homeostat.Span[float64]{Rest: 1, Peak: 1}, Memory: homeostat.Span[int64]{Rest: 128 << 20, Peak: 128 << 20},
	}
}

var model = Model{Start50: 10 * time.Millisecond, Start99: 30 * time.Millisecond, Service: 30 * time.Millisecond, CPU: 0.3}

func run(t *testing.T, d Day, v ...Variant) []*Result {
	t.Helper()
	r, err := Run(t.Context(), d, model, v, nil)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestRun_MoreMemoryBuysFewerStarts(t *testing.T) {
	d := Generated(200, 300, 24*time.Hour, 1)
	r := run(t, d,
		Variant{"one minute", policy(time.Minute, 20*time.Minute, 0)},
		Variant{"five minutes", policy(5*time.Minute, 20*time.Minute, 0)},
		Variant{"always on", policy(5*time.Minute, 20*time.Minute, 1)},
	)
	if r[0].Requests != r[1].Requests || math.Abs(float64(r[0].Requests)-200*300) > 6000 {
		t.Errorf("%d and %d requests, want about 60000", r[0].Requests, r[1].Requests)
	}
	if !(r[0].ColdShare() > r[1].ColdShare() && r[1].ColdShare() > r[2].ColdShare()) {
		t.Errorf("cold: %g, %g, %g", r[0].ColdShare(), r[1].ColdShare(), r[2].ColdShare())
	}
	if !(r[0].MemorySeconds < r[1].MemorySeconds && r[1].MemorySeconds < r[2].MemorySeconds) {
		t.Errorf("memory: %g, %g, %g", r[0].MemorySeconds, r[1].MemorySeconds, r[2].MemorySeconds)
	}
	if r[2].Cold > 200 || r[2].Peak() < 200 || r[2].Peak() > 260 {
		t.Errorf("always on: %d cold requests, up to %g instances", r[2].Cold, r[2].Peak())
	}
	for _, x := range r {
		if x.Wait50 != 0 || x.Longest > time.Second {
			t.Errorf("%s: waits of %v and %v", x.Name, x.Wait50, x.Longest)
		}
	}
}

func TestRun_TheSameDayTwice(t *testing.T) {
	d := Generated(50, 200, 6*time.Hour, 7)
	v := Variant{"default", policy(5*time.Minute, 20*time.Minute, 0)}
	if a, b := run(t, d, v), run(t, d, v); !reflect.DeepEqual(a, b) {
		t.Errorf("got %+v and %+v", a[0], b[0])
	}
}

// chance is an app whose requests come by chance.
func chance(perSecond float64, span time.Duration) Day {
	return Day{Apps: 20, Span: span, Seed: 1, App: func(i int) Arrivals {
		rnd := rand.New(rand.NewPCG(9, uint64(i)))
		at := time.Duration(0)
		return func() (time.Duration, bool) {
			at += time.Duration(rnd.ExpFloat64() / perSecond * float64(time.Second))
			return at, at <= span
		}
	}}
}

// Where requests come by chance the formula and the simulation agree.
func TestRun_AgreesWithTheFormula(t *testing.T) {
	const perSecond = 1.0 / 60
	d := chance(perSecond, 48*time.Hour)
	h := homeostat.History{Start50: model.Start50, Start99: model.Start99}
	for i := range d.Apps {
		next := d.App(i)
		last := time.Duration(0)
		for at, ok := next(); ok; at, ok = next() {
			h.Gaps.Add(max(at-last-model.Service, 0))
			h.Requests++
			last = at
		}
		h.Span += d.Span
	}
	h.Busy = time.Duration(h.Requests) * model.Service
	for _, c := range []struct{ idle, lifetime time.Duration }{
		{10 * time.Second, 0}, {time.Minute, 0}, {5 * time.Minute, 0}, {5 * time.Minute, 20 * time.Minute}, {time.Hour, 5 * time.Minute},
	} {
		got := run(t, d, Variant{"", policy(c.idle, c.lifetime, 0)})[0]
		want := h.Expect(c.idle, c.lifetime, 0)
		awake := got.InstanceSeconds / h.Span.Seconds()
		if math.Abs(got.ColdShare()-want.Cold) > 0.05 || math.Abs(awake-want.Awake) > 0.07 {
			t.Errorf("idle %v, lifetime %v: simulated %.3f cold, %.3f awake; the formula says %.3f and %.3f", c.idle, c.lifetime, got.ColdShare(), awake, want.Cold, want.Awake)
		}
	}
}

func TestRun_LoadMakesSiblingsAndCalmEndsThem(t *testing.T) {
	// A hundred requests at once, each minute for ten minutes, one at a time
	// for each instance.
	d := Day{Apps: 1, Span: 30 * time.Minute, App: func(int) Arrivals {
		n := -1
		return func() (time.Duration, bool) { n++; return time.Duration(n/100) * time.Minute, n < 1000 }
	}}
	p := policy(5*time.Minute, 0, 0)
	p.Concurrency = 1
	r := run(t, d, Variant{"", p})[0]
	if r.Requests != 1000 || r.Instances[0] < 1 {
		t.Errorf("%d requests, %g instances in the first minute", r.Requests, r.Instances[0])
	}
	if got := r.Instances[20]; got != 0 {
		t.Errorf("%g instances ten minutes after the last request", got)
	}
	if r.Starts < 3 || r.Starts > 100 {
		t.Errorf("%d starts", r.Starts)
	}
}

func TestRun_CanBeEnded(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Run(ctx, Generated(1000, 100, time.Hour, 1), model, []Variant{{"", policy(time.Minute, 0, 0)}}, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

const lines = `blog.example.com:443 10.0.0.1 - - [10/Oct/2026:13:55:36 +0200] "GET / HTTP/1.1" 200 5 "-" "curl"
10.0.0.1 - frank [10/Oct/2026:13:55:36 +0200] "GET /a HTTP/1.0" 200 2326
not a line of a log
Shop.Example.com 10.0.0.2 - - [10/Oct/2026:11:55:35 +0000] "POST / HTTP/1.1" 302 0 "http://x/" "Mozilla/5.0 [en]"
blog.example.com 10.0.0.1 - - [10/Oct/2026:13:55:36 +0200] "GET / HTTP/1.1" 200 5
`

func TestReadLogs(t *testing.T) {
	dir := t.TempDir()
	plain, packed := filepath.Join(dir, "site.log"), filepath.Join(dir, "old.log.gz")
	if err := os.WriteFile(plain, []byte(lines+strings.Repeat("x", 3*maxLine)), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(packed)
	if err != nil {
		t.Fatal(err)
	}
	z := gzip.NewWriter(f)
	_, _ = z.Write([]byte(`10.0.0.1 - - [10/Oct/2026:13:56:36 +0200] "GET / HTTP/1.1" 200 1` + "\n"))
	if err := errors.Join(z.Close(), f.Close()); err != nil {
		t.Fatal(err)
	}
	l, err := ReadLogs(plain, packed)
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(l.Names, " "); got != "blog.example.com old shop.example.com site" {
		t.Errorf("apps %s", got)
	}
	if l.Lines != 7 || l.Bad != 2 || l.FirstBad != plain+":3" {
		t.Errorf("%d lines, %d bad, the first at %s", l.Lines, l.Bad, l.FirstBad)
	}
	d := l.Day(1)
	if d.Apps != 4 || d.Span != 2*time.Minute+time.Second {
		t.Errorf("%d apps, %v", d.Apps, d.Span)
	}
	next := d.App(0)
	first, _ := next()
	second, _ := next()
	if _, more := next(); first != time.Second || second != 1500*time.Millisecond || more {
		t.Errorf("requests at %v and %v", first, second)
	}
	if r := run(t, d, Variant{"", policy(time.Minute, 0, 0)}); r[0].Requests != 5 {
		t.Errorf("%d requests", r[0].Requests)
	}
	if _, err := ReadLogs(filepath.Join(dir, "none")); err == nil {
		t.Error("a file that is not there is read")
	}
	if err := os.WriteFile(plain, []byte("nothing\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadLogs(plain); err == nil || !strings.Contains(err.Error(), "none of the 1 lines") {
		t.Errorf("got %v", err)
	}
}

func FuzzParseLine(f *testing.F) {
	for line := range strings.Lines(lines) {
		f.Add([]byte(line))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		host, at, ok := parseLine(line)
		if ok && at.IsZero() && !strings.Contains(string(line), "0001") {
			t.Errorf("%q: ok without a time", line)
		}
		if strings.ContainsAny(host, " \t\n") {
			t.Errorf("%q: host %q", line, host)
		}
	})
}

func BenchmarkRun_OneApp(b *testing.B) {
	d := Generated(1, 1000, 24*time.Hour, 3)
	p := policy(5*time.Minute, 20*time.Minute, 0)
	b.ReportAllocs()
	for b.Loop() {
		one(d, model, p, 0)
	}
}
