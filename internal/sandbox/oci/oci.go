package oci

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	runc "github.com/containerd/go-runc"
	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/sandbox"
	"github.com/fastcontainer/fastcontainer/internal/sandbox/cgroup"
)

// Config of the runtime. It is one daemon's, and one body's: two of them on a
// host need different directories, cgroups, uid ranges and networks.
type Config struct {
	Logger *slog.Logger
	// Runtime is the program: "crun", "runc" or "runsc", or a path to one of
	// them. Default "crun".
	Runtime string
	// Dir holds the bundles and the runtime's own state; it should be on a
	// tmpfs. Default "/run/fastcontainer/oci".
	Dir string
	// Cgroup is the path of the group under which containers live, below the
	// cgroup mount points. Default "/fastcontainer-oci".
	Cgroup string
	// UIDBase and UIDCount: container i has the host ids UIDBase+65536*i and
	// up. Default 1610612736 and 16384, which is beside the native body's.
	UIDBase, UIDCount uint32
	// Network; nil: containers have loopback only.
	Network sandbox.Network
}

// Runtime runs containers through an OCI runtime.
type Runtime struct {
	log     *slog.Logger
	kind    string // crun, runc or runsc
	program string
	dir     string
	parent  string // path of the root cgroup
	cgroups *cgroup.Root
	uids    *idRanges
	network sandbox.Network
	logs    *logKeeper
	// everywhere is the root cgroup in each hierarchy of the host.
	everywhere []string
	// hidden are mounts that the runtime must not see.
	hidden []string

	watches sync.WaitGroup

	mu     sync.Mutex
	closed bool
	// known are the containers of this daemon by name, from before they exist
	// until nothing is left of them.
	known map[string]*container
}

const (
	// callTimeout bounds one call of the runtime.
	callTimeout = 30 * time.Second
	// destroyTimeout bounds the wait for killed processes to be gone.
	destroyTimeout = 20 * time.Second
)

// Open makes the runtime ready. It makes this process the reaper of its
// orphaned descendants, for good: a container's first process is one, once the
// runtime that started it has ended. A runtime that is not installed is an
// error with a hint.
func Open(ctx context.Context, c Config) (_ *Runtime, err error) {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Runtime == "" {
		c.Runtime = "crun"
	}
	if c.Dir == "" {
		c.Dir = "/run/fastcontainer/oci"
	}
	if c.Cgroup == "" {
		c.Cgroup = "/fastcontainer-oci"
	}
	if c.UIDBase == 0 {
		c.UIDBase, c.UIDCount = 1610612736, 16384
	}
	r := &Runtime{
		log: c.Logger, kind: filepath.Base(c.Runtime), parent: c.Cgroup, network: c.Network,
		uids: newIDRanges(c.UIDBase, c.UIDCount), known: map[string]*container{},
	}
	if r.program, err = find(c.Runtime); err != nil {
		return nil, err
	}
	if r.dir, err = filepath.Abs(c.Dir); err != nil {
		return nil, fmt.Errorf("open runtime: %w", err)
	}
	if strings.HasPrefix(r.dir+"/", workshop+"/") {
		return nil, &fleet.Error{Op: "open runtime", Subject: r.dir, Kind: fleet.ErrInvalid, Err: errors.New("it lies below " + workshop), Hint: "choose another directory: runtimes do not see that one"}
	}
	for _, d := range []string{r.bundles(), r.states()} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("open runtime: %w", err)
		}
	}
	if r.cgroups, err = cgroup.Open(c.Cgroup); err != nil {
		return nil, err
	}
	if r.kind == "crun" && !r.cgroups.V2() {
		// crun refuses hosts with both versions; without the one that carries
		// no controllers it works.
		if r.hidden, err = unifiedMounts(); err != nil {
			return nil, err
		}
	}
	if r.everywhere, err = cgroupDirs(c.Cgroup); err != nil {
		return nil, err
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("become reaper of containers: %w", err)
	}
	if r.logs, err = newLogKeeper(c.Logger); err != nil {
		return nil, err
	}
	return r, nil
}

