package sandbox

import (
	"fmt"
	"sync"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// uidRange is a range of host uids and gids that belongs to one sandbox.
type uidRange struct {
	base, size uint32
}

// uidRanges hands out ranges, each to one sandbox at a time.
type uidRanges struct {
	base, count uint32

	mu   sync.Mutex
	used map[uint32]bool
	next uint32
}

func newUIDRanges(base, count uint32) *uidRanges {
	return &uidRanges{base: base, count: count, used: map[uint32]bool{}}
}

// take gives a free range, the one that has been free for longest or nearly so.
func (u *uidRanges) take() (uidRange, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for range u.count {
		i := u.next
		u.next = (u.next + 1) % u.count
		if !u.used[i] {
			u.used[i] = true
			return uidRange{base: u.base + i*idsPerSandbox, size: idsPerSandbox}, nil
		}
	}
	return uidRange{}, &fleet.Error{
		Op: "take a uid range", Kind: fleet.ErrOverloaded,
		Err:  fmt.Errorf("all %d ranges are in use", u.count),
		Hint: "raise uid_count in the configuration",
	}
}

// adopt marks the range that begins at base as used.
func (u *uidRanges) adopt(r uidRange) {
	if r.size == 0 || r.base < u.base {
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.used[(r.base-u.base)/idsPerSandbox] = true
}

func (u *uidRanges) free(r uidRange) {
	if r.size == 0 || r.base < u.base {
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.used, (r.base-u.base)/idsPerSandbox)
}
