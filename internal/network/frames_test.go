package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// send puts a frame onto eth0 of a namespace, as a tenant with CAP_NET_RAW can.
func (w *world) send(ns int, frame []byte) {
	w.t.Helper()
	w.in(ns, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		s, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(s) }()
		return unix.Sendto(s, frame, 0, &unix.SockaddrLinklayer{Ifindex: l.Attrs().Index, Halen: 6})
	})
}

func ethernet(dst, src net.HardwareAddr, kind uint16, payload []byte) []byte {
	f := append(append(append([]byte{}, dst...), src...), byte(kind>>8), byte(kind))
	return append(f, payload...)
}

func datagram4(src, dst netip.Addr, port uint16, text string) []byte {
	p := make([]byte, 28, 28+len(text))
	p[0], p[8], p[9] = 0x45, 64, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(p[2:], uint16(28+len(text)))
	copy(p[12:], src.AsSlice())
	copy(p[16:], dst.AsSlice())
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(p[i:]))
	}
	binary.BigEndian.PutUint16(p[10:], ^uint16(sum+sum>>16))
	binary.BigEndian.PutUint16(p[20:], 4242)
	binary.BigEndian.PutUint16(p[22:], port)
	binary.BigEndian.PutUint16(p[24:], uint16(8+len(text))) // no checksum
	return append(p, text...)
}

// listen receives datagrams; hear gives the next one, or nothing.
func (w *world) listen(ns int, network, addr string) (hear func() string) {
	w.t.Helper()
	var c net.PacketConn
	w.in(ns, func() (err error) {
		c, err = net.ListenPacket(network, addr)
		return err
	})
	w.t.Cleanup(func() { _ = c.Close() })
	return func() string {
		var b [64]byte
		_ = c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		n, _, _ := c.ReadFrom(b[:])
		return string(b[:n])
	}
}

// Frames of a tenant's own making reach the host and neighbours no more than
// others do. Each is sent once without the rules, to see that they are what
// stops it.
func TestFrames_OfOwnMaking(t *testing.T) {
	w := newWorld(t, Config{})
	a, b := w.attach(), w.attach()
	host, victim := netip.MustParseAddr(otherAddr), b.lease.Address
	own := hardwareAddr(a.lease.Address)
	atHost, atVictim := w.listen(w.host, "udp4", "0.0.0.0:7000"), w.listen(b.ns, "udp4", "0.0.0.0:7000")
	atWorld := w.listen(w.outside, "udp4", "0.0.0.0:7000")
	// The host's filter against forged senders would hide what is missing.
	gullible := func() {
		w.in(w.host, func() error {
			return errors.Join(sysctl("ipv4/conf/all/rp_filter", "0"), sysctl("ipv4/conf/fcb/rp_filter", "0"))
		})
	}
	blind := func() { // the fabric's, too
		w.in(int(w.net.fabric.ns.Fd()), func() error {
			return errors.Join(sysctl("ipv4/conf/all/rp_filter", "0"), sysctl("ipv4/conf/"+a.lease.Veth+"/rp_filter", "0"))
		})
	}
	all := net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	for what, tt := range map[string]struct {
		dst     net.HardwareAddr
		from    netip.Addr
		to      netip.Addr
		hear    func() string
		without func() // what stops it; nil: the kernel, whatever is set
	}{
		"to the host":                        {dst: own, from: a.lease.Address, to: host, hear: atHost, without: w.dropRules},
		"to a group of bridges":              {dst: net.HardwareAddr{1, 0x80, 0xc2, 0, 0, 0x0e}, from: a.lease.Address, to: host, hear: atHost},
		"to all":                             {dst: all, from: a.lease.Address, to: netip.MustParseAddr("255.255.255.255"), hear: atHost},
		"to the neighbour":                   {dst: own, from: a.lease.Address, to: victim, hear: atVictim, without: w.dropRules},
		"to the neighbour's hardware":        {dst: hardwareAddr(victim), from: a.lease.Address, to: victim, hear: atVictim},
		"to all neighbours":                  {dst: all, from: a.lease.Address, to: victim, hear: atVictim},
		"to the neighbour, as the node":      {dst: own, from: w.net.gateway, to: victim, hear: atVictim},
		"to the neighbour, as the neighbour": {dst: own, from: victim, to: victim, hear: atVictim},
		"to the world, as the neighbour":     {dst: own, from: victim, to: netip.MustParseAddr(outsideAddr), hear: atWorld, without: blind},
		"to the world, as the world":         {dst: own, from: netip.MustParseAddr("198.18.0.9"), to: netip.MustParseAddr(outsideAddr), hear: atWorld, without: func() { blind(); w.dropRules() }},
	} {
		t.Run(what, func(t *testing.T) {
			for _, frame := range [][]byte{
				ethernet(tt.dst, own, unix.ETH_P_IP, datagram4(tt.from, tt.to, 7000, what)),
				ethernet(tt.dst, hardwareAddr(tt.from), unix.ETH_P_8021Q, append([]byte{0, 0, 8, 0}, datagram4(tt.from, tt.to, 7000, what)...)),
			} {
				gullible()
				w.send(a.ns, frame)
				if heard := tt.hear(); heard != "" {
					t.Errorf("heard %q", heard)
				}
				if tt.without == nil {
					continue
				}
				tt.without()
				w.send(a.ns, frame)
				if tt.hear() == "" {
					t.Error("not heard without what stops it: the frame is no good")
				}
				w.reopen(a, b)
				w.in(int(w.net.fabric.ns.Fd()), func() error { return sysctl("ipv4/conf/"+a.lease.Veth+"/rp_filter", "1") })
			}
		})
	}
}

