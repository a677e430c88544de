// Package network connects containers: a bridge with the node's address on
// it, a veth pair and an address for each container's network namespace, and an
// nftables table of its own that lets containers out and keeps them from each
// other and from the host's services.
package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// Config of a node's network. Two daemons on one host need different bridges,
// subnets and tables.
type Config struct {
	Logger *slog.Logger
	// Bridge is the interface's name. Default fc0.
	Bridge string
	// Subnet of the containers; its first address is the node's. Default
	// 10.89.0.0/16.
	Subnet netip.Prefix
	// Table is the nftables table. Default fastcontainer.
	Table string
	// DNS servers for containers. Default: the host's.
	DNS []netip.Addr
	// Deny are destinations that containers never reach. Default: the
	// metadata address of clouds.
	Deny []netip.Prefix
}

// Lease is one container's connection.
type Lease struct {
	ID      string     `json:"id"`
	Veth    string     `json:"veth"`
	Address netip.Addr `json:"address"`
}

// Network is the node's network.
type Network struct {
	cfg     Config
	bridge  int
	gateway netip.Addr
	resolv  []byte

	guard   *guard
	removal removal

	mu   sync.Mutex
	used map[netip.Addr]Lease
	next netip.Addr
}

// Open makes the bridge and the table, or takes over those of an earlier
// process.
func Open(ctx context.Context, c Config) (*Network, error) {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Bridge == "" {
		c.Bridge = "fc0"
	}
	if !c.Subnet.IsValid() {
		c.Subnet = netip.MustParsePrefix("10.89.0.0/16")
	}
	if c.Table == "" {
		c.Table = "fastcontainer"
	}
	if len(c.Deny) == 0 {
		c.Deny = []netip.Prefix{netip.MustParsePrefix("169.254.0.0/16")}
	}
	c.Subnet = c.Subnet.Masked()
	if !c.Subnet.Addr().Is4() || c.Subnet.Bits() > 29 {
		return nil, &fleet.Error{Op: "open network", Subject: c.Subnet.String(), Kind: fleet.ErrInvalid, Err: errors.New("it must be an IPv4 prefix of at least 8 addresses"), Hint: "for example 10.89.0.0/16"}
	}
	n := &Network{cfg: c, gateway: c.Subnet.Addr().Next(), used: map[netip.Addr]Lease{}}
	n.next = n.gateway.Next()
	n.resolv = n.resolvConf()
	if err := n.openBridge(); err != nil {
		return nil, fmt.Errorf("open network: %w", err)
	}
	if err := n.openTable(); err != nil {
		return nil, fmt.Errorf("open network: %w", err)
	}
	var err error
	if n.guard, err = n.openGuard(); err != nil {
		return nil, fmt.Errorf("open network: %w", err)
	}
	return n, nil
}

func (n *Network) openBridge() error {
	link, err := netlink.LinkByName(n.cfg.Bridge)
	if _, missing := errors.AsType[netlink.LinkNotFoundError](err); missing {
		if err := n.checkSubnet(); err != nil {
			return err
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name = n.cfg.Bridge
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
			return fmt.Errorf("make bridge %s: %w", n.cfg.Bridge, err)
		}
		link, err = netlink.LinkByName(n.cfg.Bridge)
	}
	if err != nil {
		return fmt.Errorf("find bridge %s: %w", n.cfg.Bridge, err)
	}
	n.bridge = link.Attrs().Index
	// A bridge that has no address of its own takes the lowest of its ports', so
	// that it changes as containers come and go.
	if err := netlink.LinkSetHardwareAddr(link, hardwareAddr(n.gateway)); err != nil {
		return fmt.Errorf("give bridge its hardware address: %w", err)
	}
	// Containers have IPv4 alone, and the host does not answer them otherwise.
	err = os.WriteFile("/proc/sys/net/ipv6/conf/"+n.cfg.Bridge+"/disable_ipv6", []byte("1"), 0)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("disable IPv6 on the bridge: %w", err)
	}
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: n.gateway.AsSlice(), Mask: net.CIDRMask(n.cfg.Subnet.Bits(), 32)}}
	if err := netlink.AddrReplace(link, addr); err != nil {
		return fmt.Errorf("give bridge its address: %w", err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("raise bridge: %w", err)
	}
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0); err != nil {
		return fmt.Errorf("enable forwarding: %w", err)
	}
	return nil
}

// checkSubnet refuses a range that the host uses already.
func (n *Network) checkSubnet() error {
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		ip, ok := netip.AddrFromSlice(r.Dst.IP.To4())
		ones, _ := r.Dst.Mask.Size()
		if p := netip.PrefixFrom(ip, ones); ok && ones > 0 && p.Overlaps(n.cfg.Subnet) {
			return &fleet.Error{Op: "open network", Subject: n.cfg.Subnet.String(), Kind: fleet.ErrConflict, Err: fmt.Errorf("the host has a route to %s", p), Hint: "choose another range with network.subnet in the configuration"}
		}
	}
	return nil
}

