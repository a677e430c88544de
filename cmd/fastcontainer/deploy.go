package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/fastcontainer/fastcontainer/internal/appfile"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// appFlags are the parts of an app that flags can say.
type appFlags struct {
	image, runtime, cpu, memory string
	hosts, env                  []string
	port                        int
	lifetime, idle, start       string
}

func (a *appFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&a.image, "image", "", "image to run: a registry reference, oci:DIR, tar:FILE or dir:ROOTFS")
	f.StringArrayVar(&a.hosts, "host", nil, "host name whose requests belong to the app (default NAME.localhost)")
	f.IntVar(&a.port, "port", 0, "port where the app listens (default: the image's only exposed port, else 8080)")
	f.StringArrayVar(&a.env, "env", nil, "KEY=VALUE")
	f.StringVar(&a.lifetime, "lifetime", "", "how long an instance lives, such as 20m")
	f.StringVar(&a.idle, "idle", "", "freeze or end an instance this long after its last request, such as 5m")
	f.StringVar(&a.start, "start", "", "auto, cold, standby or checkpoint")
	a.limits(cmd)
}

func (a *appFlags) limits(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&a.cpu, "cpu", "", "cores at rest, such as 0.5")
	f.StringVar(&a.memory, "memory", "", "memory at rest, such as 256Mi")
	f.StringVar(&a.runtime, "runtime", "", "native, crun, runc or runsc")
}

// spec is the app that the flags describe.
func (a *appFlags) spec(name string, command []string) (fleet.Spec, error) {
	s := appfile.Default(name)
	s.Hosts, s.Port, s.Command = a.hosts, a.port, command
	s.Image = absolute(a.image)
	var errs []error
	for _, kv := range a.env {
		k, v, ok := strings.Cut(kv, "=")
		if !ok || k == "" {
			errs = append(errs, fmt.Errorf("--env %q: write it as KEY=VALUE", kv))
			continue
		}
		if s.Env == nil {
			s.Env = map[string]string{}
		}
		s.Env[k] = v
	}
	for _, d := range []struct {
		flag, value string
		to          *fleet.Duration
	}{{"lifetime", a.lifetime, &s.Lifetime}, {"idle", a.idle, &s.Idle}} {
		if d.value == "" {
			continue
		}
		v, err := fleet.ParseDuration(d.value)
		if err != nil {
			errs = append(errs, fmt.Errorf("--%s: %w", d.flag, err))
		}
		*d.to = v
	}
	if a.memory != "" {
		v, err := fleet.ParseBytes(a.memory)
		if err != nil {
			errs = append(errs, fmt.Errorf("--memory: %w", err))
		}
		s.Resources.Memory.Rest = v
	}
	if a.cpu != "" {
		if _, err := fmt.Sscan(a.cpu, &s.Resources.CPU.Rest); err != nil {
			errs = append(errs, fmt.Errorf("--cpu %q: write cores, such as 0.5", a.cpu))
		}
	}
	if a.start != "" {
		s.Start = fleet.StartPolicy(a.start)
	}
	if a.runtime != "" {
		s.Isolation.Runtime = fleet.Runtime(a.runtime)
	}
	if len(errs) > 0 {
		return s, errors.Join(errs...)
	}
	appfile.Complete(&s)
	return s, appfile.Validate(&s)
}

// absolute makes the path of a local image one that the daemon finds.
func absolute(ref string) string {
	scheme, path, ok := strings.Cut(ref, ":")
	if !ok || !slices.Contains([]string{"oci", "tar", "dir"}, scheme) {
		return ref
	}
	if abs, err := filepath.Abs(path); err == nil {
		return scheme + ":" + abs
	}
	return ref
}

func (c *cli) deployCommand() *cobra.Command {
	var flags appFlags
	var files []string
	cmd := &cobra.Command{
		Use:   "deploy -f FILE... | NAME --image REF [flags] [-- COMMAND...]",
		Short: "Make a revision of an app; returns when requests reach it",
		Example: `  fastcontainer deploy -f app.yaml
  fastcontainer deploy blog --image docker.io/library/nginx:1 --host blog.example.com
  fastcontainer deploy hello --image oci:./hello --port 8080`,
		RunE: func(cmd *cobra.Command, a []string) error {
			specs, err := c.specs(cmd, flags, files, a)
			if err != nil {
				return usageError{err}
			}
			client, err := c.client()
			if err != nil {
				return err
			}
			var errs []error
			for _, s := range specs {
				rev, err := client.Deploy(cmd.Context(), s, c.progress())
				if err != nil {
					errs = append(errs, err)
					continue
				}
				if c.json() {
					err = c.print(rev)
				} else {
					c.say("%s is deployed: image %s, hosts %s", rev.ID, rev.Image.Short(), strings.Join(rev.Spec.Hosts, ", "))
				}
				errs = append(errs, err)
			}
			return errors.Join(errs...)
		},
	}
	flags.add(cmd)
	cmd.Flags().StringArrayVarP(&files, "file", "f", nil, "app file (docs/app-file.md)")
	return cmd
}

// specs are the apps of a deploy's command line.
func (c *cli) specs(cmd *cobra.Command, flags appFlags, files, a []string) ([]fleet.Spec, error) {
	if len(files) > 0 {
		if len(a) > 0 || flags.image != "" {
			return nil, errors.New("give either app files with -f, or a name and --image")
		}
		var specs []fleet.Spec
		var errs []error
		for _, f := range files {
			s, err := appfile.Load(f)
			specs, errs = append(specs, s...), append(errs, err)
		}
		return specs, errors.Join(errs...)
	}
	names, command := a, []string(nil)
	if i := cmd.ArgsLenAtDash(); i >= 0 {
		names, command = a[:i], a[i:]
	}
	if len(names) != 1 || flags.image == "" {
		return nil, &fleet.Error{Op: "deploy", Kind: fleet.ErrInvalid, Err: errors.New("one name and --image are needed, or app files with -f"), Hint: "usage: " + cmd.UseLine()}
	}
	s, err := flags.spec(names[0], command)
	return []fleet.Spec{s}, err
}
