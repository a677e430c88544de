package sandbox

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// askForSockets has a machine open a way to ask which sockets there are in its
// network namespace (sock_diag(7)), and takes it. The daemon asks by it whether the app
// listens: that takes some microseconds, where a connection that is refused goes all
// the way through the network and back.
func (p *prepared) askForSockets(ctx context.Context) error {
	t := &tape{}
	t.call("open socket diagnosis", unix.SYS_SOCKET, num(unix.AF_NETLINK), num(unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK), num(unix.NETLINK_SOCK_DIAG))
	t.done()
	if err := p.machine.play(ctx, t); err != nil {
		return err
	}
	fd, err := takeFD(p.machine.pid, firstFD) // our child, not waited for
	if err != nil {
		return fmt.Errorf("take socket diagnosis: %w", err)
	}
	p.diag = fd
	shut := &tape{}
	shut.call("close descriptors", unix.SYS_CLOSE_RANGE, num(firstFD), num(^uint32(0)), num(0))
	shut.done()
	return p.machine.play(ctx, shut)
}

// Listens implements Asker. Who was told yes cannot ask again: nothing is kept
// open for a container that runs.
func (c *container) Listens(port int) (bool, error) {
	c.asking.Lock()
	defer c.asking.Unlock()
	if c.p.diag <= 0 {
		return false, errors.New("ask for listening sockets: not possible")
	}
	address := c.p.link.Address.As4()
	// struct nlmsghdr and struct inet_diag_req_v2: the socket that would take a
	// connection from nowhere to that address.
	const size = 16 + 56
	var msg [size]byte
	ne := binary.NativeEndian
	ne.PutUint32(msg[0:], size)
	ne.PutUint16(msg[4:], unix.SOCK_DIAG_BY_FAMILY)
	ne.PutUint16(msg[6:], unix.NLM_F_REQUEST)
	msg[16], msg[17] = unix.AF_INET, unix.IPPROTO_TCP
	ne.PutUint32(msg[20:], 1<<unix.BPF_TCP_LISTEN)
	binary.BigEndian.PutUint16(msg[24:], uint16(port)) //nolint:gosec // checked when the app was deployed
	copy(msg[28:], address[:])
	ne.PutUint32(msg[64:], ^uint32(0)) // no cookie
	ne.PutUint32(msg[68:], ^uint32(0))
	if err := unix.Sendto(c.p.diag, msg[:], 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return false, fmt.Errorf("ask for listening sockets: %w", err)
	}
	var answer [512]byte
	n, _, err := unix.Recvfrom(c.p.diag, answer[:], 0)
	if err != nil {
		return false, fmt.Errorf("ask for listening sockets: %w", err)
	}
	switch {
	case n < 20:
		return false, errors.New("ask for listening sockets: a short answer")
	case ne.Uint16(answer[4:]) == unix.NLMSG_ERROR:
		if errno := unix.Errno(-int32(ne.Uint32(answer[16:]))); errno != unix.ENOENT { //nolint:gosec // a negative number
			return false, fmt.Errorf("ask for listening sockets: %w", errno)
		}
		return false, nil
	}
	c.p.mute()
	return true, nil
}
