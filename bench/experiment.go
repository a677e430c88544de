package main

import (
	"bytes"
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/fastcontainer/fastcontainer/bench/load"
	"github.com/fastcontainer/fastcontainer/internal/appfile"
	"github.com/fastcontainer/fastcontainer/internal/e2e/realapps"
	"github.com/fastcontainer/fastcontainer/internal/events"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/plot"
)

// experiment is one document of docs/experiments: what was done, what came
// out, pictures and data.
type experiment struct {
	name, title string
	run         func(*bench, *report) error
}

var experiments = []experiment{
	{"scale-out", "Scale-out: siblings for an app that a third of a core does not serve", scaleOut},
	{"scale-up", "Scale-up: the limit of one instance moves", scaleUp},
	{"saturation", "From saturation to help, in milliseconds", saturation},
	{"step", "From nothing to 3,000 requests a second in one step", step},
	{"circulation", "Circulation: instances that live for one second", circulation},
	{"deploy", "A deploy and a rollback under 1,000 requests a second", deploys},
	{"neighbour", "The noisy neighbour", neighbour},
	{"autophagy", "Autophagy: a machine filled to twice its memory", autophagy},
}

// report is the document of one experiment while it is written.
type report struct {
	name string
	text bytes.Buffer
	// pictures and data, by the names of their files.
	files map[string][]byte
	// figures are the lines of the index.
	figures []string
}

func (r *report) say(format string, a ...any) { fmt.Fprintf(&r.text, format+"\n", a...) }

// figure is what an issue or a paper asked for, as it came out.
func (r *report) figure(what, got string) {
	r.figures = append(r.figures, fmt.Sprintf("| [%s](%s.md) | %s | %s |", r.name, r.name, what, got))
}

// draw adds a picture and the data of its first panel's x axis.
func (r *report) draw(name, title string, c plot.Chart) error {
	svg, err := c.SVG()
	if err != nil {
		return err
	}
	file := r.name
	if name != "" {
		file += "-" + name
	}
	r.files[file+".svg"] = svg
	r.files[file+".csv"] = table(c)
	r.say("![%s](%s.svg)\n\nData: [%s.csv](%s.csv)\n", title, file, file, file)
	return nil
}

// table is the data of a chart as CSV: one column for each series.
func table(c plot.Chart) []byte {
	var out bytes.Buffer
	w := csv.NewWriter(&out)
	_ = w.Write([]string{"series", "x", "y"})
	for _, p := range c.Panels {
		for _, s := range p.Series {
			for i := range s.X {
				_ = w.Write([]string{strings.TrimSpace(p.Title + " " + s.Name), strconv.FormatFloat(s.X[i], 'g', 5, 64), strconv.FormatFloat(s.Y[i], 'g', 5, 64)})
			}
		}
	}
	w.Flush()
	return out.Bytes()
}

// experiment runs them and writes docs/experiments.
func (b *bench) experiment(only, dir string) error {
	build := exec.CommandContext(b.ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", b.root+"/worker", "./bench/worker")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build worker: %w\n%s", err, out)
	}
	var index []string
	for _, e := range experiments {
		if only != "" && !slices.Contains(strings.Split(only, ","), e.name) {
			index = append(index, kept(filepath.Join(dir, "README.md"), e.name)...)
			continue
		}
		began := time.Now()
		log.Printf("%s...", e.name)
		r := &report{name: e.name, files: map[string][]byte{}}
		r.say("# %s\n", e.title)
		if err := e.run(b, r); err != nil {
			return fmt.Errorf("%s: %w", e.name, err)
		}
		log.Printf("%s took %s", e.name, time.Since(began).Truncate(time.Second))
		index = append(index, r.figures...)
		r.files[e.name+".md"] = r.text.Bytes()
		if dir == "" || b.quick {
			fmt.Print(r.text.String())
			continue
		}
		for name, content := range r.files {
			if err := os.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil { //nolint:gosec // a document
				return err
			}
		}
	}
	b.out.Reset()
	b.head()
	doc := strings.NewReplacer("# Benchmarks", "# Experiments", "`make bench` beside its peers in the same run", "`make experiments`, all in one run on one machine that also made the load").Replace(b.out.String())
	doc += "| experiment | wanted | measured |\n|---|---|---|\n" + strings.Join(index, "\n") + "\n"
	if b.quick || dir == "" {
		fmt.Print(doc)
		return nil
	}
	return os.WriteFile(filepath.Join(dir, "README.md"), []byte(doc), 0o644) //nolint:gosec // a document
}