// take gives the address that has been free for longest.
func (n *Network) take(id string) (netip.Addr, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	first := n.gateway.Next()
	for a, tries := n.next, 0; tries < 1<<(32-n.cfg.Subnet.Bits()); tries++ {
		if !n.cfg.Subnet.Contains(a.Next()) { // a is the broadcast address
			a = first
		}
		if _, taken := n.used[a]; !taken {
			n.used[a] = Lease{ID: id, Veth: id, Address: a}
			n.next = a.Next()
			return a, nil
		}
		a = a.Next()
	}
	return netip.Addr{}, &fleet.Error{Op: "take an address", Subject: n.cfg.Subnet.String(), Kind: fleet.ErrOverloaded, Err: errors.New("all addresses are in use"), Hint: "choose a larger network.subnet"}
}

func (n *Network) free(a netip.Addr) {
	n.mu.Lock()
	delete(n.used, a)
	n.mu.Unlock()
}

// Attach connects the network namespace behind a descriptor. id must be unique
// on the host and at most 15 bytes: it is the interface's name.
func (n *Network) Attach(ctx context.Context, id string, netns int) (_ Lease, err error) {
	if err := ctx.Err(); err != nil {
		return Lease{}, err
	}
	addr, err := n.take(id)
	if err != nil {
		return Lease{}, err
	}
	defer func() {
		if err != nil {
			n.free(addr)
		}
	}()
	lease := Lease{ID: id, Veth: id, Address: addr}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MasterIndex, attrs.TxQLen = id, n.bridge, 1000
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(netns), PeerHardwareAddr: hardwareAddr(addr)}
	if err := netlink.LinkAdd(veth); err != nil {
		return Lease{}, fmt.Errorf("make interface %s: %w", id, err)
	}
	defer func() {
		if err != nil {
			_ = netlink.LinkDel(veth)
		}
	}()
	link, err := netlink.LinkByName(id)
	if err != nil {
		return Lease{}, fmt.Errorf("find interface %s: %w", id, err)
	}
	if err := n.confine(link, addr); err != nil {
		return Lease{}, fmt.Errorf("isolate interface %s: %w", id, err)
	}
	if err := n.guard.admit(lease); err != nil {
		return Lease{}, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.guard.dismiss(lease))
		}
	}()
	if err := netlink.LinkSetUp(link); err != nil {
		return Lease{}, fmt.Errorf("raise interface %s: %w", id, err)
	}
	if err := inNamespace(netns, func() error { return n.furnish(addr) }); err != nil {
		return Lease{}, fmt.Errorf("set up namespace of %s: %w", id, err)
	}
	return lease, nil
}

// confine makes a port of the bridge that reaches the host alone, and makes
// the host know for good who is behind it: nothing that a container sends
// changes where another one's packets go.
func (n *Network) confine(link netlink.Link, addr netip.Addr) error {
	for _, set := range []func(netlink.Link, bool) error{
		func(l netlink.Link, _ bool) error { return netlink.LinkSetIsolated(l, true) },
		netlink.LinkSetLearning, netlink.LinkSetFlood,
	} {
		if err := set(link, false); err != nil {
			return err
		}
	}
	mac := hardwareAddr(addr)
	return errors.Join(
		netlink.NeighSet(&netlink.Neigh{Family: unix.AF_BRIDGE, LinkIndex: link.Attrs().Index, Flags: netlink.NTF_MASTER, State: netlink.NUD_PERMANENT | netlink.NUD_NOARP, HardwareAddr: mac}),
		netlink.NeighSet(&netlink.Neigh{Family: netlink.FAMILY_V4, LinkIndex: n.bridge, State: netlink.NUD_PERMANENT, IP: addr.AsSlice(), HardwareAddr: mac}),
	)
}

// furnish sets up the calling thread's network namespace.
func (n *Network) furnish(addr netip.Addr) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		return err
	}
	eth, err := h.LinkByName("eth0")
	if err != nil {
		return err
	}
	for _, s := range [][2]string{
		{"ipv6/conf/all/disable_ipv6", "1"},
		{"ipv6/conf/default/disable_ipv6", "1"},
		{"ipv4/ip_unprivileged_port_start", "0"},
		{"ipv4/ping_group_range", "0 65535"},
	} {
		err := os.WriteFile("/proc/sys/net/"+s[0], []byte(s[1]), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.EINVAL) {
			return err
		}
	}
	for _, l := range []netlink.Link{lo, eth} {
		if l == eth {
			ip := &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(n.cfg.Subnet.Bits(), 32)}
			if err := h.AddrAdd(eth, &netlink.Addr{IPNet: ip}); err != nil {
				return fmt.Errorf("give address: %w", err)
			}
		}
		if err := h.LinkSetUp(l); err != nil {
			return fmt.Errorf("raise %s: %w", l.Attrs().Name, err)
		}
	}
	// The first answer shall not wait for ARP.
	gateway := &netlink.Neigh{Family: netlink.FAMILY_V4, LinkIndex: eth.Attrs().Index, State: netlink.NUD_PERMANENT, IP: n.gateway.AsSlice(), HardwareAddr: hardwareAddr(n.gateway)}
	if err := h.NeighSet(gateway); err != nil {
		return fmt.Errorf("tell of the gateway: %w", err)
	}
	if err := h.RouteAdd(&netlink.Route{LinkIndex: eth.Attrs().Index, Gw: n.gateway.AsSlice()}); err != nil {
		return fmt.Errorf("set route: %w", err)
	}
	return nil
}

