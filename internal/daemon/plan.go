package daemon

import (
	"time"

	"github.com/fastcontainer/fastcontainer/internal/api"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// Plan tells what an app's requests so far would have met under its policy and
// under some others.
func (b backend) Plan(name fleet.AppName, wanted float64) (api.Plan, error) {
	a, ok := b.d.control.App(name)
	if !ok {
		return api.Plan{}, missing("plan", name)
	}
	h := a.History()
	p := api.Plan{App: name, Requests: h.Requests, Seconds: h.Span.Seconds(), StartP50: ms(h.Start50), StartP99: ms(h.Start99), Wanted: wanted}
	s := a.Policy()
	level := func(idle, lifetime time.Duration, least int) api.PlanLevel {
		l := h.Expect(idle, lifetime, least)
		return api.PlanLevel{
			Idle: fleet.Duration(idle).String(), Lifetime: fleet.Duration(lifetime).String(), Min: least,
			Cold: l.Cold, WaitP50: ms(l.Wait50), WaitP99: ms(l.Wait99), Starts: l.Starts,
			MemorySeconds: l.Awake * (24 * time.Hour).Seconds() * float64(s.Memory.Rest),
		}
	}
	p.Now = level(s.Idle, s.Lifetime, s.Min)
	for _, idle := range []time.Duration{10 * time.Second, time.Minute, 5 * time.Minute, 30 * time.Minute, 4 * time.Hour} {
		p.Others = append(p.Others, level(idle, s.Lifetime, 0))
	}
	p.Others = append(p.Others, level(s.Idle, s.Lifetime, 1))
	if idle, ok := h.Reach(wanted, s.Lifetime); ok && h.Requests > 0 {
		p.Reach = fleet.Duration(idle).String()
	}
	return p, nil
}

func ms(d time.Duration) float64 { return d.Seconds() * 1e3 }
