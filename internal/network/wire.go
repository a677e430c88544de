package network

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/slow"
)

// wire speaks with the kernel about one network namespace: that of the thread
// that opened it, whichever thread speaks later. It may be used by many at once.
// Where a container waits for the answer, requests are written here, for a
// library asks the kernel twice as often.
type wire struct {
	socket  *nl.NetlinkSocket
	sockets map[int]*nl.SocketHandle
	names   int // a socket to ask for the numbers of interfaces
}

func openWire() (*wire, error) {
	route, err := nl.Subscribe(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	err = errors.Join(route.SetReceiveTimeout(&nl.SocketTimeoutTv), route.SetSendTimeout(&nl.SocketTimeoutTv), route.SetExtAck(true))
	names := -1
	if err == nil {
		names, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	}
	if err != nil {
		route.Close()
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	return &wire{socket: route, sockets: map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: route}}, names: names}, nil
}

func (w *wire) close() {
	w.socket.Close()
	_ = unix.Close(w.names)
}

// ask for a change.
func (w *wire) ask(kind, flags int, parts ...nl.NetlinkRequestData) error {
	return w.send(kind, flags|unix.NLM_F_ACK, parts...)
}

func (w *wire) send(kind, flags int, parts ...nl.NetlinkRequestData) error {
	req := nl.NewNetlinkRequest(kind, flags)
	req.Sockets = w.sockets
	for _, p := range parts {
		req.AddData(p)
	}
	slow.Ahead()
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// index of an interface.
func (w *wire) index(name string) (int, error) {
	req, err := unix.NewIfreq(name)
	if err != nil {
		return 0, err
	}
	if err := unix.IoctlIfreq(w.names, unix.SIOCGIFINDEX, req); err != nil {
		return 0, err
	}
	return int(req.Uint32()), nil
}

// makePort makes a port, raised, and its other end, eth0, in another namespace.
func (w *wire) makePort(name string, netns int, addr netip.Addr) error {
	hardware := nl.NewRtAttr(unix.IFLA_ADDRESS, hardwareAddr(addr))
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Flags, msg.Change = unix.IFF_UP|unix.IFF_NOARP, unix.IFF_UP|unix.IFF_NOARP
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("veth"))
	peer := info.AddRtAttr(nl.IFLA_INFO_DATA, nil).AddRtAttr(nl.VETH_INFO_PEER, nil)
	end := nl.NewIfInfomsgChild(peer, unix.AF_UNSPEC)
	end.Flags, end.Change = unix.IFF_NOARP, unix.IFF_NOARP
	peer.AddRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated("eth0"))
	peer.AddChild(hardware)
	peer.AddRtAttr(unix.IFLA_NET_NS_FD, number(netns))
	// One queue: the kernel makes as many as the machine has processors
	// otherwise, each with objects of its own.
	for _, kind := range []int{unix.IFLA_NUM_TX_QUEUES, unix.IFLA_NUM_RX_QUEUES} {
		peer.AddRtAttr(kind, number(1))
	}
	return w.ask(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, msg, nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)), hardware,
		nl.NewRtAttr(unix.IFLA_NUM_TX_QUEUES, number(1)), nl.NewRtAttr(unix.IFLA_NUM_RX_QUEUES, number(1)), info)
}

// reach makes an address that of the one behind a port.
func (w *wire) reach(port int, addr, source netip.Addr) error {
	msg := nl.NewRtMsg()
	msg.Family, msg.Dst_len, msg.Scope = unix.AF_INET, uint8(addr.BitLen()), unix.RT_SCOPE_LINK //nolint:gosec // 32
	return w.ask(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, msg, nl.NewRtAttr(unix.RTA_DST, addr.AsSlice()),
		nl.NewRtAttr(unix.RTA_OIF, number(port)), nl.NewRtAttr(unix.RTA_PREFSRC, source.AsSlice()))
}