// inNamespace runs f on a thread in another network namespace.
func inNamespace(netns int, f func() error) error {
	errs := make(chan error, 1)
	var wg sync.WaitGroup
	wg.Go(func() {
		// Never unlocked: the runtime ends the thread, and nobody else ever runs
		// on one that is in the wrong namespace.
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// A process's first thread does not end before the process does: hold
			// it while another one serves.
			defer runtime.UnlockOSThread()
			errs <- inNamespace(netns, f)
			return
		}
		if err := unix.Setns(netns, unix.CLONE_NEWNET); err != nil {
			errs <- fmt.Errorf("enter network namespace: %w", err)
			return
		}
		errs <- f()
	})
	wg.Wait()
	return <-errs
}

// Adopt marks the address of a connection that an earlier process made.
func (n *Network) Adopt(l Lease) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if owner, ok := n.used[l.Address]; ok && owner.ID != l.ID {
		return fmt.Errorf("address %s belongs to %s already", l.Address, owner.ID)
	}
	n.used[l.Address] = l
	return n.guard.admit(l)
}

// Clean removes every connection on the bridge that is not in keep, and what
// else of them an earlier process left.
func (n *Network) Clean(_ context.Context, keep []string) ([]string, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	var removed []string
	var orphans []Lease
	for _, l := range links {
		name := l.Attrs().Name
		if l.Attrs().MasterIndex == n.bridge && !slices.Contains(keep, name) {
			removed = append(removed, name)
			orphans = append(orphans, Lease{ID: name, Veth: name})
		}
	}
	if err := n.remove(orphans); err != nil {
		return nil, errors.Join(err, n.sweep())
	}
	return removed, n.sweep()
}

// sweep forgets neighbours that have no connection any more.
func (n *Network) sweep() error {
	n.mu.Lock()
	defer n.mu.Unlock() // nobody comes meanwhile
	neighbours, err := netlink.NeighList(n.bridge, netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("list neighbours: %w", err)
	}
	var errs []error
	for _, neigh := range neighbours {
		a, ok := netip.AddrFromSlice(neigh.IP)
		if _, used := n.used[a.Unmap()]; ok && !used && n.cfg.Subnet.Contains(a.Unmap()) {
			errs = append(errs, n.forget(a.Unmap()))
		}
	}
	return errors.Join(append(errs, n.guard.reset(slices.Collect(maps.Values(n.used))...))...)
}

// Remove takes the bridge and the tables off the host. Nothing may be connected
// any more.
func (n *Network) Remove() error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	for _, f := range []nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyBridge} {
		if f == nftables.TableFamilyIPv4 || n.guard != nil {
			c.DelTable(&nftables.Table{Family: f, Name: n.cfg.Table})
		}
	}
	errs := []error{c.Flush()}
	link, err := netlink.LinkByIndex(n.bridge)
	if err == nil {
		err = netlink.LinkDel(link)
	}
	return errors.Join(append(errs, err)...)
}

// ResolvConf is what containers find as /etc/resolv.conf.
func (n *Network) ResolvConf() []byte { return n.resolv }

func (n *Network) resolvConf() []byte {
	found := n.cfg.DNS
	// systemd-resolved's stub, which containers cannot reach, names its sources
	// in another file.
	for _, f := range []string{"/run/systemd/resolve/resolv.conf", "/etc/resolv.conf"} {
		if len(found) > 0 {
			break
		}
		if b, err := os.ReadFile(f); err == nil {
			found = servers(string(b))
		}
	}
	if len(found) == 0 {
		n.cfg.Logger.Warn("containers have no name server: the host's are loopback addresses, which they cannot reach", "hint", "set network.dns in the configuration")
	}
	var b strings.Builder
	for _, s := range found[:min(len(found), 3)] {
		b.WriteString("nameserver " + s.String() + "\n")
	}
	return []byte(b.String())
}

// servers are the name servers of a resolv.conf(5) that containers can reach.
func servers(text string) []netip.Addr {
	var found []netip.Addr
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) < 2 || fields[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(fields[1]); err == nil && !a.IsLoopback() && a.Is4() {
			found = append(found, a)
		}
	}
	return found
}
