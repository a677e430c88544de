package network

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// world is a host of its own: a network namespace and beyond it, through an
// uplink, the rest of the world, another one. Whatever a test does there, it
// does with in: the namespace that its goroutine is in is the machine's own.
type world struct {
	t             testing.TB
	host, outside int // network namespaces
	net           *Network
}

const (
	hostAddr    = "192.0.2.1"
	outsideAddr = "192.0.2.2"
	otherAddr   = "198.51.100.7" // the host has it, too
	cloudAddr   = "169.254.169.254"
	deniedAddr  = "203.0.113.9"
)

// newNamespace makes a network namespace that only a descriptor keeps.
func newNamespace(t testing.TB) int {
	t.Helper()
	fd := -1
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		var err error
		fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

// onThread runs f on a thread that ends with it.
func onThread(f func() error) error {
	errs := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		errs <- f()
	}()
	return <-errs
}

func newWorld(t testing.TB, c Config) *world {
	t.Helper()
	w := &world{t: t, host: newNamespace(t), outside: newNamespace(t)}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "up0"
	w.in(w.host, func() error {
		return errors.Join(up("lo"), addAddr("lo", otherAddr+"/32"),
			netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "out0", PeerNamespace: netlink.NsFd(w.outside)}),
			addAddr("up0", hostAddr+"/24"), up("up0"))
	})
	w.in(w.outside, func() error {
		return errors.Join(up("lo"), addAddr("out0", outsideAddr+"/24"), addAddr("out0", cloudAddr+"/32"), addAddr("out0", deniedAddr+"/32"), up("out0"))
	})
	w.in(w.host, func() error {
		_, all, _ := net.ParseCIDR("0.0.0.0/0")
		return netlink.RouteAdd(&netlink.Route{Dst: all, Gw: net.ParseIP(outsideAddr)})
	})
	c.Interface, c.Table = "fcb", "fct"
	if !c.Subnet.IsValid() {
		c.Subnet = netip.MustParsePrefix("10.123.0.0/24")
	}
	var err error
	if w.net, err = w.open(c); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(w.net.Close(), release(w.net.namespace())); err != nil {
			t.Error(err)
		}
	})
	return w
}

// open is a daemon on the world's host.
func (w *world) open(c Config) (n *Network, err error) {
	err = inNamespace(w.host, func() (err error) {
		n, err = Open(context.Background(), c)
		return err
	})
	return n, err
}

// reopen is a new process, as after kill -9.
func (w *world) reopen(adopt ...box) {
	w.t.Helper()
	w.do("end", w.net.Close)
	var err error
	if w.net, err = w.open(Config{Interface: "fcb", Table: "fct", Subnet: w.net.cfg.Subnet}); err != nil {
		w.t.Fatal(err)
	}
	for _, b := range adopt {
		w.do("adopt", func() error { return w.net.Adopt(b.lease) })
	}
}

// in does something in a namespace, which must succeed. f must not end the test.
func (w *world) in(ns int, f func() error) {
	w.t.Helper()
	if err := inNamespace(ns, f); err != nil {
		w.t.Fatal(err)
	}
}

// nft is the host's.
func (w *world) nft(args ...string) string { w.t.Helper(); return w.nftIn(w.host, args...) }

func (w *world) nftIn(ns int, args ...string) string {
	w.t.Helper()
	var out []byte
	w.in(ns, func() (err error) {
		if out, err = exec.Command("nft", args...).CombinedOutput(); err != nil { // a child has its parent thread's namespace
			return fmt.Errorf("nft %q: %w: %s", args, err, out)
		}
		return nil
	})
	return string(out)
}

func (w *world) do(what string, f func() error) {
	w.t.Helper()
	if err := f(); err != nil {
		w.t.Fatalf("%s: %v", what, err)
	}
}

func up(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(l)
}

func addAddr(name, addr string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	a, err := netlink.ParseAddr(addr)
	if err != nil {
		return err
	}
	return netlink.AddrAdd(l, a)
}

// box is one container's namespace.
type box struct {
	ns    int
	lease Lease
}

var boxes int

