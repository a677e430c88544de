package fleet

import "time"

// EventType says what happened.
type EventType string

// The event types.
const (
	EventDeploy     EventType = "deploy"
	EventDelete     EventType = "delete"
	EventStart      EventType = "start"
	EventReady      EventType = "ready"
	EventFail       EventType = "fail"
	EventResize     EventType = "resize"
	EventFreeze     EventType = "freeze"
	EventThaw       EventType = "thaw"
	EventCheckpoint EventType = "checkpoint"
	EventRetire     EventType = "retire"
	EventStop       EventType = "stop"
	EventDigest     EventType = "digest"
	EventAdopt      EventType = "adopt"
	EventClean      EventType = "clean"
)

// Event is one decision or one thing that happened, with its cause: the
// explanation of the system to its operator.
type Event struct {
	// Seq orders the events of one node; it never repeats in one log.
	Seq      uint64     `json:"seq"`
	Time     time.Time  `json:"time"`
	Type     EventType  `json:"type"`
	App      AppName    `json:"app,omitempty"`
	Instance InstanceID `json:"instance,omitempty"`
	Revision RevisionID `json:"revision,omitempty"`
	Node     NodeName   `json:"node,omitempty"`
	// Cause says why, in a few words: "first request", "lifetime ended".
	Cause string `json:"cause"`
	// Detail says what a person needs to act: an error with its hint.
	Detail string `json:"detail,omitempty"`
	// Kind and Stages belong to ready and thaw.
	Kind   StartKind `json:"kind,omitempty"`
	Stages *Stages   `json:"stages,omitempty"`
	// Log holds the last lines that a failed instance wrote.
	Log []string `json:"log,omitempty"`
	// Inputs are the numbers behind a decision.
	Inputs map[string]float64 `json:"inputs,omitempty"`
}

// Stages are the timings of one start, in microseconds each. They follow one
// another; what a kind of start does not have stays 0.
type Stages struct {
	// Hold: arrival of the request until the start was decided.
	Hold int64 `json:"hold_us"`
	// Place: decided until a node had been found and admitted it.
	Place int64 `json:"place_us"`
	// Claim: until a prepared sandbox was taken, or made if none was there; or
	// until a frozen instance was thawed.
	Claim int64 `json:"claim_us"`
	// Rootfs: until its root filesystem was ready to be mounted.
	Rootfs int64 `json:"rootfs_us"`
	// Network: until address and routes were there.
	Network int64 `json:"network_us"`
	// Exec: until the app's own program was executed.
	Exec int64 `json:"exec_us"`
	// Listen: until the app was ready.
	Listen int64 `json:"listen_us"`
	// Connect: until the first request's connection to it stood.
	Connect int64 `json:"connect_us"`
	// FirstByte: until the first byte of its response.
	FirstByte int64 `json:"first_byte_us"`
}

// Stage is one named timing.
type Stage struct {
	Name string
	Took time.Duration
}

// List gives the stages by name in their order.
func (s *Stages) List() []Stage {
	us := func(n int64) time.Duration { return time.Duration(n) * time.Microsecond }
	return []Stage{
		{"hold", us(s.Hold)}, {"place", us(s.Place)}, {"claim", us(s.Claim)},
		{"rootfs", us(s.Rootfs)}, {"network", us(s.Network)}, {"exec", us(s.Exec)},
		{"listen", us(s.Listen)}, {"connect", us(s.Connect)}, {"first_byte", us(s.FirstByte)},
	}
}
