package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

func causes(t *testing.T) (context.Context, context.CancelCauseFunc) {
	ctx, cancel := context.WithCancelCause(t.Context())
	t.Cleanup(func() { cancel(nil) })
	return ctx, cancel
}

// model is what a store of one app must be like: a list in the order of use,
// and nothing else.
type model struct {
	budget  int
	kept    []*modelled // the least recently used first
	doomed  []*modelled
	refused map[string]bool
}

type modelled struct {
	key     string
	blocks  int
	content string
	holds   int
}

func (m *model) find(key string) *modelled {
	if i := slices.IndexFunc(m.kept, func(c *modelled) bool { return c.key == key }); i >= 0 {
		return m.kept[i]
	}
	return nil
}

func (m *model) use(c *modelled) {
	m.kept = append(slices.DeleteFunc(m.kept, func(x *modelled) bool { return x == c }), c)
}

func (m *model) blocks() (sum int) {
	for _, c := range slices.Concat(m.kept, m.doomed) {
		sum += c.blocks
	}
	return sum
}

// add is what Make has to do: it says whether there is room.
func (m *model) add(c *modelled) bool {
	kept := slices.Clone(m.kept)
	for m.blocks()+c.blocks > m.budget {
		i := slices.IndexFunc(m.kept, func(c *modelled) bool { return c.holds == 0 })
		if i < 0 {
			m.kept = kept
			return false
		}
		m.kept = slices.Delete(m.kept, i, i+1)
	}
	m.kept = append(m.kept, c)
	return true
}

// dismiss has those go that match.
func (m *model) dismiss(which func(*modelled) bool) {
	for _, c := range slices.Clone(m.kept) {
		if !which(c) {
			continue
		}
		m.kept = slices.DeleteFunc(m.kept, func(x *modelled) bool { return x == c })
		if c.holds > 0 {
			m.doomed = append(m.doomed, c)
		}
	}
}

func (m *model) release(c *modelled) {
	if c.holds--; c.holds == 0 {
		m.doomed = slices.DeleteFunc(m.doomed, func(x *modelled) bool { return x == c })
	}
}

// player does random things to a store with an app of its own, and knows what
// must come of them.
type player struct {
	t     *testing.T
	s     *Store
	rng   *rand.Rand
	app   fleet.AppName
	model model
	holds []hold
	n     int
}

type hold struct {
	c    *modelled
	real *Checkpoint
}

func (p *player) step() {
	k := key(p.rng.IntN(6))
	switch p.rng.IntN(20) {
	case 0, 1, 2, 3, 4, 5:
		p.make(k)
	case 6, 7, 8, 9, 10, 11:
		p.find(k)
	case 12, 13, 14, 15, 16:
		if len(p.holds) > 0 {
			p.release(p.rng.IntN(len(p.holds)))
		}
	case 17:
		if err := p.s.Refuse(p.app, k, "by chance"); err != nil {
			p.t.Error(err)
		}
		p.model.refused[k] = true
		p.model.dismiss(func(c *modelled) bool { return c.key == k })
	case 18:
		if p.rng.IntN(4) > 0 {
			return
		}
		if err := p.s.Delete(p.app); err != nil {
			p.t.Error(err)
		}
		clear(p.model.refused)
		p.model.dismiss(func(*modelled) bool { return true })
	case 19:
		// Others' are not ours to remove.
		if _, err := p.s.Keep(func(app fleet.AppName, key string) bool { return app != p.app || key != k }); err != nil {
			p.t.Error(err)
		}
		delete(p.model.refused, k)
		p.model.dismiss(func(c *modelled) bool { return c.key == k })
	}
}