// find looks for the runtime's program.
func find(name string) (string, error) {
	program, err := exec.LookPath(name)
	if err == nil {
		return filepath.Abs(program)
	}
	hint := "choose one of the runtimes native, crun, runc, runsc"
	switch filepath.Base(name) {
	case "crun", "runc", "runsc":
		hint = "install it: apt-get install " + filepath.Base(name) + "; or set isolation.runtime: native"
	}
	return "", &fleet.Error{Op: "find runtime", Subject: name, Kind: fleet.ErrUnavailable, Err: err, Hint: hint}
}

func (r *Runtime) bundles() string { return filepath.Join(r.dir, "bundles") }
func (r *Runtime) states() string  { return filepath.Join(r.dir, "state") }

// Check reports why containers cannot run on this host: it asks the runtime
// for its version.
func (r *Runtime) Check() error {
	if _, err := find(r.program); err != nil {
		return err
	}
	if _, err := os.Stat(workshop); err != nil {
		return &fleet.Error{Op: "check runtime", Subject: r.kind, Kind: fleet.ErrUnavailable, Err: err, Hint: "mkdir " + workshop}
	}
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, r.program, "--version").CombinedOutput() //nolint:gosec // the configured program
	if err != nil {
		return &fleet.Error{
			Op: "check runtime", Subject: r.kind, Kind: fleet.ErrUnavailable,
			Err: fmt.Errorf("%w: %s", err, strings.TrimSpace(string(out))), Hint: "run " + r.program + " --version",
		}
	}
	return nil
}

// Memory that all of its containers use, without what the kernel would take
// back at once.
func (r *Runtime) Memory() (fleet.Bytes, error) {
	m, err := r.cgroups.Memory()
	return fleet.Bytes(m), err
}

// Close ends the watches. Containers go on.
func (r *Runtime) Close() error {
	r.mu.Lock()
	r.closed = true
	for _, c := range r.known {
		c.unwatch()
	}
	r.mu.Unlock()
	r.watches.Wait()
	r.logs.close()
	return nil
}

// client is the runtime's command line; what it says goes to a file of its own.
func (r *Runtime) client(log string) *runc.Runc {
	c := &runc.Runc{Command: r.program, Root: r.states(), Log: log, LogFormat: runc.JSON, Setpgid: true}
	if r.kind == "runsc" {
		// Its KVM platform needs /dev/kvm; ptrace works everywhere. It does not
		// know this daemon's cgroups, so it is put into them from outside.
		c.ExtraArgs = []string{"--platform=ptrace", "--ignore-cgroups", "--oci-seccomp", "--network=" + r.sandboxNetwork()}
	}
	return c
}

// sandboxNetwork is what runsc shall do with the network namespace: take its
// interfaces over into the sandbox, or leave it alone.
func (r *Runtime) sandboxNetwork() string {
	if r.network == nil {
		return "none"
	}
	return "sandbox"
}

// newName is the name of a container's bundle, cgroup and link.
func newName() string { return "o" + strings.ToLower(rand.Text()[:10]) }

// Start implements sandbox.Runtime.
func (r *Runtime) Start(ctx context.Context, spec sandbox.Spec) (sandbox.Sandbox, error) {
	if err := validate(&spec); err != nil {
		return nil, err
	}
	caps, err := sandbox.Capabilities(spec.CapAdd, spec.CapDrop)
	if err != nil {
		return nil, err
	}
	c := r.newContainer(newName(), spec)
	if err := r.own(c); err != nil {
		return nil, err
	}
	if err := c.start(ctx, caps); err != nil {
		return nil, errors.Join(err, c.remove(context.WithoutCancel(ctx)))
	}
	if spec.Log != "" && spec.Stdio == nil {
		r.logs.watch(spec.Log, int64(spec.LogMax))
	}
	return c, nil
}

// own enters a container in the books.
func (r *Runtime) own(c *container) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return &fleet.Error{Op: "start", Subject: string(c.spec.ID), Kind: fleet.ErrUnavailable, Err: errors.New("the runtime is closed")}
	}
	r.known[c.name] = c
	return nil
}

