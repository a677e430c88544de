package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// guard keeps each container at its own address: of what comes from a port of
// the bridge only IPv4 and ARP pass, and only with the addresses that belong
// to that port. Its sets are kept when a daemon ends, for containers go on.
type guard struct {
	ports, leases *nftables.Set
}

// openGuard makes the table, or takes over that of an earlier process. nil: the
// kernel has no nftables for bridges.
func (n *Network) openGuard() (*guard, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	t := c.AddTable(&nftables.Table{Family: nftables.TableFamilyBridge, Name: n.cfg.Table})
	lease, err := nftables.ConcatSetType(nftables.TypeIFName, nftables.TypeEtherAddr, nftables.TypeIPAddr)
	if err != nil {
		return nil, fmt.Errorf("make guard: %w", err)
	}
	g := &guard{
		ports:  &nftables.Set{Table: t, Name: "ports", KeyType: nftables.TypeIFName},
		leases: &nftables.Set{Table: t, Name: "leases", KeyType: lease, Concatenation: true},
	}
	for _, s := range []*nftables.Set{g.ports, g.leases} {
		if err := c.AddSet(s, nil); err != nil {
			return nil, fmt.Errorf("make guard: %w", err)
		}
	}
	ch := c.AddChain(&nftables.Chain{Name: "from", Table: t, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityFilter})
	c.FlushChain(ch)
	drop := []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}}
	for _, r := range [][][]expr.Any{
		{g.ours(), ethertype(unix.ETH_P_IP, expr.CmpOpEq), g.wrong(expr.PayloadBaseLLHeader, 6, 12), drop},
		{g.ours(), ethertype(unix.ETH_P_ARP, expr.CmpOpEq), g.wrong(expr.PayloadBaseNetworkHeader, 8, 14), drop},
		{g.ours(), ethertype(unix.ETH_P_IP, expr.CmpOpNeq), ethertype(unix.ETH_P_ARP, expr.CmpOpNeq), drop},
	} {
		var all []expr.Any
		for _, part := range r {
			all = append(all, part...)
		}
		c.AddRule(&nftables.Rule{Table: t, Chain: ch, Exprs: all})
	}
	switch err := c.Flush(); {
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EAFNOSUPPORT), errors.Is(err, unix.ENOENT):
		n.cfg.Logger.Warn("the kernel cannot check what containers send, so that one could take another's address for its own", "error", err, "hint", "modprobe nf_tables_bridge nft_meta_bridge")
		return nil, nil //nolint:nilnil // there is no guard
	case err != nil:
		return nil, fmt.Errorf("make guard: %w", err)
	}
	return g, nil
}

// ours holds for frames from a container.
func (g *guard) ours() []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}, &expr.Lookup{SourceRegister: 1, SetName: g.ports.Name, SetID: g.ports.ID}}
}

func ethertype(kind uint16, op expr.CmpOp) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: binaryutil.BigEndian.PutUint16(kind)}}
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

func portKey(name string) []byte {
	key := make([]byte, unix.IFNAMSIZ)
	copy(key, name)
	return key
}

func leaseKey(l Lease) []byte {
	key := append(portKey(l.Veth), hardwareAddr(l.Address)...)
	key = append(key, 0, 0) // to a whole register
	return append(key, l.Address.AsSlice()...)
}

// hardwareAddr of a container follows from its address; it is locally
// administered, and the same address always has the same one.
func hardwareAddr(a netip.Addr) net.HardwareAddr {
	return append(net.HardwareAddr{0x02, 0xfc}, a.AsSlice()...)
}

// change enters or removes containers, in one transaction.
func (g *guard) change(f func(*nftables.Conn, *nftables.Set, []nftables.SetElement) error, leases ...Lease) error {
	if g == nil {
		return nil
	}
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	var ports, all []nftables.SetElement
	for _, l := range leases {
		ports = append(ports, nftables.SetElement{Key: portKey(l.Veth)})
		all = append(all, nftables.SetElement{Key: leaseKey(l)})
	}
	if err := errors.Join(f(c, g.leases, all), f(c, g.ports, ports)); err != nil {
		return fmt.Errorf("change guard: %w", err)
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("change guard: %w", err)
	}
	return nil
}

func (g *guard) admit(l ...Lease) error {
	return g.change((*nftables.Conn).SetAddElements, l...)
}

// dismiss forgets containers. It may be repeated.
func (g *guard) dismiss(l ...Lease) error {
	err := g.change((*nftables.Conn).SetDeleteElements, l...)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// reset forgets all containers but these.
func (g *guard) reset(l ...Lease) error {
	return g.change(func(c *nftables.Conn, s *nftables.Set, e []nftables.SetElement) error {
		c.FlushSet(s)
		if len(e) == 0 {
			return nil
		}
		return c.SetAddElements(s, e)
	}, l...)
}
