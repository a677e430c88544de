package network

import (
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// openTable replaces the table as a whole, in one transaction: there is no
// moment without it.
func (n *Network) openTable() error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	t := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: n.cfg.Table}
	c.AddTable(t)
	c.DelTable(t)
	c.AddTable(t)
	chain := func(name string, kind nftables.ChainType, hook *nftables.ChainHook, priority *nftables.ChainPriority) *nftables.Chain {
		return c.AddChain(&nftables.Chain{Name: name, Table: t, Type: kind, Hooknum: hook, Priority: priority})
	}
	rule := func(ch *nftables.Chain, parts ...[]expr.Any) {
		var all []expr.Any
		for _, p := range parts {
			all = append(all, p...)
		}
		c.AddRule(&nftables.Rule{Table: t, Chain: ch, Exprs: all})
	}
	accept, drop := []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}, []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}}
	from := iface(expr.MetaKeyIIFNAME, n.cfg.Bridge, expr.CmpOpEq)
	to := iface(expr.MetaKeyOIFNAME, n.cfg.Bridge, expr.CmpOpEq)
	notTo := iface(expr.MetaKeyOIFNAME, n.cfg.Bridge, expr.CmpOpNeq)
	ours := n.prefix(12, n.cfg.Subnet.Bits(), n.cfg.Subnet.Addr().AsSlice(), expr.CmpOpEq)
	notOurs := n.prefix(12, n.cfg.Subnet.Bits(), n.cfg.Subnet.Addr().AsSlice(), expr.CmpOpNeq)

	// Containers reach nothing of the host; they answer it.
	in := chain("input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter)
	rule(in, from, established(), accept)
	rule(in, from, drop)

	// Containers reach the world, with their own addresses, but not each other.
	fwd := chain("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter)
	rule(fwd, from, notOurs, drop)
	rule(fwd, from, to, drop)
	for _, d := range n.cfg.Deny {
		rule(fwd, from, n.prefix(16, d.Bits(), d.Masked().Addr().AsSlice(), expr.CmpOpEq), drop)
	}
	rule(fwd, from, accept)
	rule(fwd, to, established(), accept)
	rule(fwd, to, drop)

	nat := chain("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource)
	rule(nat, ours, notTo, []expr.Any{&expr.Masq{}})
	if err := c.Flush(); err != nil {
		return fmt.Errorf("write nftables table %s: %w", n.cfg.Table, err)
	}
	return nil
}

func iface(key expr.MetaKey, name string, op expr.CmpOp) []expr.Any {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: b}}
}

// prefix compares an address of the IPv4 header, at an offset of it.
func (n *Network) prefix(offset uint32, bits int, addr []byte, op expr.CmpOp) []expr.Any {
	mask := binaryutil.BigEndian.PutUint32(^uint32(0) << (32 - bits))
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: mask, Xor: make([]byte, 4)},
		&expr.Cmp{Op: op, Register: 1, Data: addr},
	}
}

func established() []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}
