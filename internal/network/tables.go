package network

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/slow"
)

// filters changes nftables, one transaction at a time, in one network
// namespace. It keeps its connection, for each container changes them twice.
type filters struct {
	home *os.File

	mu   sync.Mutex
	conn *nftables.Conn
}

// change makes all that f asks for, or nothing.
func (f *filters) change(ask func(*nftables.Conn) error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.conn == nil {
		conn, err := nftables.New(nftables.AsLasting(), nftables.WithNetNSFd(int(f.home.Fd())))
		if err != nil {
			return fmt.Errorf("open nftables: %w", err)
		}
		f.conn = conn
	}
	err := ask(f.conn)
	if err == nil {
		slow.Ahead()
		err = f.conn.Flush()
	}
	if err != nil { // the connection may still hold questions, or answers
		_ = f.conn.CloseLasting()
		f.conn = nil
	}
	return err
}

func (f *filters) close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.conn == nil {
		return nil
	}
	return f.conn.CloseLasting()
}

// unsupported is true if the kernel lacks a part of nftables.
func unsupported(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.ENOENT)
}

// metadata is where clouds tell a machine its secrets.
var metadata = []string{
	"169.254.0.0/16",     // nearly all of them
	"100.100.100.200/32", // Alibaba
	"168.63.129.16/32",   // Azure
	"192.0.0.192/32",     // Oracle
}

// openTables replaces the tables as a whole, in one transaction: there is no
// moment without them.
//
// What they cannot do is to let something pass that another firewall of the
// host refuses: a packet passes if all tables accept it. The host reaches its
// containers nevertheless, for firewalls that refuse forwarded packets do not
// look at those that the host sends, and those of input accept answers. But
// containers reach the world only if such a firewall forwards what comes from
// and goes to the interface.
func (n *Network) openTables() error {
	list, err := n.listUplinks()
	if err != nil {
		return err
	}
	err = n.filters.change(func(c *nftables.Conn) error {
		for _, t := range n.tables() {
			c.AddTable(t)
			c.DelTable(t)
			c.AddTable(t)
		}
		n.addFilter(c, n.tables()[0])
		n.setSources(c, list)
		n.addCut(c, n.tables()[1])
		return nil
	})
	if unsupported(err) {
		return &fleet.Error{Op: "write nftables tables", Subject: n.cfg.Table, Kind: fleet.ErrUnavailable, Err: err, Hint: "modprobe nf_tables nft_ct nft_nat nft_chain_nat"}
	}
	if err != nil {
		return fmt.Errorf("write nftables tables %s: %w", n.cfg.Table, err)
	}
	return nil
}

func (n *Network) tables() []*nftables.Table {
	return []*nftables.Table{
		{Family: nftables.TableFamilyIPv4, Name: n.cfg.Table},
		{Family: nftables.TableFamilyINet, Name: n.cfg.Table},
	}
}

func rule(c *nftables.Conn, ch *nftables.Chain, parts ...[]expr.Any) {
	var all []expr.Any
	for _, p := range parts {
		all = append(all, p...)
	}
	c.AddRule(&nftables.Rule{Table: ch.Table, Chain: ch, Exprs: all})
}

func verdict(k expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: k}} }

// addFilter lets containers out, and nobody in but the host.
func (n *Network) addFilter(c *nftables.Conn, t *nftables.Table) {
	chain := func(name string, kind nftables.ChainType, hook *nftables.ChainHook, priority *nftables.ChainPriority) *nftables.Chain {
		return c.AddChain(&nftables.Chain{Name: name, Table: t, Type: kind, Hooknum: hook, Priority: priority})
	}
	accept, drop := verdict(expr.VerdictAccept), verdict(expr.VerdictDrop)
	from := iface(expr.MetaKeyIIFNAME, n.cfg.Interface, expr.CmpOpEq)
	to := iface(expr.MetaKeyOIFNAME, n.cfg.Interface, expr.CmpOpEq)
	notTo := iface(expr.MetaKeyOIFNAME, n.cfg.Interface, expr.CmpOpNeq)
	subnet := n.cfg.Subnet

	// Containers reach nothing of the host, at whichever address; they answer it.
	in := chain("input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter)
	rule(c, in, from, established(), accept)
	rule(c, in, from, drop)

	// Containers reach the world, with their own addresses, but not each other.
	// A name server may be where a cloud keeps its metadata.
	fwd := chain("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter)
	rule(c, fwd, from, prefix(source, subnet, expr.CmpOpNeq), drop)
	rule(c, fwd, from, to, drop)
	for _, s := range n.servers {
		for _, transport := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
			rule(c, fwd, from, prefix(destination, hostPrefix(s), expr.CmpOpEq), domain(transport), accept)
		}
	}
	for _, d := range n.cfg.Deny {
		rule(c, fwd, from, prefix(destination, d, expr.CmpOpEq), drop)
	}
	rule(c, fwd, from, accept)
	rule(c, fwd, to, established(), accept)
	rule(c, fwd, to, drop)

	nat := chain("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource)
	c.AddChain(&nftables.Chain{Name: sources, Table: t})
	rule(c, nat, prefix(source, subnet, expr.CmpOpEq), notTo, []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: sources}})
}

// addCut cuts all of IPv6.
func (n *Network) addCut(c *nftables.Conn, t *nftables.Table) {
	drop := verdict(expr.VerdictDrop)
	ipv6 := []expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.NFPROTO_IPV6}}}
	from := c.AddChain(&nftables.Chain{Name: "from", Table: t, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRaw})
	rule(c, from, ipv6, iface(expr.MetaKeyIIFNAME, n.cfg.Interface, expr.CmpOpEq), drop)
	to := c.AddChain(&nftables.Chain{Name: "to", Table: t, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityRaw})
	rule(c, to, ipv6, iface(expr.MetaKeyOIFNAME, n.cfg.Interface, expr.CmpOpEq), drop)
}
