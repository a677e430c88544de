package main

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/fastcontainer/fastcontainer/internal/api"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

func (c *cli) appsCommand() *cobra.Command {
	return &cobra.Command{
		Use: "apps", Short: "List the apps", Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := c.client()
			if err != nil {
				return err
			}
			apps, err := client.Apps(cmd.Context())
			if err != nil {
				return err
			}
			if c.json() {
				return c.print(apps)
			}
			rows := make([][]string, len(apps))
			for i, a := range apps {
				rows[i] = []string{string(a.Name), short(a.Revision), a.State, strconv.Itoa(a.Instances), strconv.Itoa(a.InFlight), strings.Join(a.Hosts, ","), a.Image, ago(a.UpdatedAt)}
			}
			return c.table([]string{"APP", "REVISION", "STATE", "INSTANCES", "IN FLIGHT", "HOSTS", "IMAGE", "DEPLOYED"}, rows)
		},
	}
}

func (c *cli) psCommand() *cobra.Command {
	return &cobra.Command{
		Use: "ps [APP]", Short: "List the instances", Args: args(cobra.MaximumNArgs(1)), ValidArgsFunction: c.appNames,
		RunE: func(cmd *cobra.Command, a []string) error {
			client, err := c.client()
			if err != nil {
				return err
			}
			app := ""
			if len(a) > 0 {
				app = a[0]
			}
			list, err := client.Instances(cmd.Context(), fleet.AppName(app))
			if err != nil {
				return err
			}
			if c.json() {
				return c.print(list)
			}
			return c.table(psHead, psRows(list))
		},
	}
}

var psHead = []string{"INSTANCE", "REVISION", "STATE", "KIND", "PID", "ADDRESS", "IN FLIGHT", "CPU", "MEMORY", "ENDS"}

func psRows(list []api.Instance) [][]string {
	rows := make([][]string, len(list))
	for i, n := range list {
		rows[i] = []string{
			string(n.ID), short(n.Revision), string(n.State), string(n.Kind), strconv.Itoa(n.PID), n.Address, strconv.Itoa(n.InFlight),
			fmt.Sprintf("%.2f/%g", n.CPU.Used, n.CPU.Limit), size(n.Memory.Used) + "/" + size(n.Memory.Limit), in(n.ExpiresAt),
		}
	}
	return rows
}

func (c *cli) inspectCommand() *cobra.Command {
	return &cobra.Command{
		Use: "inspect APP", Short: "Show everything about an app", Args: args(cobra.ExactArgs(1)), ValidArgsFunction: c.appNames,
		RunE: func(cmd *cobra.Command, a []string) error {
			client, err := c.client()
			if err != nil {
				return err
			}
			d, err := client.App(cmd.Context(), fleet.AppName(a[0]))
			if err != nil {
				return err
			}
			if c.json() {
				return c.print(d)
			}
			return c.printApp(d)
		},
	}
}

func (c *cli) printApp(d api.AppDetail) error {
	r := d.Spec.Resources
	for _, l := range [][2]string{
		{"app", string(d.Name)}, {"state", d.State}, {"revision", string(d.Revision)}, {"image", d.Image + " (" + d.Digest.Short() + ")"},
		{"hosts", strings.Join(d.Hosts, ", ")}, {"port", strconv.Itoa(d.Spec.Port)},
		{"lifetime", d.Spec.Lifetime.String()}, {"idle", d.Spec.Idle.String()}, {"drain", d.Spec.Drain.String()},
		{"scale", fmt.Sprintf("%d to %d instances", d.Spec.Scale.Min, d.Spec.Scale.Max)},
		{"cpu", fmt.Sprintf("%g to %g cores", r.CPU.Rest, r.CPU.Peak)}, {"memory", fmt.Sprintf("%s to %s", r.Memory.Rest, r.Memory.Peak)},
		{"isolation", string(d.Spec.Isolation.Runtime)}, {"in flight", strconv.Itoa(d.InFlight)}, {"waiting", strconv.Itoa(d.Waiting)},
		{"last error", d.LastError},
	} {
		if l[1] != "" {
			c.say("%-11s %s", l[0], l[1])
		}
	}
	c.say("")
	rows := make([][]string, len(d.Revisions))
	for i, v := range d.Revisions {
		mark := ""
		switch v.ID {
		case d.Revision:
			mark = "current"
		case d.Previous:
			mark = "previous"
		}
		rows[i] = []string{string(v.ID), v.Image, v.Digest.Short(), v.Cause, ago(v.CreatedAt), mark}
	}
	if err := c.table([]string{"REVISION", "IMAGE", "DIGEST", "CAUSE", "MADE", ""}, rows); err != nil {
		return err
	}
	c.say("")
	starts := make([][]string, len(d.Starts))
	for i, v := range d.Starts {
		starts[i] = []string{string(v.Kind), strconv.Itoa(v.Count), "", "", "", "", ""}
		if v.Count > 0 {
			starts[i][2], starts[i][3] = wait(float64(v.UsualUS)/1e3), wait(float64(v.LongestUS)/1e3)
		}
		if v.Memory > 0 {
			starts[i][4] = size(v.Memory)
		}
		if v.Disk > 0 {
			starts[i][5] = size(v.Disk)
		}
		if v.Next {
			starts[i][6] = "next"
		}
	}
	if err := c.table([]string{"START", "COUNT", "USUAL", "LONGEST", "MEMORY", "DISK", ""}, starts); err != nil {
		return err
	}
	c.say("")
	if err := c.table(psHead, psRows(d.Running)); err != nil {
		return err
	}
	c.say("")
	for _, e := range d.Events {
		c.printEvent(e)
	}
	return nil
}

// change is a command that does one thing to one app.
func (c *cli) change(use, about, done string, f func(cmd *cobra.Command, client *api.Client, app fleet.AppName) error) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: about, Args: args(cobra.ExactArgs(1)), ValidArgsFunction: c.appNames,
		RunE: func(cmd *cobra.Command, a []string) error {
			client, err := c.client()
			if err != nil {
				return err
			}
			if err := f(cmd, client, fleet.AppName(a[0])); err != nil {
				return err
			}
			c.say("%s %s", a[0], done)
			return nil
		},
	}
}

func (c *cli) stopCommand() *cobra.Command {
	return c.change("stop APP", "End an app's instances and answer 503 until it is started or deployed", "is stopped",
		func(cmd *cobra.Command, client *api.Client, app fleet.AppName) error {
			return client.SetStopped(cmd.Context(), app, true)
		})
}

func (c *cli) startCommand() *cobra.Command {
	return c.change("start APP", "Let requests wake a stopped app again", "may be woken again",
		func(cmd *cobra.Command, client *api.Client, app fleet.AppName) error {
			return client.SetStopped(cmd.Context(), app, false)
		})
}

func (c *cli) deleteCommand() *cobra.Command {
	volumes := false
	cmd := c.change("delete APP", "Delete an app; its volumes are kept unless --volumes is given", "is deleted",
		func(cmd *cobra.Command, client *api.Client, app fleet.AppName) error {
			return client.Delete(cmd.Context(), app, volumes)
		})
	cmd.Flags().BoolVar(&volumes, "volumes", false, "delete its volumes, too")
	return cmd
}

func (c *cli) rollbackCommand() *cobra.Command {
	var rev fleet.Revision
	cmd := c.change("rollback APP", "Make the previous revision current again", "is rolled back",
		func(cmd *cobra.Command, client *api.Client, app fleet.AppName) (err error) {
			rev, err = client.Rollback(cmd.Context(), app)
			if err == nil && c.json() {
				return c.print(rev)
			}
			return err
		})
	return cmd
}