func (w *world) attach() box {
	w.t.Helper()
	boxes++
	b := box{ns: newNamespace(w.t)}
	var err error
	if b.lease, err = w.net.Attach(w.t.Context(), fmt.Sprintf("box%d", boxes), b.ns); err != nil {
		w.t.Fatal(err)
	}
	return b
}

// serve answers each connection with the address that it came from.
func (w *world) serve(ns int, addr string) {
	w.t.Helper()
	w.in(ns, func() error {
		l, err := net.Listen("tcp4", addr)
		if err != nil {
			return err
		}
		w.t.Cleanup(func() { _ = l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = io.WriteString(c, c.RemoteAddr().(*net.TCPAddr).IP.String())
				_ = c.Close()
			}
		}()
		return nil
	})
}

// ask connects from a namespace and reads what the server says. from, if not
// empty, is the address to come from.
func (w *world) ask(ns int, addr, from string) (said string, err error) {
	err = inNamespace(ns, func() error {
		// The socket is made here, on this thread: a Dialer might use others.
		s, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(s) }()
		tv := unix.Timeval{Usec: 400_000}
		_ = unix.SetsockoptTimeval(s, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv)
		_ = unix.SetsockoptTimeval(s, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
		if from != "" {
			if err := unix.Bind(s, &unix.SockaddrInet4{Addr: netip.MustParseAddr(from).As4()}); err != nil {
				return err
			}
		}
		ap := netip.MustParseAddrPort(addr)
		if err := unix.Connect(s, &unix.SockaddrInet4{Addr: ap.Addr().As4(), Port: int(ap.Port())}); err != nil {
			return err
		}
		var buf [64]byte
		n, err := unix.Read(s, buf[:])
		if n > 0 {
			said = string(buf[:n])
		}
		return err
	})
	return said, err
}

// dial connects as a daemon does that runs elsewhere than this test: on a thread
// of the host.
func (w *world) dial(addr string) (said string, err error) {
	err = inNamespace(w.host, func() error {
		c, err := (&net.Dialer{Control: w.net.Control}).DialContext(w.t.Context(), "tcp", addr)
		if err != nil {
			return err
		}
		defer func() { _ = c.Close() }()
		b, err := io.ReadAll(c)
		said = string(b)
		return err
	})
	return said, err
}

func TestContainers_ReachTheWorldAndNothingElse(t *testing.T) {
	w := newWorld(t, Config{Deny: []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("fd00::/8")}})
	a, b := w.attach(), w.attach()
	second, err := w.open(Config{Interface: "fcc", Table: "fcu", Subnet: netip.MustParsePrefix("10.123.1.0/24")})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = errors.Join(second.Close(), release(second.namespace())) }()
	far := box{ns: newNamespace(t)}
	if far.lease, err = second.Attach(t.Context(), "far", far.ns); err != nil {
		t.Fatal(err)
	}
	for _, ns := range []int{a.ns, b.ns, far.ns, w.outside, w.host} {
		w.serve(ns, "0.0.0.0:7000")
	}
	// The host reaches the container; the daemon as the node.
	if from, err := w.ask(w.host, a.lease.Address.String()+":7000", ""); err != nil || from == w.net.gateway.String() {
		t.Errorf("host to container: %q, %v", from, err)
	}
	if from, err := w.dial(a.lease.Address.String() + ":7000"); err != nil || from != w.net.gateway.String() {
		t.Errorf("daemon to container: %q, %v", from, err)
	}
	hear := w.listen(a.ns, "udp4", "0.0.0.0:7001")
	w.in(w.host, func() error {
		c, err := (&net.Dialer{Control: w.net.Control}).DialContext(t.Context(), "udp", a.lease.Address.String()+":7001")
		if err != nil {
			return err
		}
		_, err = io.WriteString(c, "from "+c.LocalAddr().(*net.UDPAddr).IP.String())
		return errors.Join(err, c.Close())
	})
	if heard := hear(); heard != "from "+w.net.gateway.String() {
		t.Errorf("by UDP the container hears %q", heard)
	}
	// The container reaches the world, which sees the host's address.
	if from, err := w.ask(a.ns, outsideAddr+":7000", ""); err != nil || from != hostAddr {
		t.Errorf("container to the world: %q, %v", from, err)
	}
	for _, own := range []string{"127.0.0.1", "0.0.0.0", a.lease.Address.String()} {
		if _, err := w.ask(a.ns, own+":7000", ""); err != nil {
			t.Errorf("container to itself as %s: %v", own, err)
		}
	}
	for what, addr := range map[string]string{
		"a neighbour": b.lease.Address.String(), "a container of another daemon": far.lease.Address.String(),
		"the node": w.net.gateway.String(), "another node": second.gateway.String(),
		"the host by its uplink": hostAddr, "the host by its loopback": otherAddr, "all": "10.123.0.255",
		"the metadata address": cloudAddr, "what is denied": deniedAddr,
	} {
		if from, err := w.ask(a.ns, addr+":7000", ""); err == nil {
			t.Errorf("a container reaches %s, which sees %s", what, from)
		}
	}
	if _, err := w.ask(w.outside, a.lease.Address.String()+":7000", ""); err == nil {
		t.Error("the world reaches a container")
	}
	// By way of the host is no way.
	w.in(a.ns, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.NeighSet(&netlink.Neigh{Family: netlink.FAMILY_V4, LinkIndex: l.Attrs().Index, State: netlink.NUD_PERMANENT, IP: b.lease.Address.AsSlice(), HardwareAddr: hardwareAddr(w.net.gateway)})
	})
	for _, addr := range []string{b.lease.Address.String(), w.net.gateway.String()} {
		if _, err := w.ask(a.ns, addr+":7000", ""); err == nil {
			t.Errorf("a container reaches %s", addr)
		}
	}
}