// kept are the lines of an experiment that was not made again.
func kept(file, name string) []string {
	old, err := os.ReadFile(file) //nolint:gosec // a document of ours
	if err != nil {
		return nil
	}
	var lines []string
	for line := range strings.Lines(string(old)) {
		if strings.HasPrefix(line, "| ["+name+"]") {
			lines = append(lines, strings.TrimRight(line, "\n"))
		}
	}
	return lines
}

// worker deploys an app of the worker.
func (n *node) worker(name string, change func(*fleet.Spec)) error {
	return n.deploy(n.b.ctx, name, func(s *fleet.Spec) {
		s.Command = []string{"/worker"}
		if change != nil {
			change(s)
		}
	})
}

func (n *node) target(name, path string) load.Target {
	return load.Target{Addr: n.http, Host: name + ".localhost", Path: path}
}

// clients are what a process of its own does: either so many of them, one
// request after another each, or so many requests a second.
type clients struct {
	Target load.Target
	Count  int
	Rate   float64
	Span   time.Duration
}

// clientsOrder is the variable in which such a process finds it.
const clientsOrder = "BENCH_CLIENTS"

// beClients does it, and prints what came back.
func beClients(order string) error {
	var c clients
	if err := json.Unmarshal([]byte(order), &c); err != nil {
		return err
	}
	var run *load.Run
	if c.Rate > 0 {
		run = load.Open(context.Background(), c.Target, c.Rate, c.Span)
	} else {
		run = load.Closed(context.Background(), c.Target, c.Count, c.Span, 0)
	}
	return json.NewEncoder(os.Stdout).Encode(run)
}

// clients are on other machines as a rule. Who floods takes what all others
// leave of the processors here (nice 19), and who measures waits for nobody
// (nice -20): what is measured is then the node.
func (b *bench) clients(c clients, nice int) (*load.Run, error) {
	order, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(b.ctx, "nice", "-n", strconv.Itoa(nice), self) //nolint:gosec // this program
	cmd.Env = append(os.Environ(), clientsOrder+"="+string(order))
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("clients: %w", err)
	}
	var run load.Run
	return &run, json.Unmarshal(out, &run)
}

// once asks an app one time, so that it is awake.
func (n *node) once(name string) error {
	_, err := get(n.http, name+".localhost")
	return err
}

// watch samples an app's instances until stop.
type watch struct {
	began time.Time
	mu    sync.Mutex
	at    []float64
	ready []float64
	limit []float64 // cores of all
	used  []float64 // cores of all
	mem   []float64 // MiB of all
}

func (n *node) watch(app fleet.AppName, began time.Time) (w *watch, stop func()) {
	w = &watch{began: began}
	ctx, cancel := context.WithCancel(n.b.ctx)
	var wg sync.WaitGroup
	last, lastAt := map[fleet.InstanceID]float64{}, time.Now()
	wg.Go(func() {
		for ticker := time.NewTicker(200 * time.Millisecond); ; {
			list, err := n.client.Instances(ctx, app)
			now := time.Now()
			if err == nil {
				var ready, limit, used, mem float64
				for _, i := range list {
					if i.State != fleet.StateReady {
						continue
					}
					ready++
					limit += i.CPU.Limit
					mem += float64(i.Memory.Used) / (1 << 20)
					if before, ok := last[i.ID]; ok {
						used += max(i.CPUSeconds-before, 0) / now.Sub(lastAt).Seconds()
					}
					last[i.ID] = i.CPUSeconds
				}
				lastAt = now
				w.mu.Lock()
				w.at = append(w.at, now.Sub(w.began).Seconds())
				w.ready, w.limit, w.used, w.mem = append(w.ready, ready), append(w.limit, limit), append(w.used, used), append(w.mem, mem)
				w.mu.Unlock()
			}
			select {
			case <-ctx.Done():
				return
			case <-ticker.C:
			}
		}
	})
	return w, func() { cancel(); wg.Wait() }
}

// most instances that were seen.
func (w *watch) most() int { return int(slices.Max(append([]float64{0}, w.ready...))) }

// latency and rate of a run, as panels.
func panels(r *load.Run, width time.Duration) []plot.Panel {
	var x, rate, p50, p95, p99 []float64
	for _, b := range r.Buckets(width) {
		x = append(x, b.At.Seconds())
		rate = append(rate, b.Rate)
		p50, p95, p99 = append(p50, millis(b.P50)), append(p95, millis(b.P95)), append(p99, millis(b.P99))
	}
	return []plot.Panel{
		{Title: "Answers per second", YLabel: "1/s", Series: []plot.Series{{X: x, Y: rate}}},
		{Title: "Time of the answers", YLabel: "ms", Log: true, Series: []plot.Series{{Name: "p50", X: x, Y: p50}, {Name: "p95", X: x, Y: p95}, {Name: "p99", X: x, Y: p99}}},
	}
}

