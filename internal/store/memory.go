package store

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// keptChanges is how far back a watch of Memory can begin.
const keptChanges = 10_000

// Memory is a store that ends with its process, for tests.
type Memory struct {
	mu      sync.Mutex
	rev     Rev
	entries map[string]Entry
	session map[string]bool
	history []Change // ascending by Rev
	dropped Rev      // newest revision that history lacks
	changed chan struct{}
	away    bool
	closed  bool
}

// NewMemory makes an empty store.
func NewMemory() *Memory {
	return &Memory{entries: map[string]Entry{}, session: map[string]bool{}, changed: make(chan struct{})}
}

// SetAway makes every call fail with ErrAway and watches wait, or all work
// again.
func (m *Memory) SetAway(away bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.away = away
	m.wake()
}

func (m *Memory) wake() {
	close(m.changed)
	m.changed = make(chan struct{})
}

// reach reports why the store does not answer. The caller holds the lock.
func (m *Memory) reach(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if m.away || m.closed {
		return ErrAway
	}
	return nil
}

// Get implements Store.
func (m *Memory) Get(ctx context.Context, key string) (Entry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.reach(ctx); err != nil {
		return Entry{}, err
	}
	e, ok := m.entries[key]
	if !ok {
		return Entry{}, fmt.Errorf("key %s: %w", key, fleet.ErrNotFound)
	}
	e.Value = slices.Clone(e.Value)
	return e, nil
}

// List implements Store.
func (m *Memory) List(ctx context.Context, prefix string) ([]Entry, Rev, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.reach(ctx); err != nil {
		return nil, 0, err
	}
	var list []Entry
	for _, key := range slices.Sorted(maps.Keys(m.entries)) {
		if strings.HasPrefix(key, prefix) {
			e := m.entries[key]
			e.Value = slices.Clone(e.Value)
			list = append(list, e)
		}
	}
	return list, m.rev, nil
}

// Commit implements Store.
func (m *Memory) Commit(ctx context.Context, ops ...Op) (Rev, error) {
	if err := Check(ops); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.reach(ctx); err != nil {
		return 0, err
	}
	for _, op := range ops {
		if op.If != AnyRev && m.entries[op.Key].Rev != op.If {
			return 0, fmt.Errorf("key %s: %w", op.Key, ErrConflict)
		}
	}
	m.write(ops)
	return m.rev, nil
}

func (m *Memory) write(ops []Op) {
	if len(ops) == 0 {
		return
	}
	m.rev++
	for _, op := range ops {
		delete(m.session, op.Key)
		if op.Value == nil {
			if _, ok := m.entries[op.Key]; ok {
				delete(m.entries, op.Key)
				m.history = append(m.history, Change{Entry: Entry{Key: op.Key, Rev: m.rev}, Deleted: true})
			}
			continue
		}
		e := Entry{Key: op.Key, Value: slices.Clone(op.Value), Rev: m.rev}
		m.entries[op.Key] = e
		if op.Session {
			m.session[op.Key] = true
		}
		m.history = append(m.history, Change{Entry: e})
	}
	for len(m.history) > keptChanges {
		m.dropped = m.history[0].Rev
		m.history = m.history[1:]
	}
	m.wake()
}

// Watch implements Store.
func (m *Memory) Watch(ctx context.Context, prefix string, after Rev, f func(Change) error) error {
	for {
		m.mu.Lock()
		if after < m.dropped {
			m.mu.Unlock()
			return ErrCompacted
		}
		var batch []Change
		if !m.away {
			batch = m.since(after, prefix)
			after = max(after, m.rev)
		}
		changed, closed := m.changed, m.closed
		m.mu.Unlock()
		for _, c := range batch {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := f(c); err != nil {
				return err
			}
		}
		if closed {
			return ErrAway
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}

// since gives the changes after a revision. The caller holds the lock.
func (m *Memory) since(after Rev, prefix string) []Change {
	first, _ := slices.BinarySearchFunc(m.history, after+1, func(c Change, rev Rev) int { return cmp.Compare(c.Rev, rev) })
	var batch []Change
	for _, c := range m.history[first:] {
		if strings.HasPrefix(c.Key, prefix) {
			c.Value = slices.Clone(c.Value)
			batch = append(batch, c)
		}
	}
	return batch
}

// Ping implements Store.
func (m *Memory) Ping(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.reach(ctx)
}

// Close implements Store.
func (m *Memory) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil
	}
	var ops []Op
	for key := range m.session {
		ops = append(ops, Op{Key: key, If: AnyRev})
	}
	m.write(ops)
	m.closed = true
	m.wake()
	return nil
}