func (p *player) make(k string) {
	p.n++
	c := &modelled{key: k, content: fmt.Sprint(p.app, p.n), blocks: 1 + p.rng.IntN(4)}
	broken := p.rng.IntN(8) == 0
	failed := errors.New("by chance")
	err := p.s.Make(p.t.Context(), p.app, k, func(dir string) error {
		for i := range c.blocks {
			if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), []byte(c.content), 0o600); err != nil {
				return err
			}
		}
		if broken {
			return failed
		}
		return nil
	})
	var want error
	switch {
	case p.model.refused[k]:
		want = ErrRefused
	case p.model.find(k) != nil:
	case broken:
		want = failed
	case !p.model.add(c):
		want = fleet.ErrOverloaded
	}
	if !errors.Is(err, want) {
		p.t.Errorf("%s: make: %v, want %v", p.app, err, want)
	}
}

func (p *player) find(k string) {
	c, err := p.s.Find(p.app, k)
	want := p.model.find(k)
	switch {
	case want != nil && err == nil:
		p.model.use(want)
		want.holds++
		p.holds = append(p.holds, hold{want, c})
		p.check(p.holds[len(p.holds)-1])
	case want == nil && p.model.refused[k] && errors.Is(err, ErrRefused):
	case want == nil && !p.model.refused[k] && errors.Is(err, ErrNone):
	default:
		p.t.Errorf("%s: find: %v, want %+v, refused %t", p.app, err, want, p.model.refused[k])
	}
}

// check fails unless what is held is what was made.
func (p *player) check(h hold) {
	for i := range h.c.blocks {
		if data, err := os.ReadFile(filepath.Join(h.real.Dir(), fmt.Sprint(i))); err != nil || string(data) != h.c.content {
			p.t.Errorf("%s: held %q, %v, want %q", p.app, data, err, h.c.content)
		}
	}
	if h.real.Size() != fleet.Bytes(h.c.blocks*block) {
		p.t.Errorf("%s: its size is %d, want %d blocks", p.app, h.real.Size(), h.c.blocks)
	}
}

func (p *player) release(i int) {
	p.check(p.holds[i])
	p.holds[i].real.Release()
	p.model.release(p.holds[i].c)
	p.holds = slices.Delete(p.holds, i, i+1)
}

// compare fails unless the store lists what the model has.
func (p *player) compare() {
	var want []string
	for _, c := range p.model.kept {
		want = append(want, c.key)
	}
	for k := range p.model.refused {
		want = append(want, k)
	}
	slices.Sort(want)
	if got := keys(p.s.List(p.app)); !slices.Equal(got, want) {
		p.t.Errorf("%s: listed %v, want %v", p.app, got, want)
	}
}

func (p *player) finish() {
	for len(p.holds) > 0 {
		p.release(0)
	}
	p.compare()
}

// TestModel_OneByOne has one app, so it is known exactly what has to go for
// what; and the process is killed now and then.
func TestModel_OneByOne(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	const budget = 12
	dir := ramdisk(t, "16m")
	p := &player{t: t, s: open(t, dir, budget*block), rng: rand.New(rand.NewPCG(seed, 1)), app: "blog", model: model{budget: budget, refused: map[string]bool{}}}
	noted := func() { // so that a restart forgets nothing of the order
		p.s.mu.Lock()
		defer p.s.mu.Unlock()
		for _, e := range p.s.kept {
			if err := os.Chtimes(filepath.Join(e.dir, manifestFile), e.used, e.used); err != nil {
				t.Error(err)
			}
		}
	}
	for i := range 3000 {
		if t.Failed() {
			t.Fatalf("at step %d", i)
		}
		p.step()
		p.compare()
		clean(t, p.s, len(p.model.kept)+len(p.model.doomed))
		if p.rng.IntN(50) > 0 {
			continue
		}
		noted()
		p.s = open(t, dir, budget*block)
		// Whatever was held is held again, under its name; some died.
		survivors := p.holds[:0]
		for _, h := range p.holds {
			if p.rng.IntN(2) == 0 {
				continue // adjust counts anew
			}
			release, ok := p.s.Hold(p.app, h.c.key)
			if !ok {
				t.Errorf("%s is lost", h.c.key)
			}
			survivors = append(survivors, hold{h.c, &Checkpoint{dir: h.real.dir, size: h.real.size, release: release}})
		}
		clear(p.holds[len(survivors):])
		p.holds = survivors
		p.adjust()
		if _, err := p.s.Keep(func(fleet.AppName, string) bool { return true }); err != nil {
			t.Error(err)
		}
	}
	p.finish()
	clean(t, p.s, len(p.model.kept))
}

