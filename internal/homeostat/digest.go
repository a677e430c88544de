package homeostat

import (
	"cmp"
	"slices"
	"time"
)

// Digestion gives a starving machine's idle parts to its busy ones, as cells
// do in autophagy: the harmless first, never what is serving, and never for
// long. The cells themselves say what they are; see [Digest].

// Cell is one ready instance of a starving machine.
type Cell struct {
	// App by a number of the caller's.
	App, Priority int
	// InFlight requests, Unused since the end of the last response, Left of
	// its lifetime; 0: no end.
	InFlight     int
	Unused, Left time.Duration
	// Surplus: its siblings suffice. Outdated: a newer revision or image
	// exists. Growing: its memory has only ever grown. Failing: it has just
	// broken requests.
	Surplus, Outdated, Growing, Failing bool
	// Siblings that are ready, itself included, and the least of them.
	Siblings, Min int
	// Share is what its app has of the machine, divided by what is its due.
	Share float64
	// Digested: its app was the last that gave something. Hot: its processor
	// limit is in the way.
	Digested, Hot bool
	// Standby: it is frozen, and worth so much, see Standby.Worth.
	Standby bool
	Worth   float64
	// Memory used and the limit, CPU limit, each with what it has at rest.
	Memory, MemoryLimit, MemoryRest int64
	CPU, CPURest                    float64
}

// Hunger is what the machine lacks: bytes and cores, and Rooms for more
// instances at rest. Nothing of it: no hunger.
type Hunger struct {
	Memory int64
	CPU    float64
	Rooms  int
}

// None tells whether nothing is lacking.
func (h Hunger) None() bool { return h.Memory <= 0 && h.CPU <= 0 && h.Rooms <= 0 }

// Bite is one step of a digestion: an instance retires, or goes back to what
// it has at rest.
type Bite struct {
	Cell   int // index
	Retire bool
	// CPU and Memory: these limits go back to rest.
	CPU, Memory bool
	Cause       string
}

// Causes of digestion.
const (
	CauseStandby  = "digested: standby"
	CauseAbnormal = "digested: outdated, growing or failing"
	CauseDigested = "digested: surplus"
	CauseIdlest   = "digested: idle"
	CauseShare    = "digested: its app has more than its share"
	CauseRest     = "digested: back to rest"
)

// still is how long an instance must have been unused to count as idle on a
// starving machine.
const still = time.Second

// Classes of harm.
const (
	harmStandby = iota
	harmAbnormal
	harmSurplus
	harmIdle
	harmPeak
	harmShare
	harmTooMuch
)

// harm of digesting a cell: its class and the cause. hottest is the highest
// priority of those whose processor limit is in the way.
func (c *Cell) harm(h Hunger, hottest int) (int, string) {
	// What is idle holds memory and room, but no processor.
	idle := c.InFlight == 0 && c.Unused >= still && (h.Memory > 0 || h.Rooms > 0)
	spared := c.Siblings <= c.Min
	switch {
	case c.Standby:
		if h.Memory > 0 { // it holds nothing else
			return harmStandby, CauseStandby
		}
		return harmTooMuch, ""
	case idle && !spared && (c.Outdated || c.Growing || c.Failing):
		return harmAbnormal, CauseAbnormal
	case idle && !spared && c.Surplus && c.Siblings > 1:
		return harmSurplus, CauseDigested
	case idle && !spared:
		return harmIdle, CauseIdlest
	case h.Memory > 0 && c.MemoryLimit > c.MemoryRest && c.Memory < c.MemoryRest, h.CPU > 0 && c.CPU > c.CPURest && c.Priority < hottest:
		return harmPeak, CauseRest
	case h.Rooms > 0 && c.Siblings > max(c.Min, 1) && c.Share > 1:
		return harmShare, CauseShare
	}
	return harmTooMuch, ""
}

