package node

import (
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/image"
	"github.com/fastcontainer/fastcontainer/internal/sandbox"
)

// sandboxSpec merges what the image says with what the user says, as the OCI
// image specification has it (config.md): the user's entrypoint drops the
// image's command, the user's variables win.
func (n *Node) sandboxSpec(id fleet.InstanceID, rev fleet.Revision, img image.Image) (sandbox.Spec, error) {
	s := rev.Spec
	out := sandbox.Spec{
		ID: id, App: rev.App, Layers: img.Layers, Hostname: string(rev.App),
		Args: Args(s, img.Config), Dir: firstOf(s.Workdir, img.Config.WorkingDir, "/"), User: firstOf(s.User, img.Config.User),
		UserNS: s.Isolation.UserNS, ReadonlyRoot: s.Isolation.Readonly, Seccomp: s.Isolation.Seccomp,
		CapAdd: s.Isolation.Capabilities.Add, CapDrop: s.Isolation.Capabilities.Drop,
		Disk:   s.Resources.Disk,
		Limits: atRest(s.Resources),
		Log:    n.logPath(id),
	}
	if err := placeLog(out.Log); err != nil {
		return out, err
	}
	if out.Disk == 0 {
		out.Disk = max(s.Resources.Memory.Peak, s.Resources.Memory.Rest) / 2
	}
	out.Env = environment(s, img.Config, id, rev.ID)
	for _, v := range s.Volumes {
		source := v.Bind
		if v.Name != "" {
			source = filepath.Join(n.cfg.VolumeDir, string(rev.App), v.Name)
			if err := os.MkdirAll(source, 0o755); err != nil { //nolint:gosec // other users of the container must enter it; the parent is closed
				return out, fmt.Errorf("make volume %s: %w", v.Name, err)
			}
		}
		out.Mounts = append(out.Mounts, sandbox.Mount{Source: source, Target: v.Mount, Readonly: v.Readonly})
	}
	return out, nil
}

// atRest are the limits of an instance without load.
func atRest(r fleet.Resources) sandbox.Limits {
	return sandbox.Limits{CPU: r.CPU.Rest, CPUWeight: 100, Memory: r.Memory.Rest, PIDs: r.PIDs}
}

// Args is what an app runs.
func Args(s fleet.Spec, c image.Config) []string {
	if len(s.Entrypoint) > 0 {
		return slices.Concat(s.Entrypoint, s.Command)
	}
	if len(s.Command) > 0 {
		return slices.Concat(c.Entrypoint, s.Command)
	}
	return slices.Concat(c.Entrypoint, c.Cmd)
}

const defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// environment of an app: the image's, then ours, then the user's.
func environment(s fleet.Spec, c image.Config, id fleet.InstanceID, rev fleet.RevisionID) []string {
	env := []string{}
	set := func(kv string) {
		key, _, ok := strings.Cut(kv, "=")
		if !ok || key == "" {
			return
		}
		if i := slices.IndexFunc(env, func(e string) bool { return strings.HasPrefix(e, key+"=") }); i >= 0 {
			env[i] = kv
			return
		}
		env = append(env, kv)
	}
	set(defaultPath)
	for _, kv := range c.Env {
		set(kv)
	}
	set("HOSTNAME=" + string(s.Name))
	set("PORT=" + strconv.Itoa(s.Port))
	set("FASTCONTAINER_APP=" + string(s.Name))
	set("FASTCONTAINER_INSTANCE=" + string(id))
	set("FASTCONTAINER_REVISION=" + string(rev))
	if s.Start != fleet.StartCold {
		set("FASTCONTAINER_RESTORED=" + sandbox.RestoredFile)
	}
	for _, key := range slices.Sorted(maps.Keys(s.Env)) {
		set(key + "=" + s.Env[key])
	}
	return env
}

func firstOf(s ...string) string {
	for _, v := range s {
		if v != "" {
			return v
		}
	}
	return ""
}

// stopSignal reads a signal as images write it: a name with or without SIG, or
// a number. What cannot be read is SIGTERM.
func stopSignal(s string) syscall.Signal {
	s = strings.ToUpper(strings.TrimSpace(s))
	if n, err := strconv.Atoi(s); err == nil && n > 0 && n <= 64 {
		return syscall.Signal(n)
	}
	if s != "" && !strings.HasPrefix(s, "SIG") {
		s = "SIG" + s
	}
	if sig := unix.SignalNum(s); sig != 0 {
		return sig
	}
	return syscall.SIGTERM
}

// deaf tells that a process is the first of its PID namespace and does not
// handle a signal: then the kernel ignores it (pid_namespaces(7)), and waiting
// for the process to obey would be in vain.
func deaf(pid int, sig syscall.Signal) bool {
	if sig == syscall.SIGKILL {
		return false
	}
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return false
	}
	first, caught := false, true
	for line := range strings.Lines(string(b)) {
		switch key, value, _ := strings.Cut(line, ":"); key {
		case "State":
			if strings.HasPrefix(strings.TrimSpace(value), "Z") {
				return false // dead, and not yet waited for: it has no handlers any more
			}
		case "NSpid":
			ids := strings.Fields(value)
			first = len(ids) > 1 && ids[len(ids)-1] == "1"
		case "SigCgt":
			mask, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
			caught = err != nil || mask&(1<<(sig-1)) != 0
		}
	}
	return first && !caught
}

func addrPort(a netip.Addr, port int) netip.AddrPort {
	return netip.AddrPortFrom(a, uint16(port)) //nolint:gosec // checked when the app was deployed
}

// bootTime is seconds since boot, suspended time included.
func bootTime() float64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return float64(ts.Sec) + float64(ts.Nsec)/1e9
}