// adjust tells the model that a hold by name holds all of that name.
func (p *player) adjust() {
	for _, c := range slices.Concat(p.model.kept, p.model.doomed) {
		c.holds = 0
	}
	for i, h := range p.holds {
		var all []func()
		for _, c := range slices.Concat(p.model.kept, p.model.doomed) {
			if c.key == h.c.key {
				c.holds++
				if c != h.c {
					all = append(all, func() { p.model.release(c) })
				}
			}
		}
		release := h.real.release
		p.holds[i].real.release = func() {
			release()
			for _, f := range all {
				f()
			}
		}
	}
	p.model.doomed = slices.DeleteFunc(p.model.doomed, func(c *modelled) bool { return c.holds == 0 })
}

func TestModel_ManyAtOnce(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	s := open(t, ramdisk(t, "64m"), plenty)
	var wg sync.WaitGroup
	players := make([]*player, 6)
	for i := range players {
		p := &player{t: t, s: s, rng: rand.New(rand.NewPCG(seed, uint64(i))), app: fleet.AppName(fmt.Sprint("app", i)), model: model{budget: plenty / block, refused: map[string]bool{}}}
		players[i] = p
		wg.Go(func() {
			for range 500 {
				p.step()
				p.compare()
			}
			p.finish()
		})
	}
	wg.Wait()
	kept := 0
	for _, p := range players {
		kept += len(p.model.kept)
	}
	clean(t, s, kept)
}

// TestModel_TogetherInATightBudget has everybody use the same few names with
// too little room: nobody knows what is there, but what is held is whole, and
// the budget is kept.
func TestModel_TogetherInATightBudget(t *testing.T) {
	const budget = 10
	dir := ramdisk(t, "16m")
	s := open(t, dir, budget*block)
	var wg sync.WaitGroup
	for i := range 6 {
		rng := rand.New(rand.NewPCG(rand.Uint64(), uint64(i)))
		wg.Go(func() {
			for range 400 {
				app, n := fleet.AppName([]string{"blog", "shop"}[rng.IntN(2)]), rng.IntN(4)
				switch rng.IntN(12) {
				case 0:
					_ = s.Delete(app)
				case 1:
					_ = s.Refuse(app, key(n), "by chance")
				case 2:
					_, _ = s.Keep(func(fleet.AppName, string) bool { return rng.IntN(5) > 0 })
				case 3, 4, 5, 6:
					err := s.Make(t.Context(), app, key(n), func(dir string) error {
						for i := range n + 1 {
							if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), []byte(key(n)), 0o600); err != nil {
								return err
							}
						}
						return nil
					})
					if err != nil && !errors.Is(err, ErrBusy) && !errors.Is(err, ErrRefused) && !errors.Is(err, fleet.ErrOverloaded) && !errors.Is(err, fleet.ErrConflict) {
						t.Errorf("make: %v", err)
					}
				default:
					c, err := s.Find(app, key(n))
					if errors.Is(err, ErrNone) || errors.Is(err, ErrRefused) {
						continue
					}
					if err != nil {
						t.Errorf("find: %v", err)
						continue
					}
					for i := range n + 1 {
						if data, err := os.ReadFile(filepath.Join(c.Dir(), fmt.Sprint(i))); err != nil || string(data) != key(n) {
							t.Errorf("held %q, %v", data, err)
						}
					}
					c.Release()
				}
				s.mu.Lock()
				sum := s.reserved
				for e := range s.all {
					sum += e.size
				}
				s.mu.Unlock()
				if sum > budget*block {
					t.Errorf("%d bytes are kept", sum)
				}
			}
		})
	}
	wg.Wait()
	clean(t, s, len(s.kept))
}
