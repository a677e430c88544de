package network

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// removal takes connections off the host together. The kernel lets go of an
// interface only after every processor has been seen not to look at it: that
// takes tens of milliseconds, for one as for a hundred.
type removal struct {
	mu      sync.Mutex
	waiting *batch // which the next removal takes

	turn sync.Mutex // one removal at a time
	last time.Time  // end of the last one; guarded by turn
}

// pause between two removals: while one is under way the kernel lets nobody
// else make an interface, and somebody may be waiting for one.
const pause = 100 * time.Millisecond

// batch is what is removed at once.
type batch struct {
	leases []Lease
	done   bool
	err    error
}

// Detach removes a connection. It may be repeated. Nobody gets the address
// before nothing is left of it.
func (n *Network) Detach(_ context.Context, l Lease) error {
	r := &n.removal
	r.mu.Lock()
	if r.waiting == nil {
		r.waiting = &batch{}
	}
	b := r.waiting
	b.leases = append(b.leases, l)
	r.mu.Unlock()

	r.turn.Lock()
	defer r.turn.Unlock()
	if b.done { // by another one that waited
		return b.err
	}
	time.Sleep(pause - time.Since(r.last))
	r.mu.Lock()
	r.waiting = nil // who comes now is in the next
	r.mu.Unlock()
	b.err, b.done = n.remove(b.leases), true
	r.last = time.Now()
	return b.err
}

// remove takes connections off the host and frees their addresses.
func (n *Network) remove(leases []Lease) error {
	if len(leases) == 0 {
		return nil
	}
	err := n.removeLinks(leases)
	n.pool.free(leases...)
	return err
}

// removeLinks puts the interfaces into a group, and removes that.
func (n *Network) removeLinks(leases []Lease) error {
	var errs []error
	found := 0
	for _, l := range leases {
		switch err := n.fabric.wire.regroup(l.Veth, leavingGroup); {
		case gone(err): // with its namespace
		case err != nil:
			errs = append(errs, fmt.Errorf("remove interface %s: %w", l.Veth, err))
		default:
			found++
		}
	}
	if found > 0 {
		if err := n.fabric.wire.removeGroup(leavingGroup); err != nil && !gone(err) {
			errs = append(errs, fmt.Errorf("remove interfaces: %w", err))
		}
	}
	return errors.Join(errs...)
}

// gone is true for interfaces that are not there.
func gone(err error) bool { return errors.Is(err, unix.ENODEV) }
