// Fastcontainer hosts web applications in containers that exist only as long
// as requests need them. See README.md.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// version is set by the build.
var version = "development"

func main() {
	os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// Exit codes.
const (
	exitDone     = 0
	exitFailed   = 1
	exitUsage    = 2
	exitNotFound = 3
)

// run is the whole program, without globals.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends us at once
	root := newRoot(&cli{stdin: stdin, stdout: stdout, stderr: stderr})
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	return report(stderr, err)
}

// exitCode is the exit code of a program that ran inside a container.
type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// usageError is a wrong command line.
type usageError struct{ err error }

func (u usageError) Error() string { return u.err.Error() }

func (u usageError) Unwrap() error { return u.err }

// report says what went wrong and what to do, and gives the exit code.
func report(w io.Writer, err error) int {
	if err == nil {
		return exitDone
	}
	if code, ok := errors.AsType[exitCode](err); ok {
		return int(code)
	}
	_, _ = fmt.Fprintf(w, "error: %s\n", strings.TrimSpace(err.Error()))
	hint := fleet.Hint(err)
	usage, wrong := errors.AsType[usageError](err)
	if wrong && hint == "" && usage.err != nil {
		hint = "fastcontainer help shows how"
	}
	if hint != "" {
		_, _ = fmt.Fprintf(w, "hint: %s\n", hint)
	}
	switch {
	case wrong:
		return exitUsage
	case errors.Is(err, fleet.ErrNotFound):
		return exitNotFound
	default:
		return exitFailed
	}
}

// newRoot is the tree of commands.
func newRoot(c *cli) *cobra.Command {
	root := &cobra.Command{
		Use:           "fastcontainer",
		Short:         "Host web applications in containers that live only while requests need them",
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.PersistentFlags().StringVar(&c.server, "server", "", "daemon to speak to (default $FASTCONTAINER_SERVER, else unix:///run/fastcontainer/api.sock)")
	root.PersistentFlags().StringVarP(&c.output, "output", "o", "table", "table or json")
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json"}, cobra.ShellCompDirectiveNoFileComp))
	root.PersistentPreRunE = func(*cobra.Command, []string) error { return c.check() }
	root.AddCommand(
		c.serveCommand(),
		c.deployCommand(), c.appsCommand(), c.psCommand(), c.inspectCommand(), c.logsCommand(), c.eventsCommand(),
		c.execCommand(), c.runCommand(), c.stopCommand(), c.startCommand(), c.deleteCommand(), c.rollbackCommand(),
		c.imageCommand(), c.topCommand(), c.planCommand(), c.simulateCommand(), c.doctorCommand(), c.versionCommand(),
	)
	return root
}

// args makes a check of the arguments whose failure is wrong usage.
func args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, a []string) error {
		if err := check(cmd, a); err != nil {
			return usageError{&fleet.Error{Op: cmd.CommandPath(), Err: err, Hint: "usage: " + cmd.UseLine()}}
		}
		return nil
	}
}
