package checkpoint

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// Why there is no checkpoint.
var (
	// ErrNone: nothing is saved.
	ErrNone = errors.New("no checkpoint")
	// ErrRefused: it was tried and is not to be tried again; the reason follows.
	ErrRefused = errors.New("checkpoint refused")
	// ErrDamaged: it was there, and not as it had been saved.
	ErrDamaged = errors.New("damaged")
	// ErrBusy: it is being made.
	ErrBusy = errors.New("checkpoint is being made")
)

const (
	manifestFile = "manifest.json"
	doomedFile   = "doomed.json"
	contentDir   = "content"
)

// Config of a store.
type Config struct {
	// Dir is where it keeps everything. It is made, and closed to others.
	Dir string
	// Budget of all checkpoints together, in whole blocks of 4Ki for each entry
	// of a directory. 0: none is kept.
	Budget fleet.Bytes
	// Logger hears of what was found damaged, and of removals that nobody waits
	// for. nil: nobody does.
	Logger *slog.Logger
}

// Store keeps checkpoints. Its methods may be called from any goroutine, also
// by the function that Make calls.
type Store struct {
	dir    string
	budget fleet.Bytes
	log    *slog.Logger

	// recording orders what writes and removes refusals on the disk, which is
	// then what the memory says.
	recording sync.Mutex

	mu sync.Mutex // guards the fields below and some of entry's; never held across I/O
	// kept are those that Find finds.
	kept map[id]*entry
	// all of them take room: also the doomed, which go when nobody holds them.
	all     map[*entry]struct{}
	refused map[id]refusal
	making  map[id]*making
	// reserved is the room of those that are about to be kept.
	reserved fleet.Bytes
}

// id names a checkpoint to the outside.
type id struct {
	app fleet.AppName
	key string
}

var hexKey = regexp.MustCompile(`^[0-9a-f]{64}$`)

// newID refuses what cannot be part of a file's name.
func newID(app fleet.AppName, key string) (id, error) {
	err := fleet.ValidName(string(app))
	if err == nil && !hexKey.MatchString(key) {
		err = fmt.Errorf("%q is not a key", key)
	}
	return id{app, key}, err
}

// parseID reads the beginning of a file's name.
func parseID(s string) (_ id, rest string, err error) {
	app, s, _ := strings.Cut(s, ".")
	key, rest, _ := strings.Cut(s, ".")
	n, err := newID(fleet.AppName(app), key)
	return n, rest, err
}

// prefix is the beginning of its files' names.
func (n id) prefix() string { return string(n.app) + "." + n.key + "." }

// String is for people.
func (n id) String() string { return string(n.app) + " (" + n.key[:min(12, len(n.key))] + ")" }

// entry is a checkpoint on the disk.
type entry struct {
	id      id
	base    string // its directory's name, wherever that stands
	dir     string // where it stands until it goes
	tree    tree
	size    fleet.Bytes
	created time.Time

	// Guarded by the store's lock.
	holds  int
	used   time.Time
	noted  time.Time // what of used is on the disk
	doomed bool

	// check is held while the files are read, by design: who else wants this
	// very checkpoint waits for the same answer.
	check    sync.Mutex
	verified bool
	damage   error
}

// Checkpoint is a checkpoint that somebody holds.
type Checkpoint struct {
	dir     string
	size    fleet.Bytes
	created time.Time
	release func()
}

// Dir has what was saved. It is there, and does not change, until Release.
func (c *Checkpoint) Dir() string { return c.dir }

// Size is what it takes of the budget.
func (c *Checkpoint) Size() fleet.Bytes { return c.size }

// Created is when it had been saved.
func (c *Checkpoint) Created() time.Time { return c.created }

// Release ends the hold. If it was the last one of a checkpoint that is to go,
// that is removed before Release returns. A second call does nothing.
func (c *Checkpoint) Release() { c.release() }

// Open opens the store in cfg.Dir and removes what a crash left unfinished.
// What the instances of an earlier process still use of it must be held (see
// Hold) before anything else is done with the store; Keep, after that, removes
// what was to go with their last hold.
func Open(cfg Config) (*Store, error) {
	s := &Store{
		budget: max(cfg.Budget, 0), log: cmp.Or(cfg.Logger, slog.New(slog.DiscardHandler)),
		kept: map[id]*entry{}, all: map[*entry]struct{}{}, refused: map[id]refusal{}, making: map[id]*making{},
	}
	var err error
	if s.dir, err = filepath.Abs(cfg.Dir); err == nil {
		err = s.open()
	}
	if err != nil {
		return nil, &fleet.Error{Op: "open checkpoints", Subject: cfg.Dir, Err: err,
			Hint: "it must be a directory of the daemon's own, on a disk that works; what is in it can be removed while no instance runs"}
	}
	return s, nil
}

