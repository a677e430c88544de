package homeostat

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

const mib = 1 << 20

func TestDigest_TheHarmlessFirst(t *testing.T) {
	idle := Cell{Unused: time.Minute, Siblings: 1, Priority: 50, Memory: 10 * mib, Left: time.Hour}
	with := func(app int, change func(*Cell)) Cell {
		c := idle
		c.App = app
		change(&c)
		return c
	}
	cells := []Cell{
		with(0, func(c *Cell) { c.Priority = 10 }),
		with(1, func(c *Cell) {}),
		with(2, func(c *Cell) { c.Surplus, c.Siblings = true, 2 }),
		with(3, func(c *Cell) { c.Surplus, c.Siblings, c.Left = true, 2, time.Second }),
		with(4, func(c *Cell) { c.Growing = true }),
		with(5, func(c *Cell) { c.InFlight, c.Unused = 1, 0 }),
		with(6, func(c *Cell) { c.Min = 1 }),
		with(7, func(c *Cell) { c.Unused = time.Millisecond }),
		with(8, func(c *Cell) {
			c.InFlight, c.Unused, c.MemoryRest, c.MemoryLimit = 3, 0, 20*mib, 60*mib
		}),
		with(9, func(c *Cell) { c.Digested = true }),
	}
	var order []int
	for _, b := range Digest(Hunger{Memory: 1 << 40}, cells, 100) {
		order = append(order, b.Cell)
		if b.Cause == "" || b.Retire != (b.Cell != 8) {
			t.Errorf("%+v", b)
		}
	}
	if want := []int{4, 3, 2, 0, 1, 8}; !slices.Equal(order, want) {
		t.Errorf("got the order %v, want %v", order, want)
	}
	if got := Digest(Hunger{Memory: 15 * mib}, cells, 100); len(got) != 2 {
		t.Errorf("%d bites for what two give", len(got))
	}
	if got := Digest(Hunger{}, cells, 100); len(got) != 0 {
		t.Errorf("%d bites without hunger", len(got))
	}
}

func TestDigest_RoomForOthersIsTakenFromThoseWithMoreThanTheirShare(t *testing.T) {
	cells := []Cell{
		{App: 0, InFlight: 9, Siblings: 3, Share: 1.5},
		{App: 1, InFlight: 9, Siblings: 6, Share: 3},
		{App: 2, InFlight: 9, Siblings: 1, Share: 4}, // its last
		{App: 3, InFlight: 9, Siblings: 2, Share: 0.5},
	}
	got := Digest(Hunger{Rooms: 1}, cells, 2)
	if len(got) != 1 || got[0].Cell != 1 || got[0].Cause != CauseShare || !got[0].Retire {
		t.Errorf("got %+v", got)
	}
	if got := Digest(Hunger{Memory: 1}, cells, 2); len(got) != 0 {
		t.Errorf("who serves is digested for memory: %+v", got)
	}
}

// For processor time only peaks go back, of apps below others that lack it.
func TestDigest_ForTheProcessor(t *testing.T) {
	cells := []Cell{
		{App: 0, Unused: time.Minute, Siblings: 1},
		{App: 1, InFlight: 3, Siblings: 1, CPU: 1, CPURest: 0.3, Priority: 60, Hot: true},
		{App: 2, InFlight: 3, Siblings: 1, CPU: 1, CPURest: 0.3, Priority: 50, Hot: true},
	}
	got := Digest(Hunger{CPU: 1}, cells, 9)
	if len(got) != 1 || got[0].Cell != 2 || got[0].Retire {
		t.Errorf("got %+v", got)
	}
}

func TestDigest_Invariants(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 4))
	for range 20000 {
		siblings := map[int]int{}
		cells := make([]Cell, rnd.IntN(20))
		for i := range cells {
			app := rnd.IntN(6)
			siblings[app]++
			cells[i] = Cell{
				App: app, Priority: rnd.IntN(100), InFlight: rnd.IntN(3), Unused: time.Duration(rnd.IntN(4)) * time.Second, Surplus: rnd.IntN(2) == 0,
				Outdated: rnd.IntN(4) == 0, Growing: rnd.IntN(4) == 0, Hot: rnd.IntN(2) == 0, Share: 2 * rnd.Float64(), Digested: rnd.IntN(4) == 0, Min: rnd.IntN(2),
				Memory: rnd.Int64N(100), MemoryLimit: rnd.Int64N(100), MemoryRest: rnd.Int64N(100), CPU: rnd.Float64(), CPURest: rnd.Float64(),
			}
		}
		for i := range cells {
			cells[i].Siblings = siblings[cells[i].App]
		}
		most := rnd.IntN(5)
		bites := Digest(Hunger{Memory: rnd.Int64N(300) - 50, CPU: rnd.Float64() - 0.5, Rooms: rnd.IntN(3)}, cells, most)
		if len(bites) > most {
			t.Fatalf("%d bites, at most %d", len(bites), most)
		}
		seen := map[int]bool{}
		for _, b := range bites {
			c := cells[b.Cell]
			switch {
			case seen[c.App]:
				t.Fatalf("twice of one app: %+v", bites)
			case c.Digested:
				t.Fatalf("an app twice in a row: %+v", c)
			case b.Retire && c.InFlight > 0 && c.Siblings < 2:
				t.Fatalf("the last that serves: %+v", c)
			case b.Retire && c.Siblings <= c.Min:
				t.Fatalf("below the floor: %+v", c)
			}
			seen[c.App] = true
		}
	}
}

