package image

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// Bars draws the progress of one pull: on a terminal one line per layer, drawn
// again in place; elsewhere one line per change of phase. It is used by one
// goroutine, as Progress promises.
type Bars struct {
	w        io.Writer
	terminal bool
	width    int
	height   int // most layers drawn; the rest is counted
	now      func() time.Time

	steps []Step
	own   Step
	drawn int // lines on the screen
	last  time.Time
}

// NewBars draws to w. width and height are those of the terminal; a width of 0
// says that w is no terminal.
func NewBars(w io.Writer, width, height int) *Bars {
	return &Bars{w: w, terminal: width > 0, width: max(width, 40), height: max(height-2, 1), now: time.Now}
}

// barsPace is how often a terminal is drawn.
const barsPace = 100 * time.Millisecond

// Step takes in one step, and draws if it is time.
func (b *Bars) Step(s Step) {
	if s.Layers != len(b.steps) {
		b.steps = make([]Step, max(0, min(s.Layers, maxLayers+1)))
	}
	var old Phase
	switch {
	case s.Layer == "":
		old, b.own = b.own.Phase, s
	case s.Index >= 0 && s.Index < len(b.steps):
		old, b.steps[s.Index] = b.steps[s.Index].Phase, s
	default:
		return
	}
	if !b.terminal {
		if s.Phase != old {
			b.line(s)
		}
		return
	}
	ended := s.Layer == "" && (s.Phase == PhaseDone || s.Phase == PhaseFailed)
	if now := b.now(); ended || now.Sub(b.last) >= barsPace {
		b.last = now
		b.draw()
	}
}

func (b *Bars) line(s Step) {
	switch {
	case s.Layer == "":
		fmt.Fprintf(b.w, "%s: %s\n", s.Ref, s.Phase)
	case s.Phase != PhaseWaiting:
		fmt.Fprintf(b.w, "layer %d/%d %s: %s%s\n", s.Index+1, s.Layers, s.Layer.Short(), s.Phase, amount(s))
	}
}

func amount(s Step) string {
	if s.Total <= 0 {
		return ""
	}
	return " " + human(s.Total)
}

// human is an amount as people read it.
func human(n fleet.Bytes) string {
	f, unit := float64(n), ""
	for _, u := range []string{"Ki", "Mi", "Gi", "Ti"} {
		if f < 1024 {
			break
		}
		f, unit = f/1024, u
	}
	if unit == "" {
		return fmt.Sprintf("%dB", n)
	}
	return fmt.Sprintf("%.1f%sB", f, unit)
}

// draw replaces what was drawn before.
func (b *Bars) draw() {
	var lines []string
	rest := 0
	for _, s := range b.steps {
		if s.Phase == "" {
			continue
		}
		if len(lines) == b.height {
			rest++
			continue
		}
		lines = append(lines, b.bar(s))
	}
	if rest > 0 {
		lines = append(lines, fmt.Sprintf("and %d more layers", rest))
	}
	if b.own.Phase != "" {
		lines = append(lines, b.fit(fmt.Sprintf("%s: %s", b.own.Ref, b.own.Phase)))
	}
	var out strings.Builder
	if b.drawn > 0 {
		fmt.Fprintf(&out, "\x1b[%dA", b.drawn)
	}
	for _, l := range lines {
		out.WriteString("\r\x1b[K" + l + "\n")
	}
	out.WriteString("\x1b[J") // what a taller drawing left
	b.drawn = len(lines)
	_, _ = io.WriteString(b.w, out.String())
}

func (b *Bars) bar(s Step) string {
	head := fmt.Sprintf("%-12s %-11s ", s.Layer.Short(), s.Phase)
	tail := ""
	if s.Total > 0 {
		tail = fmt.Sprintf(" %s/%s", human(min(s.Done, s.Total)), human(s.Total))
	}
	room := b.width - len(head) - 22
	if room < 10 || s.Total <= 0 || s.Phase == PhaseWaiting {
		return b.fit(head + tail)
	}
	full := int(float64(room) * float64(min(s.Done, s.Total)) / float64(s.Total))
	return b.fit(head + "[" + strings.Repeat("=", full) + strings.Repeat(" ", room-full) + "]" + tail)
}

// fit cuts a line so that the terminal does not wrap it, and drops what a
// terminal would take for a command.
func (b *Bars) fit(line string) string {
	out := []rune(strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 {
			return -1
		}
		return r
	}, line))
	return string(out[:min(len(out), b.width-1)])
}
