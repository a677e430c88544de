package network

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// pool gives addresses. The one that has been free for longest comes first, so
// that what still knows an address from an earlier life has time to forget it.
type pool struct {
	subnet  netip.Prefix
	gateway netip.Addr

	mu    sync.Mutex
	used  map[netip.Addr]Lease
	fresh netip.Addr   // this and all higher ones were never given
	freed []netip.Addr // lower ones, in the order in which they came back
}

func newPool(subnet netip.Prefix) *pool {
	gateway := subnet.Addr().Next()
	return &pool{subnet: subnet, gateway: gateway, used: map[netip.Addr]Lease{}, fresh: gateway.Next()}
}

// take gives an address to a container. Its interface has the container's id.
func (p *pool) take(id string) (Lease, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		a, ok := p.oldest()
		if !ok {
			return Lease{}, &fleet.Error{Op: "take an address", Subject: p.subnet.String(), Kind: fleet.ErrOverloaded, Err: errors.New("all addresses are in use"), Hint: "choose a larger network.subnet"}
		}
		if _, taken := p.used[a]; !taken { // by adoption
			l := Lease{ID: id, Veth: id, Address: a}
			p.used[a] = l
			return l, nil
		}
	}
}

func (p *pool) oldest() (netip.Addr, bool) {
	if a := p.fresh; p.subnet.Contains(a.Next()) { // or else a is the broadcast address
		p.fresh = a.Next()
		return a, true
	}
	if len(p.freed) == 0 {
		return netip.Addr{}, false
	}
	a := p.freed[0]
	p.freed = p.freed[1:]
	return a, true
}

// adopt marks an address that an earlier process gave.
func (p *pool) adopt(l Lease) error {
	if !p.subnet.Contains(l.Address) || !p.gateway.Less(l.Address) || !p.subnet.Contains(l.Address.Next()) {
		return &fleet.Error{Op: "adopt connection", Subject: l.ID, Kind: fleet.ErrConflict, Err: fmt.Errorf("address %s is not one of %s", l.Address, p.subnet), Hint: "keep network.subnet while containers are connected"}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if owner, taken := p.used[l.Address]; taken && owner.ID != l.ID {
		return &fleet.Error{Op: "adopt connection", Subject: l.ID, Kind: fleet.ErrConflict, Err: fmt.Errorf("address %s belongs to %s already", l.Address, owner.ID)}
	}
	p.used[l.Address] = l
	return nil
}

// free takes addresses back from those who hold them. It may be repeated.
func (p *pool) free(leases ...Lease) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, l := range leases {
		if held, ok := p.used[l.Address]; !ok || held.ID != l.ID {
			continue
		}
		delete(p.used, l.Address)
		if l.Address.Less(p.fresh) {
			p.freed = append(p.freed, l.Address)
		}
	}
}

// all are the connections that hold an address, by their interfaces' names.
func (p *pool) all() map[string]Lease {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := make(map[string]Lease, len(p.used))
	for _, l := range p.used {
		all[l.Veth] = l
	}
	return all
}
