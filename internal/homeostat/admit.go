package homeostat

// Claim is what an instance reserves of a machine: its resources at rest.
type Claim struct {
	CPU    float64
	Memory int64
}

// Add so many times another claim.
func (c Claim) Add(o Claim, times int) Claim {
	return Claim{CPU: c.CPU + float64(times)*o.CPU, Memory: c.Memory + int64(times)*o.Memory}
}

// Fits tells how many instances with that claim a machine of some capacity can
// take when claimed is given away already: at most as many as are wanted.
func Fits(capacity, claimed, one Claim, wanted int) int {
	n := wanted
	if one.CPU > 0 {
		n = min(n, int((capacity.CPU-claimed.CPU)/one.CPU+1e-9))
	}
	if one.Memory > 0 {
		n = min(n, int((capacity.Memory-claimed.Memory)/one.Memory))
	}
	return max(n, 0)
}

// Ceiling is how many cores an app may be given while others have traffic too,
// so that these find a processor when a request comes: what they do not use of
// three quarters of the machine, and never less than its part of that. use is
// what the app uses itself, active the number of apps with traffic.
func Ceiling(cores, idle, use float64, active int) float64 {
	if active < 2 || cores <= 0 {
		return 0
	}
	most := headroom * cores
	if idle < 0 {
		return most
	}
	return min(max(most/float64(active), most-max(cores-idle-use, 0)), most)
}

// headroom: apps together may fill so much of a machine.
const headroom = 0.75

// Part is the larger of the two shares of the capacity that a claim takes.
func Part(capacity, c Claim) float64 {
	part := 0.0
	if capacity.CPU > 0 {
		part = c.CPU / capacity.CPU
	}
	if capacity.Memory > 0 {
		part = max(part, float64(c.Memory)/float64(capacity.Memory))
	}
	return part
}

// Grow is the next limit for an instance that came near its present one, when
// the machine has so much free: half as much again, within the peak; 0: none.
func Grow(p Policy, limit, free int64) int64 {
	next := min(whole(limit+max(limit/2, 16<<20)), p.Memory.Most())
	if next <= limit || next-limit > free {
		return 0
	}
	return next
}

// Shrink is the next lower limit for an instance that has used no more than
// that for a while: halfway back to rest, with air above what is used; 0: none.
func Shrink(p Policy, limit, used int64) int64 {
	next := max(p.Memory.Rest, whole(max(used+used/2, limit-max((limit-p.Memory.Rest)/2, 16<<20))))
	if next >= limit || limit <= p.Memory.Rest {
		return 0
	}
	return next
}

// whole mebibytes: people read limits.
func whole(n int64) int64 { return (n + 1<<20 - 1) &^ (1<<20 - 1) }