// know tells the hardware address of a neighbour for good, so that nobody asks
// for it and nobody can tell another one.
func (w *wire) know(index int, addr netip.Addr) error {
	return w.ask(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE,
		&netlink.Ndmsg{Family: unix.AF_INET, Index: uint32(index), State: netlink.NUD_PERMANENT}, //nolint:gosec // not negative
		nl.NewRtAttr(netlink.NDA_DST, addr.AsSlice()), nl.NewRtAttr(netlink.NDA_LLADDR, hardwareAddr(addr)))
}

// raise an interface.
func (w *wire) raise(index int) error {
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index, msg.Flags, msg.Change = int32(index), unix.IFF_UP, unix.IFF_UP //nolint:gosec // small
	return w.ask(unix.RTM_NEWLINK, 0, msg)
}

const skipStats = 1 << 3 // RTEXT_FILTER_SKIP_STATS

// settle makes an interface whose other end was raised just now carry packets
// at once. The kernel does so in its own time otherwise, which is long on a busy
// host, and drops what comes before; whoever asks it about the interface makes
// it hurry (Linux 6.9).
func (w *wire) settle(index int) error {
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(index) //nolint:gosec // small
	return w.send(unix.RTM_GETLINK, 0, msg, nl.NewRtAttr(unix.IFLA_EXT_MASK, number(skipStats)))
}

// regroup puts an interface into a group.
func (w *wire) regroup(name string, group int) error {
	return w.ask(unix.RTM_SETLINK, 0, nl.NewIfInfomsg(unix.AF_UNSPEC),
		nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)), nl.NewRtAttr(unix.IFLA_GROUP, number(group)))
}

// removeGroup removes all interfaces of a group.
func (w *wire) removeGroup(group int) error {
	return w.ask(unix.RTM_DELLINK, 0, nl.NewIfInfomsg(unix.AF_UNSPEC), nl.NewRtAttr(unix.IFLA_GROUP, number(group)))
}

// address gives an interface an address, and nobody else's with it.
func (w *wire) address(index int, a netip.Addr) error {
	msg := nl.NewIfAddrmsg(unix.AF_INET)
	msg.Prefixlen, msg.Index = uint8(a.BitLen()), uint32(index) //nolint:gosec // not negative
	return w.ask(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL, msg,
		nl.NewRtAttr(unix.IFA_LOCAL, a.AsSlice()), nl.NewRtAttr(unix.IFA_ADDRESS, a.AsSlice()))
}

// route sends what is for a range to a neighbour that the interface reaches,
// whatever its address.
func (w *wire) route(index int, to netip.Prefix, neighbour netip.Addr) error {
	msg := nl.NewRtMsg()
	msg.Family, msg.Dst_len, msg.Flags = unix.AF_INET, uint8(to.Bits()), unix.RTNH_F_ONLINK //nolint:gosec // at most 32
	parts := []nl.NetlinkRequestData{msg, nl.NewRtAttr(unix.RTA_GATEWAY, neighbour.AsSlice()), nl.NewRtAttr(unix.RTA_OIF, number(index))}
	if to.Bits() > 0 {
		parts = append(parts, nl.NewRtAttr(unix.RTA_DST, to.Masked().Addr().AsSlice()))
	}
	return w.ask(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, parts...)
}

func number(n int) []byte { return nl.Uint32Attr(uint32(n)) } //nolint:gosec // not negative

// all asks again for a list that changed while the kernel told it.
func all[T any](list func() ([]T, error)) ([]T, error) {
	for range 10 {
		l, err := list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return l, err
		}
	}
	return list()
}

// inNamespace runs f on a thread in another network namespace.
func inNamespace(netns int, f func() error) error {
	var err error
	var wg sync.WaitGroup
	wg.Go(func() {
		runtime.LockOSThread()
		var home int
		home, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			runtime.UnlockOSThread()
			err = fmt.Errorf("open network namespace: %w", err)
			return
		}
		defer func() { _ = unix.Close(home) }()
		if err = unix.Setns(netns, unix.CLONE_NEWNET); err != nil {
			runtime.UnlockOSThread()
			err = fmt.Errorf("enter network namespace: %w", err)
			return
		}
		err = f()
		// A thread that cannot return is not given back: the runtime ends it,
		// and nobody else ever runs in the wrong namespace.
		if unix.Setns(home, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
	})
	wg.Wait()
	return err
}