// A name server where clouds have their metadata answers questions, and no
// others.
func TestContainers_AskNameServersAnywhere(t *testing.T) {
	w := newWorld(t, Config{DNS: []netip.Addr{netip.MustParseAddr(cloudAddr), netip.MustParseAddr(hostAddr), netip.MustParseAddr("::1")}})
	if got := string(w.net.ResolvConf()); got != "nameserver "+cloudAddr+"\n" { // the host's address is not reached
		t.Errorf("resolv.conf: %q", got)
	}
	a := w.attach()
	w.serve(w.outside, cloudAddr+":53")
	w.serve(w.outside, cloudAddr+":80")
	if _, err := w.ask(a.ns, cloudAddr+":53", ""); err != nil {
		t.Errorf("name server: %v", err)
	}
	if _, err := w.ask(a.ns, cloudAddr+":80", ""); err == nil {
		t.Error("the metadata is reached")
	}
}

// Another firewall that forwards nothing does not keep the host from its
// containers.
func TestHost_ReachesContainersBesideAnotherFirewall(t *testing.T) {
	w := newWorld(t, Config{})
	a := w.attach()
	w.serve(a.ns, "0.0.0.0:7000")
	w.nft("add table ip other; add chain ip other forward { type filter hook forward priority 0; policy drop; }; " +
		"add chain ip other input { type filter hook input priority 0; policy drop; }; add rule ip other input ct state established accept")
	if _, err := w.ask(w.host, a.lease.Address.String()+":7000", ""); err != nil {
		t.Error(err)
	}
}

// A tenant that is root in its namespace takes its neighbour's addresses, or the
// node's, for its own: nothing that it sends passes, and its neighbour is still reached.
func TestContainers_CannotPretendToBeAnother(t *testing.T) {
	w := newWorld(t, Config{})
	thief, victim := w.attach(), w.attach()
	w.serve(victim.ns, "0.0.0.0:7000")
	w.serve(w.outside, "0.0.0.0:7000")
	stolen := victim.lease.Address.String()
	if _, err := w.ask(thief.ns, outsideAddr+":7000", thief.lease.Address.String()); err != nil {
		t.Errorf("its own address: %v", err)
	}
	for _, from := range []string{stolen, w.net.gateway.String(), hostAddr, host.String(), outsideAddr} {
		w.in(thief.ns, func() error { return addAddr("lo", from+"/32") })
		if heard, err := w.ask(thief.ns, outsideAddr+":7000", from); err == nil {
			t.Errorf("the world hears %s from the thief, who said %s", heard, from)
		}
	}
	if from, err := w.ask(w.host, stolen+":7000", ""); err != nil || from == "" {
		t.Errorf("the victim is not reached any more: %v", err)
	}
	link, err := w.net.kernel.LinkByName("fcb")
	if err != nil {
		t.Fatal(err)
	}
	if addrs, err := w.net.kernel.AddrList(link, netlink.FAMILY_V6); err != nil || len(addrs) > 0 {
		t.Errorf("the interface has IPv6: %v, %v", addrs, err)
	}
}

