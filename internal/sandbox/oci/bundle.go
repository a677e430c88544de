package oci

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/moby/sys/user"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/sandbox"
)

// bundle is what the runtime reads, and what Exec and Clean read again.
type bundle struct{ specs.Spec }

const idAnnotation = "fastcontainer.instance"

// ID of the instance that it is for.
func (b *bundle) ID() fleet.InstanceID { return fleet.InstanceID(b.Annotations[idAnnotation]) }

func readBundle(dir string) (*bundle, error) {
	raw, err := os.ReadFile(filepath.Join(dir, "config.json"))
	if err != nil {
		return nil, fmt.Errorf("read bundle: %w", err)
	}
	b := &bundle{}
	if err := json.Unmarshal(raw, &b.Spec); err != nil {
		return nil, fmt.Errorf("read bundle: %w", err)
	}
	return b, nil
}

// write makes config.json. It holds the environment, so it is for root only.
func (b *bundle) write(dir string) error {
	raw, err := json.Marshal(b.Spec)
	if err != nil {
		return fmt.Errorf("write bundle: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), raw, 0o600); err != nil {
		return fmt.Errorf("write bundle: %w", err)
	}
	return nil
}

// The files and directories that tell about the host or change it, as the
// native body hides and protects them.
var (
	maskedPaths = []string{
		"/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats",
		"/proc/sched_debug", "/proc/interrupts", "/proc/kpagecount", "/proc/kpageflags", "/proc/kpagecgroup",
		"/proc/sysrq-trigger", "/proc/acpi", "/proc/asound", "/proc/scsi", "/sys/firmware",
		"/sys/devices/virtual/powercap", "/sys/kernel/debug", "/sys/kernel/tracing", "/sys/fs/bpf",
	}
	readonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"}
)

// newBundle translates a spec. The root filesystem stands at rootPath and
// volumes are given as mounts, as an assembly leaves them.
func (c *container) newBundle(ns *namespaces, who *user.ExecUser, program string, caps []string, volumes []specs.Mount) (*bundle, error) {
	spec := &c.spec
	masked := maskedPaths
	mounts := []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "noexec", "strictatime", "mode=755", "size=64k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=64m"}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
	}
	if c.r.cgroups.V2() {
		mounts = append(mounts, specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", "ro"}})
	} else {
		masked = append([]string{"/sys/fs/cgroup"}, masked...)
	}
	b := &bundle{specs.Spec{
		Version:     "1.0.2",
		Hostname:    spec.Hostname,
		Root:        &specs.Root{Path: rootPath, Readonly: spec.ReadonlyRoot},
		Mounts:      append(mounts, volumes...),
		Annotations: map[string]string{idAnnotation: string(spec.ID)},
		Process:     newProcess(who, program, spec.Args, spec.Env, spec.Dir, caps),
		Linux: &specs.Linux{
			CgroupsPath: filepath.Join(c.r.parent, c.name),
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}, {Type: specs.MountNamespace},
				{Type: specs.CgroupNamespace}, {Type: specs.NetworkNamespace, Path: fdPath(ns.net)},
			},
			MaskedPaths:   masked,
			ReadonlyPaths: readonlyPaths,
			Resources:     &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}},
		},
	}}
	b.Process.Terminal = spec.Stdio != nil && spec.Stdio.TTY
	if ns.user != nil {
		ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: c.ids.Base, Size: c.ids.Size}}
		b.Linux.UIDMappings, b.Linux.GIDMappings = ids, ids
		userns := specs.LinuxNamespace{Type: specs.UserNamespace, Path: fdPath(ns.user)}
		if c.r.kind == "runsc" {
			userns.Path = "" // it cannot join one, so it makes an equal one
		}
		b.Linux.Namespaces = append(b.Linux.Namespaces, userns)
	}
	if spec.Seccomp != "unconfined" {
		var err error
		if b.Linux.Seccomp, err = sandbox.SeccompProfile(caps); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// newProcess is a program that is confined as all of a container's are.
// Runtimes look along PATH and know no default, so where there is none the
// program's own path is its first argument.
func newProcess(who *user.ExecUser, program string, args, env []string, dir string, caps []string) *specs.Process {
	if _, ok := pathOf(env); !ok {
		args = append([]string{program}, args[1:]...)
	}
	if dir == "" {
		dir = "/"
	}
	umask := uint32(0o022)
	groups := make([]uint32, len(who.Sgids))
	for i, g := range who.Sgids {
		groups[i] = uint32(g) //nolint:gosec // at most 65535, see lookup
	}
	p := &specs.Process{
		Args: args, Env: env, Cwd: dir, NoNewPrivileges: true,
		User:    specs.User{UID: uint32(who.Uid), GID: uint32(who.Gid), AdditionalGids: groups, Umask: &umask}, //nolint:gosec // as above
		Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_CORE"}},
		// What root has, and what other users may get from files, which no new
		// privileges forbids.
		Capabilities: &specs.LinuxCapabilities{Bounding: caps},
	}
	if who.Uid == 0 {
		p.Capabilities.Effective, p.Capabilities.Permitted = caps, caps
	}
	return p
}
