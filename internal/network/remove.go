package network

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// removal takes connections off the host together. The kernel lets go of an
// interface, and of an element of a set, only after every processor has been
// seen to look at neither: that takes tens of milliseconds, for one as for a
// hundred.
type removal struct {
	mu      sync.Mutex
	waiting *batch // which the next removal takes

	turn sync.Mutex // one removal at a time
	last time.Time  // end of the last one; guarded by turn
}

// pause between two removals: while one is under way the kernel lets nobody
// else make an interface, and somebody may be waiting for one.
const pause = 100 * time.Millisecond

// batch is what is removed at once.
type batch struct {
	leases []Lease
	done   bool
	err    error
}

// Detach removes a connection. It may be repeated. Nobody gets the address
// before nothing is left of it.
func (n *Network) Detach(_ context.Context, l Lease) error {
	r := &n.removal
	r.mu.Lock()
	if r.waiting == nil {
		r.waiting = &batch{}
	}
	b := r.waiting
	b.leases = append(b.leases, l)
	r.mu.Unlock()

	r.turn.Lock()
	defer r.turn.Unlock()
	if b.done { // by another one that waited
		return b.err
	}
	time.Sleep(pause - time.Since(r.last))
	r.mu.Lock()
	r.waiting = nil // who comes now is in the next
	r.mu.Unlock()
	b.err, b.done = n.remove(b.leases), true
	r.last = time.Now()
	return b.err
}

// remove takes connections off the host and frees their addresses.
func (n *Network) remove(leases []Lease) error {
	if len(leases) == 0 {
		return nil
	}
	var errs []error
	for _, l := range leases {
		if l.Address.IsValid() {
			errs = append(errs, n.forget(l.Address))
		}
	}
	errs = append(errs, n.removeLinks(leases), n.dismiss(leases))
	n.mu.Lock()
	for _, l := range leases {
		if n.used[l.Address].ID == l.ID {
			delete(n.used, l.Address)
		}
	}
	n.mu.Unlock()
	return errors.Join(errs...)
}

// dismiss makes the guard forget containers, at once if it knows them all.
func (n *Network) dismiss(leases []Lease) error {
	if known := n.known(leases); len(known) > 0 {
		return n.guard.dismiss(known...)
	}
	return nil
}

// known are those of the leases that hold their address.
func (n *Network) known(leases []Lease) []Lease {
	n.mu.Lock()
	defer n.mu.Unlock()
	var known []Lease
	seen := map[string]bool{}
	for _, l := range leases {
		if held, ok := n.used[l.Address]; ok && held.ID == l.ID && !seen[l.ID] {
			known = append(known, l)
			seen[l.ID] = true
		}
	}
	return known
}

// forget removes what the host knows of an address.
func (n *Network) forget(a netip.Addr) error {
	err := netlink.NeighDel(&netlink.Neigh{Family: netlink.FAMILY_V4, LinkIndex: n.bridge, IP: a.AsSlice()})
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove neighbour %s: %w", a, err)
	}
	return nil
}

// leaving is the group of interfaces that are about to be removed. No two
// bridges of a host have the same.
func (n *Network) leaving() int { return 0x0fc00000 + n.bridge }

// removeLinks puts the interfaces into a group, and removes that.
func (n *Network) removeLinks(leases []Lease) error {
	var errs []error
	found := 0
	for _, l := range leases {
		link, err := netlink.LinkByName(l.Veth)
		if err == nil {
			err = netlink.LinkSetGroup(link, n.leaving())
		}
		if _, missing := errors.AsType[netlink.LinkNotFoundError](err); missing || errors.Is(err, unix.ENODEV) {
			continue // with its namespace
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("remove interface %s: %w", l.Veth, err))
			continue
		}
		found++
	}
	if found > 0 {
		req := nl.NewNetlinkRequest(unix.RTM_DELLINK, unix.NLM_F_ACK)
		req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
		req.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(uint32(n.leaving())))) //nolint:gosec // not negative
		if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, fmt.Errorf("remove interfaces: %w", err))
		}
	}
	return errors.Join(errs...)
}
