package main

import (
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/fastcontainer/fastcontainer/internal/daemon"
)

func (c *cli) serveCommand() *cobra.Command {
	var file, endpoints string
	flags := daemon.Default()
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run the daemon on this machine",
		Long:  "Run the daemon on this machine. It needs root. Containers go on when it ends; the next daemon takes them over.",
		Args:  args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg := daemon.Default()
			if file != "" {
				var err error
				if cfg, err = daemon.Load(file); err != nil {
					return usageError{err}
				}
			}
			for name, set := range map[string]func(){
				"data": func() { cfg.Data = flags.Data }, "run": func() { cfg.Run = flags.Run },
				"http": func() { cfg.HTTP = flags.HTTP }, "https": func() { cfg.HTTPS = flags.HTTPS },
				"metrics": func() { cfg.Metrics = flags.Metrics }, "server-timing": func() { cfg.ServerTiming = flags.ServerTiming },
				"log-level": func() { cfg.Log.Level = flags.Log.Level }, "log-format": func() { cfg.Log.Format = flags.Log.Format },
				"node": func() { cfg.Node = flags.Node },
				"etcd": func() { cfg.Etcd.Endpoints = strings.Split(endpoints, ",") },
			} {
				if cmd.Flags().Changed(name) {
					set()
				}
			}
			if err := cfg.Validate(); err != nil {
				return usageError{err}
			}
			return daemon.Serve(cmd.Context(), cfg, version, c.logger(cfg.Log), func() {
				_, _ = fmt.Fprintf(c.stderr, "ready: requests on %s, management on unix://%s\n", addresses(cfg), filepath.Join(cfg.Run, "api.sock"))
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&file, "config", "", "configuration file (docs/configuration.md); flags win over it")
	f.StringVar(&flags.Data, "data", flags.Data, "directory of what must be kept")
	f.StringVar(&flags.Run, "run", flags.Run, "directory of what a reboot may lose")
	f.StringVar(&flags.HTTP, "http", flags.HTTP, "address for HTTP")
	f.StringVar(&flags.HTTPS, "https", flags.HTTPS, "address for HTTPS")
	f.StringVar(&flags.Metrics, "metrics", flags.Metrics, "address for Prometheus")
	f.StringVar(&endpoints, "etcd", "", "URLs of an etcd cluster, separated by commas (default: etcd inside the daemon)")
	f.StringVar(&flags.Node, "node", flags.Node, "name of this machine")
	f.BoolVar(&flags.ServerTiming, "server-timing", flags.ServerTiming, "tell clients the stages of a start that they waited for")
	f.StringVar(&flags.Log.Level, "log-level", flags.Log.Level, "debug, info, warn or error")
	f.StringVar(&flags.Log.Format, "log-format", flags.Log.Format, "text or json")
	return cmd
}

func addresses(c daemon.Config) string {
	var all []string
	for _, a := range []string{c.HTTP, c.HTTPS} {
		if a != "" {
			all = append(all, a)
		}
	}
	return strings.Join(all, " and ")
}

func (c *cli) logger(l daemon.LogConfig) *slog.Logger {
	var level slog.Level
	_ = level.UnmarshalText([]byte(l.Level)) // Validate knows the names
	opts := &slog.HandlerOptions{Level: level}
	if l.Format == "json" {
		return slog.New(slog.NewJSONHandler(c.stderr, opts))
	}
	return slog.New(slog.NewTextHandler(c.stderr, opts))
}
