package network

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// uplink is an address of the host in the world beyond one of its interfaces.
type uplink struct {
	index int
	addr  netip.Prefix
}

// uplinks follows the host's addresses, for what containers send into the world
// leaves with one of them.
//
// The kernel would find it alone (masquerade), but then looks through all
// connections that the host has whenever one of its interfaces goes down.
type uplinks struct {
	changes *nl.NetlinkSocket
	closing atomic.Bool
	work    sync.WaitGroup
}

func openUplinks() (*uplinks, error) {
	changes, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_IPV4_IFADDR)
	if err != nil {
		return nil, fmt.Errorf("follow the host's addresses: %w", err)
	}
	return &uplinks{changes: changes}, nil
}

func (u *uplinks) close() {
	u.closing.Store(true)
	u.changes.Close()
	u.work.Wait()
}

// followUplinks tells nftables of them after each change, until n is closed.
func (n *Network) followUplinks() {
	for {
		_, _, err := n.uplinks.changes.Receive()
		switch {
		case n.uplinks.closing.Load():
			return
		case err != nil && !errors.Is(err, unix.ENOBUFS): // there were too many, and one is enough
			n.cfg.Logger.Error("changes of the host's addresses are not followed any more", "error", err, "hint", "restart the daemon after the next")
			return
		}
		list, err := n.listUplinks()
		if err == nil {
			err = n.filters.change(func(c *nftables.Conn) error { n.setSources(c, list); return nil })
		}
		if err != nil {
			n.cfg.Logger.Error("tell nftables of the host's addresses", "error", err)
		}
	}
}

// sources is the chain that gives what leaves the host its source.
const sources = "sources"

// setSources makes that an address of the interface by which it leaves, in the
// destination's own range if there is one, or else its first; if it has none,
// as on some links between two hosts, the first of all. Connections that exist
// keep theirs.
func (n *Network) setSources(c *nftables.Conn, list []uplink) {
	ch := &nftables.Chain{Name: sources, Table: n.tables()[0]}
	c.FlushChain(ch)
	first := map[int]bool{}
	var rest []uplink
	for _, u := range list {
		rule(c, ch, by(u.index), prefix(destination, u.addr, expr.CmpOpEq), as(u.addr.Addr()))
		if !first[u.index] {
			first[u.index] = true
			rest = append(rest, u)
		}
	}
	for _, u := range rest {
		rule(c, ch, by(u.index), as(u.addr.Addr()))
	}
	if len(rest) > 0 {
		rule(c, ch, as(rest[0].addr.Addr()))
	}
	rule(c, ch, verdict(expr.VerdictDrop))
}

// listUplinks lists the addresses that others may know, in the host's order.
func (n *Network) listUplinks() ([]uplink, error) {
	addrs, err := all(func() ([]netlink.Addr, error) { return n.kernel.AddrList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	var list []uplink
	for _, a := range addrs {
		p, ok := asPrefix(a.IPNet)
		if ok && a.Scope == unix.RT_SCOPE_UNIVERSE && a.Flags&unix.IFA_F_SECONDARY == 0 && a.LinkIndex != loopback && a.LinkIndex != n.link {
			list = append(list, uplink{a.LinkIndex, p})
		}
	}
	return list, nil
}

// by holds for what leaves by an interface.
func by(index int) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyOIF, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(uint32(index))}, //nolint:gosec // not negative
	}
}

// as gives a connection its source.
func as(a netip.Addr) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: a.AsSlice()},
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1},
	}
}
