package network

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// openLink makes the host's interface, whose other end is the fabric's uplink,
// or takes over that of an earlier process, with the containers behind it.
func (n *Network) openLink() error {
	link, err := n.kernel.LinkByName(n.cfg.Interface)
	if _, missing := errors.AsType[netlink.LinkNotFoundError](err); err != nil && !missing {
		return fmt.Errorf("find interface %s: %w", n.cfg.Interface, err)
	}
	if err == nil && !ours(link) {
		return &fleet.Error{Op: "open network", Subject: n.cfg.Interface, Kind: fleet.ErrConflict, Err: fmt.Errorf("the host has an interface of this name, a %s", link.Type()), Hint: "choose another name with network.interface in the configuration"}
	}
	if err != nil || !n.leads(link) {
		if link, err = n.makeLink(link); err != nil {
			return err
		}
	}
	n.link = link.Attrs().Index
	if err := n.checkSubnet(); err != nil {
		return err
	}
	return settleParameters(n.cfg.Interface)
}

// ours are interfaces with the hardware address that the host's end has.
func ours(link netlink.Link) bool {
	return link.Type() == "veth" && bytes.Equal(link.Attrs().HardwareAddr, hardwareAddr(host))
}

// leads is true if an interface's other end is the fabric's uplink.
func (n *Network) leads(link netlink.Link) bool {
	uplink, err := n.fabric.kernel.LinkByName(uplinkName)
	return err == nil && uplink.Attrs().ParentIndex == link.Attrs().Index && link.Attrs().ParentIndex == uplink.Attrs().Index
}

// makeLink makes the pair, after what is left of an earlier one.
func (n *Network) makeLink(old netlink.Link) (netlink.Link, error) {
	if old != nil {
		if err := n.kernel.LinkDel(old); err != nil && !gone(err) {
			return nil, fmt.Errorf("remove interface %s: %w", n.cfg.Interface, err)
		}
	}
	if uplink, err := n.fabric.kernel.LinkByName(uplinkName); err == nil {
		if err := n.fabric.kernel.LinkDel(uplink); err != nil && !gone(err) {
			return nil, fmt.Errorf("remove uplink: %w", err)
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr = uplinkName, hardwareAddr(n.gateway)
	pair := &netlink.Veth{LinkAttrs: attrs, PeerName: n.cfg.Interface, PeerHardwareAddr: hardwareAddr(host), PeerNamespace: netlink.NsFd(n.ns.Fd())}
	if err := n.fabric.kernel.LinkAdd(pair); err != nil {
		return nil, fmt.Errorf("make interface %s: %w", n.cfg.Interface, err)
	}
	return n.kernel.LinkByName(n.cfg.Interface)
}

// raiseLink comes last: now the rules are there. The host finds containers
// behind the fabric, and nobody else of the range of an earlier configuration.
func (n *Network) raiseLink() error {
	// Hosts may have no other address to ask containers from.
	if err := n.wire.address(n.link, host); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("give interface %s its address: %w", n.cfg.Interface, err)
	}
	if err := n.wire.raise(n.link); err != nil {
		return fmt.Errorf("raise interface %s: %w", n.cfg.Interface, err)
	}
	if err := n.fabric.raise(); err != nil {
		return err
	}
	if err := n.wire.know(n.link, n.gateway); err != nil {
		return fmt.Errorf("tell the host of the fabric: %w", err)
	}
	routes, err := all(func() ([]netlink.Route, error) {
		return n.kernel.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{LinkIndex: n.link}, netlink.RT_FILTER_OIF)
	})
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		if p, ok := asPrefix(r.Dst); ok && p != n.cfg.Subnet {
			if err := n.kernel.RouteDel(&r); err != nil {
				return fmt.Errorf("remove route to %s: %w", p, err)
			}
		}
	}
	if err := n.wire.route(n.link, n.cfg.Subnet, n.gateway); err != nil {
		return fmt.Errorf("set route to %s: %w", n.cfg.Subnet, err)
	}
	return errors.Join(n.wire.settle(n.link), sysctl("ipv4/ip_forward", "1"))
}

// settleParameters makes an interface neither a proxy, nor a router of others'
// choosing, nor somebody to talk IPv6 to. Whichever defaults the host has.
func settleParameters(name string) error {
	for _, p := range [][2]string{
		{"ipv4/conf/%s/rp_filter", "1"},
		{"ipv4/conf/%s/route_localnet", "0"},
		{"ipv4/conf/%s/proxy_arp", "0"},
		{"ipv4/conf/%s/proxy_arp_pvlan", "0"},
		{"ipv4/conf/%s/accept_local", "0"},
		{"ipv4/conf/%s/accept_source_route", "0"},
		{"ipv4/conf/%s/accept_redirects", "0"},
		{"ipv4/conf/%s/send_redirects", "0"},
		{"ipv4/conf/%s/arp_ignore", "1"}, // tells of its own address alone
		{"ipv6/conf/%s/accept_ra", "0"},
		{"ipv6/conf/%s/disable_ipv6", "1"},
	} {
		err := sysctl(fmt.Sprintf(p[0], name), p[1])
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
		if p, ok := asPrefix(r.Dst); ok && r.LinkIndex != n.link && p.Bits() > 0 && p.Overlaps(n.cfg.Subnet) {
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

// hostAddrs are the host's addresses.
func (n *Network) hostAddrs() ([]netip.Addr, error) {
	addrs, err := all(func() ([]netlink.Addr, error) { return n.kernel.AddrList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	var hosts []netip.Addr
	for _, a := range addrs {
		if p, ok := asPrefix(a.IPNet); ok {
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
