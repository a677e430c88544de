package checkpoint

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

const (
	// maxReason bounds what is remembered of an error.
	maxReason  = 4 << 10
	maxRefusal = 64 << 10
)

// refusal is refused/APP.KEY.json.
type refusal struct {
	Reason string    `json:"reason"`
	At     time.Time `json:"at"`
}

// loadRefusals reads which keys were refused. A file that cannot be read
// refuses, too: a cold start is always right.
func (s *Store) loadRefusals() error {
	entries, err := os.ReadDir(s.path("refused"))
	if err != nil {
		return err
	}
	for _, d := range entries {
		path := s.path("refused", d.Name())
		n, rest, err := parseID(d.Name())
		if err != nil || rest != "json" {
			s.sweep(path, "its name is no refusal's")
			continue
		}
		var r refusal
		data, err := read(path, maxRefusal)
		if err == nil {
			err = unmarshal(data, &r)
		}
		if err != nil {
			s.log.Warn("refusal of a checkpoint is damaged", "path", path, "error", err)
			r = refusal{Reason: "the reason is lost: its file is damaged"}
		}
		s.refused[n] = r
	}
	return nil
}

func (s *Store) refusalPath(n id) string { return s.path("refused", n.prefix()+"json") }

// Refuse removes a checkpoint, now or with its last hold, and remembers that
// it is not to be made again. If that cannot be written it is remembered until
// the store is opened again.
func (s *Store) Refuse(app fleet.AppName, key, reason string) error {
	n, err := newID(app, key)
	if err != nil {
		return &fleet.Error{Op: "refuse checkpoint", Kind: fleet.ErrInvalid, Err: err}
	}
	if len(reason) > maxReason {
		reason = reason[:maxReason] + "…"
	}
	r := refusal{Reason: strings.ToValidUTF8(reason, ""), At: time.Now().Round(0).UTC()}
	err = s.record(n, r)
	s.stop(func(x id) bool { return x == n }, fmt.Errorf("%w: %s", ErrRefused, r.Reason))
	_, derr := s.dismiss(func(e *entry) bool { return e.id == n })
	if err = errors.Join(err, derr); err != nil {
		return fmt.Errorf("refuse checkpoint of %s: %w", app, err)
	}
	return nil
}

func (s *Store) record(n id, r refusal) error {
	s.recording.Lock()
	defer s.recording.Unlock()
	s.mu.Lock()
	s.refused[n] = r
	s.mu.Unlock()
	return write(s.path("tmp"), s.refusalPath(n), r)
}

// Delete removes everything of an app, refusals too: what somebody holds with
// its last hold, all else before it returns. Nothing of it can be found from
// now on.
func (s *Store) Delete(app fleet.AppName) error {
	s.stop(func(n id) bool { return n.app == app }, &fleet.Error{Op: "make checkpoint", Subject: string(app), Kind: fleet.ErrConflict,
		Err: errors.New("the app was deleted meanwhile")})
	_, err := s.dismiss(func(e *entry) bool { return e.id.app == app })
	if err = errors.Join(err, s.pardon(func(n id) bool { return n.app == app })); err != nil {
		return fmt.Errorf("delete checkpoints of %s: %w", app, err)
	}
	return nil
}

// Keep removes what want does not name, refusals too, and then, if the budget is
// smaller than it was, those that were not used for longest. What somebody holds
// goes with its last hold. removed is the number of checkpoints that went.
func (s *Store) Keep(want func(app fleet.AppName, key string) bool) (removed int, err error) {
	// want is asked without the lock, so it may take its time.
	known := map[id]bool{}
	s.mu.Lock()
	for e := range s.all {
		known[e.id] = true
	}
	for n := range s.refused {
		known[n] = true
	}
	s.mu.Unlock()
	for n := range known {
		known[n] = want(n.app, n.key)
	}
	unwanted := func(n id) bool {
		wanted, asked := known[n]
		return asked && !wanted
	}
	removed, err = s.dismiss(func(e *entry) bool { return e.doomed && e.holds == 0 || unwanted(e.id) })
	err = errors.Join(err, s.pardon(unwanted))

	s.mu.Lock()
	victims, _ := s.victims(0)
	for _, v := range victims {
		s.forget(v)
	}
	s.mu.Unlock()
	if err = errors.Join(err, s.removeAll(victims)); err != nil {
		err = fmt.Errorf("remove checkpoints: %w", err)
	}
	return removed + len(victims), err
}

