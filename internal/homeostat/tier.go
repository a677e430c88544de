package homeostat

import "time"

// There are three ways to an instance that answers, in the order of what they
// cost the one who waits: thawing a standby (standby.go), restoring saved
// processes, starting anew. Which of the last two a start takes, and whether
// it is worth a checkpoint, is decided here by what was measured of the app.

// SavePolicy is what an app's owner wants of checkpoints.
type SavePolicy int

// The save policies.
const (
	// SaveNever: each start is a cold one.
	SaveNever SavePolicy = iota
	// SaveAuto: processes are saved and restored where that is quicker.
	SaveAuto
	// SaveAlways: they are, whatever it takes.
	SaveAlways
)

// Tier is what was measured of one kind of start of an app's revision.
type Tier struct {
	// Starts that were measured.
	Starts int
	// Usual and Tail: median and longest of the last ones, from decided to
	// ready.
	Usual, Tail time.Duration
	// Memory that an instance held when its first requests were answered, Disk what
	// the saved processes take, in bytes. 0: not known.
	Memory, Disk int64
}

const (
	// worthSaving: making processes anew from their image takes some tens of
	// milliseconds for any of them, so quicker starts have nothing to gain.
	worthSaving = 60 * time.Millisecond
	// trials of a kind before it is judged: the first one finds nothing in the
	// page cache.
	trials = 3
	// gain that the usual restore must be ahead.
	gain = 0.9
)

// Saves tells whether an app's processes should be saved, after cold starts that took so
// long.
func (p Policy) Saves(cold Tier) bool {
	switch p.Save {
	case SaveAlways:
		return true
	case SaveAuto:
		return cold.Starts > 0 && cold.Usual >= worthSaving
	case SaveNever:
	}
	return false
}

// Restores tells whether a start should restore saved processes, if there are some.
func (p Policy) Restores(cold, restored Tier) bool {
	switch p.Save {
	case SaveAlways:
		return true
	case SaveAuto:
		return restored.Starts < trials || cold.Starts == 0 || float64(restored.Usual) <= gain*float64(cold.Usual)
	case SaveNever:
	}
	return false
}