func (w *watch) panels() []plot.Panel {
	return []plot.Panel{{Title: "Instances and their cores", Series: []plot.Series{
		{Name: "ready instances", X: w.at, Y: w.ready, Step: true}, {Name: "limit of all, cores", X: w.at, Y: w.limit, Step: true}, {Name: "used by all, cores", X: w.at, Y: w.used},
	}}}
}

func short(d time.Duration) string {
	switch {
	case d >= 10*time.Second:
		return fmt.Sprintf("%.0f s", d.Seconds())
	case d >= time.Second:
		return fmt.Sprintf("%.1f s", d.Seconds())
	case d >= 10*time.Millisecond:
		return fmt.Sprintf("%.0f ms", millis(d))
	default:
		return fmt.Sprintf("%.1f ms", millis(d))
	}
}

func failed(r *load.Run) string {
	f := r.Failed()
	if len(f) == 0 {
		return "0"
	}
	sum, kinds := 0, []string{}
	for what, n := range f {
		sum += n
		kinds = append(kinds, fmt.Sprintf("%d × %s", n, what))
	}
	slices.Sort(kinds)
	return fmt.Sprintf("%d (%s)", sum, strings.Join(kinds, ", "))
}

// served tells from when on a run was served well: the first second from which
// the p95 of every further one stays within one and a half times that of the
// last quarter.
func served(r *load.Run, span time.Duration) (time.Duration, time.Duration) {
	steady := r.Between(span*3/4, span).Quantile(.95)
	from := time.Duration(0)
	for _, b := range r.Buckets(time.Second) {
		if b.At > span {
			break
		}
		if b.P95 > steady*3/2 || b.P95 == 0 {
			from = b.At + 500*time.Millisecond
		}
	}
	return from, steady
}

// counts of an app's events by type and cause.
func (n *node) counts(app fleet.AppName) (map[string]int, error) {
	c := map[string]int{}
	err := n.client.Events(n.b.ctx, app, events.From{Last: 100000}, false, func(e fleet.Event) error {
		c[string(e.Type)+": "+e.Cause]++
		return nil
	})
	return c, err
}

func list(c map[string]int, types ...string) string {
	var out []string
	for what, n := range c {
		for _, t := range types {
			if strings.HasPrefix(what, t+":") {
				out = append(out, fmt.Sprintf("%d × %s", n, what))
			}
		}
	}
	slices.Sort(out)
	return strings.Join(out, "; ")
}

// php deploys Apache with PHP, whose page costs some milliseconds.
func (n *node) php(name string, change func(*fleet.Spec)) error {
	tar, err := realapps.Debian(n.b.ctx, ".cache/rootfs")
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(n.b.dir, "php")
	if err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o755); err != nil { //nolint:gosec // other users of the container read it
		return err
	}
	for file, text := range map[string]string{
		"www/index.php": "<?php for ($i = 0, $s = ''; $i < 20000; $i++) { $s = md5($s . $i); } echo $s;",
		"ports.conf":    "Listen 8080\n",
		"site.conf":     "ServerName localhost\n<VirtualHost *:8080>\nDocumentRoot /var/www/html\nErrorLog /dev/stderr\n</VirtualHost>\n",
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, file)), 0o755); err != nil { //nolint:gosec // the same
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o644); err != nil { //nolint:gosec // the same
			return err
		}
	}
	s := appfile.Default(name)
	s.Image, s.Port = "tar:"+tar, 8080
	s.Command = []string{"sh", "-c", "mkdir -p /run/apache2 /run/lock && . /etc/apache2/envvars && exec apache2 -DFOREGROUND"}
	s.Volumes = []fleet.Volume{
		{Bind: dir + "/ports.conf", Mount: "/etc/apache2/ports.conf", Readonly: true},
		{Bind: dir + "/site.conf", Mount: "/etc/apache2/sites-enabled/000-default.conf", Readonly: true},
		{Bind: dir + "/www", Mount: "/var/www/html", Readonly: true},
	}
	s.Resources.Memory.Rest = 512 << 20
	change(&s)
	appfile.Complete(&s)
	if _, err = n.client.Deploy(n.b.ctx, s, nil); err != nil {
		return err
	}
	if run := load.Closed(n.b.ctx, n.target(name, "/"), 1, time.Minute, 1); len(run.Failed()) > 0 {
		return fmt.Errorf("the page of PHP: %v", run.Failed())
	}
	return nil
}

var errSlow = errors.New("it does not come to rest")

// until waits for something, at most so long.
func until(limit time.Duration, f func() bool) error {
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if f() {
			return nil
		}
	}
	return errSlow
}

func millis(d time.Duration) float64 { return d.Seconds() * 1e3 }
