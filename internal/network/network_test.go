package network

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
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

// world is a host of its own: a network namespace, in which the test's thread
// runs, and beyond it, through an uplink, the rest of the world.
type world struct {
	t       testing.TB
	outside int // network namespace
	net     *Network
}

const (
	hostAddr    = "192.0.2.1"
	outsideAddr = "192.0.2.2"
	metadata    = "169.254.169.254"
)

// newNamespace makes a network namespace and leaves the calling thread in it
// if stay is true.
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
	w := &world{t: t, outside: newNamespace(t)}
	runtime.LockOSThread() // for good: the thread ends with the test
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	w.do("up", func() error { return up("lo") })
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "up0"
	w.do("uplink", func() error {
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "out0", PeerNamespace: netlink.NsFd(w.outside)}); err != nil {
			return err
		}
		if err := addAddr("up0", hostAddr+"/24"); err != nil {
			return err
		}
		if err := up("up0"); err != nil {
			return err
		}
		return inNamespace(w.outside, func() error {
			return errors.Join(up("lo"), addAddr("out0", outsideAddr+"/24"), addAddr("out0", metadata+"/32"), up("out0"))
		})
	})
	w.do("routes", func() error {
		_, all, _ := net.ParseCIDR("0.0.0.0/0")
		return netlink.RouteAdd(&netlink.Route{Dst: all, Gw: net.ParseIP(outsideAddr)})
	})
	var err error
	c.Bridge, c.Table = "fcb", "fct"
	if !c.Subnet.IsValid() {
		c.Subnet = netip.MustParsePrefix("10.123.0.0/24")
	}
	if w.net, err = Open(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	return w
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

// serve answers each connection with the address that it came from. ns is the
// namespace, -1 this thread's.
func (w *world) serve(ns int, addr string) {
	w.t.Helper()
	listen := func() error {
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
	}
	if ns < 0 {
		w.do("listen", listen)
		return
	}
	w.do("listen", func() error { return inNamespace(ns, listen) })
}

// ask connects from a namespace (-1: this thread's) and reads what the server
// says. from, if not empty, is the address to come from.
func (w *world) ask(ns int, addr, from string) (string, error) {
	var said string
	dial := func() error {
		// The socket is made here, on this thread: a Dialer might use others.
		s, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		f := os.NewFile(uintptr(s), "socket")
		defer func() { _ = f.Close() }()
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
	}
	if ns < 0 {
		return said, errors.Join(dial())
	}
	err := inNamespace(ns, dial)
	return said, err
}

func TestContainers_ReachTheWorldAndNothingElse(t *testing.T) {
	w := newWorld(t, Config{})
	a, b := w.attach(), w.attach()
	for _, at := range []string{":7000"} {
		w.serve(a.ns, "0.0.0.0"+at)
		w.serve(b.ns, "0.0.0.0"+at)
		w.serve(-1, "0.0.0.0"+at)
		w.serve(w.outside, "0.0.0.0"+at)
	}
	// The host reaches the container, which sees the bridge's address.
	if from, err := w.ask(-1, a.lease.Address.String()+":7000", ""); err != nil || from != w.net.gateway.String() {
		t.Errorf("host to container: %q, %v", from, err)
	}
	// The container reaches the world, which sees the host's address.
	if from, err := w.ask(a.ns, outsideAddr+":7000", ""); err != nil || from != hostAddr {
		t.Errorf("container to the world: %q, %v", from, err)
	}
	if _, err := w.ask(a.ns, "127.0.0.1:7000", ""); err != nil {
		t.Errorf("container to itself: %v", err)
	}
	for what, addr := range map[string]string{
		"a neighbour": b.lease.Address.String(), "the host by the bridge": w.net.gateway.String(), "the host by another address": hostAddr,
		"the metadata address": metadata,
	} {
		if from, err := w.ask(a.ns, addr+":7000", ""); err == nil {
			t.Errorf("a container reaches %s, which sees %s", what, from)
		}
	}
	if _, err := w.ask(w.outside, a.lease.Address.String()+":7000", ""); err == nil {
		t.Error("the world reaches a container")
	}
}

// A tenant that is root in its namespace takes its neighbour's addresses for
// its own: nothing that it sends passes, and its neighbour is still reached.
func TestContainers_CannotPretendToBeAnother(t *testing.T) {
	w := newWorld(t, Config{})
	thief, victim := w.attach(), w.attach()
	w.serve(victim.ns, "0.0.0.0:7000")
	w.serve(w.outside, "0.0.0.0:7000")
	stolen := victim.lease.Address.String()
	if _, err := w.ask(thief.ns, outsideAddr+":7000", thief.lease.Address.String()); err != nil {
		t.Errorf("its own address: %v", err)
	}
	w.do("steal the address", func() error {
		return inNamespace(thief.ns, func() error { return addAddr("eth0", stolen+"/32") })
	})
	if from, err := w.ask(thief.ns, outsideAddr+":7000", stolen); err == nil {
		t.Errorf("the world hears %s from the thief", from)
	}
	// Now also the hardware address, told to everybody by ARP.
	w.do("steal the hardware address", func() error {
		return inNamespace(thief.ns, func() error {
			l, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			_ = os.WriteFile("/proc/sys/net/ipv4/conf/eth0/arp_notify", []byte("1"), 0)
			return errors.Join(netlink.LinkSetDown(l), netlink.LinkSetHardwareAddr(l, hardwareAddr(victim.lease.Address)), netlink.LinkSetUp(l),
				netlink.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: w.net.gateway.AsSlice()}))
		})
	})
	if from, err := w.ask(thief.ns, outsideAddr+":7000", stolen); err == nil {
		t.Errorf("the world hears %s from the thief", from)
	}
	if from, err := w.ask(-1, stolen+":7000", ""); err != nil || from == "" {
		t.Errorf("the victim is not reached any more: %v", err)
	}
	bridge, err := netlink.LinkByName("fcb")
	if err != nil {
		t.Fatal(err)
	}
	if addrs, err := netlink.AddrList(bridge, netlink.FAMILY_V6); err != nil || len(addrs) > 0 {
		t.Errorf("the bridge has IPv6: %v, %v", addrs, err)
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
	_, err := Open(t.Context(), Config{Bridge: "fcc", Table: "fcu", Subnet: netip.MustParsePrefix("192.0.2.0/25")})
	if !errors.Is(err, fleet.ErrConflict) || fleet.Hint(err) == "" {
		t.Errorf("got %v", err)
	}
	if _, err := Open(t.Context(), Config{Subnet: netip.MustParsePrefix("fd00::/64")}); !errors.Is(err, fleet.ErrInvalid) {
		t.Errorf("got %v", err)
	}
	if err := w.net.Remove(); err != nil {
		t.Error(err)
	}
	if links, _ := netlink.LinkList(); len(links) != 2 { // lo, up0
		t.Errorf("%d links are left", len(links))
	}
}

