// Package cgroup makes, fills, limits, reads and removes the control groups of
// containers, on cgroup v2 and on v1 (also in hybrid mode). A Root is the
// group under which all containers of one daemon live; a Group is one
// container's.
//
// It speaks to the files directly: a start writes about six numbers, and a
// general library's walk over every controller of the host costs more than
// the rest of the start. What it promises: numbers are read and written whole
// or an error names the file; Remove leaves nothing.
package cgroup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/slow"
)

// Limits of a group. Zero leaves a number unlimited.
type Limits struct {
	CPU       float64 // cores
	CPUWeight uint64  // 2 to 10000, 100 is usual; or IdleWeight
	Memory    int64   // bytes
	PIDs      int64
}

// IdleWeight gives a group what no other one wants: whoever of the others wakes
// up takes the processor from it at once (cpu.idle). Before Linux 6.6, whose
// scheduler makes who had little weight wait for seconds after he has got more,
// it is a quarter of the usual weight.
const IdleWeight = 1

const quarter = 25

// idles tells whether this kernel's groups can be idle and come back from it.
var idles = sync.OnceValue(func() bool {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return false
	}
	var major, minor int
	_, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor)
	return err == nil && (major > 6 || major == 6 && minor >= 6)
})

// Stats of a group. A number that the kernel does not give stays 0.
type Stats struct {
	CPUTime, Throttled        time.Duration
	Periods, ThrottledPeriods uint64
	Memory, MemoryPeak        int64
	PIDs                      int64
	OOMKills                  uint64
}

// The processor quota is given out in periods: a tenth of the usual 100 ms, for
// who has used his up waits for the next one, and who may use two processors
// for half of it keeps both from his neighbours. Very small limits get longer
// ones, as the kernel gives no less than a millisecond.
const (
	period     = 10 * time.Millisecond
	longPeriod = 100 * time.Millisecond
	shortFrom  = 0.2 // cores
)

// quota of a limit in cores and its period, in µs; -1: none.
func quota(cores float64) (quota, per int64) {
	per = period.Microseconds()
	switch {
	case cores <= 0:
		return -1, per
	case cores < shortFrom:
		per = longPeriod.Microseconds()
	}
	return max(int64(cores*float64(per)), 1000), per // the kernel's least
}

// Root is where the groups of one daemon live.
type Root struct {
	v2 bool
	// dirs are the directories of the root group: on v2 the only one, on v1
	// one for each hierarchy. needed on v1: which of them hold a controller.
	dirs []string
	// v1 finds a controller's directory.
	v1 map[string]string
}

// Group is the control group of one container.
type Group struct {
	root *Root
	name string

	mu sync.Mutex
	// is what was set, by file: nobody else sets limits there.
	is map[string]string
}

var controllers = []string{"cpu", "cpuacct", "memory", "pids", "freezer"}

// Open makes the root group, parent being its path below the mount points
// ("/fastcontainer"), and enables the controllers that containers need.
func Open(parent string) (*Root, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, fmt.Errorf("find cgroup mounts: %w", err)
	}
	r := &Root{v1: map[string]string{}}
	unified := ""
	for _, m := range mounts {
		if m.FSType == "cgroup2" {
			unified = m.Mountpoint
			continue
		}
		for _, opt := range strings.Split(m.VFSOptions, ",") {
			if slices.Contains(controllers, opt) && r.v1[opt] == "" {
				r.v1[opt] = filepath.Join(m.Mountpoint, parent)
			}
		}
	}
	if len(r.v1) == 0 && unified != "" {
		r.v2 = true
		if err := r.openV2(unified, parent); err != nil {
			return nil, err
		}
		return r, nil
	}
	for _, c := range controllers {
		dir, ok := r.v1[c]
		if !ok {
			return nil, fmt.Errorf("the %s controller of cgroup v1 is not mounted", c)
		}
		if !slices.Contains(r.dirs, dir) {
			r.dirs = append(r.dirs, dir)
		}
	}
	for _, dir := range r.dirs {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, fmt.Errorf("make cgroup: %w", err)
		}
	}
	return r, nil
}

