package network

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// fabric is what lies between containers and the host: a network namespace with
// a port for each container, and an uplink, whose other end is the host's one
// interface. It has the node's address, and is a router between the two;
// connections to containers begin here (see Control).
//
// A port is a link between two: no container shares one with another. It leads
// to one address, and nothing passes that comes from elsewhere than where its
// answer would go (rp_filter, RFC 3704), so each container is held to its own.
// Nobody asks for hardware addresses there, and nobody tells any: both ends have
// the same one, and it is not looked at.
//
// The host sees one interface, however many containers come and go: its udev,
// its network manager and whoever else listens are not told of each, its
// firewall and its table of connections are not asked about each packet, nor
// does the kernel search that table whenever a port goes down.
//
// A file in the directory of named namespaces (`ip netns`) holds it while no
// daemon runs.
type fabric struct {
	*space
	file   string
	fresh  bool // there was none
	uplink int
}

// In the fabric.
const (
	uplinkName = "uplink"

	leavingGroup = 1 // ports that are about to be removed; all others are in 0
)

// openFabric makes it, or takes over that of an earlier process.
func openFabric(file string) (*fabric, error) {
	ns, fresh, err := named(file)
	f := &fabric{file: file, fresh: fresh}
	if err == nil {
		f.space, err = openSpace(ns)
	}
	if err != nil {
		if fresh {
			err = errors.Join(err, release(file))
		}
		return nil, fmt.Errorf("open the fabric %s: %w", file, err)
	}
	return f, nil
}

// furnish makes it a router that has the node's address, or takes over those of
// an earlier process. The uplink is there.
func (f *fabric) furnish(node netip.Addr) (err error) {
	if f.uplink, err = f.wire.index(uplinkName); err != nil {
		return fmt.Errorf("find uplink: %w", err)
	}
	if err := f.settleAddress(node); err != nil {
		return err
	}
	err = inNamespace(int(f.ns.Fd()), func() error {
		// Ports take the defaults.
		return errors.Join(settleParameters("all"), settleParameters("default"), settleParameters(uplinkName), sysctl("ipv4/ip_forward", "1"))
	})
	if err != nil {
		return err
	}
	ports, err := f.ports()
	if err != nil {
		return err
	}
	for _, p := range ports {
		if err := f.wire.regroup(p, 0); err != nil && !gone(err) {
			return fmt.Errorf("take over port %s: %w", p, err)
		}
	}
	return nil
}

// settleAddress gives the fabric the node's address, and takes away that of an
// earlier configuration, unless containers still rely on it. The uplink has the
// hardware address that goes with it.
func (f *fabric) settleAddress(node netip.Addr) error {
	lo := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: "lo", Index: loopback}} // it never goes, nor do the routes that rely on its address
	addrs, err := all(func() ([]netlink.Addr, error) { return f.kernel.AddrList(lo, netlink.FAMILY_V4) })
	if err != nil {
		return fmt.Errorf("list the fabric's addresses: %w", err)
	}
	for _, a := range addrs {
		p, ok := asPrefix(a.IPNet)
		switch {
		case ok && p.Addr().IsLoopback():
			continue
		case ok && p.Addr() == node:
			return nil
		}
		if ports, err := f.ports(); err != nil || len(ports) > 0 {
			return errors.Join(err, &fleet.Error{Op: "open network", Subject: node.String(), Kind: fleet.ErrConflict, Err: fmt.Errorf("%d containers are connected to %s", len(ports), p.Addr()), Hint: "keep network.subnet while containers are connected"})
		}
		if err := f.kernel.AddrDel(lo, &a); err != nil {
			return fmt.Errorf("remove the fabric's address %s: %w", p, err)
		}
	}
	uplink, err := f.kernel.LinkByName(uplinkName)
	if err != nil {
		return fmt.Errorf("find uplink: %w", err)
	}
	if err := f.kernel.LinkSetHardwareAddr(uplink, hardwareAddr(node)); err != nil {
		return fmt.Errorf("give uplink its hardware address: %w", err)
	}
	if err := f.wire.address(loopback, node); err != nil {
		return fmt.Errorf("give the fabric its address: %w", err)
	}
	return nil
}