// Digest chooses what the machine digests now: at most so many bites, in the
// order of least harm, until what they give is enough. Of one app it takes one
// instance, and none of the app that gave last; never one that serves as the
// last of its app, or is needed for its floor.
func Digest(h Hunger, cells []Cell, most int) []Bite {
	type candidate struct {
		cell, class int
		cause       string
	}
	var order []candidate
	hottest := -1
	for i := range cells {
		if cells[i].Hot {
			hottest = max(hottest, cells[i].Priority)
		}
	}
	for i := range cells {
		if class, cause := cells[i].harm(h, hottest); class != harmTooMuch && !cells[i].Digested {
			order = append(order, candidate{i, class, cause})
		}
	}
	end := func(c *Cell) time.Duration { // for ever is last
		if c.Left <= 0 {
			return 1 << 62
		}
		return c.Left
	}
	slices.SortStableFunc(order, func(x, y candidate) int {
		a, b := &cells[x.cell], &cells[y.cell]
		if x.class != y.class {
			return cmp.Compare(x.class, y.class)
		}
		switch x.class {
		case harmStandby:
			return cmp.Or(cmp.Compare(a.Worth, b.Worth), cmp.Compare(a.Priority, b.Priority))
		case harmAbnormal, harmSurplus:
			return cmp.Or(cmp.Compare(end(a), end(b)), cmp.Compare(a.Priority, b.Priority))
		case harmShare:
			return cmp.Or(cmp.Compare(b.Share, a.Share), cmp.Compare(a.Priority, b.Priority))
		default:
			return cmp.Or(cmp.Compare(a.Priority, b.Priority), cmp.Compare(end(a), end(b)), cmp.Compare(b.Unused, a.Unused))
		}
	})
	lacksCPU := h.CPU > 0
	var bites []Bite
	given := map[int]bool{}
	for _, c := range order {
		if len(bites) >= most || h.None() {
			break
		}
		cell := &cells[c.cell]
		if given[cell.App] {
			continue
		}
		given[cell.App] = true
		bite := Bite{Cell: c.cell, Retire: c.class != harmPeak, Cause: c.cause}
		if !bite.Retire {
			bite.CPU = lacksCPU && cell.CPU > cell.CPURest
			bite.Memory = cell.Memory < cell.MemoryRest && cell.MemoryLimit > cell.MemoryRest
		}
		bites = append(bites, bite)
		switch {
		case cell.Standby:
			h.Memory -= cell.Memory
		case bite.Retire:
			h.Memory -= cell.Memory
			h.CPU -= cell.CPU
			h.Rooms--
		default:
			h.Memory -= cell.MemoryLimit - cell.MemoryRest
			h.CPU -= cell.CPU - cell.CPURest
		}
	}
	return bites
}

// Vitals are a machine's.
type Vitals struct {
	// Memory that its instances use, and the most that they may.
	Used, Memory int64
	// Stalled shares of the last seconds in which work waited for memory, and
	// in which something waited for a processor (PSI "some", 0 to 1).
	MemoryStalled, CPUStalled float64
	// Idle cores of all Cores.
	Idle, Cores float64
}

const (
	// fasting begins when so much of the memory is used, and ends below fed.
	fasting, fed = 0.95, 0.85
	// memoryStalled, cpuStalled: work that waits so much of the time starves.
	memoryStalled, cpuStalled = 0.10, 0.60
)

// Feel tells what a machine lacks. Once it starves it wants more than it takes
// to be just above the line, so that it does not starve again at once.
func Feel(v Vitals, starving bool) Hunger {
	var h Hunger
	line := fasting
	if starving {
		line = fed
	}
	if v.Memory > 0 && float64(v.Used) > line*float64(v.Memory) {
		h.Memory = v.Used - int64(fed*float64(v.Memory))
	}
	stalled := memoryStalled
	if starving {
		stalled /= 2
	}
	if h.Memory <= 0 && v.MemoryStalled > stalled {
		h.Memory = max(v.Memory/20, 1)
	}
	if v.CPUStalled > cpuStalled && v.Idle < 0.05*v.Cores {
		h.CPU = 0.1 * v.Cores
	}
	return h
}