// openV2 makes the root group and hands every controller down to it. A process
// in the parent (the daemon itself, under systemd) would forbid that, so
// it is moved aside by the caller beforehand.
func (r *Root) openV2(mount, parent string) error {
	dir := mount
	for _, part := range strings.Split(strings.Trim(parent, "/")+"/.", "/") {
		if err := enableV2(dir); err != nil {
			return err
		}
		if part == "." {
			break
		}
		dir = filepath.Join(dir, part)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("make cgroup: %w", err)
		}
	}
	r.dirs = []string{dir}
	return nil
}

func enableV2(dir string) error {
	have, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return fmt.Errorf("read controllers: %w", err)
	}
	on, err := os.ReadFile(filepath.Join(dir, "cgroup.subtree_control"))
	if err != nil {
		return fmt.Errorf("read controllers: %w", err)
	}
	for _, c := range []string{"cpu", "memory", "pids"} {
		if slices.Contains(strings.Fields(string(on)), c) {
			continue
		}
		if !slices.Contains(strings.Fields(string(have)), c) {
			return fmt.Errorf("cgroup %s lacks the %s controller: enable it in its parent's cgroup.subtree_control (systemd: Delegate=yes)", dir, c)
		}
		if err := write(filepath.Join(dir, "cgroup.subtree_control"), "+"+c); err != nil {
			return fmt.Errorf("enable the %s controller in %s: %w", c, dir, err)
		}
	}
	return nil
}

// V2 tells which version the host uses for containers.
func (r *Root) V2() bool { return r.v2 }

// Remove removes the root group itself, which must be empty.
func (r *Root) Remove() error {
	var errs []error
	for _, dir := range r.dirs {
		if err := syscall.Rmdir(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove cgroup %s: %w", dir, err))
		}
	}
	return errors.Join(errs...)
}

// List names the groups that exist.
func (r *Root) List() ([]string, error) {
	var names []string
	for _, dir := range r.dirs {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return nil, fmt.Errorf("list cgroups: %w", err)
		}
		for _, e := range entries {
			if e.IsDir() && !slices.Contains(names, e.Name()) {
				names = append(names, e.Name())
			}
		}
	}
	return names, nil
}

// Group is the group of that name, which may or may not exist yet.
func (r *Root) Group(name string) *Group { return &Group{root: r, name: name} }

// Name of the group.
func (g *Group) Name() string { return g.name }

func (g *Group) dirs() []string {
	dirs := make([]string, len(g.root.dirs))
	for i, d := range g.root.dirs {
		dirs[i] = filepath.Join(d, g.name)
	}
	return dirs
}

// file is the path of a file of one controller.
func (g *Group) file(controller, name string) string {
	if g.root.v2 {
		return filepath.Join(g.root.dirs[0], g.name, name)
	}
	return filepath.Join(g.root.v1[controller], g.name, name)
}

// Create makes the group.
func (g *Group) Create() error {
	for _, dir := range g.dirs() {
		slow.Ahead()
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("make cgroup: %w", err)
		}
	}
	return nil
}

// Open gives the directory of a v2 group, for clone into it; -1 on v1.
func (g *Group) Open() (int, error) {
	if !g.root.v2 {
		return -1, nil
	}
	fd, err := unix.Open(g.dirs()[0], unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open cgroup %s: %w", g.name, err)
	}
	return fd, nil
}

// Doors of a v1 group: into each a process of one thread writes "0" to enter.
// Such a process moves itself without stopping anybody else; to move another
// one (Add) the kernel holds up every fork and exit of the host until no
// processor can be in one, for some 10 ms.
func (g *Group) Doors() ([]int, error) {
	var fds []int
	for _, dir := range g.dirs() {
		fd, err := unix.Open(filepath.Join(dir, "tasks"), unix.O_WRONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			for _, fd := range fds {
				_ = unix.Close(fd)
			}
			return nil, fmt.Errorf("open cgroup %s: %w", g.name, err)
		}
		fds = append(fds, fd)
	}
	return fds, nil
}

// Add moves a process, with all of its threads, into the group. See Doors for
// what that costs.
func (g *Group) Add(pid int) error {
	for _, dir := range g.dirs() {
		if err := write(filepath.Join(dir, "cgroup.procs"), strconv.Itoa(pid)); err != nil {
			return fmt.Errorf("move process %d: %w", pid, err)
		}
	}
	return nil
}

