package plot

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"testing"
)

func TestSVG(t *testing.T) {
	nan := math.NaN()
	for name, c := range map[string]Chart{
		"two panels": {XLabel: "seconds", Marks: []Mark{{"load", 1}}, Panels: []Panel{
			{Title: "latency", YLabel: "ms", Log: true, Series: []Series{{Name: "p50", X: []float64{0, 1, 2}, Y: []float64{1, 0, 1000}}}},
			{Title: "instances", Series: []Series{{Name: "ready", X: []float64{0, 1, 2}, Y: []float64{1, 2, 2}, Step: true}}},
		}},
		"gaps":      {Panels: []Panel{{Series: []Series{{X: []float64{0, 1, 2, 3}, Y: []float64{1, nan, math.Inf(1), 2}}}}}},
		"one point": {Panels: []Panel{{Series: []Series{{X: []float64{5}, Y: []float64{0}}}}}},
		"nothing":   {Panels: []Panel{{Log: true, Series: []Series{{Name: "none"}}}}},
		"all alike": {Panels: []Panel{{Log: true, Series: []Series{{X: []float64{1, 2}, Y: []float64{3, 3}}}}}},
	} {
		a, err := c.SVG()
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if b, _ := c.SVG(); !bytes.Equal(a, b) {
			t.Errorf("%s: drawn twice it differs", name)
		}
		for d := xml.NewDecoder(bytes.NewReader(a)); ; {
			if _, err := d.Token(); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Errorf("%s: %v", name, err)
				break
			}
		}
		if bytes.Contains(a, []byte("NaN")) || bytes.Contains(a, []byte("Inf")) {
			t.Errorf("%s: the drawing holds what is no number", name)
		}
	}
}

func TestSVG_Refuses(t *testing.T) {
	if _, err := (Chart{}).SVG(); err == nil {
		t.Error("a chart without panels is drawn")
	}
	if _, err := (Chart{Panels: []Panel{{Series: []Series{{X: []float64{1}}}}}}).SVG(); err == nil {
		t.Error("a series with more x than y is drawn")
	}
}
