package appfile

import (
	"fmt"
	"maps"
	"net/url"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/moby/sys/capability"
	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// What is sane. Beyond these a value is a slip, or an attack.
const (
	maxHosts    = 256
	maxArgs     = 1024
	maxEnv      = 1024
	maxVolumes  = 64
	maxText     = 128<<10 - 1 // the kernel's bound of one argument or variable
	maxTime     = 365 * 24 * time.Hour
	maxShort    = 24 * time.Hour // ready.timeout, drain
	maxScale    = 10_000
	maxInFlight = 1_000_000
	minCores    = 0.01
	maxCores    = 4096
	minMemory   = 4 << 20
	minDisk     = 64 << 10
	maxBytes    = 64 << 40
	maxPIDs     = 4 << 20
)

// Default is an app with everything that does not follow from something else;
// Complete does the rest once name, image and limits are there.
func Default(name string) fleet.Spec {
	return fleet.Spec{
		Name:     fleet.AppName(name),
		Ready:    fleet.Ready{Timeout: fleet.Duration(30 * time.Second)},
		Lifetime: fleet.Duration(20 * time.Minute),
		Idle:     fleet.Duration(5 * time.Minute),
		Drain:    fleet.Duration(30 * time.Second),
		Scale:    fleet.Scale{Max: 10},
		Resources: fleet.Resources{
			CPU:    fleet.CPU{Rest: 1},
			Memory: fleet.Memory{Rest: 256 << 20},
			PIDs:   1024,
		},
		Priority:  50,
		Start:     fleet.StartAuto,
		Isolation: fleet.Isolation{Runtime: fleet.RuntimeNative, UserNS: true, Seccomp: "default"},
	}
}

// Complete fills in what is missing: everything that is zero where zero has
// no meaning of its own. Lifetime, Idle, Drain, Concurrency, Scale.Min,
// Priority and UserNS stay as they are, and so does Port: 0 is the image's
// exposed port. Host names become lower case.
func Complete(s *fleet.Spec) {
	d := Default("")
	fill(&s.Ready.Timeout, d.Ready.Timeout)
	fill(&s.Scale.Max, d.Scale.Max)
	fill(&s.Resources.CPU.Rest, d.Resources.CPU.Rest)
	fill(&s.Resources.CPU.Peak, s.Resources.CPU.Rest)
	fill(&s.Resources.Memory.Rest, d.Resources.Memory.Rest)
	fill(&s.Resources.Memory.Peak, s.Resources.Memory.Rest)
	fill(&s.Resources.Disk, s.Resources.Memory.Peak/2)
	fill(&s.Resources.PIDs, d.Resources.PIDs)
	fill(&s.Start, d.Start)
	fill(&s.Isolation.Runtime, d.Isolation.Runtime)
	fill(&s.Isolation.Seccomp, d.Isolation.Seccomp)
	if len(s.Hosts) == 0 && s.Name != "" {
		s.Hosts = []string{string(s.Name) + ".localhost"}
	}
	hosts := slices.Clone(s.Hosts)
	for i, h := range hosts {
		hosts[i] = strings.ToLower(h)
	}
	s.Hosts = hosts
}

func fill[T comparable](p *T, value T) {
	var zero T
	if *p == zero {
		*p = value
	}
}

// Validate reports everything that is wrong with a completed app, as a
// *fleet.Error of kind fleet.ErrInvalid around Problems, or nil. Paths must
// be absolute: only a file has a directory that they could be relative to.
func Validate(s *fleet.Spec) error {
	var problems Problems
	check(s, func(key, format string, args ...any) {
		problems = append(problems, Problem{Key: key, Text: fmt.Sprintf(format, args...)})
	})
	if len(problems) == 0 {
		return nil
	}
	return &fleet.Error{Op: "check app", Subject: clip(string(s.Name)), Kind: fleet.ErrInvalid, Err: problems}
}

// note takes one problem: its key, and what is wrong with it.
type note func(key, format string, args ...any)

func check(s *fleet.Spec, bad note) {
	if s.Name == "" {
		bad("name", "is missing; every app has one")
	} else if fleet.ValidName(string(s.Name)) != nil {
		bad("name", "%q is not a DNS label; 1 to 63 of a-z, 0-9 and '-', starting and ending with a letter or digit", clip(string(s.Name)))
	}
	checkImage(s.Image, bad)
	checkHosts(s.Hosts, bad)
	if s.Port != 0 {
		between(bad, "port", s.Port, 1, 65535)
	}
	checkProcess(s, bad)
	for key, h := range map[string]string{"ready.http": s.Ready.HTTP, "warm": s.Warm} {
		if h == "" {
			continue
		}
		if _, err := url.ParseRequestURI(h); err != nil || h[0] != '/' || strings.HasPrefix(h, "//") || len(h) > 2048 || strings.ContainsFunc(h, notPrinted) || strings.Contains(h, " ") {
			bad(key, "%q is not a path; write it as /healthz", clip(h))
		}
	}
	lasting(bad, "ready.timeout", s.Ready.Timeout, fleet.Duration(time.Millisecond), maxShort)
	lasting(bad, "lifetime", s.Lifetime, 0, maxTime)
	lasting(bad, "idle", s.Idle, 0, maxTime)
	lasting(bad, "drain", s.Drain, 0, maxShort)
	between(bad, "concurrency", s.Concurrency, 0, maxInFlight)
	if s.Scale.Min > s.Scale.Max && s.Scale.Max > 0 {
		bad("scale.max", "is %d, below scale.min (%d); at least as much", s.Scale.Max, s.Scale.Min)
	}
	between(bad, "scale.min", s.Scale.Min, 0, maxScale)
	between(bad, "scale.max", s.Scale.Max, 1, maxScale)
	checkResources(s.Resources, bad)
	between(bad, "priority", s.Priority, 0, 100)
	oneOf(bad, "start", s.Start, fleet.StartAuto, fleet.StartCold, fleet.StartStandby, fleet.StartCheckpoint)
	checkVolumes(s.Volumes, bad)
	oneOf(bad, "isolation.runtime", s.Isolation.Runtime, fleet.RuntimeNative, fleet.RuntimeCrun, fleet.RuntimeRunc, fleet.RuntimeRunsc)
	oneOf(bad, "isolation.seccomp", s.Isolation.Seccomp, "default", "unconfined")
	checkCapabilities(s.Isolation.Capabilities.Add, "isolation.capabilities.add", bad)
	checkCapabilities(s.Isolation.Capabilities.Drop, "isolation.capabilities.drop", bad)
}

func checkImage(image string, bad note) {
	const forms = "write it as [HOST[:PORT]/]NAME[:TAG|@sha256:…], or oci:DIR, tar:FILE, dir:ROOTFS"
	scheme, file, _ := strings.Cut(image, ":")
	switch {
	case image == "":
		bad("image", "is missing; "+forms)
	case len(image) > 4096 || strings.ContainsFunc(image, notPrinted):
		bad("image", "%q is no image; "+forms, clip(image))
	case localImage(scheme) && file == "":
		bad("image", "%s: has no path; "+forms, scheme)
	case localImage(scheme) && !filepath.IsAbs(file):
		bad("image", "the path %q is relative; write it in full, because the daemon reads it", clip(file))
	case localImage(scheme):
	default:
		if _, err := name.ParseReference(image); err != nil {
			bad("image", "%q is no image reference; "+forms, clip(image))
		}
	}
}

var hostName = regexp.MustCompile(`^(\*\.)?([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?$`)

func checkHosts(hosts []string, bad note) {
	atMost(bad, "hosts", len(hosts), maxHosts)
	seen := map[string]bool{}
	for i, h := range hosts[:min(len(hosts), maxHosts)] {
		key := fmt.Sprintf("hosts[%d]", i)
		switch {
		case h == "":
			bad(key, "is empty; write a host name such as www.example.com")
		case strings.Contains(h, "/"):
			bad(key, "%q is not a host name; write it without scheme and path", clip(h))
		case strings.Contains(h, ":"):
			bad(key, "%q is not a host name; write it without port", clip(h))
		case strings.ContainsFunc(h, func(c rune) bool { return c > unicode.MaxASCII }):
			bad(key, "%q is not ASCII; write it in its xn-- form", clip(h))
		case len(h) > 253 || !hostName.MatchString(h):
			bad(key, "%q is not a host name; labels of a-z, 0-9 and '-' with dots between them, the first may be *", clip(h))
		case seen[h]:
			bad(key, "%q is given twice; once is enough", h)
		}
		seen[h] = true
	}
}

var userName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}\$?(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}\$?)?$`)

func checkProcess(s *fleet.Spec, bad note) {
	args := func(key string, list []string) {
		atMost(bad, key, len(list), maxArgs)
		for i, a := range list[:min(len(list), maxArgs)] {
			checkText(bad, fmt.Sprintf("%s[%d]", key, i), a)
		}
	}
	args("entrypoint", s.Entrypoint)
	args("command", s.Command)
	if len(s.Entrypoint) > 0 && s.Entrypoint[0] == "" {
		bad("entrypoint[0]", "is empty; it names the program")
	}
	atMost(bad, "env", len(s.Env), maxEnv)
	for i, k := range slices.Sorted(maps.Keys(s.Env)) {
		key := "env." + clip(k)
		switch {
		case i == maxEnv:
			return
		case k == "":
			bad("env", "has a variable without a name; write NAME: value")
		case strings.ContainsAny(k, "=\x00"):
			bad(key, "the name has %s in it; write NAME: value", map[bool]string{true: "'='", false: "a NUL"}[strings.Contains(k, "=")])
		case len(k)+len(s.Env[k])+1 > maxText:
			bad(key, "is too long; at most %d bytes with its name", maxText)
		default:
			checkText(bad, key, s.Env[k])
		}
	}
	if s.Workdir != "" && (!path.IsAbs(s.Workdir) || len(s.Workdir) > 4095 || strings.ContainsRune(s.Workdir, 0)) {
		bad("workdir", "%q is no absolute path; write it as /srv/app", clip(s.Workdir))
	}
	if s.User != "" && !userName.MatchString(s.User) {
		bad("user", "%q is no user; write a name or number, or name:group, or uid:gid", clip(s.User))
	} else if s.User != "" {
		for part := range strings.SplitSeq(s.User, ":") {
			if n, err := strconv.ParseUint(part, 10, 64); err == nil && n >= 1<<32-1 {
				bad("user", "%s is too large; ids end at %d", part, uint32(1<<32-2))
			}
		}
	}
	for key, signal := range map[string]string{"stop_signal": s.StopSignal, "restored_signal": s.RestoredSignal} {
		if signal != "" && !validSignal(signal) {
			bad(key, "%q is no signal; write it as SIGTERM, TERM or 15", clip(signal))
		}
	}
}

func validSignal(s string) bool {
	if n, err := strconv.Atoi(s); err == nil {
		return n >= 1 && n <= 64
	}
	s = strings.ToUpper(s)
	return unix.SignalNum(s) != 0 || unix.SignalNum("SIG"+s) != 0
}

func checkResources(r fleet.Resources, bad note) {
	cores := func(key string, v float64) bool {
		ok := v >= minCores && v <= maxCores // false for NaN
		if !ok {
			bad(key, "is %v; %v to %v cores", v, minCores, maxCores)
		}
		return ok
	}
	amount := func(key string, v, least fleet.Bytes) bool {
		ok := v >= least && v <= maxBytes
		if !ok {
			bad(key, "is %v; %v to %v", v, least, fleet.Bytes(maxBytes))
		}
		return ok
	}
	// A peak that only follows its rest is not refused beside it.
	if rest := cores("resources.cpu.rest", r.CPU.Rest); r.CPU.Peak != r.CPU.Rest && cores("resources.cpu.peak", r.CPU.Peak) && rest && r.CPU.Peak < r.CPU.Rest {
		bad("resources.cpu.peak", "is %v, below resources.cpu.rest (%v); at least as much", r.CPU.Peak, r.CPU.Rest)
	}
	if rest := amount("resources.memory.rest", r.Memory.Rest, minMemory); r.Memory.Peak != r.Memory.Rest && amount("resources.memory.peak", r.Memory.Peak, minMemory) && rest && r.Memory.Peak < r.Memory.Rest {
		bad("resources.memory.peak", "is %v, below resources.memory.rest (%v); at least as much", r.Memory.Peak, r.Memory.Rest)
	}
	amount("resources.disk", r.Disk, minDisk)
	between(bad, "resources.pids", r.PIDs, 1, maxPIDs)
}

func checkVolumes(volumes []fleet.Volume, bad note) {
	atMost(bad, "volumes", len(volumes), maxVolumes)
	mounts := map[string]bool{}
	for i, v := range volumes[:min(len(volumes), maxVolumes)] {
		key := fmt.Sprintf("volumes[%d]", i)
		switch {
		case v.Name == "" && v.Bind == "":
			bad(key, "has neither name nor bind; name: one that the node keeps, bind: a directory of the host")
		case v.Name != "" && v.Bind != "":
			bad(key, "has both name and bind; one of them")
		case v.Name != "" && fleet.ValidName(v.Name) != nil:
			bad(key+".name", "%q is not a DNS label; 1 to 63 of a-z, 0-9 and '-'", clip(v.Name))
		case v.Bind != "" && !plainPath(v.Bind):
			bad(key+".bind", "%q is no absolute path; write it as /srv/data", clip(v.Bind))
		}
		m := path.Clean(v.Mount)
		switch {
		case v.Mount == "":
			bad(key+".mount", "is missing; the absolute path inside the container")
		case !plainPath(v.Mount) || slices.Contains(strings.Split(v.Mount, "/"), ".."):
			bad(key+".mount", "%q is no absolute path; write it as /var/lib/data", clip(v.Mount))
		case m == "/" || within(m, "/proc") || within(m, "/sys") || within(m, "/dev"):
			bad(key+".mount", "%q belongs to the container itself; any path but /, /proc, /sys and /dev", clip(v.Mount))
		case mounts[m]:
			bad(key+".mount", "%q has a volume already; one volume to a path", clip(v.Mount))
		}
		mounts[m] = true
	}
}

func plainPath(p string) bool {
	return path.IsAbs(p) && len(p) <= 4095 && !strings.ContainsFunc(p, notPrinted)
}

func within(p, dir string) bool { return p == dir || strings.HasPrefix(p, dir+"/") }

func checkCapabilities(names []string, key string, bad note) {
	atMost(bad, key, len(names), 64)
	for i, n := range names[:min(len(names), 64)] {
		short := strings.TrimPrefix(strings.ToUpper(n), "CAP_")
		known := short == "ALL" || slices.ContainsFunc(capability.ListKnown(), func(c capability.Cap) bool {
			return strings.ToUpper(c.String()) == short
		})
		if !known {
			bad(fmt.Sprintf("%s[%d]", key, i), "%q is no capability; names such as NET_BIND_SERVICE, or ALL", clip(n))
		}
	}
}

func checkText(bad note, key, s string) {
	switch {
	case strings.ContainsRune(s, 0):
		bad(key, "has a NUL in it; text only")
	case len(s) > maxText:
		bad(key, "is too long; at most %d bytes", maxText)
	}
}

func atMost(bad note, key string, n, most int) {
	if n > most {
		bad(key, "has %d entries; at most %d", n, most)
	}
}

func between[T ~int | ~int64](bad note, key string, v, least, most T) {
	if v < least || v > most {
		bad(key, "is %d; %d to %d", v, least, most)
	}
}

func lasting(bad note, key string, d, least fleet.Duration, most time.Duration) {
	if d < least || d > fleet.Duration(most) {
		bad(key, "is %v; %v to %v", d, least, fleet.Duration(most))
	}
}

func oneOf[T ~string](bad note, key string, v T, allowed ...T) {
	if slices.Contains(allowed, v) {
		return
	}
	var words []string
	for _, a := range allowed {
		words = append(words, string(a))
	}
	meant := ""
	if m := suggest(string(v), words); m != "" {
		meant = "did you mean " + m + "? "
	}
	bad(key, "%q is unknown; %sallowed: %s", clip(string(v)), meant, strings.Join(words, ", "))
}

func notPrinted(c rune) bool { return !unicode.IsPrint(c) }

// clip keeps what is quoted short.
func clip(s string) string {
	if len(s) <= 64 {
		return s
	}
	return strings.ToValidUTF8(s[:61], "") + "…"
}
