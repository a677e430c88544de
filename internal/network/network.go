// Package network connects containers: a veth pair and an address for each
// container's network namespace, a namespace between them and the host that
// routes, and nftables tables of its own that let containers out and keep them
// from each other and from the host's services.
//
//	container         fabric                                host
//	eth0 10.89.0.7 ── port ─┐ takes only 10.89.0.7
//	eth0 10.89.0.8 ── port ─┴ 10.89.0.1 ─ uplink ────────── fc0 ── forward, NAT ── world
//
// Of what a container sends, the world is all that it reaches. It is reached
// from the host alone: by this process from within the fabric (see Control), by
// others through fc0.
package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// Config of a node's network. Two daemons on one host need different interfaces,
// subnets and tables.
type Config struct {
	Logger *slog.Logger
	// Interface is the name of the host's interface to them. Default fc0.
	Interface string
	// Subnet of the containers; its first address is the node's. Default
	// 10.89.0.0/16.
	Subnet netip.Prefix
	// Table is the name of the nftables tables, and of the fabric's namespace. Default fastcontainer.
	Table string
	// DNS servers for containers. Default: the host's.
	DNS []netip.Addr
	// Deny are IPv4 destinations that containers never reach, beside the
	// metadata addresses of clouds. They reach name servers even there.
	Deny []netip.Prefix
}

// Lease is one container's connection.
type Lease struct {
	ID      string     `json:"id"`
	Veth    string     `json:"veth"`
	Address netip.Addr `json:"address"`
}

// Network is the node's network. It belongs to the network namespace of the
// thread that opened it, whichever thread uses it.
type Network struct {
	cfg     Config
	link    int // the host's interface
	gateway netip.Addr
	hosts   []netip.Addr // the host's own addresses
	servers []netip.Addr

	*space  // the host's
	fabric  *fabric
	uplinks *uplinks
	removal removal
	pool    *pool
	// parameters of the containers' network namespaces.
	parameters parameters
}

// Open makes the fabric and the tables, or takes over those of an earlier
// process. Containers that are connected stay so. Close it.
func Open(ctx context.Context, c Config) (_ *Network, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	c, err = c.complete()
	if err != nil {
		return nil, err
	}
	n := &Network{cfg: c, gateway: c.Subnet.Addr().Next(), pool: newPool(c.Subnet)}
	if err := n.open(); err != nil {
		return nil, fmt.Errorf("open network: %w", errors.Join(err, n.Close()))
	}
	return n, nil
}

func (c Config) complete() (Config, error) {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Interface == "" {
		c.Interface = "fc0"
	}
	if !c.Subnet.IsValid() {
		c.Subnet = netip.MustParsePrefix("10.89.0.0/16")
	}
	if c.Table == "" {
		c.Table = "fastcontainer"
	}
	c.Subnet = c.Subnet.Masked()
	if !c.Subnet.Addr().Is4() || c.Subnet.Bits() > 29 || c.Subnet.Bits() < 8 {
		return c, &fleet.Error{Op: "open network", Subject: c.Subnet.String(), Kind: fleet.ErrInvalid, Err: errors.New("it must be an IPv4 prefix of 8 to 2^24 addresses"), Hint: "for example 10.89.0.0/16"}
	}
	deny := make([]netip.Prefix, 0, len(metadata)+len(c.Deny))
	for _, m := range metadata {
		deny = append(deny, netip.MustParsePrefix(m))
	}
	for _, d := range c.Deny {
		if !d.IsValid() {
			return c, &fleet.Error{Op: "open network", Subject: "deny", Kind: fleet.ErrInvalid, Err: errors.New("it holds something that is no prefix"), Hint: "for example 192.168.0.0/16"}
		}
		if d.Addr().Is4() { // they reach nothing by IPv6
			deny = append(deny, d)
		}
	}
	c.Deny = deny
	return c, nil
}

