package network

import (
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/slow"
)

// sysctl sets a parameter of the calling thread's network namespace, if it has
// another value. Some hosts (a container is one) let nobody write.
func sysctl(name, value string) error { return setParameter(nil, name, value) }

// setParameter does so by way of a proc filesystem; nil: the one at /proc.
func setParameter(proc *os.File, name, value string) error {
	subject := "net/" + name
	path := "/proc/sys/" + subject
	dir, file := unix.AT_FDCWD, path
	if proc != nil {
		dir, file = int(proc.Fd()), "sys/"+subject
	}
	slow.Ahead()
	fd, err := unix.Openat(dir, file, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		_, err = unix.Write(fd, []byte(value))
		_ = unix.Close(fd)
	}
	if err == nil {
		return nil
	}
	if now := strings.Fields(readFile(path)); slices.Equal(now, strings.Fields(value)) {
		return nil
	}
	return &fleet.Error{Op: "set a kernel parameter", Subject: subject, Kind: fleet.ErrUnavailable, Err: &os.PathError{Op: "write", Path: path, Err: err}, Hint: "it must be " + value + ": let the daemon write below /proc/sys/net, or set it beforehand"}
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
	uses atomic.Uint64
	work sync.WaitGroup // closes what is thrown away, for which the kernel takes its time

	mu   sync.RWMutex // held while the view is used
	view *os.File     // a proc filesystem that is mounted nowhere; nil: /proc has to do
}

// viewUses is how many parameters are set in one: a chain is a quarter as long.
const viewUses = 128

// set a parameter of the calling thread's network namespace.
func (p *parameters) set(name, value string) error {
	if p.uses.Add(1)%viewUses == 1 {
		p.renew(newView())
	}
	p.mu.RLock()
	defer p.mu.RUnlock()
	return setParameter(p.view, name, value)
}

// renew puts another view in the place of the one there is.
func (p *parameters) renew(view *os.File) {
	p.mu.Lock()
	old := p.view
	p.view = view
	p.mu.Unlock()
	if old != nil {
		p.work.Go(func() { _ = old.Close() })
	}
}

// close throws away what there is. Nobody uses it any more.
func (p *parameters) close() {
	p.renew(nil)
	p.work.Wait()
}

// newView is nil if it cannot be made here.
func newView() *os.File {
	slow.Ahead()
	fs, err := unix.Fsopen("proc", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil
	}
	defer func() { _ = unix.Close(fs) }()
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil
	}
	dir, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil
	}
	return os.NewFile(uintptr(dir), "proc")
}
