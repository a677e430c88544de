package homeostat

import (
	"testing"
	"time"
)

func TestTiers(t *testing.T) {
	const ms = time.Millisecond
	measured := func(n int, usual time.Duration) Tier { return Tier{Starts: n, Usual: usual, Tail: 2 * usual} }
	for name, c := range map[string]struct {
		save            SavePolicy
		cold, restored  Tier
		saves, restores bool
	}{
		"nothing is known":                        {save: SaveAuto, restores: true},
		"a quick app has nothing to gain":         {save: SaveAuto, cold: measured(5, 5*ms), restores: true},
		"a slow app is saved":                     {save: SaveAuto, cold: measured(1, 400*ms), saves: true, restores: true},
		"a restore is tried before it is judged":  {save: SaveAuto, cold: measured(1, 80*ms), restored: measured(2, 300*ms), saves: true, restores: true},
		"a slow restore loses":                    {save: SaveAuto, cold: measured(1, 80*ms), restored: measured(3, 79*ms), saves: true},
		"a quick restore wins":                    {save: SaveAuto, cold: measured(1, 80*ms), restored: measured(3, 40*ms), saves: true, restores: true},
		"a daemon that knows restores only":       {save: SaveAuto, restored: measured(9, 40*ms), restores: true},
		"who wants it gets it, whatever it takes": {save: SaveAlways, cold: measured(5, 5*ms), restored: measured(5, 50*ms), saves: true, restores: true},
		"who does not want it":                    {save: SaveNever, cold: measured(5, time.Second), restored: measured(5, ms)},
	} {
		t.Run(name, func(t *testing.T) {
			p := Policy{Save: c.save}
			if got := p.Saves(c.cold); got != c.saves {
				t.Errorf("saves: %v", got)
			}
			if got := p.Restores(c.cold, c.restored); got != c.restores {
				t.Errorf("restores: %v", got)
			}
		})
	}
}