// Set changes the limits: what is so already costs nothing.
func (g *Group) Set(l Limits) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return errors.Join(g.setCPU(l), g.setMemory(l.Memory), g.setPIDs(l.PIDs))
}

// put writes a limit unless it is so. The caller holds the lock.
func (g *Group) put(controller, file, text string) error {
	if g.is[file] == text {
		return nil
	}
	delete(g.is, file)
	if err := write(g.file(controller, file), text); err != nil {
		return err
	}
	if g.is == nil {
		g.is = map[string]string{}
	}
	g.is[file] = text
	return nil
}

func (g *Group) setCPU(l Limits) error {
	quota, per := quota(l.CPU)
	if g.root.v2 {
		q := "max"
		if quota > 0 {
			q = strconv.FormatInt(quota, 10)
		}
		return errors.Join(g.put("cpu", "cpu.max", q+" "+strconv.FormatInt(per, 10)), g.setWeight(l.CPUWeight))
	}
	return errors.Join(
		g.put("cpu", "cpu.cfs_period_us", strconv.FormatInt(per, 10)),
		g.put("cpu", "cpu.cfs_quota_us", strconv.FormatInt(quota, 10)),
		g.setWeight(l.CPUWeight))
}

func (g *Group) setWeight(weight uint64) error {
	file, text := "cpu.weight", strconv.FormatUint(weight, 10)
	if !g.root.v2 {
		file, text = "cpu.shares", strconv.FormatUint(max(weight*1024/100, 2), 10)
	}
	switch {
	case weight == 0:
		return nil
	case weight == IdleWeight && idles():
		delete(g.is, file) // the kernel sets it
		return g.put("cpu", "cpu.idle", "1")
	case weight == IdleWeight:
		return g.setWeight(quarter)
	}
	err := g.put("cpu", file, text)
	if errors.Is(err, unix.EINVAL) && idles() { // an idle group has no weight
		if err = g.put("cpu", "cpu.idle", "0"); err == nil {
			err = g.put("cpu", file, text)
		}
	}
	return err
}

func (g *Group) setMemory(limit int64) error {
	if g.root.v2 {
		v := "max"
		if limit > 0 {
			v = strconv.FormatInt(limit, 10)
		}
		err := g.put("memory", "memory.max", v)
		if serr := g.put("memory", "memory.swap.max", "0"); serr != nil && !errors.Is(serr, fs.ErrNotExist) {
			err = errors.Join(err, serr)
		}
		return err
	}
	v := "-1"
	if limit > 0 {
		v = strconv.FormatInt(limit, 10)
	}
	// Memory plus swap must never be below memory: what goes first depends on
	// the direction, so a refused first try is repeated after the other.
	const plain, both = "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"
	err := g.put("memory", plain, v)
	if serr := g.put("memory", both, v); serr != nil && !errors.Is(serr, fs.ErrNotExist) {
		return errors.Join(err, serr)
	} else if serr == nil && err != nil {
		err = g.put("memory", plain, v)
	}
	return err
}

func (g *Group) setPIDs(n int64) error {
	v := "max"
	if n > 0 {
		v = strconv.FormatInt(n, 10)
	}
	return g.put("pids", "pids.max", v)
}

// Stats reads the numbers of the group. What cannot be read is named in the
// error; the rest is good.
func (g *Group) Stats() (Stats, error) {
	s, err := g.CPU()
	errs := []error{err}
	number := func(controller, name string) int64 {
		n, err := readNumber(g.file(controller, name))
		errs = append(errs, err)
		return n
	}
	if g.root.v2 {
		s.Memory = number("memory", "memory.current")
		s.MemoryPeak, _ = readNumber(g.file("memory", "memory.peak")) // since Linux 5.19
	} else {
		s.Memory = number("memory", "memory.usage_in_bytes")
		s.MemoryPeak = number("memory", "memory.max_usage_in_bytes")
	}
	s.OOMKills, err = g.oomKills()
	errs = append(errs, err)
	s.PIDs = number("pids", "pids.current")
	return s, errors.Join(errs...)
}