// raise comes after the rules. What is for elsewhere goes to the host.
func (f *fabric) raise() error {
	for _, index := range []int{loopback, f.uplink} {
		if err := f.wire.raise(index); err != nil {
			return fmt.Errorf("raise interface: %w", err)
		}
	}
	if err := f.wire.know(f.uplink, host); err != nil {
		return fmt.Errorf("tell of the host: %w", err)
	}
	if err := f.wire.route(f.uplink, netip.PrefixFrom(netip.IPv4Unspecified(), 0), host); err != nil {
		return fmt.Errorf("set route: %w", err)
	}
	return f.wire.settle(f.uplink)
}

// host is what the fabric calls its neighbour: the address of the host's
// interface, from which the host asks containers.
var host = netip.AddrFrom4([4]byte{169, 254, 0, 1})

// openTables replaces what keeps containers from each other, in one transaction:
// nothing is forwarded but from the uplink or to it.
//
// Of frames to group addresses the kernel forwards nothing.
func (f *fabric) openTables(name string) error {
	t := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: name}
	err := f.filters.change(func(c *nftables.Conn) error {
		c.AddTable(t)
		c.DelTable(t)
		c.AddTable(t)
		forward := c.AddChain(&nftables.Chain{Name: "forward", Table: t, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter})
		rule(c, forward, iface(expr.MetaKeyIIFNAME, uplinkName, expr.CmpOpNeq), iface(expr.MetaKeyOIFNAME, uplinkName, expr.CmpOpNeq), verdict(expr.VerdictDrop))
		return nil
	})
	if err != nil {
		return fmt.Errorf("write nftables table: %w", err)
	}
	return nil
}

// ports are the names of those that lead to containers. What else someone put
// there is not ours.
func (f *fabric) ports() ([]string, error) {
	links, err := all(f.kernel.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	var names []string
	for _, l := range links {
		if a := l.Attrs(); l.Type() == "veth" && a.Name != uplinkName && bytes.HasPrefix(a.HardwareAddr, hardwarePrefix) {
			names = append(names, a.Name)
		}
	}
	slices.Sort(names)
	return names, nil
}

// named opens the network namespace that a file holds, and makes it if there is
// none: then it is fresh.
func named(file string) (ns *os.File, fresh bool, err error) {
	ns, err = os.Open(file) //nolint:gosec // of the configuration
	if err == nil {
		if isNamespace(ns) {
			return ns, false, nil
		}
		_ = ns.Close() // an earlier process ended between the two steps
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil { //nolint:gosec // as ip netns makes it
		return nil, false, err
	}
	empty, err := os.OpenFile(file, os.O_CREATE|os.O_RDONLY, 0o444) //nolint:gosec // of the configuration
	if err != nil {
		return nil, false, err
	}
	if err := empty.Close(); err != nil {
		return nil, false, err
	}
	if err := hold(file); err != nil {
		return nil, false, &fleet.Error{Op: "make a network namespace", Subject: file, Kind: fleet.ErrUnavailable, Err: err, Hint: "the daemon needs root, and a kernel with network namespaces"}
	}
	ns, err = os.Open(file) //nolint:gosec // of the configuration
	return ns, true, err
}

// hold makes a network namespace that the file holds.
func hold(file string) error {
	done := make(chan error, 1)
	go func() { // on a thread that ends with it, for it is in the wrong namespace
		runtime.LockOSThread()
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = unix.Mount("/proc/thread-self/ns/net", file, "", unix.MS_BIND, "")
		}
		done <- err
	}()
	return <-done
}

func isNamespace(f *os.File) bool {
	var fs unix.Statfs_t
	return unix.Fstatfs(int(f.Fd()), &fs) == nil && fs.Type == unix.NSFS_MAGIC
}

// release lets go of the namespace, which ends with what is in it. It may be
// repeated.
func release(file string) error {
	if err := unix.Unmount(file, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("release namespace %s: %w", file, err)
	}
	if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// hardwareAddr follows from an address; it is locally administered.
func hardwareAddr(a netip.Addr) net.HardwareAddr {
	return append(slices.Clone(hardwarePrefix), a.AsSlice()...)
}

var hardwarePrefix = net.HardwareAddr{0x02, 0xfc}
