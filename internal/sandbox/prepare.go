package sandbox

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/sandbox/cgroup"
	"github.com/fastcontainer/fastcontainer/internal/slow"
)

// prepared is a sandbox before it knows what it will be: a machine inside
// fresh namespaces, with its cgroup, its address, its uid range and its own
// /proc, /sys and /dev at hand. It serves one container, ever.
type prepared struct {
	name    string // of its cgroup and its network link
	machine *machine
	group   *cgroup.Group
	link    Link
	uids    uidRange // size 0: no user namespace of its own
	userns  *os.File
	disk    *writable
	garbage []int // descriptors to be closed once it runs
	diag    int   // asks for its sockets, see Listens; 0: there is none
	// bounding is the set of capabilities that its programs may have.
	bounding uint64
	// ended is closed when the first process has ended.
	ended chan struct{}

	mu     sync.Mutex
	status status
	then   func(status)
}

// end is called by the reaper.
func (p *prepared) end(s status, _ bool) {
	p.mu.Lock()
	p.status = s
	then := p.then
	close(p.ended)
	p.mu.Unlock()
	if then != nil {
		then(s)
	}
}

// whenEnded calls f once the first process has ended; f must not block.
func (p *prepared) whenEnded(f func(status)) {
	p.mu.Lock()
	select {
	case <-p.ended:
		p.mu.Unlock()
		f(p.status)
		return
	default:
		p.then = f
	}
	p.mu.Unlock()
}

const idsPerSandbox = 65536

