package events

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// Lost is the type of the event that a follower gets in the place of events
// which left the ring before it came to read them. Inputs["lost"] says how
// many there were, of all apps; Seq is that of the last of them. It is made
// for that follower and is not in the log.
const Lost fleet.EventType = "lost"

// ErrClosed: the log was closed; a follower has seen everything.
var ErrClosed = errors.New("event log is closed")

// Bounds of one log and one event.
const (
	defaultSize = 16 << 20
	defaultRing = 10_000
	// maxPending events may wait for the disk; past it they are only in the ring.
	maxPending = 8192
	// crashGap is left in the numbers after a crash, because the last ones
	// that were given out may not have reached the disk.
	crashGap = 100_000

	// maxSeq is the largest whole number that every reader of JSON keeps exact.
	maxSeq = 1 << 53
	// maxScan events are looked at by a follower while it holds the lock.
	maxScan = 1024

	maxText   = 4 << 10
	maxLog    = 8 << 10
	maxInputs = 64
)

// Config of a log. The zero value keeps 10,000 events in memory only.
type Config struct {
	// File is where events are kept, in a directory that exists; "": memory only.
	File string
	// Size at which File becomes File.1, and File.1 File.2. 0: 16 MiB.
	Size int64
	// Ring is how many events can be read back. 0: 10,000.
	Ring int
	// Node is given to events that name none.
	Node fleet.NodeName
	// Logger hears of trouble with the file. nil: nobody does.
	Logger *slog.Logger
}

// Log is an event log. All methods may be called from many goroutines.
type Log struct {
	node   fleet.NodeName
	logger *slog.Logger
	disk   *disk // nil: memory only; owned by the writer between Open and Close

	kick   chan struct{} // one token: there is something for the writer
	ended  chan struct{} // closed by Close: the writer finishes
	loop   sync.WaitGroup
	finish func() error

	mu sync.Mutex
	// ring holds the events at the positions [end-len(ring), end), position p
	// at ring[p%size].
	ring    []fleet.Event
	size    int
	end     uint64
	seq     uint64        // the last number given out
	pending []fleet.Event // for the writer
	dropped int           // did not fit in pending since the writer last looked
	wake    chan struct{} // closed at the next append; nil: nobody waits
	closed  bool
}

// Open reads what the last process left behind, cuts off a line that it did
// not finish, and starts the writer. Close must follow.
func Open(cfg Config) (*Log, error) {
	l := &Log{
		node:   cfg.Node,
		logger: cmp.Or(cfg.Logger, slog.New(slog.DiscardHandler)),
		size:   cmp.Or(max(cfg.Ring, 0), defaultRing),
		kick:   make(chan struct{}, 1),
		ended:  make(chan struct{}),
	}
	l.finish = sync.OnceValue(l.stop)
	if cfg.File == "" {
		return l, nil
	}
	d, past, clean, err := openDisk(cfg.File, cmp.Or(max(cfg.Size, 0), defaultSize), l.size, l.logger)
	if err != nil {
		return nil, &fleet.Error{Op: "open event log", Subject: cfg.File, Err: err,
			Hint: "its directory must exist and be writable"}
	}
	l.disk = d
	for _, e := range past {
		l.keep(e)
		l.seq = max(l.seq, e.Seq)
	}
	if !clean {
		l.seq += crashGap
	}
	l.loop.Go(l.write)
	return l, nil
}