func (r *Runtime) disown(name string) {
	r.mu.Lock()
	delete(r.known, name)
	r.mu.Unlock()
}

func validate(spec *sandbox.Spec) error {
	invalid := func(err error, hint string) error {
		return &fleet.Error{Op: "start", Subject: string(spec.ID), Kind: fleet.ErrInvalid, Err: err, Hint: hint}
	}
	if len(spec.Args) == 0 || spec.Args[0] == "" {
		return invalid(errors.New("there is no program to run"), "the image has neither entrypoint nor command: set entrypoint or command in the app file")
	}
	if len(spec.Layers) == 0 {
		return invalid(errors.New("the image has no layers"), "")
	}
	for _, s := range slices.Concat(spec.Args, spec.Env, []string{spec.Dir, spec.Hostname}) {
		if strings.ContainsRune(s, 0) {
			return invalid(errors.New("an argument or variable holds a NUL byte"), "")
		}
	}
	if !slices.Contains([]string{"", "default", "unconfined"}, spec.Seccomp) {
		return invalid(fmt.Errorf("seccomp %q", spec.Seccomp), "use default or unconfined")
	}
	return nil
}

// Adopt implements sandbox.Runtime.
func (r *Runtime) Adopt(ctx context.Context, raw json.RawMessage) (sandbox.Sandbox, error) {
	var s state
	if err := json.Unmarshal(raw, &s); err != nil {
		return nil, fmt.Errorf("adopt container: %w", err)
	}
	if s.Name == "" || s.Name != filepath.Base(s.Name) {
		return nil, fmt.Errorf("adopt container: %q is not the name of one", s.Name)
	}
	c := r.newContainer(s.Name, sandbox.Spec{
		ID: s.ID, App: s.ID.App(), Log: s.Log, LogMax: s.LogMax, Dir: s.Dir, User: s.User, UserNS: s.UIDs.Size > 0,
	})
	c.ids, c.link, c.pid, c.started, c.family = s.UIDs, s.Link, s.PID, s.Started, s.Family
	if err := r.own(c); err != nil {
		return nil, err
	}
	r.uids.adopt(s.UIDs)
	if r.network != nil && s.Link.Name != "" {
		if err := r.network.Adopt(s.Link); err != nil {
			return nil, fmt.Errorf("adopt container: %w", err)
		}
	}
	switch err := c.watch(); {
	case errors.Is(err, sandbox.ErrGone):
		return nil, errors.Join(sandbox.ErrGone, c.remove(ctx))
	case err != nil:
		return nil, fmt.Errorf("adopt container: %w", err)
	}
	if s.Log != "" {
		r.logs.watch(s.Log, int64(s.LogMax))
	}
	return c, nil
}

// Clean implements sandbox.Runtime: bundles, cgroups and links that belong
// neither to a container of this daemon nor to one in keep are removed.
func (r *Runtime) Clean(ctx context.Context, keep []fleet.InstanceID) ([]string, error) {
	r.mu.Lock()
	var names []string
	for name := range r.known {
		names = append(names, name)
	}
	r.mu.Unlock()

	found, err := r.cgroups.List()
	errs := []error{err}
	entries, err := os.ReadDir(r.bundles())
	errs = append(errs, err)
	for _, e := range entries {
		if !slices.Contains(found, e.Name()) {
			found = append(found, e.Name())
		}
		if slices.Contains(names, e.Name()) {
			continue
		}
		if b, err := readBundle(filepath.Join(r.bundles(), e.Name())); err == nil && slices.Contains(keep, b.ID()) {
			names = append(names, e.Name())
		}
	}
	var removed []string
	for _, name := range found {
		if slices.Contains(names, name) {
			continue
		}
		c := r.newContainer(name, sandbox.Spec{})
		if err := c.remove(ctx); err != nil {
			errs = append(errs, err)
			continue
		}
		removed = append(removed, name)
	}
	if r.network != nil {
		links, err := r.network.Clean(ctx, names)
		errs = append(errs, err)
		for _, l := range links {
			if !slices.Contains(removed, l) {
				removed = append(removed, l)
			}
		}
	}
	return removed, errors.Join(errs...)
}
