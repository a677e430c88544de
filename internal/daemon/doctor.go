package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/sandbox/criu"
)

// Finding is one thing that Diagnose looked at.
type Finding struct {
	Name string `json:"name"`
	OK   bool   `json:"ok"`
	// Needed: without it the daemon does not run.
	Needed bool   `json:"needed"`
	Found  string `json:"found"`
	Hint   string `json:"hint,omitempty"`
}

// Diagnose looks at what the daemon needs of this machine. It changes nothing.
func Diagnose(ctx context.Context, c Config) []Finding {
	return []Finding{
		root(), kernel(), cgroups(), controllers(), filesystems(), userNamespaces(), pidfd(), seccomp(),
		nft(), routes4(c), resolver(), descriptors(), space(c), port(ctx, c),
		program("crun", "isolation.runtime: crun"), program("runc", "isolation.runtime: runc"), program("runsc", "isolation.runtime: runsc"),
		savers(ctx, c),
	}
}

// savers looks for CRIU, as the daemon does.
func savers(ctx context.Context, c Config) Finding {
	f := Finding{Name: "criu", Hint: "only for checkpoints: without it slow apps start anew each time"}
	if c.Checkpoint.CRIU == "" || c.Checkpoint.Budget == 0 {
		f.Found = "not wanted"
		return f
	}
	p, err := criu.Open(ctx, c.Checkpoint.CRIU)
	if err != nil {
		f.Found = err.Error()
		f.Hint += "; " + fleet.Hint(err)
		return f
	}
	f.OK, f.Found = true, p.Path+" "+p.Version
	_ = p.Close()
	return f
}

func root() Finding {
	f := Finding{Name: "root", Needed: true, OK: os.Geteuid() == 0, Found: fmt.Sprintf("uid %d", os.Geteuid()), Hint: "run it as root: sudo fastcontainer serve"}
	return f
}

func kernel() Finding {
	var u unix.Utsname
	_ = unix.Uname(&u)
	release := unix.ByteSliceToString(u.Release[:])
	var major, minor int
	_, _ = fmt.Sscanf(release, "%d.%d", &major, &minor)
	return Finding{Name: "kernel", Needed: true, OK: major > 5 || major == 5 && minor >= 19, Found: release, Hint: "5.19 or newer is needed (idmapped layers under overlayfs); Debian 12 and Ubuntu 24.04 have it"}
}

func cgroups() Finding {
	f := Finding{Name: "cgroups", Needed: true, Hint: "mount -t cgroup2 none /sys/fs/cgroup"}
	var st unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &st); err != nil {
		f.Found = err.Error()
		return f
	}
	switch st.Type {
	case unix.CGROUP2_SUPER_MAGIC:
		f.OK, f.Found = true, "version 2"
	default:
		_, err := os.Stat("/sys/fs/cgroup/memory")
		f.OK, f.Found = err == nil, "version 1"
	}
	return f
}

func controllers() Finding {
	f := Finding{Name: "controllers", Needed: true, Hint: "echo '+cpu +memory +pids' > /sys/fs/cgroup/cgroup.subtree_control, or start the kernel with cgroup_enable=memory"}
	want := []string{"cpu", "memory", "pids"}
	var have []string
	if b, err := os.ReadFile("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		have = strings.Fields(string(b))
	} else {
		for _, w := range want {
			if _, err := os.Stat(filepath.Join("/sys/fs/cgroup", w)); err == nil {
				have = append(have, w)
			}
		}
	}
	f.OK = !slices.ContainsFunc(want, func(w string) bool { return !slices.Contains(have, w) })
	f.Found = strings.Join(have, " ")
	return f
}

func filesystems() Finding {
	f := Finding{Name: "overlayfs", Needed: true, Hint: "modprobe overlay"}
	b, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		f.Found = err.Error()
		return f
	}
	f.OK = bytes.Contains(b, []byte("\toverlay\n"))
	f.Found = map[bool]string{true: "there", false: "missing"}[f.OK]
	return f
}

func userNamespaces() Finding {
	f := Finding{Name: "user namespaces", Needed: true, Hint: "sysctl -w user.max_user_namespaces=100000"}
	b, err := os.ReadFile("/proc/sys/user/max_user_namespaces")
	if err != nil {
		f.Found = err.Error()
		return f
	}
	n := strings.TrimSpace(string(b))
	f.OK, f.Found = n != "0", "at most "+n
	return f
}

