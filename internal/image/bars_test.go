package image

import (
	"strings"
	"testing"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

func barSteps() []Step {
	d := fleet.Digest("sha256:" + strings.Repeat("ab", 32))
	return []Step{
		{Ref: "r\x1b[2J", Phase: PhaseResolving},
		{Ref: "r", Layer: d, Layers: 2, Phase: PhaseDownloading, Done: 512, Total: 1024},
		{Ref: "r", Layer: d, Layers: 2, Phase: PhaseDownloading, Done: 1024, Total: 1024},
		{Ref: "r", Layer: d, Layers: 2, Index: 1, Phase: PhasePresent},
		{Ref: "r", Layer: d, Layers: 2, Index: 7, Phase: PhasePresent},
		{Ref: "r", Layer: d, Layers: 2, Phase: PhaseDone, Done: 1024, Total: 1024},
		{Ref: "r", Layers: 2, Phase: PhaseDone},
	}
}

func TestBars_OnATerminal(t *testing.T) {
	t.Parallel()
	var out strings.Builder
	b := NewBars(&out, 80, 24)
	now := time.Unix(0, 0)
	b.now = func() time.Time { now = now.Add(time.Second); return now }
	for _, s := range barSteps() {
		b.Step(s)
	}
	got := out.String()
	if strings.Contains(got, "\x1b[2J") {
		t.Error("a reference reached the terminal as a command")
	}
	last := got[strings.LastIndex(got, "\x1b[3A"):]
	for _, want := range []string{"abababababab done", "=] 1.0KiB/1.0KiB", "present", "r: done"} {
		if !strings.Contains(last, want) {
			t.Errorf("%q is missing in %q", want, last)
		}
	}
	for _, l := range strings.Split(got, "\n") {
		if len(l) > 80+20 {
			t.Errorf("line of %d: %q", len(l), l)
		}
	}
}

func TestBars_InAFile(t *testing.T) {
	t.Parallel()
	var out strings.Builder
	b := NewBars(&out, 0, 0)
	for _, s := range barSteps()[1:] {
		b.Step(s)
	}
	want := `layer 1/2 abababababab: downloading 1.0KiB
layer 2/2 abababababab: present
layer 1/2 abababababab: done 1.0KiB
r: done
`
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", out.String(), want)
	}
}
