package checkpoint

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// making is a checkpoint that is being made.
type making struct {
	// void is why it is not wanted any more.
	void error
	// placing: it moves to the kept ones, and who wants it to go waits for done.
	placing bool
	done    chan struct{}
}

// Make makes a checkpoint of what fill puts into the empty directory dir, and
// returns when it is on the disk and can be found. On any error nothing is
// left. If there is one already that is enough, and fill is not called.
//
// ErrBusy: somebody else makes it. ErrRefused: it is not to be tried.
// fleet.ErrOverloaded: the budget has no room for it, even without all that
// nobody holds. fleet.ErrConflict: its app was deleted meanwhile.
func (s *Store) Make(ctx context.Context, app fleet.AppName, key string, fill func(dir string) error) (err error) {
	n, err := newID(app, key)
	if err != nil {
		return &fleet.Error{Op: "make checkpoint", Kind: fleet.ErrInvalid, Err: err}
	}
	m, err := s.announce(n)
	if m == nil {
		return err
	}
	defer s.finish(n, m)
	base := n.prefix() + rand.Text()
	e := &entry{id: n, base: base, dir: s.path("kept", base)}
	tmp := s.path("tmp", base)
	defer func() {
		// When all went well it is somewhere else.
		if rerr := os.RemoveAll(tmp); rerr != nil {
			err = errors.Join(err, fmt.Errorf("remove unfinished checkpoint: %w", rerr))
		}
	}()
	if err := s.fill(ctx, e, tmp, fill); err != nil {
		s.mu.Lock()
		void := m.void
		s.mu.Unlock()
		if void != nil { // nobody wants it any more, and that may be why it failed
			return void
		}
		return fmt.Errorf("make checkpoint of %s: %w", app, err)
	}
	return s.place(m, e, tmp)
}

// announce begins a making, or says why there is none. Without either there is
// nothing to do.
func (s *Store) announce(n id) (*making, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r, no := s.refused[n]; no {
		return nil, fmt.Errorf("%w: %s", ErrRefused, r.Reason)
	}
	if s.making[n] != nil {
		return nil, ErrBusy
	}
	if s.kept[n] != nil {
		return nil, nil
	}
	if s.budget == 0 {
		return nil, s.noRoom(n, errors.New("checkpoint.budget is 0"))
	}
	m := &making{done: make(chan struct{})}
	s.making[n] = m
	return m, nil
}

func (s *Store) finish(n id, m *making) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.making, n)
	close(m.done)
}

// fill makes a whole checkpoint in tmp, and has it on the disk.
func (s *Store) fill(ctx context.Context, e *entry, tmp string, fill func(dir string) error) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	content := filepath.Join(tmp, contentDir)
	for _, d := range []string{tmp, content} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return err
		}
	}
	if err := fill(content); err != nil {
		return err
	}
	t, err := readTree(ctx, content, s.budget, true)
	if errors.Is(err, errTooLarge) {
		return s.noRoom(e.id, fmt.Errorf("it takes more than checkpoint.budget, which is %s", s.budget))
	}
	if err != nil {
		return err
	}
	now := time.Now()
	e.tree, e.size, e.created, e.used, e.noted = *t, t.size(), now.Round(0).UTC(), now, now
	return write(tmp, filepath.Join(tmp, manifestFile), manifest{Format: manifestFormat, App: e.id.app, Key: e.id.key, Created: e.created, tree: e.tree})
}

// place makes room for a checkpoint and moves it to the others.
func (s *Store) place(m *making, e *entry, tmp string) error {
	victims, err := s.reserve(m, e)
	if err != nil {
		return err
	}
	err = s.removeAll(victims)
	if err == nil {
		err = s.move(tmp, e.dir)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reserved -= e.size
	if err != nil {
		return fmt.Errorf("keep checkpoint of %s: %w", e.id.app, err)
	}
	s.all[e], s.kept[e.id] = struct{}{}, e
	return nil
}

// move puts a directory in its place for good. On error it is where it was.
func (s *Store) move(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return err
	}
	if err := syncDir(filepath.Dir(to)); err != nil {
		return errors.Join(err, os.Rename(to, from))
	}
	return nil
}

// reserve takes room for e, and gives those that have to go for it: they are
// not found any more. It gives none if that is not enough.
func (s *Store) reserve(m *making, e *entry) ([]*entry, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if m.void != nil {
		return nil, m.void
	}
	victims, over := s.victims(e.size)
	if over > 0 {
		return nil, s.noRoom(e.id, fmt.Errorf("it takes %s, %s more than checkpoint.budget has beside what is in use", e.size, over))
	}
	for _, v := range victims {
		s.forget(v)
	}
	s.reserved += e.size
	m.placing = true
	return victims, nil
}

// victims are those that have to go so that size fits into the budget: first
// what goes anyway, then who was not used for longest. over is what does not
// fit even so. s.mu is held.
func (s *Store) victims(size fleet.Bytes) (victims []*entry, over fleet.Bytes) {
	over = s.reserved + size - s.budget
	var free []*entry
	for e := range s.all {
		over += e.size
		if e.holds == 0 {
			free = append(free, e)
		}
	}
	slices.SortFunc(free, func(a, b *entry) int {
		if a.doomed != b.doomed {
			if a.doomed {
				return -1
			}
			return 1
		}
		return a.used.Compare(b.used)
	})
	for i := 0; i < len(free) && over > 0; i++ {
		over -= free[i].size
		victims = append(victims, free[i])
	}
	return victims, over
}

func (s *Store) noRoom(n id, err error) error {
	return &fleet.Error{Op: "keep checkpoint", Subject: n.String(), Kind: fleet.ErrOverloaded, Err: err,
		Hint: "raise checkpoint.budget in the daemon's configuration"}
}
