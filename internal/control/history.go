package control

import (
	"time"

	"github.com/fastcontainer/fastcontainer/internal/homeostat"
)

// record is what is remembered of an app's requests. It exists from the first
// one on and is as small as a few hundred bytes; a new daemon begins anew.
type record struct {
	gaps     homeostat.Gaps
	requests uint64
	first    time.Time
	open     int // requests in flight
	since    time.Time
	busy     time.Duration // with something in flight, up to since
	quiet    bool          // nothing is in flight, and nobody waits
}

// arrives notes a request. The caller holds the lock.
func (a *App) arrives(now time.Time) {
	r := a.record
	if r == nil {
		r = &record{first: now}
		a.record = r
	}
	r.requests++
	if r.quiet {
		r.quiet = false
		r.gaps.Add(max(now.Sub(a.used), 0))
	}
}

// opens notes that a request is in flight, closes that it no longer is. The
// caller holds the lock.
func (r *record) opens(now time.Time) {
	if r.open++; r.open == 1 {
		r.since = now
	}
}

func (r *record) closes(now time.Time, waiting bool) {
	if r.open--; r.open == 0 {
		r.busy += max(now.Sub(r.since), 0)
		r.quiet = !waiting
	}
}

// Policy of the app's current revision.
func (a *App) Policy() homeostat.Policy {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.policy
}

// History of the app's requests on this node since the daemon started.
func (a *App) History() homeostat.History {
	a.mu.Lock()
	defer a.mu.Unlock()
	r := a.record
	if r == nil {
		return homeostat.History{}
	}
	now := time.Now()
	h := homeostat.History{Gaps: r.gaps, Requests: r.requests, Span: now.Sub(r.first), Busy: r.busy}
	if r.open > 0 {
		h.Busy += now.Sub(r.since)
	}
	h.Start50, h.Start99 = a.expected()
	return h
}