// dropRules takes the rules of the world's host and of its fabric away.
func (w *world) dropRules() {
	w.t.Helper()
	for _, family := range []string{"ip", "inet"} {
		w.nft("delete", "table", family, w.net.cfg.Table)
	}
	w.nftIn(int(w.net.fabric.ns.Fd()), "flush", "ruleset")
}

// A forged answer to "who has the victim's address" changes nothing.
func TestFrames_ForgedARP(t *testing.T) {
	w := newWorld(t, Config{})
	thief, victim := w.attach(), w.attach()
	w.serve(victim.ns, "0.0.0.0:7000")
	w.serve(w.outside, "0.0.0.0:7000")
	own, all := hardwareAddr(thief.lease.Address), net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	for _, stolen := range []netip.Addr{victim.lease.Address, w.net.gateway, host} {
		for _, src := range []net.HardwareAddr{own, hardwareAddr(stolen)} {
			arp := []byte{0, 1, 8, 0, 6, 4, 0, 2}
			arp = append(append(append(append(arp, own...), stolen.AsSlice()...), all...), stolen.AsSlice()...)
			w.send(thief.ns, ethernet(all, src, unix.ETH_P_ARP, arp))
		}
	}
	neigh, err := w.net.fabric.kernel.NeighList(0, netlink.FAMILY_V4)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range neigh {
		if e.State&netlink.NUD_PERMANENT == 0 { // the host alone is told of, by us
			t.Errorf("the fabric sends to %s what is for %s", e.HardwareAddr, e.IP)
		}
	}
	if _, err := w.dial(victim.lease.Address.String() + ":7000"); err != nil {
		t.Errorf("daemon to victim: %v", err)
	}
	if _, err := w.ask(w.host, victim.lease.Address.String()+":7000", ""); err != nil {
		t.Errorf("host to victim: %v", err)
	}
	if _, err := w.ask(victim.ns, outsideAddr+":7000", ""); err != nil {
		t.Errorf("victim to the world: %v", err)
	}
}

