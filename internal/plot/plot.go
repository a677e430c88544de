// Package plot draws line charts as SVG: what the experiments measured and what
// the simulator saw. The same data gives the same bytes.
package plot

import (
	"bytes"
	"errors"
	"fmt"
	"image/color"
	"math"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// Series is one line. X and Y are equally long; points that are no finite
// numbers break the line.
type Series struct {
	Name string
	X, Y []float64
	// Step draws the value as constant until the next point: counts, limits.
	Step bool
}

// Mark is a vertical line with a name: something happened.
type Mark struct {
	Name string
	X    float64
}

// Panel is one diagram.
type Panel struct {
	Title  string
	YLabel string
	Series []Series
	// Log draws the y axis logarithmically; values below the smallest
	// positive one are lifted to it.
	Log bool
}

// Chart is diagrams one above the other, with one x axis.
type Chart struct {
	XLabel string
	Panels []Panel
	Marks  []Mark
}

// colors that are told apart also by those who do not see red and green (Okabe
// and Ito).
var colors = []color.Color{
	color.RGBA{0, 114, 178, 255}, color.RGBA{213, 94, 0, 255}, color.RGBA{0, 158, 115, 255},
	color.RGBA{204, 121, 167, 255}, color.RGBA{230, 159, 0, 255}, color.RGBA{86, 180, 233, 255}, color.RGBA{60, 60, 60, 255},
}

const (
	width       = 18 * vg.Centimeter
	panelHeight = 5.2 * vg.Centimeter
)

// SVG draws the chart.
func (c Chart) SVG() ([]byte, error) {
	if len(c.Panels) == 0 {
		return nil, errors.New("draw chart: it has no panel")
	}
	least, most := c.span()
	height := panelHeight * vg.Length(len(c.Panels))
	canvas := vgsvg.NewWith(vgsvg.UseWH(width, height))
	all := draw.New(canvas)
	all.SetColor(color.White)
	all.Fill(all.Rectangle.Path())
	for i, panel := range c.Panels {
		p, err := panel.plot(c, least, most)
		if err != nil {
			return nil, fmt.Errorf("draw %s: %w", panel.Title, err)
		}
		if i == len(c.Panels)-1 {
			p.X.Label.Text = c.XLabel
		}
		top := height - panelHeight*vg.Length(i)
		p.Draw(draw.Crop(all, 4, -12, top-panelHeight+4, top-height-4))
	}
	var out bytes.Buffer
	if _, err := canvas.WriteTo(&out); err != nil {
		return nil, fmt.Errorf("draw chart: %w", err)
	}
	return out.Bytes(), nil
}

// span of all x values.
func (c Chart) span() (least, most float64) {
	least, most = math.Inf(1), math.Inf(-1)
	for _, p := range c.Panels {
		for _, s := range p.Series {
			for _, x := range s.X {
				if !math.IsNaN(x) && !math.IsInf(x, 0) {
					least, most = min(least, x), max(most, x)
				}
			}
		}
	}
	if least >= most { // nothing, or one point
		least, most = least-1, least+1
	}
	if math.IsInf(least, 0) || math.IsNaN(least) {
		return 0, 1
	}
	return least, most
}

func (panel Panel) plot(c Chart, least, most float64) (*plot.Plot, error) {
	p := plot.New()
	p.Title.Text, p.Y.Label.Text = panel.Title, panel.YLabel
	p.Title.TextStyle.Font.Size, p.Legend.TextStyle.Font.Size = 10, 8
	p.X.Min, p.X.Max = least, most
	p.Legend.Top = true
	p.Add(plotter.NewGrid())
	low, high := math.Inf(1), math.Inf(-1)
	for _, s := range panel.Series {
		if len(s.X) != len(s.Y) {
			return nil, fmt.Errorf("series %s has %d x and %d y", s.Name, len(s.X), len(s.Y))
		}
		for _, y := range s.Y {
			if ok(y) && (!panel.Log || y > 0) {
				low, high = min(low, y), max(high, y)
			}
		}
	}
	if math.IsInf(low, 0) {
		low, high = 0, 1
		if panel.Log {
			low = 0.1
		}
	}
	for i, s := range panel.Series {
		if err := add(p, s, colors[i%len(colors)], panel.Log, low); err != nil {
			return nil, err
		}
	}
	p.Y.Min, p.Y.Max = min(0, low), high+(high-low)*0.05
	if panel.Log {
		p.Y.Scale, p.Y.Tick.Marker = plot.LogScale{}, plot.LogTicks{Prec: -1}
		p.Y.Min, p.Y.Max = low, high
	}
	if p.Y.Min >= p.Y.Max {
		p.Y.Max = p.Y.Min + max(math.Abs(p.Y.Min), 1)
	}
	for _, m := range c.Marks {
		line, err := plotter.NewLine(plotter.XYs{{X: m.X, Y: p.Y.Min}, {X: m.X, Y: p.Y.Max}})
		if err != nil {
			return nil, err
		}
		line.Color, line.Dashes = color.Gray{120}, []vg.Length{3, 3}
		p.Add(line)
		label, err := plotter.NewLabels(plotter.XYLabels{XYs: plotter.XYs{{X: m.X, Y: p.Y.Min}}, Labels: []string{" " + m.Name}})
		if err != nil {
			return nil, err
		}
		label.TextStyle[0].Font.Size = 7
		p.Add(label)
	}
	return p, nil
}

func ok(y float64) bool { return !math.IsNaN(y) && !math.IsInf(y, 0) }

// add draws a series as the pieces between its gaps.
func add(p *plot.Plot, s Series, c color.Color, log bool, low float64) error {
	var pieces []plotter.XYs
	var piece plotter.XYs
	for i := range s.X {
		if !ok(s.Y[i]) || !ok(s.X[i]) {
			pieces, piece = append(pieces, piece), nil
			continue
		}
		y := s.Y[i]
		if log {
			y = max(y, low)
		}
		piece = append(piece, plotter.XY{X: s.X[i], Y: y})
	}
	named := false
	for _, xy := range append(pieces, piece) {
		if len(xy) == 0 {
			continue
		}
		line, err := plotter.NewLine(xy)
		if err != nil {
			return err
		}
		line.Color, line.Width = c, 1.2
		if s.Step {
			line.StepStyle = plotter.PostStep
		}
		p.Add(line)
		if !named && s.Name != "" {
			p.Legend.Add(s.Name, line)
			named = true
		}
	}
	return nil
}
