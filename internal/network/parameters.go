package network

import (
	"os"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/slow"
)

// sysctl sets a parameter of the calling thread's network namespace, if it has
// another value. Some hosts (a container is one) let nobody write.
func sysctl(name, value string) error { return setParameter(unix.AT_FDCWD, "/proc/", name, value) }

// setParameter does so below a proc filesystem.
func setParameter(dir int, root, name, value string) error {
	file := root + "sys/net/" + name
	slow.Ahead()
	fd, err := unix.Openat(dir, file, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		_, err = unix.Write(fd, []byte(value))
		_ = unix.Close(fd)
	}
	if err == nil {
		return nil
	}
	err = &os.PathError{Op: "write", Path: "/proc/sys/net/" + name, Err: err}
	if now := strings.Fields(readFile("/proc/sys/net/" + name)); slices.Equal(now, strings.Fields(value)) {
		return nil
	}
	return &fleet.Error{Op: "set a kernel parameter", Subject: "net/" + name, Kind: fleet.ErrUnavailable, Err: err, Hint: "it must be " + value + ": let the daemon write below /proc/sys/net, or set it beforehand"}
}

// parameters sets those of the network namespaces of containers, in time that does
// not depend on how many containers there are.
//
// The kernel keeps what was looked up below /proc/sys/net for each network
// namespace in one chain for each name, and goes through all of it: four parameters
// took 0.1 ms with 250 network namespaces, 0.9 ms with 1,000 and 3.4 ms with 2,000
// (Linux 6.18). So it is done in a proc filesystem of our own, which is thrown
// away with what it keeps after some uses: 0.1 ms. Its zero value is ready.
type parameters struct {
	work sync.WaitGroup // closes what is thrown away, for which the kernel takes its time

	mu   sync.Mutex
	view *view
}

// view is a proc filesystem that is mounted nowhere.
type view struct {
	dir   int // -1: it cannot be made here, and /proc has to do
	uses  int
	users int
	old   bool
}

// viewUses is how many parameters are set in one: a chain is a quarter as long.
const viewUses = 128

// set a parameter of the calling thread's network namespace.
func (p *parameters) set(name, value string) error {
	v := p.borrow()
	defer p.giveBack(v)
	if v.dir < 0 {
		return sysctl(name, value)
	}
	return setParameter(v.dir, "", name, value)
}

func (p *parameters) borrow() *view {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.view != nil && p.view.uses >= viewUses {
		p.retire()
	}
	if p.view == nil {
		p.view = newView()
	}
	p.view.uses++
	p.view.users++
	return p.view
}

func (p *parameters) giveBack(v *view) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if v.users--; v.old && v.users == 0 {
		p.drop(v)
	}
}

// retire has the view thrown away when nobody uses it. The caller holds the lock.
func (p *parameters) retire() {
	v := p.view
	p.view, v.old = nil, true
	if v.users == 0 {
		p.drop(v)
	}
}

func (p *parameters) drop(v *view) {
	if v.dir >= 0 {
		p.work.Go(func() { _ = unix.Close(v.dir) })
	}
}

// close throws away what there is. Nobody uses it any more.
func (p *parameters) close() {
	p.mu.Lock()
	if p.view != nil {
		p.retire()
	}
	p.mu.Unlock()
	p.work.Wait()
}

func newView() *view {
	dir, err := mountProc()
	if err != nil {
		dir = -1
	}
	return &view{dir: dir}
}

func mountProc() (int, error) {
	slow.Ahead()
	fs, err := unix.Fsopen("proc", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, err
	}
	defer func() { _ = unix.Close(fs) }()
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, err
	}
	return unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
}
