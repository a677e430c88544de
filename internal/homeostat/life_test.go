package homeostat

import (
	"math/rand/v2"
	"testing"
	"time"
)

func TestJudge(t *testing.T) {
	p := Policy{Max: 5, Lifetime: time.Minute, Idle: 20 * time.Second}
	for name, c := range map[string]struct {
		p    Policy
		l    Life
		want Fate
	}{
		"young and busy":            {p, Life{Age: time.Second, Limit: time.Minute, InFlight: 1, Siblings: 1}, Fate{Again: 20 * time.Second}},
		"idle soon":                 {p, Life{Age: 15 * time.Second, Limit: time.Minute, Unused: 15 * time.Second, Siblings: 1, Quiet: 15 * time.Second}, Fate{Again: 5 * time.Second}},
		"idle":                      {p, Life{Age: 20 * time.Second, Limit: time.Minute, Unused: 20 * time.Second, Siblings: 1, Quiet: 20 * time.Second}, Fate{Verdict: Retire, Cause: CauseIdle}},
		"idle, but the last of min": {Policy{Min: 1, Max: 1, Idle: time.Second}, Life{Unused: time.Hour, Siblings: 1, Quiet: time.Hour}, Fate{}},
		"old and unused":            {p, Life{Age: time.Minute, Limit: time.Minute, Unused: 15 * time.Second, Siblings: 1, Quiet: 15 * time.Second}, Fate{Verdict: Retire, Cause: CauseLifetime}},
		"old and busy":              {p, Life{Age: time.Minute, Limit: time.Minute, InFlight: 3, Siblings: 1}, Fate{Verdict: Replace, Cause: CauseLifetime}},
		"old and just used":         {p, Life{Age: time.Minute, Limit: time.Minute, Unused: time.Second, Siblings: 1, Quiet: time.Second}, Fate{Verdict: Replace, Cause: CauseLifetime}},
		"outdated, in use":          {p, Life{Outdated: true, InFlight: 1, Siblings: 1}, Fate{Verdict: Replace, Cause: CauseOutdated}},
		"outdated, unused":          {p, Life{Outdated: true, Unused: 15 * time.Second, Siblings: 1, Quiet: 15 * time.Second}, Fate{Verdict: Retire, Cause: CauseOutdated}},
		"surplus, just used":        {p, Life{Limit: time.Minute, Unused: 2 * time.Second, Siblings: 2, Surplus: true, Quiet: 2 * time.Second}, Fate{Again: time.Second}},
		"surplus, unused":           {p, Life{Limit: time.Minute, Unused: 3 * time.Second, Siblings: 2, Surplus: true, Quiet: 3 * time.Second}, Fate{Verdict: Retire, Cause: CauseSurplus}},
		"surplus at its end, busy":  {p, Life{Age: time.Minute, Limit: time.Minute, InFlight: 1, Siblings: 2, Surplus: true}, Fate{Verdict: Retire, Cause: CauseLifetime}},
		"surplus without idle time": {Policy{Max: 3}, Life{Unused: 3 * time.Second, Siblings: 2, Surplus: true, Quiet: 3 * time.Second}, Fate{Verdict: Retire, Cause: CauseSurplus}},
		"surplus within min":        {Policy{Min: 2, Max: 3, Idle: time.Second}, Life{Unused: time.Hour, Siblings: 2, Surplus: true, Quiet: time.Hour}, Fate{}},
		"surplus, but the last":     {Policy{Max: 3}, Life{Unused: time.Hour, Siblings: 1, Surplus: true, Quiet: time.Hour}, Fate{}},
		"a successor of the unused": {p, Life{Age: time.Minute, Limit: time.Minute, Unused: time.Second, Quiet: 11 * time.Second, Siblings: 1}, Fate{Verdict: Retire, Cause: CauseLifetime}},
		"for ever":                  {Policy{Max: 1}, Life{Age: 1000 * time.Hour, Unused: time.Hour, Siblings: 1, Quiet: time.Hour}, Fate{}},
	} {
		if got := Judge(c.p, c.l); got != c.want {
			t.Errorf("%s: got %+v, want %+v", name, got, c.want)
		}
	}
}

func TestBackoff_GrowsAndIsBounded(t *testing.T) {
	last := time.Duration(0)
	for n := range 100 {
		b := Backoff(n)
		if b < last || b > 30*time.Second {
			t.Fatalf("after %d failures: %v, before %v", n, b, last)
		}
		last = b
	}
}

func TestLifetime_IsAtMostATenthShorter(t *testing.T) {
	p := Policy{Lifetime: time.Minute}
	for range 1000 {
		if l := Lifetime(p, rand.Float64()); l > time.Minute || l < 54*time.Second {
			t.Fatalf("got %v", l)
		}
	}
}
