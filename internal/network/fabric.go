package network

import (
	"errors"
	"fmt"
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
// a bridge, whose ports lead to containers, and an uplink, whose other end is
// the host's one interface. It has the node's address, and forwards between the
// two; connections to containers begin here (see Control).
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
	bridge int
	uplink int
}

// In the fabric.
const (
	bridgeName = "bridge"
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
		return nil, fmt.Errorf("open the bridge's namespace %s: %w", file, err)
	}
	return f, nil
}

// furnish makes the bridge and its address, or takes over those of an earlier
// process. The uplink is there.
func (f *fabric) furnish(node netip.Prefix) (err error) {
	if f.uplink, err = f.wire.index(uplinkName); err != nil {
		return fmt.Errorf("find uplink: %w", err)
	}
	if f.bridge, err = f.wire.index(bridgeName); errors.Is(err, unix.ENODEV) {
		f.bridge, err = f.makeBridge()
	}
	if err != nil {
		return fmt.Errorf("make bridge: %w", err)
	}
	if err := f.settleAddress(node); err != nil {
		return err
	}
	err = inNamespace(int(f.ns.Fd()), func() error {
		return errors.Join(settleParameters("all"), settleParameters(bridgeName), settleParameters(uplinkName), sysctl("ipv4/ip_forward", "1"))
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

func (f *fabric) makeBridge() (int, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = bridgeName
	snooping := false // ports are isolated: there is nothing to learn of groups
	if err := f.kernel.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snooping}); err != nil {
		return 0, err
	}
	return f.wire.index(bridgeName)
}

// settleAddress gives the bridge the node's address, and takes away that of an
// earlier configuration, unless containers still rely on it. The uplink has the
// hardware address that goes with it, too.
func (f *fabric) settleAddress(node netip.Prefix) error {
	link, err := f.kernel.LinkByName(bridgeName)
	if err != nil {
		return fmt.Errorf("find bridge: %w", err)
	}
	addrs, err := all(func() ([]netlink.Addr, error) { return f.kernel.AddrList(link, netlink.FAMILY_V4) })
	if err != nil {
		return fmt.Errorf("list addresses of the bridge: %w", err)
	}
	for _, a := range addrs {
		p, ok := asPrefix(a.IPNet)
		if ok && p == node {
			return nil
		}
		if ports, err := f.ports(); err != nil || len(ports) > 0 {
			return errors.Join(err, &fleet.Error{Op: "open network", Subject: node.Masked().String(), Kind: fleet.ErrConflict, Err: fmt.Errorf("%d containers are connected to %s", len(ports), p), Hint: "keep network.subnet while containers are connected"})
		}
		if err := f.kernel.AddrDel(link, &a); err != nil {
			return fmt.Errorf("remove address %s of the bridge: %w", p, err)
		}
	}
	uplink, err := f.kernel.LinkByName(uplinkName)
	if err != nil {
		return fmt.Errorf("find uplink: %w", err)
	}
	// A bridge that has no hardware address of its own takes the lowest of its
	// ports', so that it changes as containers come and go.
	for _, l := range []netlink.Link{link, uplink} {
		if err := f.kernel.LinkSetHardwareAddr(l, hardwareAddr(node.Addr())); err != nil {
			return fmt.Errorf("give %s its hardware address: %w", l.Attrs().Name, err)
		}
	}
	if err := f.wire.address(f.bridge, node); err != nil {
		return fmt.Errorf("give bridge its address: %w", err)
	}
	return nil
}

// raise comes after the rules. What is for elsewhere goes to the host.
func (f *fabric) raise() error {
	for _, index := range []int{f.bridge, f.uplink} {
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

// openTables replaces what keeps containers from each other where the fabric
// would forward what they send to it, in one transaction. For what they send to
// each other see guard.
//
// Frames to the group addresses of bridges (01:80:c2:00:00:0e and its siblings)
// pass neither: the kernel takes them from the port itself. But it forwards
// nothing that was not for its own hardware address, and takes nothing from a
// port that has no way back to the sender (rp_filter).
func (f *fabric) openTables(name string) error {
	t := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: name}
	err := f.filters.change(func(c *nftables.Conn) error {
		c.AddTable(t)
		c.DelTable(t)
		c.AddTable(t)
		forward := c.AddChain(&nftables.Chain{Name: "forward", Table: t, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter})
		rule(c, forward, iface(expr.MetaKeyIIFNAME, bridgeName, expr.CmpOpEq), iface(expr.MetaKeyOIFNAME, bridgeName, expr.CmpOpEq), verdict(expr.VerdictDrop))
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
		if a := l.Attrs(); a.MasterIndex != 0 && a.MasterIndex == f.bridge && l.Type() == "veth" {
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
