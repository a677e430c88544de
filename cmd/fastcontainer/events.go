package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/fastcontainer/fastcontainer/internal/events"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

func (c *cli) eventsCommand() *cobra.Command {
	follow, last := false, 100
	cmd := &cobra.Command{
		Use: "events [-f] [APP]", Short: "Show what happened, and why", Args: args(cobra.MaximumNArgs(1)), ValidArgsFunction: c.appNames,
		RunE: func(cmd *cobra.Command, a []string) error {
			client, err := c.client()
			if err != nil {
				return err
			}
			app := ""
			if len(a) > 0 {
				app = a[0]
			}
			err = client.Events(cmd.Context(), fleet.AppName(app), events.From{Last: last}, follow, func(e fleet.Event) error {
				if c.json() {
					return c.print(e)
				}
				c.printEvent(e)
				return nil
			})
			return unlessEnough(cmd.Context(), err)
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "wait for more")
	cmd.Flags().IntVarP(&last, "last", "n", last, "how many of the past")
	return cmd
}

func (c *cli) printEvent(e fleet.Event) {
	who := string(e.Instance)
	if who == "" {
		who = string(e.Revision)
	}
	if who == "" {
		who = string(e.App)
	}
	line := fmt.Sprintf("%s  %-7s %-20s %s", e.Time.Local().Format("15:04:05.000"), e.Type, who, e.Cause)
	if e.Detail != "" {
		line += ": " + e.Detail
	}
	c.say("%s", line)
	if e.Stages != nil {
		var parts []string
		for _, s := range e.Stages.List() {
			parts = append(parts, fmt.Sprintf("%s %.1f", s.Name, float64(s.Took.Microseconds())/1000))
		}
		c.say("%14s%s (ms)", "", strings.Join(parts, ", "))
	}
	for _, l := range e.Log {
		c.say("%14s| %s", "", printable(l))
	}
}

// printable keeps a container's output from moving the terminal's cursor.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' && r != '\t' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return '·'
		}
		return r
	}, s)
}

func (c *cli) logsCommand() *cobra.Command {
	follow, lines := false, 100
	cmd := &cobra.Command{
		Use: "logs [-f] APP|INSTANCE", Short: "Show what an app wrote", Args: args(cobra.ExactArgs(1)), ValidArgsFunction: c.appNames,
		RunE: func(cmd *cobra.Command, a []string) error {
			client, err := c.client()
			if err != nil {
				return err
			}
			err = client.Logs(cmd.Context(), a[0], lines, follow, c.stdout)
			return unlessEnough(cmd.Context(), err)
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "wait for more")
	cmd.Flags().IntVarP(&lines, "lines", "n", lines, "how many of the past")
	return cmd
}

// unlessEnough drops the error of a stream that the user has seen enough of.
func unlessEnough(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		err = nil
	}
	return err
}