func (s *Store) path(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

func (s *Store) open() error {
	for _, d := range []string{"", "kept", "refused", "tmp", "trash"} {
		if err := os.MkdirAll(s.path(d), 0o700); err != nil {
			return err
		}
		if err := os.Chmod(s.path(d), 0o700); err != nil {
			return err
		}
	}
	for _, d := range []string{"tmp", "trash"} {
		entries, err := os.ReadDir(s.path(d))
		if err != nil {
			return err
		}
		for _, e := range entries {
			s.sweep(s.path(d, e.Name()), "unfinished")
		}
	}
	if err := s.loadRefusals(); err != nil {
		return err
	}
	return s.load()
}

// sweep removes what is no checkpoint. If that fails the next Open tries it
// again.
func (s *Store) sweep(path, why string) {
	if err := os.RemoveAll(path); err != nil {
		s.log.Warn("checkpoint leftover cannot be removed", "path", path, "error", err)
		return
	}
	s.log.Info("checkpoint leftover removed", "path", path, "cause", why)
}

func (s *Store) load() error {
	entries, err := os.ReadDir(s.path("kept"))
	if err != nil {
		return err
	}
	for _, d := range entries {
		e := &entry{base: d.Name(), dir: s.path("kept", d.Name())}
		var chance string
		if e.id, chance, err = parseID(e.base); err != nil || chance == "" {
			s.sweep(e.dir, "its name is no checkpoint's")
			continue
		}
		if err := e.read(); err != nil {
			if transient(err) {
				return err
			}
			if _, err := os.Lstat(filepath.Join(e.dir, contentDir)); err != nil {
				s.sweep(e.dir, "it has no content")
				continue
			}
			// It may be under the root filesystem of an instance that still runs.
			s.log.Warn("checkpoint is damaged and will be removed", "path", e.dir, "error", err)
			e.doomed = true
		}
		s.admit(e)
	}
	return nil
}

// read reads its manifest. One that is doomed keeps it under another name.
func (e *entry) read() error {
	path := filepath.Join(e.dir, manifestFile)
	data, err := read(path, maxManifest)
	if errors.Is(err, fs.ErrNotExist) {
		e.doomed = true
		path = filepath.Join(e.dir, doomedFile)
		data, err = read(path, maxManifest)
	}
	if err != nil {
		return err
	}
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	m, err := parseManifest(data, e.id)
	if err != nil {
		return fmt.Errorf("read manifest: %w", err)
	}
	e.tree, e.size, e.created = m.tree, m.size(), m.Created
	e.used, e.noted = info.ModTime(), info.ModTime()
	return nil
}

// admit adds what load found. There is nobody else yet.
func (s *Store) admit(e *entry) {
	s.all[e] = struct{}{}
	_, no := s.refused[e.id]
	e.doomed = e.doomed || no || s.budget == 0
	if e.doomed {
		return
	}
	// Two of one name: the elder was to go, and a crash came first.
	if other := s.kept[e.id]; other != nil {
		if other.created.After(e.created) {
			e, other = other, e
		}
		other.doomed = true
	}
	s.kept[e.id] = e
}

// Find gives a checkpoint, verified and held: Release must follow. ErrNone:
// there is none. ErrRefused: and none is to be made. ErrDamaged: it is removed
// now. Any other error is the machine's of this moment. Who asks first reads
// all of its files.
func (s *Store) Find(app fleet.AppName, key string) (*Checkpoint, error) {
	n := id{app, key}
	for {
		s.mu.Lock()
		e := s.kept[n]
		if e == nil {
			r, no := s.refused[n]
			s.mu.Unlock()
			if no {
				return nil, fmt.Errorf("%w: %s", ErrRefused, r.Reason)
			}
			return nil, ErrNone
		}
		e.holds++
		s.mu.Unlock()

		if err := e.verify(); err != nil {
			return nil, s.unfit(e, err)
		}
		s.mu.Lock()
		if e.doomed { // meanwhile
			s.mu.Unlock()
			s.letGo(e)
			continue
		}
		e.used = time.Now()
		note := e.used.Sub(e.noted).Abs() > noteAfter
		if note {
			e.noted = e.used
		}
		used := e.used
		s.mu.Unlock()
		if note {
			// Without it others are older after a restart: no harm.
			_ = os.Chtimes(filepath.Join(e.dir, manifestFile), time.Time{}, used)
		}
		return &Checkpoint{dir: filepath.Join(e.dir, contentDir), size: e.size, created: e.created, release: sync.OnceFunc(func() { s.letGo(e) })}, nil
	}
}

// Has tells whether something of an app is kept.
func (s *Store) Has(app fleet.AppName) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for n := range s.kept {
		if n.app == app {
			return true
		}
	}
	return false
}