func pidfd() Finding {
	fd, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return Finding{Name: "pidfd", Needed: true, Found: err.Error(), Hint: "the kernel is too old, or a seccomp filter forbids pidfd_open"}
	}
	_ = unix.Close(fd)
	return Finding{Name: "pidfd", Needed: true, OK: true, Found: "there"}
}

func seccomp() Finding {
	f := Finding{Name: "seccomp", Needed: true, Hint: "a kernel with CONFIG_SECCOMP_FILTER is needed"}
	b, err := os.ReadFile("/proc/sys/kernel/seccomp/actions_avail")
	f.OK, f.Found = err == nil, strings.TrimSpace(string(b))
	if err != nil {
		f.Found = err.Error()
	}
	return f
}

func nft() Finding {
	f := Finding{Name: "nftables", Needed: true, Hint: "modprobe nf_tables nft_nat nft_chain_nat nft_ct, as root"}
	c, err := nftables.New()
	if err == nil {
		_, err = c.ListTables()
	}
	f.OK, f.Found = err == nil, "there"
	if err != nil {
		f.Found = err.Error()
	}
	return f
}

func routes4(c Config) Finding {
	f := Finding{Name: "network range", Needed: true, OK: true, Found: c.Network.Subnet + " is free", Hint: "choose another network.subnet in the configuration"}
	_, subnet, err := net.ParseCIDR(c.Network.Subnet)
	if err != nil {
		f.OK, f.Found = false, err.Error()
		return f
	}
	links, err := netlink.LinkByName(c.Network.Interface)
	own := -1
	if err == nil {
		own = links.Attrs().Index
	}
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		f.OK, f.Found = false, err.Error()
		return f
	}
	for _, r := range routes {
		if r.Dst == nil || r.LinkIndex == own {
			continue
		}
		if ones, _ := r.Dst.Mask.Size(); ones > 0 && (subnet.Contains(r.Dst.IP) || r.Dst.Contains(subnet.IP)) {
			f.OK, f.Found = false, fmt.Sprintf("%s overlaps the route to %s", c.Network.Subnet, r.Dst)
		}
	}
	return f
}

func resolver() Finding {
	f := Finding{Name: "name servers", Hint: "set network.dns in the configuration, or containers cannot resolve names"}
	for _, name := range []string{"/run/systemd/resolve/resolv.conf", "/etc/resolv.conf"} {
		b, err := os.ReadFile(name)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(b)) {
			fields := strings.Fields(line)
			if len(fields) >= 2 && fields[0] == "nameserver" && !strings.HasPrefix(fields[1], "127.") && !strings.Contains(fields[1], ":") {
				f.OK, f.Found = true, fields[1]
				return f
			}
		}
	}
	f.Found = "only loopback addresses, which a container cannot reach"
	return f
}

func descriptors() Finding {
	var l unix.Rlimit
	_ = unix.Getrlimit(unix.RLIMIT_NOFILE, &l)
	return Finding{Name: "descriptors", OK: l.Max >= 65536, Found: fmt.Sprintf("at most %d", l.Max), Hint: "LimitNOFILE=1048576 in the unit, or ulimit -n"}
}

func space(c Config) Finding {
	f := Finding{Name: "disk", Hint: "choose another --data directory, or make room"}
	dir := c.Data
	for dir != "/" {
		var st unix.Statfs_t
		err := unix.Statfs(dir, &st)
		if errors.Is(err, unix.ENOENT) {
			dir = filepath.Dir(dir)
			continue
		}
		if err != nil {
			f.Found = err.Error()
			return f
		}
		free := st.Bavail * uint64(st.Bsize) //nolint:gosec // not negative
		f.OK, f.Found = free > 2<<30, fmt.Sprintf("%d MiB free at %s", free>>20, dir)
		return f
	}
	return f
}

func port(ctx context.Context, c Config) Finding {
	f := Finding{Name: "address " + c.HTTP, OK: true, Found: "free", Hint: "something else listens there (or our own daemon): choose another address with --http"}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", c.HTTP)
	if err != nil {
		f.OK, f.Found = false, err.Error()
		return f
	}
	_ = l.Close()
	return f
}

func program(name, use string) Finding {
	f := Finding{Name: name, Hint: "only for " + use + ": apt-get install " + name}
	path, err := exec.LookPath(name)
	f.OK, f.Found = err == nil, path
	if err != nil {
		f.Found = "not installed"
	}
	return f
}
