package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// guard keeps each container at its own address: of what comes from a port of
// the bridge only IPv4 and ARP pass, and only with the addresses that belong
// to that port. Its set is kept when a daemon ends, for containers go on.
//
// It needs nftables for bridges (Linux 5.3; nf_tables_bridge). Without them a
// warning is logged, and these remain: a locked port, which takes only the
// container's hardware address (Linux 5.16), neighbours that are told for good,
// and that no packet leaves the bridge but from its subnet. Then a container
// may send packets in another one's name, but never receives the answers.
type guard struct {
	filters *filters
	leases  *nftables.Set
}

func (n *Network) guardTable() *nftables.Table {
	return &nftables.Table{Family: nftables.TableFamilyBridge, Name: n.cfg.Table}
}

// openGuard makes the table, or takes over that of an earlier process. nil: the
// kernel has no nftables for bridges.
func (n *Network) openGuard() (*guard, error) {
	kind, err := nftables.ConcatSetType(nftables.TypeIFName, nftables.TypeEtherAddr, nftables.TypeIPAddr)
	if err != nil {
		return nil, fmt.Errorf("make guard: %w", err)
	}
	t := n.guardTable()
	g := &guard{filters: n.fabric.filters, leases: &nftables.Set{Table: t, Name: "leases", KeyType: kind, Concatenation: true}}
	err = n.fabric.filters.change(func(c *nftables.Conn) error {
		c.AddTable(t)
		if err := c.AddSet(g.leases, nil); err != nil {
			return err
		}
		ch := c.AddChain(&nftables.Chain{Name: "from", Table: t, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityFilter})
		c.FlushChain(ch)
		drop := verdict(expr.VerdictDrop)
		rule(c, ch, ethertype(unix.ETH_P_IP, expr.CmpOpEq), g.wrong(expr.PayloadBaseLLHeader, 6, source), drop)
		rule(c, ch, ethertype(unix.ETH_P_ARP, expr.CmpOpEq), g.wrong(expr.PayloadBaseNetworkHeader, 8, 14), drop)
		rule(c, ch, ethertype(unix.ETH_P_IP, expr.CmpOpNeq), ethertype(unix.ETH_P_ARP, expr.CmpOpNeq), drop)
		return nil
	})
	switch {
	case unsupported(err):
		n.cfg.Logger.Warn("the kernel cannot check what containers send, so that one could send in another's name", "error", err, "hint", "modprobe nf_tables_bridge")
		return nil, nil //nolint:nilnil // there is no guard
	case err != nil:
		return nil, fmt.Errorf("make guard: %w", err)
	}
	return g, nil
}

// wrong holds if port, hardware address and IPv4 address, the latter two at
// offsets of the frame, are nobody's. They lie one after another in registers
// of four bytes.
func (g *guard) wrong(hardwareBase expr.PayloadBase, hardware, addr uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: unix.NFT_REG32_00},
		&expr.Payload{DestRegister: unix.NFT_REG32_00 + 4, Base: hardwareBase, Offset: hardware, Len: 6},
		&expr.Payload{DestRegister: unix.NFT_REG32_00 + 6, Base: expr.PayloadBaseNetworkHeader, Offset: addr, Len: 4},
		&expr.Lookup{SourceRegister: unix.NFT_REG32_00, SetName: g.leases.Name, SetID: g.leases.ID, Invert: true},
	}
}

// elements of the set: port, hardware address filled up to a whole register,
// and IPv4 address.
func elements(leases []Lease) []nftables.SetElement {
	all := make([]nftables.SetElement, 0, len(leases))
	for _, l := range leases {
		key := make([]byte, unix.IFNAMSIZ, unix.IFNAMSIZ+12)
		copy(key, l.Veth)
		key = append(append(key, hardwareAddr(l.Address)...), 0, 0)
		all = append(all, nftables.SetElement{Key: append(key, l.Address.AsSlice()...)})
	}
	return all
}

// hardwareAddr of a container follows from its address; it is locally
// administered, and the same address always has the same one.
func hardwareAddr(a netip.Addr) net.HardwareAddr {
	return append(slices.Clone(hardwarePrefix), a.AsSlice()...)
}

var hardwarePrefix = net.HardwareAddr{0x02, 0xfc}

func (g *guard) change(ask func(*nftables.Conn) error) error {
	if g == nil {
		return nil
	}
	if err := g.filters.change(ask); err != nil {
		return fmt.Errorf("change guard: %w", err)
	}
	return nil
}

// admit lets containers send.
func (g *guard) admit(l ...Lease) error {
	return g.change(func(c *nftables.Conn) error { return c.SetAddElements(g.leases, elements(l)) })
}

// dismiss forgets containers. It may be repeated.
func (g *guard) dismiss(l ...Lease) error {
	if len(l) == 0 {
		return nil
	}
	err := g.change(func(c *nftables.Conn) error { return c.SetDeleteElements(g.leases, elements(l)) })
	if errors.Is(err, unix.ENOENT) {
		// One was not there, and so none was removed.
		for _, one := range l {
			if err := g.change(func(c *nftables.Conn) error { return c.SetDeleteElements(g.leases, elements([]Lease{one})) }); err != nil && !errors.Is(err, unix.ENOENT) {
				return err
			}
		}
		return nil
	}
	return err
}

// reset forgets all containers but these.
func (g *guard) reset(l ...Lease) error {
	return g.change(func(c *nftables.Conn) error {
		c.FlushSet(g.leases)
		if len(l) == 0 {
			return nil
		}
		return c.SetAddElements(g.leases, elements(l))
	})
}