func TestAttach_Exhausted(t *testing.T) {
	w := newWorld(t, Config{Subnet: netip.MustParsePrefix("10.123.0.0/29")})
	var all []box
	for range 5 { // 8 less network, broadcast and gateway
		all = append(all, w.attach())
	}
	ns := newNamespace(t)
	if _, err := w.net.Attach(t.Context(), "more", ns); !errors.Is(err, fleet.ErrOverloaded) || fleet.Hint(err) == "" {
		t.Errorf("got %v", err)
	}
	if err := w.net.Detach(t.Context(), all[2].lease); err != nil {
		t.Fatal(err)
	}
	l, err := w.net.Attach(t.Context(), "more", ns)
	if err != nil || l.Address != all[2].lease.Address {
		t.Errorf("got %+v, %v", l, err)
	}
}

func TestOpen_RefusesARangeInUse(t *testing.T) {
	w := newWorld(t, Config{})
	_, err := w.open(Config{Interface: "fcc", Table: "fcu", Subnet: netip.MustParsePrefix("192.0.2.0/25")})
	if !errors.Is(err, fleet.ErrConflict) || fleet.Hint(err) == "" {
		t.Errorf("got %v", err)
	}
	if _, err := w.open(Config{Subnet: netip.MustParsePrefix("fd00::/64")}); !errors.Is(err, fleet.ErrInvalid) {
		t.Errorf("got %v", err)
	}
	if _, err := w.open(Config{Interface: "up0", Table: "fcu", Subnet: netip.MustParsePrefix("10.123.9.0/24")}); !errors.Is(err, fleet.ErrConflict) {
		t.Errorf("an interface of the host: %v", err)
	}
	if _, err := w.open(Config{Interface: "fcc", Table: "fcu", Subnet: netip.MustParsePrefix("198.51.100.0/24")}); !errors.Is(err, fleet.ErrConflict) {
		t.Errorf("a range that holds an address of the host: %v", err)
	}
	for range 2 { // it may be repeated
		if err := w.net.Remove(); err != nil {
			t.Error(err)
		}
	}
	if links, _ := w.net.kernel.LinkList(); len(links) != 2 { // lo, up0
		t.Errorf("%d links are left", len(links))
	}
	if rules := w.nft("list", "ruleset"); rules != "" {
		t.Errorf("left: %s", rules)
	}
	for _, name := range []string{"fct", "fcu"} {
		if _, err := os.Stat(filepath.Join(namespaces, name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("left: namespace %s, %v", name, err)
		}
	}
}

// Another range takes the place of the former, unless containers rely on it.
func TestOpen_WithAnotherRange(t *testing.T) {
	w := newWorld(t, Config{})
	a := w.attach()
	other := Config{Interface: "fcb", Table: "fct", Subnet: netip.MustParsePrefix("10.123.8.0/24")}
	if _, err := w.open(other); !errors.Is(err, fleet.ErrConflict) || fleet.Hint(err) == "" {
		t.Errorf("with a container: %v", err)
	}
	if err := w.net.Detach(t.Context(), a.lease); err != nil {
		t.Fatal(err)
	}
	n, err := w.open(other)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = n.Close() }()
	if err := n.Adopt(a.lease); !errors.Is(err, fleet.ErrConflict) {
		t.Errorf("adopt an address of the former range: %v", err)
	}
	b := box{ns: newNamespace(t)}
	if b.lease, err = n.Attach(t.Context(), "other", b.ns); err != nil {
		t.Fatal(err)
	}
	w.serve(b.ns, "0.0.0.0:7000")
	err = inNamespace(w.host, func() error {
		c, err := (&net.Dialer{Control: n.Control}).DialContext(t.Context(), "tcp", b.lease.Address.String()+":7000")
		if err != nil {
			return err
		}
		said, err := io.ReadAll(c)
		if string(said) != "10.123.8.1" {
			t.Errorf("it is asked by %s", said)
		}
		return errors.Join(err, c.Close())
	})
	if err != nil {
		t.Error(err)
	}
	if err := n.Detach(t.Context(), b.lease); err != nil {
		t.Error(err)
	}
}