// open connects to the kernel and makes what is missing there.
func (n *Network) open() (err error) {
	ns, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return fmt.Errorf("open network namespace: %w", err)
	}
	if n.space, err = openSpace(ns); err != nil {
		return err
	}
	if n.hosts, err = n.hostAddrs(); err != nil {
		return err
	}
	n.servers = nameservers(n.cfg.DNS, n.hosts, resolvFiles, n.cfg.Logger)
	if n.fabric, err = openFabric(n.namespace()); err != nil {
		return err
	}
	defer func() {
		if err != nil && n.fabric.fresh {
			err = errors.Join(err, n.Remove())
		}
	}()
	if err := n.openLink(); err != nil {
		return err
	}
	if n.uplinks, err = openUplinks(); err != nil {
		return err
	}
	if err := n.fabric.furnish(n.gateway); err != nil {
		return err
	}
	if err := n.openTables(); err != nil {
		return err
	}
	if err := n.fabric.openTables(n.cfg.Table); err != nil {
		return err
	}
	n.uplinks.work.Go(n.followUplinks)
	return n.raiseLink()
}

// namespace is the file that holds the fabric.
func (n *Network) namespace() string { return filepath.Join(namespaces, n.cfg.Table) }

// namespaces is the directory of `ip netns`.
const namespaces = "/run/netns"

// Close lets go of the kernel. The fabric stays, for containers go on.
func (n *Network) Close() error {
	var errs []error
	n.parameters.close()
	if n.uplinks != nil {
		n.uplinks.close()
	}
	if n.fabric != nil {
		errs = append(errs, n.fabric.close())
	}
	if n.space != nil {
		errs = append(errs, n.space.close())
	}
	return errors.Join(errs...)
}