func TestFeel(t *testing.T) {
	const all = 1000 * mib
	for name, c := range map[string]struct {
		v        Vitals
		starving bool
		want     bool
	}{
		"well":                       {Vitals{Used: 800 * mib, Memory: all, Idle: 1, Cores: 2}, false, false},
		"nearly full":                {Vitals{Used: 960 * mib, Memory: all, Idle: 1, Cores: 2}, false, true},
		"it eats until there is air": {Vitals{Used: 900 * mib, Memory: all, Idle: 1, Cores: 2}, true, true},
		"fed":                        {Vitals{Used: 840 * mib, Memory: all, Idle: 1, Cores: 2}, true, false},
		"work waits for memory":      {Vitals{Used: 100 * mib, Memory: all, MemoryStalled: 0.2, Idle: 1, Cores: 2}, false, true},
		"work waits for processors":  {Vitals{Used: 100 * mib, Memory: all, CPUStalled: 0.9, Idle: 0, Cores: 2}, false, true},
		"busy, with cores to spare":  {Vitals{Used: 100 * mib, Memory: all, CPUStalled: 0.9, Idle: 1, Cores: 2}, false, false},
		"nothing is known":           {Vitals{Idle: -1}, false, false},
	} {
		if got := Feel(c.v, c.starving); got.None() == c.want {
			t.Errorf("%s: got %+v", name, got)
		}
	}
}

func TestFitsAndPart(t *testing.T) {
	capacity, one := Claim{CPU: 4, Memory: 1000}, Claim{CPU: 0.3, Memory: 100}
	for _, c := range []struct {
		taken  int
		wanted int
		want   int
	}{{0, 5, 5}, {0, 50, 10}, {8, 5, 2}, {10, 5, 0}, {12, 5, 0}} {
		if got := Fits(capacity, Claim{}.Add(one, c.taken), one, c.wanted); got != c.want {
			t.Errorf("%d taken, %d wanted: got %d, want %d", c.taken, c.wanted, got, c.want)
		}
	}
	if got := Part(capacity, Claim{CPU: 2, Memory: 100}); got != 0.5 {
		t.Errorf("got %g", got)
	}
}

func TestCeiling(t *testing.T) {
	for name, c := range map[string]struct {
		cores, idle, use float64
		active           int
		want             float64
	}{
		"alone":                            {2, 0, 2, 1, 0},
		"two, the other uses little":       {2, 0.4, 1.5, 2, 1.4},
		"two, the other uses all":          {2, 0, 0, 2, 0.75},
		"two, this one uses nothing":       {2, 2, 0, 2, 1.5},
		"idle time is not known":           {2, -1, 0, 2, 1.5},
		"eight on a large machine":         {64, 20, 10, 8, 14},
		"others already use more than all": {4, 0, 0, 4, 0.75},
	} {
		if got := Ceiling(c.cores, c.idle, c.use, c.active); math.Abs(got-c.want) > 1e-9 {
			t.Errorf("%s: got %g, want %g", name, got, c.want)
		}
	}
}

// An app that floods gives way as soon as another one has traffic, and takes
// the machine again when it is alone.
func TestTrend_TheCeilingBoundsAFlood(t *testing.T) {
	p := app()
	p.CPU = Span[float64]{Rest: 0.5, Peak: 2}
	var trend Trend
	limit := 0.5
	run := func(d time.Duration, ceiling float64) {
		for range d / (10 * time.Millisecond) {
			l := Load{InFlight: 200, Ready: 1, Limit: limit, Ceiling: ceiling, Spare: -1}
			trend.Add(p, Sample{Span: 10 * time.Millisecond, Arrived: 1, Answered: 1, Busy: time.Second, CPU: seconds(limit * 0.01), Load: l})
			if plan := Decide(p, l, &trend); plan.Limit > 0 {
				limit = plan.Limit
			} else if ceiling > 0 && plan.Start > 0 {
				t.Fatalf("%d more instances with a ceiling of %g cores", plan.Start, ceiling)
			}
		}
	}
	run(time.Second, 0)
	if limit != 2 {
		t.Errorf("alone it has %g cores, want its peak", limit)
	}
	run(time.Second, 1.2)
	if limit != 1.2 {
		t.Errorf("with others it has %g cores, want the ceiling", limit)
	}
	run(time.Second, 0.1)
	if limit != 0.5 {
		t.Errorf("it has %g cores, want no less than at rest", limit)
	}
	run(time.Second, 0)
	if limit != 2 {
		t.Errorf("alone again it has %g cores", limit)
	}
}

func TestGrowAndShrink(t *testing.T) {
	p := Policy{Memory: Span[int64]{Rest: 128 * mib, Peak: 512 * mib}}
	limit := int64(128 * mib)
	for limit < 512*mib {
		next := Grow(p, limit, 1<<40)
		if next <= limit || next > 512*mib {
			t.Fatalf("from %d to %d", limit, next)
		}
		limit = next
	}
	if Grow(p, limit, 1<<40) != 0 || Grow(p, 128*mib, 0) != 0 {
		t.Error("it grows without room")
	}
	for range 100 {
		next := Shrink(p, limit, 20*mib)
		if next == 0 {
			break
		}
		limit = next
	}
	if limit != 128*mib {
		t.Errorf("calm ends at %d", limit)
	}
	if got := Shrink(p, 512*mib, 400*mib); got != 0 {
		t.Errorf("what is used is taken away: %d", got)
	}
}
