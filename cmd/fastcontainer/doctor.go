package main

import (
	"strings"

	"github.com/spf13/cobra"

	"github.com/fastcontainer/fastcontainer/internal/daemon"
)

func (c *cli) doctorCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use: "doctor", Short: "Check whether this machine can run containers, and say what to type if not", Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg := daemon.Default()
			if file != "" {
				var err error
				if cfg, err = daemon.Load(file); err != nil {
					return usageError{err}
				}
			}
			checks := daemon.Diagnose(cmd.Context(), cfg)
			bad := 0
			for _, k := range checks {
				if k.Needed && !k.OK {
					bad++
				}
			}
			if c.json() {
				if err := c.print(checks); err != nil {
					return err
				}
			} else {
				for _, k := range checks {
					mark := "ok  "
					switch {
					case !k.OK && k.Needed:
						mark = "BAD "
					case !k.OK:
						mark = "note"
					}
					c.say("%s  %-18s %s", mark, k.Name, k.Found)
					if !k.OK && k.Hint != "" {
						c.say("%s%s", strings.Repeat(" ", 25), "→ "+k.Hint)
					}
				}
			}
			if bad > 0 {
				return exitCode(exitFailed)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&file, "config", "", "configuration file")
	return cmd
}
