package network

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

func TestPool_OldestFirst(t *testing.T) {
	p := newPool(netip.MustParsePrefix("10.0.0.0/29")) // .2 to .6
	take := func(want string) Lease {
		t.Helper()
		l, err := p.take("x" + want)
		if err != nil || l.Address.String() != "10.0.0."+want {
			t.Fatalf("got %v, %v, want %s", l.Address, err, want)
		}
		return l
	}
	two := take("2")
	p.free(two, two)
	three := take("3") // nobody had it yet
	if err := p.adopt(Lease{ID: "old", Address: netip.MustParseAddr("10.0.0.5")}); err != nil {
		t.Fatal(err)
	}
	four := take("4")
	p.free(four)
	p.free(three)
	take("6") // 5 is adopted
	take("2")
	take("4")
	take("3")
	if _, err := p.take("y"); !errors.Is(err, fleet.ErrOverloaded) || fleet.Hint(err) == "" {
		t.Errorf("got %v", err)
	}
	p.free(Lease{ID: "other", Address: two.Address}) // not the owner
	if _, err := p.take("y"); !errors.Is(err, fleet.ErrOverloaded) {
		t.Errorf("got %v", err)
	}
	for _, a := range []string{"10.0.0.0", "10.0.0.1", "10.0.0.7", "10.0.0.8", "::1"} {
		if err := p.adopt(Lease{ID: "z", Address: netip.MustParseAddr(a)}); !errors.Is(err, fleet.ErrConflict) {
			t.Errorf("adopt %s: %v", a, err)
		}
	}
}

// Random lives: no two have the same address, none is lost, and the memory of
// freed ones does not grow beyond the range.
func TestPool_RandomLives(t *testing.T) {
	p := newPool(netip.MustParsePrefix("10.0.0.0/26"))
	const size = 64 - 3
	r := rand.New(rand.NewPCG(1, 2))
	alive := map[netip.Addr]Lease{}
	for i := range 20_000 {
		if r.IntN(2) == 0 {
			l, err := p.take(fmt.Sprint(i))
			if (err != nil) != (len(alive) == size) {
				t.Fatalf("with %d alive: %v", len(alive), err)
			}
			if err != nil {
				continue
			}
			if _, taken := alive[l.Address]; taken {
				t.Fatalf("%s is given twice", l.Address)
			}
			alive[l.Address] = l
			continue
		}
		for a, l := range alive {
			p.free(l)
			delete(alive, a)
			break
		}
		if len(p.freed) > size {
			t.Fatalf("%d freed", len(p.freed))
		}
	}
}