// Containers have no IPv6 beyond loopback. One that takes it nevertheless talks
// to nobody.
func TestIPv6_IsCut(t *testing.T) {
	w := newWorld(t, Config{})
	a, b := w.attach(), w.attach()
	host6, neighbour6, own6 := netip.MustParseAddr("fe80::1"), netip.MustParseAddr("fe80::b"), netip.MustParseAddr("fe80::a")
	for x, addr := range map[box]netip.Addr{a: own6, b: neighbour6} {
		w.in(x.ns, func() error {
			l, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			addrs, err := netlink.AddrList(l, netlink.FAMILY_V6)
			if err != nil {
				return err
			}
			if len(addrs) > 0 {
				return fmt.Errorf("eth0 has %v", addrs)
			}
			return errors.Join(sysctl("ipv6/conf/all/disable_ipv6", "0"), addAddr6("eth0", addr))
		})
	}
	// The host has IPv6 on its interface, where somebody gave it.
	w.in(w.host, func() error {
		return errors.Join(sysctl("ipv6/conf/fcb/disable_ipv6", "0"), addAddr6("fcb", host6))
	})
	atHost, atNeighbour := w.listen(w.host, "udp6", "[::]:7000"), w.listen(b.ns, "udp6", "[::]:7000")
	own := hardwareAddr(a.lease.Address)
	for what, tt := range map[string]struct {
		dst  net.HardwareAddr
		to   netip.Addr
		hear func() string
	}{
		"to the host":           {dst: own, to: host6, hear: atHost},
		"to a group of bridges": {dst: net.HardwareAddr{1, 0x80, 0xc2, 0, 0, 0x0e}, to: host6, hear: atHost},
		"to the neighbour":      {dst: hardwareAddr(b.lease.Address), to: neighbour6, hear: atNeighbour},
		"to all":                {dst: net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}, to: netip.MustParseAddr("ff02::1"), hear: atNeighbour},
	} {
		t.Run(what, func(t *testing.T) {
			w.send(a.ns, ethernet(tt.dst, own, unix.ETH_P_IPV6, datagram6(own6, tt.to, 7000, what)))
			if heard := tt.hear(); heard != "" {
				t.Errorf("heard %q", heard)
			}
		})
	}
	// Such a frame is heard where IPv6 is not cut.
	fabric := int(w.net.fabric.ns.Fd())
	w.in(fabric, func() error {
		return errors.Join(sysctl("ipv6/conf/"+a.lease.Veth+"/disable_ipv6", "0"), addAddr6(a.lease.Veth, host6))
	})
	hear := w.listen(fabric, "udp6", "[::]:7000")
	heard := ""
	for range 20 { // the kernel begins with IPv6 in its own time
		w.send(a.ns, ethernet(own, own, unix.ETH_P_IPV6, datagram6(own6, host6, 7000, "good")))
		if heard = hear(); heard != "" {
			break
		}
	}
	if heard != "good" {
		t.Error("not heard where IPv6 is not cut: the frame is no good")
	}
}

func addAddr6(name string, a netip.Addr) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.AddrReplace(l, &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(64, 128)}, Flags: unix.IFA_F_NODAD})
}

func datagram6(src, dst netip.Addr, port uint16, text string) []byte {
	u := make([]byte, 8, 8+len(text))
	binary.BigEndian.PutUint16(u[0:], 4242)
	binary.BigEndian.PutUint16(u[2:], port)
	binary.BigEndian.PutUint16(u[4:], uint16(8+len(text)))
	u = append(u, text...)
	pseudo := append(append(src.AsSlice(), dst.AsSlice()...), 0, 0, 0, byte(len(u)), 0, 0, 0, unix.IPPROTO_UDP)
	var sum uint32
	for i, b := range append(pseudo, u...) {
		sum += uint32(b) << (8 * (1 - i%2))
	}
	sum = sum>>16 + sum&0xffff
	binary.BigEndian.PutUint16(u[6:], ^uint16(sum+sum>>16))
	p := make([]byte, 8, 40+len(u))
	p[0], p[6], p[7] = 0x60, unix.IPPROTO_UDP, 64
	binary.BigEndian.PutUint16(p[4:], uint16(len(u)))
	return append(append(append(p, src.AsSlice()...), dst.AsSlice()...), u...)
}