// CPU reads the numbers about the processor alone: an app under load is looked
// at a hundred times a second.
func (g *Group) CPU() (Stats, error) {
	var s Stats
	var buf [512]byte
	b, err := readInto(g.file("cpu", "cpu.stat"), buf[:])
	if err != nil {
		return s, err
	}
	field := func(name string) uint64 { return tableField(b, name) }
	s.Periods, s.ThrottledPeriods = field("nr_periods"), field("nr_throttled")
	if g.root.v2 {
		s.CPUTime = time.Duration(field("usage_usec")) * time.Microsecond       //nolint:gosec // far below 2^63
		s.Throttled = time.Duration(field("throttled_usec")) * time.Microsecond //nolint:gosec // far below 2^63
		return s, nil
	}
	s.Throttled = time.Duration(field("throttled_time")) //nolint:gosec // far below 2^63
	n, err := readNumber(g.file("cpuacct", "cpuacct.usage"))
	s.CPUTime = time.Duration(n)
	return s, err
}

// readInto reads a small file of the kernel without the runtime's poller. What
// is longer than the buffer is cut off.
func readInto(name string, buf []byte) ([]byte, error) {
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	defer func() { _ = unix.Close(fd) }()
	n, err := unix.Read(fd, buf)
	for errors.Is(err, unix.EINTR) {
		n, err = unix.Read(fd, buf)
	}
	if err != nil {
		return nil, &fs.PathError{Op: "read", Path: name, Err: err}
	}
	return buf[:n], nil
}

// readNumber reads a file that holds one.
func readNumber(name string) (int64, error) {
	var buf [32]byte
	b, err := readInto(name, buf[:])
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseInt(string(bytes.TrimSpace(b)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", name, err)
	}
	return n, nil
}

// tableField finds a number in lines of "name number"; 0: it is not there.
func tableField(b []byte, name string) uint64 {
	for len(b) > 0 {
		line := b
		if i := bytes.IndexByte(b, '\n'); i >= 0 {
			line, b = b[:i], b[i+1:]
		} else {
			b = nil
		}
		if key, value, ok := bytes.Cut(line, []byte(" ")); ok && string(key) == name {
			n, _ := strconv.ParseUint(string(value), 10, 64)
			return n
		}
	}
	return 0
}

// Memory that all groups below the root use: what the kernel could not take
// back at once, so without files that were read once.
func (r *Root) Memory() (int64, error) {
	dir, usage, inactive := r.v1["memory"], "memory.usage_in_bytes", "total_inactive_file"
	if r.v2 {
		dir, usage, inactive = r.dirs[0], "memory.current", "inactive_file"
	}
	used, err := readNumber(filepath.Join(dir, usage))
	if err != nil {
		return 0, err
	}
	var buf [4096]byte
	b, err := readInto(filepath.Join(dir, "memory.stat"), buf[:])
	if err != nil {
		return 0, err
	}
	return max(used-int64(tableField(b, inactive)), 0), nil //nolint:gosec // far below 2^63
}

// OOMKills counts the processes of the group that the kernel killed for lack
// of memory, as far as that can be read.
func (g *Group) OOMKills() uint64 {
	n, _ := g.oomKills()
	return n
}

func (g *Group) oomKills() (uint64, error) {
	name := "memory.oom_control"
	if g.root.v2 {
		name = "memory.events"
	}
	var buf [512]byte
	b, err := readInto(g.file("memory", name), buf[:])
	return tableField(b, "oom_kill"), err
}

// Freeze stops every process of the group, or lets them go on.
func (g *Group) Freeze(ctx context.Context, on bool) error {
	if g.root.v2 {
		v, want := "0", uint64(0)
		if on {
			v, want = "1", 1
		}
		if err := write(g.file("freezer", "cgroup.freeze"), v); err != nil {
			return err
		}
		if !on {
			return nil
		}
		return poll(ctx, func() (bool, error) {
			var buf [128]byte
			b, err := readInto(g.file("freezer", "cgroup.events"), buf[:])
			return tableField(b, "frozen") == want, err
		})
	}
	want := "THAWED"
	if on {
		want = "FROZEN"
	}
	return poll(ctx, func() (bool, error) {
		// On v1 a fork under way can keep a group FREEZING for ever; writing
		// again pulls the newcomer in.
		if err := write(g.file("freezer", "freezer.state"), want); err != nil {
			return false, err
		}
		var buf [32]byte
		b, err := readInto(g.file("freezer", "freezer.state"), buf[:])
		return string(bytes.TrimSpace(b)) == want, err
	})
}

// Reclaim has the kernel move what it can of the group's memory to swap. On a
// host without swap there is nothing to gain: only files would be dropped,
// which other containers may share.
func (g *Group) Reclaim() error {
	swaps, _ := os.ReadFile("/proc/swaps")    // what cannot be read has none
	if bytes.Count(swaps, []byte("\n")) < 2 { // a headline and one each
		return nil
	}
	if !g.root.v2 {
		return write(g.file("memory", "memory.force_empty"), "0")
	}
	s, _ := g.Stats()                                                                 // what cannot be read is 0
	err := write(g.file("memory", "memory.reclaim"), strconv.FormatInt(s.Memory, 10)) // since Linux 5.19
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, fs.ErrNotExist) {
		return nil // less than that could be, or the kernel is older
	}
	return err
}

