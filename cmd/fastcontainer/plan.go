package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/fastcontainer/fastcontainer/internal/api"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

func (c *cli) planCommand() *cobra.Command {
	level := 99.0
	cmd := &cobra.Command{
		Use: "plan APP", Short: "Tell what service an app gets, and what another policy would mean", Args: args(cobra.ExactArgs(1)), ValidArgsFunction: c.appNames,
		Long: "Plan computes from the requests that an app had on this node since the daemon started how many of them meet a start, how long they wait for it\n" +
			"and how much memory that takes, now and under some other policies. docs/service-level.md has the formula, and where it departs from what happens.",
		RunE: func(cmd *cobra.Command, a []string) error {
			if !(level > 0 && level < 100) { //nolint:staticcheck // NaN is refused too
				return usageError{&fleet.Error{Op: "plan", Subject: a[0], Err: fmt.Errorf("--level %g is not between 0 and 100", level)}}
			}
			client, err := c.client()
			if err != nil {
				return err
			}
			p, err := client.Plan(cmd.Context(), fleet.AppName(a[0]), level/100)
			if err != nil {
				return err
			}
			if c.json() {
				return c.print(p)
			}
			return c.printPlan(p, level)
		},
	}
	cmd.Flags().Float64Var(&level, "level", level, "per cent of the requests that should meet no start")
	return cmd
}

func (c *cli) printPlan(p api.Plan, level float64) error {
	if p.Requests == 0 {
		c.say("%s had no request yet since the daemon started: there is nothing to plan from", p.App)
		return nil
	}
	c.say("%s: %d requests in %s; a start takes %.1f ms, at most %.1f ms\n", p.App, p.Requests, span(time.Duration(p.Seconds*float64(time.Second))), p.StartP50, p.StartP99)
	if p.Requests < 100 {
		c.say("(so few requests say little: ask again when there were more)")
	}
	rows := [][]string{planRow("now", p.Now)}
	for _, o := range p.Others {
		rows = append(rows, planRow("", o))
	}
	if err := c.table([]string{"", "IDLE", "LIFETIME", "MIN", "MEET A START", "WAIT P50", "WAIT P99", "STARTS A DAY", "MEMORY A DAY"}, rows); err != nil {
		return err
	}
	if p.Reach == "" {
		c.say("\n%g %% without a start: only scale.min 1 gives that", level)
	} else {
		c.say("\n%g %% without a start: idle %s", level, p.Reach)
	}
	return nil
}

func planRow(name string, l api.PlanLevel) []string {
	return []string{
		name, l.Idle, l.Lifetime, fmt.Sprint(l.Min), fmt.Sprintf("%.2f %%", 100*l.Cold), wait(l.WaitP50), wait(l.WaitP99), fmt.Sprintf("%.0f", l.Starts), memoryTime(l.MemorySeconds),
	}
}

func wait(ms float64) string {
	if ms == 0 {
		return "-"
	}
	return fmt.Sprintf("%.1f ms", ms)
}

// memoryTime is memory × time for people, in GiB hours.
func memoryTime(byteSeconds float64) string {
	return fmt.Sprintf("%.2f GiB h", byteSeconds/(1<<30)/3600)
}
