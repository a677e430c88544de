package node

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"sync"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/homeostat"
)

// vitals remembers what rates are made of. A number that cannot be read is
// left out of the decisions, which is said once.
type vitals struct {
	mu          sync.Mutex
	proc        string // "/proc", but for tests
	said        map[string]bool
	at          time.Time
	mem, cpu    time.Duration // stalled, ever
	idle        time.Duration // of all cores, ever
	last        homeostat.Vitals
	capacity    fleet.Bytes
	cores       float64
	used        func() (fleet.Bytes, error)
	unreadable  func(name string, err error)
	leastWindow time.Duration
}

func newVitals(c Config) *vitals {
	v := &vitals{proc: "/proc", said: map[string]bool{}, capacity: c.Memory, cores: c.CPU, used: c.Used, leastWindow: 50 * time.Millisecond}
	if v.cores <= 0 {
		v.cores = float64(runtime.NumCPU())
	}
	v.unreadable = func(name string, err error) {
		c.Logger.Warn("a signal of load is missing, decisions go on without it", "signal", name, "error", err)
	}
	v.last.Idle = -1 // not known
	return v
}

// Vitals of this machine, as rates since the last call: at least 50 ms, or the
// last answer is given again.
func (n *Node) Vitals() homeostat.Vitals { return n.vitals.read(time.Now()) }

func (v *vitals) read(now time.Time) homeostat.Vitals {
	v.mu.Lock()
	defer v.mu.Unlock()
	span := now.Sub(v.at)
	if !v.at.IsZero() && span < v.leastWindow {
		return v.last
	}
	out := homeostat.Vitals{Idle: -1, Cores: v.cores, Memory: int64(v.capacity)}
	mem, err := stalled(v.proc + "/pressure/memory")
	v.say("memory pressure", err)
	cpu, err := stalled(v.proc + "/pressure/cpu")
	v.say("processor pressure", err)
	idle, err := idleTime(v.proc + "/stat")
	v.say("idle time", err)
	if !v.at.IsZero() {
		out.MemoryStalled = share(mem-v.mem, span)
		out.CPUStalled = share(cpu-v.cpu, span)
		if err == nil {
			out.Idle = min(max((idle-v.idle).Seconds()/span.Seconds(), 0), v.cores)
		}
	}
	v.at, v.mem, v.cpu, v.idle = now, mem, cpu, idle
	if v.used != nil {
		used, err := v.used()
		v.say("memory of the containers", err)
		out.Used = int64(used)
	}
	// What others on this machine use is not there for containers.
	if free, err := available(v.proc + "/meminfo"); err == nil {
		if most := out.Used + free; out.Memory <= 0 || most < out.Memory {
			out.Memory = most
		}
	} else {
		v.say("free memory", err)
	}
	v.last = out
	return out
}

func (v *vitals) say(name string, err error) {
	if err == nil {
		delete(v.said, name)
		return
	}
	if !v.said[name] {
		v.said[name] = true
		v.unreadable(name, err)
	}
}

func share(d, of time.Duration) float64 {
	return min(max(d.Seconds()/of.Seconds(), 0), 1)
}

// stalled reads the time in which something waited: "some ... total=µs" of the
// kernel's pressure stall information.
func stalled(file string) (time.Duration, error) {
	b, err := os.ReadFile(file) //nolint:gosec // the kernel's
	if err != nil {
		return 0, err
	}
	line, _, _ := bytes.Cut(b, []byte("\n"))
	_, total, ok := bytes.Cut(line, []byte("total="))
	if !ok || !bytes.HasPrefix(line, []byte("some ")) {
		return 0, fmt.Errorf("%s has no total", file)
	}
	us, err := strconv.ParseInt(string(total), 10, 64)
	return time.Duration(us) * time.Microsecond, err
}

// idleTime of all cores, from the fourth and fifth number of the first line.
func idleTime(file string) (time.Duration, error) {
	b, err := os.ReadFile(file) //nolint:gosec // the kernel's
	if err != nil {
		return 0, err
	}
	line, _, _ := bytes.Cut(b, []byte("\n"))
	f := bytes.Fields(line)
	if len(f) < 6 || string(f[0]) != "cpu" {
		return 0, fmt.Errorf("%s has no line of all cores", file)
	}
	idle, err := strconv.ParseInt(string(f[4]), 10, 64)
	wait, err2 := strconv.ParseInt(string(f[5]), 10, 64)
	const tick = 10 * time.Millisecond // USER_HZ is 100 on every Linux
	return time.Duration(idle+wait) * tick, errors.Join(err, err2)
}

// available memory of the machine, less a reserve that is never given away.
func available(file string) (int64, error) {
	b, err := os.ReadFile(file) //nolint:gosec // the kernel's
	if err != nil {
		return 0, err
	}
	number := func(name string) (int64, error) {
		_, rest, ok := bytes.Cut(b, []byte(name+":"))
		if !ok {
			return 0, fmt.Errorf("%s has no %s", file, name)
		}
		line, _, _ := bytes.Cut(rest, []byte(" kB"))
		n, err := strconv.ParseInt(string(bytes.TrimSpace(line)), 10, 64)
		return n << 10, err
	}
	free, err := number("MemAvailable")
	if err != nil {
		return 0, err
	}
	total, err := number("MemTotal")
	return max(free-total/20, 0), err
}