// Processes lists the processes of the group.
func (g *Group) Processes() ([]int, error) {
	var pids []int
	for _, dir := range g.dirs() {
		b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read processes: %w", err)
		}
		for _, f := range bytes.Fields(b) {
			if pid, err := strconv.Atoi(string(f)); err == nil && !slices.Contains(pids, pid) {
				pids = append(pids, pid)
			}
		}
	}
	return pids, nil
}

// Kill ends every process of the group, frozen ones too.
func (g *Group) Kill() error {
	if g.root.v2 {
		err := write(g.file("", "cgroup.kill"), "1") // since Linux 5.14
		if err == nil || errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			return nil
		}
	}
	pids, err := g.Processes()
	for _, pid := range pids {
		if kerr := unix.Kill(pid, unix.SIGKILL); kerr != nil && !errors.Is(kerr, unix.ESRCH) {
			err = errors.Join(err, fmt.Errorf("kill process %d: %w", pid, kerr))
		}
	}
	if !g.root.v2 {
		_ = write(g.file("freezer", "freezer.state"), "THAWED") // a frozen process cannot die on v1
	}
	return err
}

// Remove kills what is left in the group and removes it. It may be repeated.
func (g *Group) Remove(ctx context.Context) error {
	return poll(ctx, func() (bool, error) {
		busy := false
		for _, dir := range g.dirs() {
			switch err := removeTree(dir); {
			case err == nil || errors.Is(err, fs.ErrNotExist):
			case errors.Is(err, unix.EBUSY):
				busy = true
			default:
				return false, fmt.Errorf("remove cgroup: %w", err)
			}
		}
		if busy {
			return false, g.Kill()
		}
		return true, nil
	})
}

// removeTree removes a group with the groups that were made inside it.
func removeTree(dir string) error {
	slow.Ahead()
	err := syscall.Rmdir(dir)
	if err == nil || !errors.Is(err, unix.EBUSY) {
		return err
	}
	entries, rerr := os.ReadDir(dir)
	if rerr != nil {
		return err
	}
	below := false
	for _, e := range entries {
		if e.IsDir() {
			below = true
			_ = removeTree(filepath.Join(dir, e.Name()))
		}
	}
	if below {
		return syscall.Rmdir(dir)
	}
	return err
}

// poll asks at a growing pace until the answer is yes. The waits are short
// because what is awaited (the end of killed processes) takes microseconds.
func poll(ctx context.Context, done func() (bool, error)) error {
	wait := 200 * time.Microsecond
	for {
		ok, err := done()
		if ok || err != nil {
			return err
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return fmt.Errorf("wait for cgroup: %w", context.Cause(ctx))
		case <-t.C:
		}
		wait = min(wait*2, 20*time.Millisecond)
	}
}

// write puts a value into a control file with one write(2): the kernel takes
// it whole or refuses it.
func write(path, value string) error {
	slow.Ahead()
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer func() { _ = unix.Close(fd) }()
	_, err = unix.Write(fd, []byte(value))
	for errors.Is(err, unix.EINTR) { // v1 gives up reclaiming for any signal, the Go runtime's too
		_, err = unix.Write(fd, []byte(value))
	}
	if err != nil {
		return &fs.PathError{Op: "write " + value + " to", Path: path, Err: err}
	}
	return nil
}
