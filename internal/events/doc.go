// Package events is the event log of one node: what was decided, what
// happened, and why.
//
// It promises: Append takes a lock for the time of a copy and never waits for
// the disk; what was appended is seen by every follower exactly once and in
// order, or the follower is told how many it missed; sequence numbers never
// repeat, not even after a crash; a full or broken disk costs history, never
// the running system.
//
// It owns FILE, FILE.1 and FILE.2 (one JSON object a line, mode 0600) and a
// ring of the newest events in memory. It never asks anybody anything.
//
// Start reading at Log in log.go; disk.go is its file.
package events
