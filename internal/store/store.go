// Package store is the contract for the durable, watchable state of a fleet
// (apps, revisions, node records), a memory body of it, and the typed helpers
// that read and write the words of package fleet. Package storetest holds the
// conformance suite that every body passes; package etcd is the real body.
//
// The request path never touches a store: whoever needs its content watches it
// and keeps a copy.
package store

import (
	"context"
	"errors"
	"fmt"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// Rev counts the changes of a store; each write makes one.
type Rev int64

// Entry is one key with its value.
type Entry struct {
	Key   string
	Value []byte
	// Rev of the last change of this key.
	Rev Rev
}

// Change is one step of a watch.
type Change struct {
	Entry
	// Deleted: the key is gone; Value is nil.
	Deleted bool
}

// Op is one write of a transaction.
type Op struct {
	Key string
	// Value to put; nil deletes the key.
	Value []byte
	// If: the write, and with it the whole transaction, happens only if the
	// key's Rev is this; 0: only if it does not exist; AnyRev: always.
	If Rev
	// TTL-bound: the key disappears when the session that wrote it ends.
	Session bool
}

// AnyRev is an Op without a condition.
const AnyRev Rev = -1

// Store is durable, watchable, ordered keyed state. Its transactions are
// bounded, see Check. Every method but Watch returns ErrAway (wrapping fleet.ErrUnavailable) when the store
// cannot be reached in time.
type Store interface {
	// Get returns fleet.ErrNotFound for a missing key.
	Get(ctx context.Context, key string) (Entry, error)
	// List returns the entries whose keys begin with prefix, in key order, and
	// the revision that the list is true for.
	List(ctx context.Context, prefix string) ([]Entry, Rev, error)
	// Commit carries out all ops or none. ErrConflict (wrapping
	// fleet.ErrConflict) if a condition did not hold.
	Commit(ctx context.Context, ops ...Op) (Rev, error)
	// Watch calls f for every change after the given revision whose key begins
	// with prefix, in order, none lost and none twice, until ctx ends, f fails
	// or the store is closed. It outlives interruptions of the store: meanwhile
	// it waits. ErrCompacted: the revision is too old; List again.
	Watch(ctx context.Context, prefix string, after Rev, f func(Change) error) error
	// Ping reports whether the store answers.
	Ping(ctx context.Context) error
	// Close ends the session and frees everything.
	Close() error
}

var (
	// ErrCompacted: the history that a watch asked for is no longer kept.
	ErrCompacted = errors.New("history is compacted")
	// ErrAway: the store cannot be reached. It is a fleet.ErrUnavailable too.
	ErrAway = fmt.Errorf("store is away: %w", fleet.ErrUnavailable)
	// ErrConflict: a condition of a transaction did not hold. It is a
	// fleet.ErrConflict too.
	ErrConflict = fmt.Errorf("store: somebody else was first: %w", fleet.ErrConflict)
)

// The bounds of one transaction: what etcd takes in one request, with the
// defaults of its server.
const (
	// MaxOps is the number of writes.
	MaxOps = 128
	// MaxValue is the bytes of all values together.
	MaxValue = 1 << 20
	// MaxKey is the bytes of one key.
	MaxKey = 1 << 10
)

// Check refuses a transaction that no body takes, as fleet.ErrInvalid.
func Check(ops []Op) error {
	refuse := func(subject, format string, args ...any) error {
		return &fleet.Error{Op: "write to the store", Subject: subject, Kind: fleet.ErrInvalid, Err: fmt.Errorf(format, args...)}
	}
	if len(ops) > MaxOps {
		return refuse("", "%d writes in one transaction, at most %d", len(ops), MaxOps)
	}
	seen := make(map[string]bool, len(ops))
	size := 0
	for _, op := range ops {
		size += len(op.Value)
		switch {
		case op.Key == "":
			return refuse("", "a key is empty")
		case len(op.Key) > MaxKey:
			return refuse(op.Key[:20]+"...", "the key has %d bytes, at most %d", len(op.Key), MaxKey)
		case size > MaxValue:
			return refuse(op.Key, "the values up to this one have %d bytes, at most %d", size, MaxValue)
		case seen[op.Key]:
			return refuse(op.Key, "it is written twice in one transaction")
		}
		seen[op.Key] = true
	}
	return nil
}
