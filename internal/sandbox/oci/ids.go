package oci

import (
	"fmt"
	"sync"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// idRange is a range of host uids and gids that belongs to one container.
// Size 0: the container has no user namespace of its own.
type idRange struct {
	Base uint32 `json:"base"`
	Size uint32 `json:"size"`
}

const idsPerContainer = 65536

// idRanges hands out ranges, each to one container at a time.
type idRanges struct {
	base, count uint32

	mu   sync.Mutex
	used map[uint32]bool
	next uint32
}

func newIDRanges(base, count uint32) *idRanges {
	return &idRanges{base: base, count: count, used: map[uint32]bool{}}
}

func (u *idRanges) take() (idRange, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for range u.count {
		base := u.base + u.next*idsPerContainer
		u.next = (u.next + 1) % u.count
		if !u.used[base] {
			u.used[base] = true
			return idRange{Base: base, Size: idsPerContainer}, nil
		}
	}
	return idRange{}, &fleet.Error{
		Op: "take a uid range", Kind: fleet.ErrOverloaded,
		Err: fmt.Errorf("all %d ranges are in use", u.count), Hint: "raise uid_count in the configuration",
	}
}

func (u *idRanges) adopt(r idRange) {
	if r.Size == 0 {
		return
	}
	u.mu.Lock()
	u.used[r.Base] = true
	u.mu.Unlock()
}

func (u *idRanges) free(r idRange) {
	u.mu.Lock()
	delete(u.used, r.Base)
	u.mu.Unlock()
}
