package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/fastcontainer/fastcontainer/internal/api"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/image"
)

// cli is what all commands share.
type cli struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	server, output string
}

func (c *cli) check() error {
	if c.output != "table" && c.output != "json" {
		return usageError{fmt.Errorf("-o %s: use table or json", c.output)}
	}
	return nil
}

func (c *cli) json() bool { return c.output == "json" }

func (c *cli) client() (*api.Client, error) {
	server := c.server
	if server == "" {
		server = os.Getenv("FASTCONTAINER_SERVER")
	}
	if server == "" {
		server = api.DefaultServer
	}
	client, err := api.NewClient(server)
	if err != nil {
		return nil, usageError{err}
	}
	return client, nil
}

// print writes v as JSON, on one line for programs that read lines.
func (c *cli) print(v any) error { return json.NewEncoder(c.stdout).Encode(v) }

// table writes rows under a head, in columns.
func (c *cli) table(head []string, rows [][]string) error {
	w := tabwriter.NewWriter(c.stdout, 0, 0, 3, ' ', 0)
	_, _ = fmt.Fprintln(w, strings.Join(head, "\t"))
	for _, r := range rows {
		_, _ = fmt.Fprintln(w, strings.Join(r, "\t"))
	}
	return w.Flush()
}

// say tells a person what was done; programs that asked for JSON are not told.
func (c *cli) say(format string, a ...any) {
	if !c.json() {
		_, _ = fmt.Fprintf(c.stdout, format+"\n", a...)
	}
}

// progress draws pulls on standard error, where that is a terminal.
func (c *cli) progress() image.Progress {
	width, height := 0, 0
	if f, ok := c.stderr.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		if w, h, err := term.GetSize(int(f.Fd())); err == nil {
			width, height = w, h
		}
	}
	if c.json() {
		return nil
	}
	return image.NewBars(c.stderr, width, height)
}

// ago is a time for people.
func ago(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return span(time.Since(t)) + " ago"
}

// in is a time to come for people.
func in(t *time.Time) string {
	if t == nil {
		return "never"
	}
	if d := time.Until(*t); d > 0 {
		return "in " + span(d)
	}
	return "now"
}

func span(d time.Duration) string {
	switch {
	case d < 0:
		return "0s"
	case d < time.Minute:
		return d.Truncate(time.Second).String()
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", int(d.Minutes()), int(d.Seconds())%60)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	default:
		return fmt.Sprintf("%dd", int(d.Hours()/24))
	}
}

// size is an amount of bytes for people.
func size(n int64) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	case n >= 1<<10:
		return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
	default:
		return fmt.Sprintf("%d B", n)
	}
}

// appNames completes names of apps.
func (c *cli) appNames(cmd *cobra.Command, have []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(have) > 0 {
		return nil, cobra.ShellCompDirectiveDefault
	}
	client, err := c.client()
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	apps, err := client.Apps(cmd.Context())
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var names []string
	for _, a := range apps {
		names = append(names, string(a.Name))
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// short is the part of a revision's name that tells it from the app's others.
func short(id fleet.RevisionID) string {
	_, n, _ := strings.Cut(string(id), "@")
	return "@" + n
}
