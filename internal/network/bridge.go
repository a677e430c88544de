package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// openBridge makes the bridge, or takes over that of an earlier process, with
// the containers at it.
func (n *Network) openBridge() error {
	link, err := n.kernel.LinkByName(n.cfg.Bridge)
	if _, missing := errors.AsType[netlink.LinkNotFoundError](err); missing {
		if link, err = n.makeBridge(); err != nil {
			return err
		}
	}
	if err != nil {
		return fmt.Errorf("find bridge %s: %w", n.cfg.Bridge, err)
	}
	if link.Type() != "bridge" {
		return &fleet.Error{Op: "open bridge", Subject: n.cfg.Bridge, Kind: fleet.ErrConflict, Err: fmt.Errorf("the host has an interface of this name, a %s", link.Type()), Hint: "choose another name with network.bridge in the configuration"}
	}
	n.bridge = link.Attrs().Index
	if err := n.settleAddress(link); err != nil {
		return err
	}
	// A bridge that has no address of its own takes the lowest of its ports', so
	// that it changes as containers come and go.
	if err := n.kernel.LinkSetHardwareAddr(link, hardwareAddr(n.gateway)); err != nil {
		return fmt.Errorf("give bridge its hardware address: %w", err)
	}
	if err := n.settleParameters(); err != nil {
		return err
	}
	ports, err := n.ports()
	if err != nil {
		return err
	}
	for _, p := range ports {
		if err := n.wire.regroup(p, n.group()); err != nil && !gone(err) {
			return fmt.Errorf("take over port %s: %w", p, err)
		}
	}
	return nil
}

// raiseBridge comes last: now the rules are there.
func (n *Network) raiseBridge() error {
	if err := n.wire.raise(n.bridge); err != nil {
		return fmt.Errorf("raise bridge: %w", err)
	}
	return sysctl("ipv4/ip_forward", "1")
}

func (n *Network) makeBridge() (netlink.Link, error) {
	if err := n.checkSubnet(); err != nil {
		return nil, err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = n.cfg.Bridge
	snooping := false // ports reach the host alone: there is nothing to learn of groups
	if err := n.kernel.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snooping}); err != nil {
		return nil, fmt.Errorf("make bridge %s: %w", n.cfg.Bridge, err)
	}
	return n.kernel.LinkByName(n.cfg.Bridge)
}

// settleAddress gives the bridge the node's address, and takes away those of an
// earlier configuration, unless containers still rely on them.
func (n *Network) settleAddress(link netlink.Link) error {
	own := netip.PrefixFrom(n.gateway, n.cfg.Subnet.Bits())
	addrs, err := all(func() ([]netlink.Addr, error) { return n.kernel.AddrList(link, netlink.FAMILY_V4) })
	if err != nil {
		return fmt.Errorf("list addresses of the bridge: %w", err)
	}
	settled := false
	for _, a := range addrs {
		p, ok := asPrefix(a.IPNet)
		if ok && p == own {
			settled = true
			continue
		}
		if ports, err := n.ports(); err != nil || len(ports) > 0 {
			return errors.Join(err, &fleet.Error{Op: "open bridge", Subject: n.cfg.Bridge, Kind: fleet.ErrConflict, Err: fmt.Errorf("%d containers are connected to it as %s", len(ports), p), Hint: "keep network.subnet while containers are connected"})
		}
		if err := n.kernel.AddrDel(link, &a); err != nil {
			return fmt.Errorf("remove address %s of the bridge: %w", p, err)
		}
	}
	if settled {
		return nil
	}
	if err := n.checkSubnet(); err != nil {
		return err
	}
	if err := n.wire.address(n.bridge, own); err != nil {
		return fmt.Errorf("give bridge its address: %w", err)
	}
	return nil
}

// settleParameters makes the host neither a proxy, nor a router of others'
// choosing, nor somebody to talk IPv6 to. Whichever defaults the host has.
func (n *Network) settleParameters() error {
	for _, p := range [][2]string{
		{"ipv4/conf/%s/rp_filter", "1"},
		{"ipv4/conf/%s/route_localnet", "0"},
		{"ipv4/conf/%s/proxy_arp", "0"},
		{"ipv4/conf/%s/proxy_arp_pvlan", "0"},
		{"ipv4/conf/%s/accept_local", "0"},
		{"ipv4/conf/%s/accept_source_route", "0"},
		{"ipv4/conf/%s/accept_redirects", "0"},
		{"ipv4/conf/%s/send_redirects", "0"},
		{"ipv4/conf/%s/arp_ignore", "1"}, // tells of the bridge's address alone
		{"ipv6/conf/%s/accept_ra", "0"},
		{"ipv6/conf/%s/disable_ipv6", "1"},
	} {
		err := sysctl(fmt.Sprintf(p[0], n.cfg.Bridge), p[1])
		if err != nil && !errors.Is(err, os.ErrNotExist) { // as in a kernel without IPv6
			return err
		}
	}
	return nil
}

// checkSubnet refuses a range that the host uses already.
func (n *Network) checkSubnet() error {
	taken := func(what string, p netip.Prefix) error {
		return &fleet.Error{Op: "open network", Subject: n.cfg.Subnet.String(), Kind: fleet.ErrConflict, Err: fmt.Errorf("the host has %s %s", what, p), Hint: "choose another range with network.subnet in the configuration"}
	}
	routes, err := all(func() ([]netlink.Route, error) { return n.kernel.RouteList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		if p, ok := asPrefix(r.Dst); ok && p.Bits() > 0 && p.Overlaps(n.cfg.Subnet) {
			return taken("a route to", p)
		}
	}
	for _, a := range n.hosts {
		if n.cfg.Subnet.Contains(a) {
			return taken("address", hostPrefix(a))
		}
	}
	return nil
}

// hostAddrs are the host's addresses, without those of the bridge.
func (n *Network) hostAddrs() ([]netip.Addr, error) {
	addrs, err := all(func() ([]netlink.Addr, error) { return n.kernel.AddrList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	index, _ := n.wire.index(n.cfg.Bridge)
	var hosts []netip.Addr
	for _, a := range addrs {
		if p, ok := asPrefix(a.IPNet); ok && a.LinkIndex != index {
			hosts = append(hosts, p.Addr())
		}
	}
	return hosts, nil
}

func asPrefix(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP.To4())
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(a, ones), ok
}

// ports of the bridge. What else someone put there is not ours.
func (n *Network) ports() ([]string, error) {
	links, err := all(n.kernel.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	var names []string
	for _, l := range links {
		if l.Attrs().MasterIndex == n.bridge && l.Type() == "veth" {
			names = append(names, l.Attrs().Name)
		}
	}
	slices.Sort(names)
	return names, nil
}