// Somebody removed the host's interface, or holds one of its name.
func TestOpen_MendsTheLink(t *testing.T) {
	w := newWorld(t, Config{})
	a := w.attach()
	w.serve(a.ns, "0.0.0.0:7000")
	w.serve(w.outside, "0.0.0.0:7000")
	remove := func() error {
		l, err := netlink.LinkByName("fcb")
		if err != nil {
			return err
		}
		return netlink.LinkDel(l)
	}
	w.in(w.host, remove)
	w.reopen(a)
	if _, err := w.ask(w.host, a.lease.Address.String()+":7000", ""); err != nil {
		t.Errorf("the host does not reach the container any more: %v", err)
	}
	if _, err := w.ask(a.ns, outsideAddr+":7000", ""); err != nil {
		t.Errorf("the container does not reach the world any more: %v", err)
	}
	w.in(w.host, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "fcb"
		return errors.Join(remove(), netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "others"}))
	})
	if _, err := w.open(w.net.cfg); !errors.Is(err, fleet.ErrConflict) || fleet.Hint(err) == "" {
		t.Errorf("another one's interface: %v", err)
	}
}

// The fabric is lost with what was connected to it, as when its file was
// unmounted: a new one takes its place.
func TestOpen_WithoutItsNamespace(t *testing.T) {
	w := newWorld(t, Config{})
	w.attach()
	w.do("end", w.net.Close)
	w.do("lose", func() error { return release(w.net.namespace()) })
	if err := os.WriteFile(w.net.namespace(), nil, 0o444); err != nil { // the mount alone is gone
		t.Fatal(err)
	}
	var err error
	if w.net, err = w.open(w.net.cfg); err != nil {
		t.Fatal(err)
	}
	b := w.attach()
	w.serve(b.ns, "0.0.0.0:7000")
	if _, err := w.ask(w.host, b.lease.Address.String()+":7000", ""); err != nil {
		t.Error(err)
	}
}

// state is everything that a container has on the host.
func (w *world) state() string {
	w.t.Helper()
	var b strings.Builder
	for _, kernel := range []*netlink.Handle{w.net.kernel, w.net.fabric.kernel} {
		links, err := kernel.LinkList()
		if err != nil {
			w.t.Fatal(err)
		}
		for _, l := range links {
			fmt.Fprintln(&b, l.Attrs().Name)
		}
	}
	routes, err := w.net.fabric.kernel.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, r := range routes {
		fmt.Fprintln(&b, "route", r.Dst, r.LinkIndex)
	}
	b.WriteString(w.nft("list", "ruleset"))
	b.WriteString(w.nftIn(int(w.net.fabric.ns.Fd()), "list", "ruleset"))
	lines := slices.Sorted(strings.Lines(b.String())) // a new process makes its table anew, after the others
	return strings.Join(lines, "")
}

