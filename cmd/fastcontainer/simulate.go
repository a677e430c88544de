package main

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/homeostat"
	"github.com/fastcontainer/fastcontainer/internal/plot"
	"github.com/fastcontainer/fastcontainer/internal/simulate"
)

// simulation is what the flags of simulate say.
type simulation struct {
	apps        int
	perApp      float64
	span        time.Duration
	seed        uint64
	start       time.Duration
	start99     time.Duration
	service     time.Duration
	memory      string
	concurrency int
	policies    []string
	svg         string
}

func (c *cli) simulateCommand() *cobra.Command {
	s := simulation{}
	cmd := &cobra.Command{
		Use: "simulate [LOG...]", Short: "Replay access logs, or a generated day, under several policies", Args: args(cobra.ArbitraryArgs),
		Long: "Simulate replays requests through the decisions of the daemon, faster than real time: from access logs in the common or combined format (with or\n" +
			"without a host in front; gzip too), or for a generated day of visitors. It needs no daemon. docs/service-level.md tells what it leaves out.",
		Example: "  fastcontainer simulate --apps 10000 --svg day.svg\n  fastcontainer simulate /var/log/nginx/access.log* --policy idle=1m --policy idle=10m,lifetime=1h --policy min=1",
		RunE:    func(cmd *cobra.Command, files []string) error { return c.simulate(cmd, s, files) },
	}
	f := cmd.Flags()
	f.IntVar(&s.apps, "apps", 1000, "apps of a generated day")
	f.Float64Var(&s.perApp, "requests", 500, "requests of each app a day, as a mean")
	f.DurationVar(&s.span, "span", 24*time.Hour, "how long a generated day is")
	f.Uint64Var(&s.seed, "seed", 1, "of the chances: the same gives the same")
	f.DurationVar(&s.start, "start", 10*time.Millisecond, "how long half of the starts take at most")
	f.DurationVar(&s.start99, "start-p99", 0, "how long 99 % of them take at most (default 3 times --start)")
	f.DurationVar(&s.service, "service", 30*time.Millisecond, "mean time of a response")
	f.StringVar(&s.memory, "memory", "128Mi", "memory of an instance at rest")
	f.IntVar(&s.concurrency, "concurrency", 0, "most requests in flight per instance")
	f.StringArrayVar(&s.policies, "policy", nil, "a policy to try, as idle=5m,lifetime=20m,min=0,max=10; may be given again (default: some usual ones)")
	f.StringVar(&s.svg, "svg", "", "draw the result into this file")
	return cmd
}

func (c *cli) simulate(cmd *cobra.Command, s simulation, files []string) error {
	wrong := func(err error) error {
		return usageError{&fleet.Error{Op: "simulate", Err: err, Hint: "fastcontainer help simulate shows how"}}
	}
	memory, err := fleet.ParseBytes(s.memory)
	if err != nil {
		return wrong(fmt.Errorf("--memory: %w", err))
	}
	if s.apps < 1 || s.apps > 1_000_000 || s.perApp <= 0 || s.perApp > 1e8 || s.span <= 0 || s.start < 0 || s.service < 0 || s.concurrency < 0 {
		return wrong(fmt.Errorf("numbers must be more than 0, and --apps at most a million"))
	}
	if s.start99 == 0 {
		s.start99 = 3 * s.start
	}
	base := homeostat.Policy{
		Max: 10, Concurrency: s.concurrency, Idle: 5 * time.Minute, Lifetime: 20 * time.Minute,
		CPU: homeostat.Span[float64]{Rest: 1, Peak: 1}, Memory: homeostat.Span[int64]{Rest: int64(memory), Peak: int64(memory)},
	}
	if len(s.policies) == 0 {
		s.policies = []string{"idle=10s", "idle=1m", "idle=5m", "idle=30m", "min=1"}
	}
	var variants []simulate.Variant
	for _, text := range s.policies {
		p, err := parsePolicy(base, text)
		if err != nil {
			return wrong(fmt.Errorf("--policy %s: %w", text, err))
		}
		variants = append(variants, simulate.Variant{Name: text, Policy: p})
	}
	day := simulate.Generated(s.apps, s.perApp, s.span, s.seed)
	if len(files) > 0 {
		log, err := simulate.ReadLogs(files...)
		if err != nil {
			return &fleet.Error{Op: "simulate", Kind: fleet.ErrInvalid, Err: err}
		}
		if log.Bad > 0 {
			_, _ = fmt.Fprintf(c.stderr, "%d of %d lines are of no access log; the first is %s\n", log.Bad, log.Lines, log.FirstBad)
		}
		day = log.Day(s.seed)
	}
	began := time.Now()
	model := simulate.Model{Start50: s.start, Start99: s.start99, Service: s.service, CPU: 0.3}
	results, err := simulate.Run(cmd.Context(), day, model, variants, c.bar())
	if err != nil {
		return err
	}
	if s.svg != "" {
		if err := drawSimulation(s.svg, results); err != nil {
			return &fleet.Error{Op: "draw", Subject: s.svg, Err: err}
		}
	}
	if c.json() {
		return c.print(results)
	}
	rows := make([][]string, len(results))
	for i, r := range results {
		rows[i] = []string{
			r.Name, fmt.Sprint(r.Requests), fmt.Sprintf("%.2f %%", 100*r.ColdShare()), wait(millis(r.Wait50)), wait(millis(r.Wait99)), wait(millis(r.Longest)),
			fmt.Sprint(r.Starts), fmt.Sprintf("%.1f", r.InstanceSeconds/day.Span.Seconds()), fmt.Sprintf("%.0f", r.Peak()), memoryTime(r.MemorySeconds),
		}
	}
	if err := c.table([]string{"POLICY", "REQUESTS", "MEET A START", "WAIT P50", "WAIT P99", "LONGEST", "STARTS", "INSTANCES", "AT MOST", "MEMORY"}, rows); err != nil {
		return err
	}
	c.say("\n%d apps, %s, in %.1f s", day.Apps, span(day.Span), time.Since(began).Seconds())
	return nil
}