// noteAfter is how wrong the time of the last use may be after a restart: a
// busy checkpoint does not write to the disk each time.
const noteAfter = time.Minute

// verify says what is wrong with a checkpoint that is held.
func (e *entry) verify() error {
	content := filepath.Join(e.dir, contentDir)
	if err := e.verifyOnce(content); err != nil {
		return err
	}
	return e.tree.look(content)
}

// verifyOnce reads all files, unless somebody has.
func (e *entry) verifyOnce(content string) error {
	e.check.Lock()
	defer e.check.Unlock()
	if e.verified || e.damage != nil {
		return e.damage
	}
	// One that grew is not read to its end, which may be far away.
	got, err := readTree(context.Background(), content, 2*e.size, false)
	if err == nil {
		err = e.tree.differs(got)
	}
	if transient(err) {
		return err
	}
	e.verified, e.damage = err == nil, err
	return err
}

// unfit ends a hold on what could not be verified.
func (s *Store) unfit(e *entry, err error) error {
	out := &fleet.Error{Op: "find checkpoint", Subject: e.id.String(), Err: err}
	if !transient(err) {
		out.Err = fmt.Errorf("%w: %w", ErrDamaged, err)
		out.Hint = "it is removed, and can be made again; if that happens again, check the disk"
		if _, rerr := s.dismiss(func(x *entry) bool { return x == e }); rerr != nil {
			out.Err = errors.Join(out.Err, rerr)
		}
	}
	s.letGo(e)
	return out
}

// Hold keeps what an instance of an earlier process was restored from where it
// is, until release is called, also if it is to go. It verifies nothing. ok:
// there was something to hold.
func (s *Store) Hold(app fleet.AppName, key string) (release func(), ok bool) {
	n := id{app, key}
	s.mu.Lock()
	defer s.mu.Unlock()
	// If one is kept and another doomed, nobody knows which it was.
	var held []*entry
	for e := range s.all {
		if e.id == n {
			e.holds++
			held = append(held, e)
		}
	}
	return sync.OnceFunc(func() {
		for _, e := range held {
			s.letGo(e)
		}
	}), len(held) > 0
}

// letGo ends a hold.
func (s *Store) letGo(e *entry) {
	s.mu.Lock()
	e.holds--
	last := e.holds == 0 && e.doomed
	if last {
		delete(s.all, e)
	}
	s.mu.Unlock()
	if !last {
		return
	}
	if err := s.remove(e); err != nil {
		s.log.Warn("checkpoint cannot be removed", "app", e.id.app, "path", e.dir, "error", err)
	}
}

// Info describes a checkpoint, or a refusal.
type Info struct {
	Key string
	// Size is what it takes of the budget; 0 for a refusal.
	Size fleet.Bytes
	// Created is when it was saved, or refused.
	Created time.Time
	// Used is when Find gave it last; zero for a refusal.
	Used time.Time
	// Refused is why it is not to be tried again; "": it is kept.
	Refused string
}

// List describes what is kept and what was refused of an app, the oldest first.
func (s *Store) List(app fleet.AppName) []Info {
	var list []Info
	s.mu.Lock()
	for n, e := range s.kept {
		if n.app == app {
			list = append(list, Info{Key: n.key, Size: e.size, Created: e.created, Used: e.used})
		}
	}
	for n, r := range s.refused {
		if n.app == app {
			list = append(list, Info{Key: n.key, Created: r.At, Refused: r.Reason})
		}
	}
	s.mu.Unlock()
	slices.SortFunc(list, func(a, b Info) int { return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.Key, b.Key)) })
	return list
}
