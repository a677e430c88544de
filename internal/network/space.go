package network

import (
	"errors"
	"fmt"
	"os"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// space is a network namespace, and the ways to speak with the kernel about it,
// whichever thread speaks.
type space struct {
	ns      *os.File
	kernel  *netlink.Handle
	wire    *wire
	filters *filters
}

// openSpace takes ns, also if it fails.
func openSpace(ns *os.File) (_ *space, err error) {
	s := &space{ns: ns, filters: &filters{home: ns}}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	if s.kernel, err = netlink.NewHandleAt(netns.NsHandle(ns.Fd()), unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	err = inNamespace(int(ns.Fd()), func() (err error) {
		s.wire, err = openWire()
		return err
	})
	if err != nil {
		return nil, err
	}
	return s, nil
}

func (s *space) close() error {
	if s.kernel != nil {
		s.kernel.Close()
	}
	if s.wire != nil {
		s.wire.close()
	}
	return errors.Join(s.filters.close(), s.ns.Close())
}
