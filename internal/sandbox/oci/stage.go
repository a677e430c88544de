package oci

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"syscall"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// workshop is where a root filesystem is put together. What is mounted over it
// is seen by the thread of onStage and by what that starts, and nobody else.
// Hosts have this directory, users of all ids can enter it, and neither the
// daemon's files nor what runtimes look at lies below it.
const workshop = "/dev/shm"

// onStage runs f on an OS thread in a mount namespace of its own, in which the
// mounts in hidden are missing. Programs that f starts are born there. The
// namespace ends with them, and with it every mount that f made.
func onStage(hidden []string, f func() error) error {
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("unshare mount namespace: %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
			return fmt.Errorf("separate mounts: %w", err)
		}
		for _, m := range hidden {
			if err := unix.Unmount(m, unix.MNT_DETACH); err != nil {
				return fmt.Errorf("hide %s: %w", m, err)
			}
		}
		return f()
	})
}

// onThread runs f on an OS thread that ends with it, whatever f did to it.
func onThread(f func() error) (err error) {
	var thread sync.WaitGroup
	thread.Go(func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// A process's first thread cannot end before the process does, and
			// would keep f's namespaces: hold it while another one serves.
			defer runtime.UnlockOSThread()
			err = onThread(f)
			return
		}
		err = f() // never unlocked: the thread ends with its goroutine
	})
	thread.Wait()
	return err
}

// unifiedMounts are the cgroup v2 mounts of a host that has v1 as well.
func unifiedMounts() ([]string, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup2"))
	if err != nil {
		return nil, fmt.Errorf("find cgroup mounts: %w", err)
	}
	var at []string
	for _, m := range mounts {
		at = append(at, m.Mountpoint)
	}
	return at, nil
}

// cgroupDirs is a group's directory in each hierarchy of the host.
func cgroupDirs(group string) ([]string, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, fmt.Errorf("find cgroup mounts: %w", err)
	}
	var dirs []string
	for _, m := range mounts {
		dirs = append(dirs, filepath.Join(m.Mountpoint, group))
	}
	return dirs, nil
}

// namespaces of a container that exist before it does.
type namespaces struct {
	user *os.File // nil: the host's
	net  *os.File
}

func (n *namespaces) close() {
	for _, f := range []*os.File{n.user, n.net} {
		if f != nil {
			_ = f.Close()
		}
	}
}

// newNamespaces makes a network namespace with its loopback up, owned by a new
// user namespace with the given range if that has one. A child of ours is born
// into them and ends before it has executed anything; the descriptors keep them.
func newNamespaces(ids idRange) (n *namespaces, err error) {
	attr := &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET,
		Ptrace:     true, // stops before its first instruction
		Pdeathsig:  unix.SIGKILL,
	}
	if ids.Size > 0 {
		attr.Cloneflags |= unix.CLONE_NEWUSER
		m := []syscall.SysProcIDMap{{ContainerID: 0, HostID: int(ids.Base), Size: int(ids.Size)}}
		attr.UidMappings, attr.GidMappings = m, m
		attr.GidMappingsEnableSetgroups = true
	}
	n = &namespaces{}
	// A tracer is a thread, not a process.
	if err := onThread(func() error { return n.open(attr) }); err != nil {
		n.close()
		return nil, err
	}
	return n, nil
}

func (n *namespaces) open(attr *syscall.SysProcAttr) error {
	child := exec.Command("/proc/self/exe") //nolint:gosec // never runs
	child.SysProcAttr = attr
	child.Env = []string{}
	if err := child.Start(); err != nil {
		return fmt.Errorf("make namespaces: %w", err)
	}
	defer func() {
		_ = child.Process.Kill()
		_ = child.Wait()
	}()
	base := "/proc/" + strconv.Itoa(child.Process.Pid) + "/ns/"
	var err error
	if attr.Cloneflags&unix.CLONE_NEWUSER != 0 {
		if n.user, err = os.Open(base + "user"); err != nil {
			return fmt.Errorf("open user namespace: %w", err)
		}
	}
	if n.net, err = os.Open(base + "net"); err != nil {
		return fmt.Errorf("open network namespace: %w", err)
	}
	if err := unix.Setns(int(n.net.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace: %w", err)
	}
	return raiseLoopback()
}

// raiseLoopback of the calling thread's network namespace.
func raiseLoopback() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("raise loopback: %w", err)
	}
	defer func() { _ = unix.Close(s) }()
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return fmt.Errorf("raise loopback: %w", err)
	}
	req.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("raise loopback: %w", err)
	}
	return nil
}

// path of a descriptor of this process, as other processes can open it.
func fdPath(f *os.File) string {
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd())
}