// Remove takes the interface, the fabric and the tables off the host, as if
// they had never been. It refuses while containers are connected. Close it
// nevertheless.
func (n *Network) Remove() error {
	ports, err := n.fabric.ports()
	if err != nil {
		return fmt.Errorf("remove network: %w", err)
	}
	if len(ports) > 0 {
		return &fleet.Error{Op: "remove network", Subject: n.cfg.Interface, Kind: fleet.ErrConflict, Err: fmt.Errorf("%d containers are connected", len(ports)), Hint: "stop all containers first"}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.Index = n.cfg.Interface, n.link
	var errs []error
	if n.link != 0 {
		if err := n.kernel.LinkDel(&netlink.Veth{LinkAttrs: attrs}); err != nil && !gone(err) {
			errs = append(errs, fmt.Errorf("remove interface %s: %w", n.cfg.Interface, err))
		}
	}
	for _, t := range n.tables() {
		err := n.filters.change(func(c *nftables.Conn) error { c.DelTable(t); return nil })
		if err != nil && !unsupported(err) { // it is not there
			errs = append(errs, fmt.Errorf("remove nftables table %s: %w", t.Name, err))
		}
	}
	return errors.Join(append(errs, release(n.fabric.file))...)
}

// Control is that of a net.Dialer: its connections to containers begin within
// the fabric, past the host's firewall and its table of connections, and
// containers see the node's address. To elsewhere it connects as any other.
//
// A socket belongs to the network namespace in which it was made, so one from
// there takes the place of the dialer's.
func (n *Network) Control(network, address string, c syscall.RawConn) error {
	kind := unix.SOCK_STREAM
	if strings.HasPrefix(network, "udp") {
		kind = unix.SOCK_DGRAM
	}
	to, err := netip.ParseAddrPort(address)
	if err != nil || !n.cfg.Subnet.Contains(to.Addr()) {
		return nil //nolint:nilerr // a path, of a unix socket
	}
	made := -1
	err = inNamespace(int(n.fabric.ns.Fd()), func() (err error) {
		made, err = unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		return err
	})
	if err != nil {
		return fmt.Errorf("make socket in the fabric: %w", err)
	}
	defer func() { _ = unix.Close(made) }()
	if e := c.Control(func(fd uintptr) { err = unix.Dup3(made, int(fd), unix.O_CLOEXEC) }); e != nil {
		return e
	}
	return err
}

// Attach connects the network namespace behind a descriptor. id must be unique
// on the host and at most 15 bytes: it is the interface's name. Nothing is left
// of a connection that failed.
func (n *Network) Attach(ctx context.Context, id string, netns int) (Lease, error) {
	if err := ctx.Err(); err != nil {
		return Lease{}, err
	}
	if id == "" || len(id) >= unix.IFNAMSIZ {
		return Lease{}, &fleet.Error{Op: "connect container", Subject: id, Kind: fleet.ErrInvalid, Err: fmt.Errorf("its name must have 1 to %d bytes", unix.IFNAMSIZ-1)}
	}
	lease, err := n.pool.take(id)
	if err != nil {
		return Lease{}, err
	}
	made, err := n.connect(lease, netns)
	if err != nil {
		if made {
			err = errors.Join(err, n.removeLinks([]Lease{lease}))
		}
		n.pool.free(lease)
		return Lease{}, fmt.Errorf("connect container %s: %w", id, err)
	}
	return lease, nil
}

// connect makes a connection. eth0 is raised last, so that the first that passes
// meets all that keeps it in.
func (n *Network) connect(l Lease, netns int) (made bool, err error) {
	port := 0
	err = inNamespace(netns, func() error {
		if err := n.cutIPv6(); err != nil {
			return err
		}
		if err := n.fabric.wire.makePort(l.Veth, netns, l.Address); err != nil {
			return fmt.Errorf("make interface: %w", err)
		}
		made = true
		if port, err = n.fabric.wire.index(l.Veth); err != nil {
			return fmt.Errorf("find interface: %w", err)
		}
		if err := n.fabric.wire.reach(port, l.Address, n.gateway); err != nil {
			return fmt.Errorf("set route: %w", err)
		}
		return n.furnish(l.Address)
	})
	if err != nil {
		return made, err
	}
	return true, n.fabric.wire.settle(port)
}

// cutIPv6 takes IPv6 from all interfaces to come in the calling thread's
// network namespace, which has loopback alone yet. That keeps its ::1. (To take
// it from those that exist needs rtnl, and the kernel spins until it gets it.)
func (n *Network) cutIPv6() error {
	err := n.parameters.set("ipv6/conf/default/disable_ipv6", "1")
	if errors.Is(err, os.ErrNotExist) { // the kernel has none
		return nil
	}
	return err
}

const loopback = 1 // the kernel gives this number to no other

// furnish sets up the calling thread's network namespace. Its eth0 is there.
func (n *Network) furnish(addr netip.Addr) error {
	// Programs that are not root listen at port 80 and ping, as they are used to.
	// Those of Go would use multipath TCP, which cannot be saved and restored, and
	// has one path only here.
	for _, s := range [][2]string{{"ipv4/ip_unprivileged_port_start", "0"}, {"ipv4/ping_group_range", "0 65535"}, {"mptcp/enabled", "0"}} {
		if err := n.parameters.set(s[0], s[1]); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.EINVAL) { // a user namespace may lack the group
			return err
		}
	}
	w, err := openWire()
	if err != nil {
		return err
	}
	defer w.close()
	eth, err := w.index("eth0")
	if err != nil {
		return fmt.Errorf("find eth0: %w", err)
	}
	if err := w.raise(loopback); err != nil {
		return fmt.Errorf("raise lo: %w", err)
	}
	if err := w.address(eth, addr); err != nil {
		return fmt.Errorf("give address: %w", err)
	}
	if err := w.raise(eth); err != nil {
		return fmt.Errorf("raise eth0: %w", err)
	}
	if err := w.route(eth, netip.PrefixFrom(netip.IPv4Unspecified(), 0), n.gateway); err != nil {
		return fmt.Errorf("set route: %w", err)
	}
	return nil
}

// Adopt marks the address of a connection that an earlier process made.
func (n *Network) Adopt(l Lease) error { return n.pool.adopt(l) }

// Clean removes every connection that is not in keep. It gives their names.
func (n *Network) Clean(ctx context.Context, keep []string) ([]string, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	n.removal.turn.Lock() // nobody leaves meanwhile
	defer n.removal.turn.Unlock()
	removed, err := n.fabric.ports()
	if err != nil {
		return nil, err
	}
	removed = slices.DeleteFunc(removed, func(name string) bool { return slices.Contains(keep, name) })
	held := n.pool.all()
	orphans := make([]Lease, 0, len(removed))
	for _, name := range removed {
		l, ok := held[name]
		if !ok {
			l = Lease{ID: name, Veth: name}
		}
		orphans = append(orphans, l)
	}
	if err := n.remove(orphans); err != nil {
		return nil, err
	}
	return removed, nil
}

// ResolvConf is what containers find as /etc/resolv.conf.
func (n *Network) ResolvConf() []byte { return resolvConf(n.servers) }