// Two hundred lives, twenty at a time: the host is as it was.
func TestLives_LeaveNothing(t *testing.T) {
	w := newWorld(t, Config{})
	var ns []int
	for range 20 {
		ns = append(ns, newNamespace(t))
	}
	w.do("warm up", func() error { // sockets that are kept
		l, err := w.net.Attach(t.Context(), "first", ns[0])
		return errors.Join(err, w.net.Detach(t.Context(), l))
	})
	before, files := w.state(), descriptors(t)
	var mu sync.Mutex
	seen := map[netip.Addr]bool{}
	for round := range 10 {
		var wg sync.WaitGroup
		for i := range ns {
			wg.Go(func() {
				l, err := w.net.Attach(t.Context(), fmt.Sprintf("r%di%d", round, i), ns[i])
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				if seen[l.Address] {
					t.Errorf("%s is used again", l.Address)
				}
				seen[l.Address] = true
				mu.Unlock()
				for range 2 { // it may be repeated
					if err := w.net.Detach(t.Context(), l); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
	}
	if after := w.state(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	if n := descriptors(t); n != files {
		t.Errorf("%d descriptors, %d before", n, files)
	}
	if len(w.net.pool.used) != 0 {
		t.Errorf("addresses in use: %v", w.net.pool.used)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

// What fails leaves nothing, and nothing of others is harmed.
func TestAttach_Fails(t *testing.T) {
	w := newWorld(t, Config{})
	a := w.attach()
	before := w.state()
	for what, at := range map[string]struct {
		id string
		ns int
	}{
		"connected already": {"again", a.ns}, "name in use": {a.lease.Veth, newNamespace(t)}, "no namespace": {"none", int(w.net.ns.Fd()) + 1000},
		"name too long": {"0123456789abcdef", newNamespace(t)}, "no name": {"", newNamespace(t)},
	} {
		if l, err := w.net.Attach(t.Context(), at.id, at.ns); err == nil {
			t.Errorf("%s: got %+v", what, l)
		}
		if after := w.state(); after != before {
			t.Errorf("%s:\n%s\nbefore:\n%s", what, after, before)
		}
	}
	if len(w.net.pool.used) != 1 {
		t.Errorf("addresses in use: %v", w.net.pool.used)
	}
	w.serve(a.ns, "0.0.0.0:7000")
	if _, err := w.ask(w.host, a.lease.Address.String()+":7000", ""); err != nil {
		t.Error(err)
	}
}

// A new process adopts one container and cleans away another; the adopted one
// is never cut off.
func TestAdoptAndClean(t *testing.T) {
	w := newWorld(t, Config{})
	before := w.state()
	kept, orphan := w.attach(), w.attach()
	w.serve(kept.ns, "0.0.0.0:7000")
	w.serve(w.outside, "0.0.0.0:7000")
	w.reopen()
	if _, err := w.ask(kept.ns, outsideAddr+":7000", ""); err != nil {
		t.Errorf("between two daemons: %v", err)
	}
	if err := w.net.Adopt(kept.lease); err != nil {
		t.Fatal(err)
	}
	if err := w.net.Adopt(Lease{ID: "other", Veth: "other", Address: kept.lease.Address}); err == nil {
		t.Error("an address was adopted twice")
	}
	removed, err := w.net.Clean(t.Context(), []string{kept.lease.ID})
	if err != nil || len(removed) != 1 || removed[0] != orphan.lease.ID {
		t.Errorf("removed %q, %v", removed, err)
	}
	if _, err := w.ask(kept.ns, outsideAddr+":7000", ""); err != nil {
		t.Errorf("after adoption: %v\n%s", err, w.state())
	}
	if _, err := w.ask(w.host, kept.lease.Address.String()+":7000", ""); err != nil {
		t.Errorf("after adoption: %v", err)
	}
	if err := w.net.Remove(); !errors.Is(err, fleet.ErrConflict) {
		t.Errorf("remove while a container is connected: %v", err)
	}
	if err := w.net.Detach(t.Context(), kept.lease); err != nil {
		t.Fatal(err)
	}
	if after := w.state(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

func BenchmarkAttach(b *testing.B) {
	w := newWorld(b, Config{})
	ns := make([]int, 0, 64)
	for range cap(ns) {
		ns = append(ns, newNamespace(b))
	}
	var took []time.Duration
	leases := make([]Lease, 0, len(ns))
	for b.Loop() {
		if len(leases) == len(ns) {
			b.StopTimer()
			w.detach(leases)
			leases = leases[:0]
			b.StartTimer()
		}
		began := time.Now()
		l, err := w.net.Attach(b.Context(), fmt.Sprintf("b%d", len(leases)), ns[len(leases)])
		if err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(began))
		leases = append(leases, l)
	}
	w.detach(leases)
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
}

// detach all together.
func (w *world) detach(leases []Lease) {
	var wg sync.WaitGroup
	for _, l := range leases {
		wg.Go(func() {
			if err := w.net.Detach(w.t.Context(), l); err != nil {
				w.t.Error(err)
			}
		})
	}
	wg.Wait()
}

// Many leave at the same moment: all of them are gone, and so is every
// address.
func TestDetach_ManyTogether(t *testing.T) {
	w := newWorld(t, Config{})
	leases := make([]Lease, 60)
	var wg sync.WaitGroup
	for i := range leases {
		ns := newNamespace(t)
		wg.Go(func() {
			var err error
			if leases[i], err = w.net.Attach(t.Context(), fmt.Sprintf("many%d", i), ns); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	began := time.Now()
	for _, l := range leases {
		wg.Go(func() {
			if err := w.net.Detach(t.Context(), l); err != nil {
				t.Error(err)
			}
			if _, err := w.net.fabric.wire.index(l.Veth); err == nil {
				t.Errorf("%s is still there", l.Veth)
			}
		})
	}
	wg.Wait()
	t.Logf("%d left in %v", len(leases), time.Since(began))
	if len(w.net.pool.used) != 0 {
		t.Errorf("addresses in use: %v", w.net.pool.used)
	}
}

// What leaves the host has an address of the interface that it leaves by, also
// after that changed.
func TestContainers_FollowTheHostsAddresses(t *testing.T) {
	w := newWorld(t, Config{})
	a := w.attach()
	w.serve(w.outside, "0.0.0.0:7000")
	const elsewhere = "203.0.113.77"
	seen := func(addr, want string) {
		t.Helper()
		var from string
		var err error
		for range 20 { // it is told in the background
			if from, err = w.ask(a.ns, addr+":7000", ""); err == nil && from == want {
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
		t.Errorf("%s is asked by %q, %v; want %q", addr, from, err, want)
	}
	w.in(w.outside, func() error {
		return errors.Join(addAddr("out0", elsewhere+"/32"), addAddr("out0", "198.18.0.2/24"))
	})
	seen(outsideAddr, hostAddr)
	seen(elsewhere, hostAddr)

	// A second range at the same interface: its neighbours see its address.
	w.in(w.host, func() error { return addAddr("up0", "198.18.0.1/24") })
	seen("198.18.0.2", "198.18.0.1")
	seen(elsewhere, hostAddr)

	// Another address instead.
	w.in(w.host, func() error {
		l, err := netlink.LinkByName("up0")
		if err != nil {
			return err
		}
		old, err := netlink.ParseAddr(hostAddr + "/24")
		if err != nil {
			return err
		}
		_, all, _ := net.ParseCIDR("0.0.0.0/0")
		return errors.Join(netlink.AddrDel(l, old), addAddr("up0", "192.0.2.9/24"),
			netlink.RouteReplace(&netlink.Route{Dst: all, Gw: net.ParseIP(outsideAddr)}))
	})
	seen(outsideAddr, "192.0.2.9")

	// None of its own: that of another one.
	w.in(w.host, func() error {
		l, err := netlink.LinkByName("up0")
		if err != nil {
			return err
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "other"
		var errs []error
		for _, s := range []string{"192.0.2.9/24", "198.18.0.1/24"} {
			a, err := netlink.ParseAddr(s)
			errs = append(errs, err, netlink.AddrDel(l, a))
		}
		_, all, _ := net.ParseCIDR("0.0.0.0/0")
		errs = append(errs, netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}), addAddr("other", "192.0.2.33/32"), up("other"),
			netlink.RouteReplace(&netlink.Route{Dst: all, LinkIndex: l.Attrs().Index, Scope: netlink.SCOPE_LINK}))
		return errors.Join(errs...)
	})
	seen(outsideAddr, "192.0.2.33")
}
