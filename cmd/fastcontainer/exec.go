package main

import (
	"errors"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/fastcontainer/fastcontainer/internal/api"
	"github.com/fastcontainer/fastcontainer/internal/sandbox"
)

func (c *cli) execCommand() *cobra.Command {
	var req api.ExecRequest
	var tty bool
	cmd := &cobra.Command{
		Use: "exec APP|INSTANCE -- COMMAND...", Short: "Run a program inside an instance; ends with its exit code",
		Args: args(cobra.MinimumNArgs(2)), ValidArgsFunction: c.appNames,
		RunE: func(cmd *cobra.Command, a []string) error {
			client, err := c.client()
			if err != nil {
				return err
			}
			if req.Args = program(a[1:]); len(req.Args) == 0 {
				return usageError{errors.New("no program is given")}
			}
			return c.attached(tty, func(streams sandbox.Stdio) (int, error) {
				req.TTY = streams.TTY
				return client.Exec(cmd.Context(), a[0], req, streams)
			})
		},
	}
	cmd.Flags().SetInterspersed(false)
	cmd.Flags().BoolVarP(&tty, "tty", "t", false, "give it a terminal (default if this is one)")
	cmd.Flags().StringArrayVar(&req.Env, "env", nil, "KEY=VALUE instead of the container's variables")
	cmd.Flags().StringVar(&req.Dir, "workdir", "", "working directory")
	cmd.Flags().StringVar(&req.User, "user", "", "user")
	return cmd
}

func (c *cli) runCommand() *cobra.Command {
	var flags appFlags
	var tty bool
	cmd := &cobra.Command{
		Use: "run IMAGE [COMMAND...]", Short: "Run one program in a container of its own; ends with its exit code",
		Args: args(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			client, err := c.client()
			if err != nil {
				return err
			}
			flags.image = a[0]
			spec, err := flags.spec("run", program(a[1:]))
			if err != nil {
				return usageError{err}
			}
			spec.Lifetime, spec.Idle = 0, 0
			if _, err := client.Pull(cmd.Context(), spec.Image, c.progress()); err != nil {
				return err
			}
			return c.attached(tty, func(streams sandbox.Stdio) (int, error) {
				return client.Run(cmd.Context(), api.RunRequest{Spec: spec, TTY: streams.TTY}, streams)
			})
		},
	}
	cmd.Flags().SetInterspersed(false)
	cmd.Flags().BoolVarP(&tty, "tty", "t", false, "give it a terminal (default if this is one)")
	cmd.Flags().StringArrayVar(&flags.env, "env", nil, "KEY=VALUE")
	flags.limits(cmd)
	return cmd
}

// program is a command line without the "--" before it.
func program(a []string) []string {
	if len(a) > 0 && a[0] == "--" {
		return a[1:]
	}
	return a
}

// attached runs f with this program's own streams, as a raw terminal where
// they are one, and turns an exit code into ours.
func (c *cli) attached(tty bool, f func(sandbox.Stdio) (int, error)) error {
	streams := sandbox.Stdio{Stdin: c.stdin, Stdout: c.stdout, Stderr: c.stderr, TTY: tty}
	in, ok := c.stdin.(*os.File)
	out, ok2 := c.stdout.(*os.File)
	if ok && ok2 && term.IsTerminal(int(in.Fd())) && term.IsTerminal(int(out.Fd())) {
		streams.TTY = true
		old, err := term.MakeRaw(int(in.Fd()))
		if err == nil {
			defer func() { _ = term.Restore(int(in.Fd()), old) }()
		}
		sizes, stop := watchSize(out)
		defer stop()
		streams.Resize = sizes
	}
	code, err := f(streams)
	if err != nil {
		return err
	}
	if code != 0 {
		return exitCode(code)
	}
	return nil
}

// watchSize tells the size of a terminal, now and after each change.
func watchSize(f *os.File) (sizes <-chan sandbox.WindowSize, stop func()) {
	out, changed, done := make(chan sandbox.WindowSize, 1), make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(changed, syscall.SIGWINCH)
	changed <- syscall.SIGWINCH
	go func() {
		for {
			select {
			case <-done:
				return
			case <-changed:
			}
			w, h, err := term.GetSize(int(f.Fd()))
			if err != nil {
				continue
			}
			select {
			case out <- sandbox.WindowSize{Rows: uint16(h), Cols: uint16(w)}: //nolint:gosec // a terminal
			case <-done:
				return
			}
		}
	}()
	return out, func() { signal.Stop(changed); close(done) }
}