// prepare makes a sandbox whose programs may have the given capabilities. Nothing is left if it fails.
func (n *Native) prepare(ctx context.Context, userns bool, caps uint64) (_ *prepared, err error) {
	p := &prepared{bounding: caps, name: "s" + strings.ToLower(rand.Text()[:10]), ended: make(chan struct{})}
	n.own(p.name)
	p.group = n.cgroups.Group(p.name)
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("prepare sandbox: %w", err), n.discard(p))
		}
	}()
	if err := p.group.Create(); err != nil {
		return nil, err
	}
	namespaces := uint64(unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWNET)
	if userns {
		namespaces |= unix.CLONE_NEWUSER
		if p.uids, err = n.uids.take(); err != nil {
			return nil, err
		}
	}
	if err := n.birth(ctx, p, namespaces); err != nil {
		return nil, err
	}
	proc := "/proc/" + strconv.Itoa(p.machine.pid)
	if userns {
		line := fmt.Sprintf("0 %d %d\n", p.uids.base, p.uids.size)
		for _, f := range []string{"/uid_map", "/gid_map"} {
			if err := os.WriteFile(proc+f, []byte(line), 0); err != nil {
				return nil, fmt.Errorf("map ids: %w", err)
			}
		}
		if p.userns, err = os.Open(proc + "/ns/user"); err != nil {
			return nil, fmt.Errorf("open user namespace: %w", err)
		}
	}
	var resolvConf []byte
	if n.network != nil {
		resolvConf = n.network.ResolvConf()
		netns, err := os.Open(proc + "/ns/net")
		if err != nil {
			return nil, fmt.Errorf("open network namespace: %w", err)
		}
		p.link, err = n.network.Attach(ctx, p.name, int(netns.Fd()))
		_ = netns.Close()
		if err != nil {
			return nil, err
		}
	}
	if p.disk, err = newWritable(int(p.uids.base), resolvConf); err != nil {
		return nil, err
	}
	if err := p.machine.play(ctx, n.furnishTape(caps)); err != nil {
		return nil, err
	}
	if p.machine.started, err = startTime(p.machine.pid); err != nil {
		return nil, err
	}
	if n.network != nil {
		if err := p.askForSockets(ctx); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// birth forks the sandbox's first process into its cgroup.
func (n *Native) birth(ctx context.Context, p *prepared, namespaces uint64) (err error) {
	p.machine, err = n.spawnInto(ctx, p.group, namespaces, p.end)
	return err
}

// spawnInto forks a child of the mother that is in a cgroup.
func (n *Native) spawnInto(ctx context.Context, g *cgroup.Group, namespaces uint64, ended func(status, bool)) (*machine, error) {
	dir, err := g.Open()
	if err != nil {
		return nil, err
	}
	if dir >= 0 {
		defer func() { _ = unix.Close(dir) }()
	}
	m, err := n.spawn(ctx, nil, namespaces, dir, ended)
	if err != nil || dir >= 0 {
		return m, err
	}
	doors, err := g.Doors()
	if err != nil {
		return m, err
	}
	defer closeAll(doors)
	t := &tape{}
	for i := range doors {
		t.call("enter cgroup", unix.SYS_WRITE, num(firstFD+i), t.bytes([]byte("0")), num(1))
	}
	t.call("close descriptors", unix.SYS_CLOSE_RANGE, num(firstFD), num(^uint32(0)), num(0))
	t.done()
	return m, m.play(ctx, t, doors...)
}

// bear has the mother fork. One that somebody killed is replaced.
func (n *Native) bear(ctx context.Context, namespaces uint64, cgroup int) (*machine, error) {
	n.spawning.Lock()
	defer n.spawning.Unlock()
	m, err := n.mother.spawn(ctx, namespaces, cgroup)
	if !errors.Is(err, errBroken) {
		return m, err
	}
	n.log.Warn("the init program is started again", "error", err)
	mother, gone, err := n.newMother()
	if err != nil {
		return nil, err
	}
	n.closeMother()
	n.mother, n.motherGone = mother, gone
	return n.mother.spawn(ctx, namespaces, cgroup)
}

// spawn forks a child of a machine (nil: of the mother) and watches over its end.
func (n *Native) spawn(ctx context.Context, from *machine, namespaces uint64, cgroup int, ended func(status, bool)) (m *machine, err error) {
	if from == nil {
		m, err = n.bear(ctx, namespaces, cgroup)
	} else {
		m, err = from.spawn(ctx, namespaces, cgroup)
	}
	if err != nil {
		return nil, err
	}
	// It is our child and nobody has waited for it, so the number is its own.
	pidfd, err := unix.PidfdOpen(m.pid, 0)
	if err == nil {
		if err = n.reaper.watch(pidfd, ended); err != nil {
			_ = unix.Close(pidfd)
		}
	}
	if err != nil {
		_ = unix.Kill(m.pid, unix.SIGKILL)
		m.close()
		return nil, fmt.Errorf("watch sandbox: %w", err)
	}
	return m, nil
}

// mute closes what it was asked by.
func (p *prepared) mute() {
	if p.diag > 0 {
		_ = unix.Close(p.diag)
		p.diag = 0
	}
}

// letGo closes what a running container does not need. It does so in the
// background: closing a mount waits until no processor of the host can still
// be looking at it.
func (n *Native) letGo(p *prepared) {
	garbage := p.garbage
	p.garbage = nil
	if p.disk != nil {
		garbage = append(garbage, p.disk.fd)
		p.disk = nil
	}
	userns := p.userns
	p.userns = nil
	n.background.Go(func() {
		slow.Ahead()
		closeAll(garbage)
		if userns != nil {
			_ = userns.Close()
		}
	})
}

// discard removes a prepared sandbox that will not be used.
func (n *Native) discard(p *prepared) error {
	p.mute()
	if p.machine != nil {
		p.machine.close()
	}
	n.letGo(p)
	return n.remove(context.Background(), p.name, p.group, p.link, p.uids, p.machine != nil, p.ended)
}

// The files and directories that the OCI runtime specification's defaults
// hide or protect: they tell about the host or change it.
var (
	maskedProcFiles = []string{
		"kcore", "keys", "latency_stats", "timer_list", "timer_stats", "sched_debug", "interrupts",
		"kpagecount", "kpageflags", "kpagecgroup", "sysrq-trigger",
	}
	maskedProcDirs   = []string{"acpi", "asound", "scsi"}
	readonlyProcDirs = []string{"bus", "fs", "irq", "sys"}
	maskedSysDirs    = []string{"firmware", "devices/virtual/powercap", "kernel/debug", "kernel/tracing", "fs/bpf"}
)

// guarded is how filesystems of the kernel are mounted.
const guarded = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// mount appends a mount(2).
func (t *tape) mount(name, source, target, fstype string, flags uint64, options string, mayFail ...uint64) {
	nr := uint64(unix.SYS_MOUNT)
	for _, f := range mayFail {
		nr |= f
	}
	t.call(name, nr, t.str(source), t.str(target), t.str(fstype), num(flags), t.str(options))
}

// guardProc protects what a /proc tells. empty is a directory to hide others
// with; "": make one.
func guardProc(t *tape, proc, empty string) {
	for _, d := range readonlyProcDirs {
		d = proc + "/" + d
		t.mount("protect "+d, d, d, "", unix.MS_BIND|unix.MS_REC, "", opMayFail)
		t.mount("protect "+d, "", d, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|guarded, "", opMayFail)
	}
	for _, f := range maskedProcFiles {
		t.mount("mask "+f, "/dev/null", proc+"/"+f, "", unix.MS_BIND, "", opMayFail)
	}
	for _, d := range maskedProcDirs {
		if empty == "" {
			t.mount("mask "+d, "tmpfs", proc+"/"+d, "tmpfs", guarded|unix.MS_RDONLY, "size=0,mode=000", opMayFail)
		} else {
			t.mount("mask "+d, empty, proc+"/"+d, "", unix.MS_BIND, "", opMayFail)
		}
	}
}

// raiseLoopback adds what a Network would do otherwise.
func raiseLoopback(t *tape) {
	request := make([]byte, unix.IFNAMSIZ+24) // struct ifreq
	copy(request, "lo")
	binary.NativeEndian.PutUint16(request[unix.IFNAMSIZ:], unix.IFF_UP)
	open := t.call("open socket", unix.SYS_SOCKET, num(unix.AF_INET), num(unix.SOCK_DGRAM|unix.SOCK_CLOEXEC), num(0))
	up := t.call("raise loopback", unix.SYS_IOCTL, num(0), num(unix.SIOCSIFFLAGS), t.bytes(request))
	t.feed(open, up)
	// 3 is the way to the daemon, and nothing else is open.
	t.call("close socket", unix.SYS_CLOSE_RANGE, num(4), num(math.MaxInt32), num(0))
}

// furnishTape makes what every container has: /proc, /sys and /dev, below
// /new until the root filesystem is there.
func (n *Native) furnishTape(caps uint64) *tape {
	t := &tape{}
	// Born as the host's root, which its ids do not contain: become its own.
	t.call("drop groups", unix.SYS_SETGROUPS, num(0), num(0))
	t.call("become root", unix.SYS_SETRESGID, num(0), num(0), num(0))
	t.call("become root", unix.SYS_SETRESUID, num(0), num(0), num(0))
	t.call("new session", unix.SYS_SETSID)
	t.call("unshare cgroup namespace", unix.SYS_UNSHARE, num(unix.CLONE_NEWCGROUP))
	// Nothing that is mounted here may reach another namespace, nor come from one.
	t.mount("make mounts private", "", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")

	if n.network == nil {
		raiseLoopback(t)
	}
	t.mount("mount proc", "proc", "/new/proc", "proc", guarded, "")
	t.mount("mount sysfs", "sysfs", "/new/sys", "sysfs", guarded|unix.MS_RDONLY, "")
	if n.cgroups.V2() {
		t.mount("mount cgroup", "cgroup", "/new/sys/fs/cgroup", "cgroup2", guarded|unix.MS_RDONLY, "", opMayFail)
	} else {
		t.mount("mask cgroup", "/empty", "/new/sys/fs/cgroup", "", unix.MS_BIND, "", opMayFail)
	}
	guardProc(t, "/new/proc", "/empty")
	for _, d := range maskedSysDirs {
		t.mount("mask "+d, "/empty", "/new/sys/"+d, "", unix.MS_BIND, "", opMayFail)
	}
	t.mount("mount dev", "/dev", "/new/dev", "", unix.MS_BIND, "")
	t.mount("mount devpts", "devpts", "/new/dev/pts", "devpts", unix.MS_NOSUID|unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5")
	t.mount("mount shm", "shm", "/new/dev/shm", "tmpfs", guarded, "mode=1777,size=64m")
	t.mount("mount mqueue", "mqueue", "/new/dev/mqueue", "mqueue", guarded, "")
	dropCaps(t, n.allCaps, caps)
	t.done()
	return t
}