// state is everything that a container has on the host.
func (w *world) state() string {
	w.t.Helper()
	links, err := netlink.LinkList()
	if err != nil {
		w.t.Fatal(err)
	}
	var b strings.Builder
	for _, l := range links {
		fmt.Fprintln(&b, l.Attrs().Name)
	}
	neigh, err := netlink.NeighList(w.net.bridge, netlink.FAMILY_V4)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, n := range neigh {
		if n.State == netlink.NUD_PERMANENT {
			fmt.Fprintln(&b, "neighbour", n.IP)
		}
	}
	rules, err := exec.Command("nft", "list", "ruleset").CombinedOutput() // a child has this thread's namespace
	if err != nil {
		w.t.Fatalf("nft: %v: %s", err, rules)
	}
	b.Write(rules)
	lines := slices.Sorted(strings.Lines(b.String())) // a new process makes its table anew, after the others
	return strings.Join(lines, "")
}

func TestLives_LeaveNothing(t *testing.T) {
	w := newWorld(t, Config{})
	before := w.state()
	for range 50 {
		a, b := w.attach(), w.attach()
		for _, x := range []box{a, b, a} { // it may be repeated
			if err := w.net.Detach(t.Context(), x.lease); err != nil {
				t.Fatal(err)
			}
		}
	}
	if after := w.state(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	if len(w.net.used) != 0 {
		t.Errorf("addresses in use: %v", w.net.used)
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
	var err error
	if w.net, err = Open(t.Context(), w.net.cfg); err != nil { // as after kill -9
		t.Fatal(err)
	}
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
	if _, err := w.ask(-1, kept.lease.Address.String()+":7000", ""); err != nil {
		t.Errorf("after adoption: %v", err)
	}
	if err := w.net.Detach(t.Context(), kept.lease); err != nil {
		t.Fatal(err)
	}
	if after := w.state(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

func TestServers(t *testing.T) {
	for text, want := range map[string]string{
		"":                                 "",
		"nameserver 10.0.0.1\n":            "10.0.0.1",
		"nameserver 127.0.0.53\n":          "",
		"nameserver ::1\nnameserver fd::1": "",
		"# nameserver 1.1.1.1\nnameserver  9.9.9.9 # x\nsearch a b\n": "9.9.9.9",
		"nameserver\nnameserver x\noptions ndots:5":                   "",
	} {
		var got []string
		for _, a := range servers(text) {
			got = append(got, a.String())
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%q: got %q, want %q", text, got, want)
		}
	}
}

func FuzzServers(f *testing.F) {
	f.Add("nameserver 1.2.3.4\n")
	f.Fuzz(func(t *testing.T, text string) {
		for _, a := range servers(text) {
			if !a.Is4() || a.IsLoopback() {
				t.Errorf("%q gives %v", text, a)
			}
		}
	})
}

func BenchmarkAttach(b *testing.B) {
	w := newWorld(b, Config{Logger: slog.New(slog.DiscardHandler)})
	ns := make([]int, 0, 64)
	for range 64 {
		ns = append(ns, newNamespace(b))
	}
	var took time.Duration
	n := 0
	for b.Loop() {
		began := time.Now()
		l, err := w.net.Attach(b.Context(), fmt.Sprintf("b%d", n), ns[n%len(ns)])
		took += time.Since(began)
		if err != nil {
			b.Fatal(err)
		}
		if err := w.net.Detach(b.Context(), l); err != nil {
			b.Fatal(err)
		}
		n++
	}
	b.ReportMetric(float64(took.Microseconds())/float64(n), "µs/attach")
}

// Many leave at the same moment: all of them are gone, and so is every
// address. This one runs on the host itself, whose threads are many.
func TestDetach_ManyTogether(t *testing.T) {
	n, err := Open(t.Context(), Config{Bridge: "fctmany", Table: "fctmany", Subnet: netip.MustParsePrefix("10.124.0.0/24")})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := n.Remove(); err != nil {
			t.Error(err)
		}
	}()
	leases := make([]Lease, 60)
	var wg sync.WaitGroup
	for i := range leases {
		ns := newNamespace(t)
		wg.Go(func() {
			var err error
			if leases[i], err = n.Attach(t.Context(), fmt.Sprintf("fctmany%d", i), ns); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	began := time.Now()
	for _, l := range leases {
		wg.Go(func() {
			if err := n.Detach(t.Context(), l); err != nil {
				t.Error(err)
			}
			if _, err := netlink.LinkByName(l.Veth); err == nil {
				t.Errorf("%s is still there", l.Veth)
			}
		})
	}
	wg.Wait()
	t.Logf("%d left in %v", len(leases), time.Since(began))
	if len(n.used) != 0 {
		t.Errorf("addresses in use: %v", n.used)
	}
}