// Append adds e. A zero Time and Node are filled in, and so is Seq unless it
// is above every number given out before. The log keeps a copy; texts that
// are unreasonably long are cut.
func (l *Log) Append(e fleet.Event) {
	e = own(e)
	if e.Node == "" {
		e.Node = l.node
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if e.Time.IsZero() {
		e.Time = time.Now().Round(0).UTC()
	}
	if e.Seq <= l.seq || e.Seq > maxSeq {
		e.Seq = l.seq + 1
	}
	l.seq = e.Seq
	l.keep(e)
	if l.wake != nil {
		close(l.wake)
		l.wake = nil
	}
	if l.disk == nil || l.closed {
		return
	}
	if len(l.pending) < maxPending {
		l.pending = append(l.pending, e)
	} else {
		l.dropped++
	}
	select {
	case l.kick <- struct{}{}:
	default:
	}
}

// Last is the newest n events of app ("": of every app), oldest first. What
// they point to is shared: read only.
func (l *Log) Last(app fleet.AppName, n int) []fleet.Event {
	l.mu.Lock()
	defer l.mu.Unlock()
	events := make([]fleet.Event, 0, min(max(n, 0), len(l.ring)))
	for p := l.end; p > l.begin() && len(events) < n; p-- {
		if e := l.at(p - 1); app == "" || e.App == app {
			events = append(events, *e)
		}
	}
	slices.Reverse(events)
	return events
}

// From says where a follower begins.
type From struct {
	// After this number. 0: Last counts.
	After uint64
	// Last so many events of the past, and then the future.
	Last int
}

// Follow calls f with the events of app ("": of every app) from the place
// that from names, past and future, each once and in order, until ctx ends
// (it returns ctx's cause), f fails (f's error) or the log is closed and
// everything was seen (ErrClosed). f may take its time: it holds nobody up.
// If it is so slow that events leave the ring before it sees them, it gets an
// event of type Lost in their place. What events point to is read only.
func (l *Log) Follow(ctx context.Context, app fleet.AppName, from From, f func(fleet.Event) error) error {
	batch := make([]fleet.Event, 0, 64)
	pos, missed := l.find(app, from)
	for {
		var wake <-chan struct{}
		var closed bool
		batch, pos, wake, closed = l.read(batch[:0], app, pos, &missed)
		for _, e := range batch {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err := f(e); err != nil {
				return err
			}
		}
		switch {
		case wake != nil:
			select {
			case <-wake:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		case closed:
			return ErrClosed
		case ctx.Err() != nil:
			return context.Cause(ctx)
		}
	}
}

// Close lets the writer finish, closes the file, and ends the followers.
// Events appended later are kept in memory only.
func (l *Log) Close() error { return l.finish() }

func (l *Log) stop() error {
	l.mu.Lock()
	l.closed = true
	if l.wake != nil {
		close(l.wake)
		l.wake = nil
	}
	l.mu.Unlock()
	close(l.ended)
	l.loop.Wait()
	if l.disk == nil {
		return nil
	}
	if err := l.disk.close(); err != nil {
		return fmt.Errorf("close event log: %w", err)
	}
	return nil
}

// find is the first position that a follower wants, and how many before it
// have left the ring already.
func (l *Log) find(app fleet.AppName, from From) (pos, missed uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	begin := l.begin()
	if from.After > 0 {
		i := sort.Search(len(l.ring), func(i int) bool { return l.at(begin+uint64(i)).Seq > from.After })
		if i == 0 && len(l.ring) > 0 {
			missed = l.at(begin).Seq - from.After - 1
		}
		return begin + uint64(i), missed
	}
	pos = l.end
	for p, n := l.end, 0; p > begin && n < from.Last; p-- {
		if app == "" || l.at(p-1).App == app {
			pos, n = p-1, n+1
		}
	}
	return pos, 0
}

// read fills batch from pos on and gives the position after it. wake is not
// nil if there is nothing more to read and more may come.
func (l *Log) read(batch []fleet.Event, app fleet.AppName, pos uint64, missed *uint64) (_ []fleet.Event, next uint64, wake <-chan struct{}, closed bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if begin := l.begin(); pos < begin {
		*missed += begin - pos
		pos = begin
	}
	if *missed > 0 {
		batch = append(batch, fleet.Event{
			Seq: l.at(pos).Seq - 1, Time: l.at(pos).Time, Type: Lost, App: app, Node: l.node,
			Cause:  "read too slowly or too late",
			Detail: fmt.Sprintf("%d events of this node are no longer in memory", *missed),
			Inputs: map[string]float64{"lost": float64(*missed)},
		})
		*missed = 0
	}
	for stop := min(l.end, pos+maxScan); pos < stop && len(batch) < cap(batch); pos++ {
		if e := l.at(pos); app == "" || e.App == app {
			batch = append(batch, *e)
		}
	}
	if pos < l.end {
		return batch, pos, nil, false
	}
	if l.closed {
		return batch, pos, nil, true
	}
	if l.wake == nil {
		l.wake = make(chan struct{})
	}
	return batch, pos, l.wake, false
}

func (l *Log) begin() uint64 { return l.end - uint64(len(l.ring)) }

func (l *Log) at(pos uint64) *fleet.Event { return &l.ring[pos%uint64(l.size)] }

func (l *Log) keep(e fleet.Event) {
	if len(l.ring) < l.size {
		l.ring = append(l.ring, e)
	} else {
		*l.at(l.end) = e
	}
	l.end++
}

// write is the writer's loop: it takes what is pending, as one batch.
func (l *Log) write() {
	for ended := false; !ended; {
		select {
		case <-l.kick:
		case <-l.ended:
			ended = true
		}
		l.mu.Lock()
		batch, dropped := l.pending, l.dropped
		l.pending, l.dropped = nil, 0
		l.mu.Unlock()
		l.disk.append(batch)
		if dropped > 0 {
			l.disk.missed += dropped
			l.logger.Warn("event log is slower than the events; some are in memory only", "dropped", dropped)
		}
	}
}

// own copies what e points to, because its maker may go on to change it, and
// cuts what is unreasonably long.
func own(e fleet.Event) fleet.Event {
	if e.Stages != nil {
		stages := *e.Stages
		e.Stages = &stages
	}
	e.Cause, e.Detail = clip(e.Cause, maxText), clip(e.Detail, maxText)
	room := maxLog
	var lines []string
	for _, line := range slices.Backward(e.Log) {
		line = clip(line, maxText)
		if room -= len(line) + 1; room < 0 {
			break
		}
		lines = append(lines, line)
	}
	slices.Reverse(lines)
	e.Log = lines
	e.Inputs = maps.Clone(e.Inputs)
	for i, key := range slices.Sorted(maps.Keys(e.Inputs)) {
		if v := e.Inputs[key]; i >= maxInputs || v-v != 0 { // JSON has no NaN and no infinity
			delete(e.Inputs, key)
		}
	}
	return e
}

// clip cuts s to n bytes and never keeps the memory of a longer text alive.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n], "") + "…"
}