// stop has those that are being made end with an error. Those that are as good
// as made it waits for: they are there when it returns.
func (s *Store) stop(which func(id) bool, why error) {
	var placed []<-chan struct{}
	s.mu.Lock()
	for n, m := range s.making {
		switch {
		case !which(n):
		case m.placing:
			placed = append(placed, m.done)
		default:
			m.void = why
		}
	}
	s.mu.Unlock()
	for _, done := range placed {
		<-done
	}
}

// pardon forgets refusals.
func (s *Store) pardon(which func(id) bool) error {
	s.recording.Lock()
	defer s.recording.Unlock()
	var gone []id
	s.mu.Lock()
	for n := range s.refused {
		if which(n) {
			delete(s.refused, n)
			gone = append(gone, n)
		}
	}
	s.mu.Unlock()
	var errs []error
	for _, n := range gone {
		if err := os.Remove(s.refusalPath(n)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if len(gone) > 0 {
		errs = append(errs, syncDir(s.path("refused")))
	}
	return errors.Join(errs...)
}

// dismiss has checkpoints not be found any more and removes them: what
// somebody holds is marked, and goes with its last hold. which is asked under
// the lock. n is how many were removed.
func (s *Store) dismiss(which func(*entry) bool) (n int, err error) {
	var free, held []*entry
	s.mu.Lock()
	for e := range s.all {
		if !which(e) {
			continue
		}
		if e.holds == 0 {
			free = append(free, e)
		} else {
			held = append(held, e)
		}
	}
	for _, e := range free {
		s.forget(e)
	}
	for _, e := range held {
		s.doom(e)
	}
	s.mu.Unlock()
	errs := []error{s.removeAll(free)}
	for _, e := range held {
		errs = append(errs, e.mark())
	}
	return len(free), errors.Join(errs...)
}

// doom has an entry not be found. s.mu is held.
func (s *Store) doom(e *entry) {
	e.doomed = true
	if s.kept[e.id] == e {
		delete(s.kept, e.id)
	}
}

// forget takes an entry that nobody holds out of the store; who called it
// removes it from the disk. s.mu is held.
func (s *Store) forget(e *entry) {
	s.doom(e)
	delete(s.all, e)
}

// mark makes a doom outlast this process. Its last hold may end meanwhile.
func (e *entry) mark() error {
	err := os.Rename(filepath.Join(e.dir, manifestFile), filepath.Join(e.dir, doomedFile))
	if err == nil {
		err = syncDir(e.dir)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func (s *Store) removeAll(entries []*entry) error {
	var errs []error
	for _, e := range entries {
		errs = append(errs, s.remove(e))
	}
	return errors.Join(errs...)
}

// remove removes a checkpoint that was forgotten: at once where it can be
// found, then from the disk. What is left of it by an error or a crash, Open
// removes.
func (s *Store) remove(e *entry) error {
	trash := s.path("trash", e.base)
	err := os.Rename(e.dir, trash)
	if err != nil {
		if _, lerr := os.Lstat(e.dir); errors.Is(lerr, fs.ErrNotExist) { // somebody else has
			return nil
		}
		// It still takes room, and whoever needs that tries again.
		s.mu.Lock()
		s.all[e] = struct{}{}
		s.mu.Unlock()
		return err
	}
	return errors.Join(syncDir(s.path("kept")), os.RemoveAll(trash))
}