func millis(d time.Duration) float64 { return d.Seconds() * 1e3 }

// parsePolicy lays "key=value,..." over a policy.
func parsePolicy(p homeostat.Policy, text string) (homeostat.Policy, error) {
	for part := range strings.SplitSeq(text, ",") {
		key, value, _ := strings.Cut(part, "=")
		var d fleet.Duration
		var err error
		switch key = strings.TrimSpace(key); key {
		case "idle", "lifetime":
			if d, err = fleet.ParseDuration(value); err != nil {
				return p, err
			}
			if key == "idle" {
				p.Idle = d.Std()
			} else {
				p.Lifetime = d.Std()
			}
		case "min", "max":
			n := 0
			if _, err := fmt.Sscanf(value, "%d", &n); err != nil || n < 0 || n > 1000 {
				return p, fmt.Errorf("%s: %q is not a number from 0 to 1000", key, value)
			}
			if key == "min" {
				p.Min = n
			} else {
				p.Max = max(n, 1)
			}
		default:
			return p, fmt.Errorf("there is no %q: use idle, lifetime, min and max", key)
		}
	}
	if p.Max < p.Min {
		return p, fmt.Errorf("max %d is below min %d", p.Max, p.Min)
	}
	return p, nil
}

// bar shows on a terminal how far a long work is.
func (c *cli) bar() func(float64) {
	f, ok := c.stderr.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) || c.json() {
		return nil
	}
	var mu sync.Mutex
	last := time.Now()
	return func(share float64) {
		mu.Lock()
		defer mu.Unlock()
		if now := time.Now(); now.Sub(last) > 100*time.Millisecond {
			last = now
			_, _ = fmt.Fprintf(f, "\r%3.0f %%\r", 100*share)
		}
	}
}

// drawSimulation draws the instances over the day and what the policies cost.
func drawSimulation(file string, results []*simulate.Result) error {
	over := plot.Panel{Title: "Instances", YLabel: "mean of ten minutes"}
	cold := plot.Panel{Title: "Requests that meet a start", YLabel: "per minute"}
	for _, r := range results {
		x, y, z := []float64{}, []float64{}, []float64{}
		const width = 10
		for i := 0; i+width <= len(r.Instances); i += width {
			sum, met := 0.0, 0.0
			for j := i; j < i+width; j++ {
				sum += r.Instances[j]
				met += float64(r.ColdMinutes[j])
			}
			x, y, z = append(x, float64(i+width/2)/60), append(y, sum/width), append(z, met/width)
		}
		over.Series = append(over.Series, plot.Series{Name: r.Name, X: x, Y: y})
		cold.Series = append(cold.Series, plot.Series{Name: r.Name, X: x, Y: z})
	}
	svg, err := plot.Chart{XLabel: "hours", Panels: []plot.Panel{over, cold}}.SVG()
	if err != nil {
		return err
	}
	return os.WriteFile(file, svg, 0o644) //nolint:gosec // a picture
}
