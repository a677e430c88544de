package fleet

import (
	"fmt"
	"slices"
)

// State of an instance.
//
//	absent → starting → ready → retiring → absent
//	            │         ⇅
//	            │      standby (frozen) → retiring
//	            └→ failed → absent
//
// An instance that crashes while it is ready or in standby moves to failed.
type State string

// The states.
const (
	StateAbsent   State = "absent"
	StateStarting State = "starting"
	StateReady    State = "ready"
	StateStandby  State = "standby"
	StateRetiring State = "retiring"
	StateFailed   State = "failed"
)

var moves = map[State][]State{
	StateAbsent:   {StateStarting},
	StateStarting: {StateReady, StateFailed, StateRetiring},
	StateReady:    {StateStandby, StateRetiring, StateFailed},
	StateStandby:  {StateReady, StateRetiring, StateFailed},
	StateRetiring: {StateAbsent},
	StateFailed:   {StateAbsent},
}

// States lists every state in the order of a life.
func States() []State {
	return []State{StateAbsent, StateStarting, StateReady, StateStandby, StateRetiring, StateFailed}
}

// IllegalMoveError says that an instance was asked to move where it cannot.
type IllegalMoveError struct{ From, To State }

func (e *IllegalMoveError) Error() string {
	return fmt.Sprintf("an instance cannot move from %s to %s", e.From, e.To)
}

// Move checks a move and gives back the new state, or the old one and an
// *IllegalMoveError.
func (s State) Move(to State) (State, error) {
	if !slices.Contains(moves[s], to) {
		return s, &IllegalMoveError{From: s, To: to}
	}
	return to, nil
}

// StartKind is how an instance came to be ready.
type StartKind string

// The start kinds.
const (
	ColdStart       StartKind = "cold"
	CheckpointStart StartKind = "checkpoint"
	StandbyStart    StartKind = "standby"
)
