package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"runtime"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/fastcontainer/fastcontainer/internal/api"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

func (c *cli) topCommand() *cobra.Command {
	every := 2 * time.Second
	cmd := &cobra.Command{
		Use: "top", Short: "Show which instances use most, again and again", Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := c.client()
			if err != nil {
				return err
			}
			out, ok := c.stdout.(*os.File)
			screen := ok && term.IsTerminal(int(out.Fd())) && !c.json()
			before := map[fleet.InstanceID]api.Instance{}
			last := time.Now()
			for {
				if before, err = c.topOnce(cmd.Context(), client, before, time.Since(last), screen); err != nil {
					return err
				}
				last = time.Now()
				if !screen { // for a program, or a file: once
					return nil
				}
				select {
				case <-cmd.Context().Done():
					return nil
				case <-time.After(every):
				}
			}
		},
	}
	cmd.Flags().DurationVar(&every, "every", every, "how often")
	return cmd
}

func (c *cli) topOnce(ctx context.Context, client *api.Client, before map[fleet.InstanceID]api.Instance, since time.Duration, screen bool) (map[fleet.InstanceID]api.Instance, error) {
	node, err := client.Node(ctx)
	if err != nil {
		return nil, err
	}
	list, err := client.Instances(ctx, "")
	if err != nil {
		return nil, err
	}
	now := map[fleet.InstanceID]api.Instance{}
	for i, n := range list {
		now[n.ID] = n
		if old, ok := before[n.ID]; ok { // what it uses now, not on average
			list[i].CPU.Used = (n.CPUSeconds - old.CPUSeconds) / since.Seconds()
		}
	}
	slices.SortStableFunc(list, func(a, b api.Instance) int {
		return cmp.Or(cmp.Compare(b.CPU.Used, a.CPU.Used), cmp.Compare(b.Memory.Used, a.Memory.Used))
	})
	if c.json() {
		return now, c.print(map[string]any{"node": node, "instances": list})
	}
	if screen {
		_, _ = fmt.Fprint(c.stdout, "\x1b[H\x1b[2J")
	}
	c.say("%s: %d apps, %d instances, %g cores, %s; up %s", node.Name, node.Apps, node.Instances, node.CPUs, size(node.Memory), span(time.Since(node.StartedAt)))
	if node.Store != "" {
		c.say("the store is away: %s", node.Store)
	}
	c.say("")
	return now, c.table(psHead, psRows(list))
}

func (c *cli) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Show the versions of this program and of the daemon", Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := c.client()
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), 2*time.Second)
			defer cancel()
			server, err := client.Version(ctx)
			if c.json() {
				return c.print(map[string]any{"client": api.Version{Version: version, Go: runtime.Version()}, "server": server})
			}
			c.say("client  %s (%s)", version, runtime.Version())
			if err != nil {
				c.say("server  not running")
				return nil
			}
			c.say("server  %s (%s)", server.Version, server.Go)
			return nil
		},
	}
}
