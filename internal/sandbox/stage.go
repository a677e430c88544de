package sandbox

import (
	"fmt"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// stage is a small set of OS threads that live in a mount namespace of their
// own, with next to nothing in it. Whatever is mounted there is invisible on
// the host and vanishes with the daemon, however that ends.
type stage struct {
	jobs chan func(thread int)
	wg   sync.WaitGroup
}

// newStage starts n threads in a new mount namespace that setup fills. setup
// runs with an empty tmpfs as "/" and the host's tree below "/host", which is
// let go of afterwards.
func newStage(n int, setup func() error) (*stage, error) {
	s := &stage{jobs: make(chan func(int))}
	first := make(chan error)
	var ns *os.File
	// thread keeps its OS thread to itself and never gives it back: the
	// runtime ends a thread whose goroutine ends locked to it.
	var thread func(i int, enter func() error, entered chan<- error)
	thread = func(i int, enter func() error, entered chan<- error) {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// A process's first thread does not end before the process does, and
			// would keep the namespace: hold it while another one serves.
			defer runtime.UnlockOSThread()
			var other sync.WaitGroup
			other.Go(func() { thread(i, enter, entered) })
			other.Wait()
			return
		}
		err := enter()
		entered <- err
		if err != nil {
			return
		}
		for job := range s.jobs {
			job(i)
		}
	}
	s.wg.Go(func() {
		thread(0, func() error {
			if err := enterEmptyRoot(setup); err != nil {
				return err
			}
			fd, err := unix.Open("/proc/thread-self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return fmt.Errorf("open mount namespace: %w", err)
			}
			ns = os.NewFile(uintptr(fd), "mnt")
			return nil
		}, first)
	})
	if err := <-first; err != nil {
		return nil, err
	}
	defer func() { _ = ns.Close() }()
	for i := 1; i < n; i++ {
		s.wg.Go(func() {
			thread(i, func() error {
				if err := unix.Unshare(unix.CLONE_FS); err != nil {
					return fmt.Errorf("unshare: %w", err)
				}
				if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS); err != nil {
					return fmt.Errorf("enter mount namespace: %w", err)
				}
				return nil
			}, first)
		})
		if err := <-first; err != nil {
			s.close()
			return nil, err
		}
	}
	return s, nil
}

// do runs f on one of the stage's threads and tells it which. after, if not
// nil, runs on the same thread once do has returned.
func (s *stage) do(f func(thread int) error, after func(thread int)) error {
	errs := make(chan error, 1)
	s.jobs <- func(i int) {
		errs <- f(i)
		if after != nil {
			after(i)
		}
	}
	return <-errs
}

// close ends the threads, and with the last of them the namespace.
func (s *stage) close() {
	close(s.jobs)
	s.wg.Wait()
}

// enterEmptyRoot moves the calling thread into a new mount namespace whose
// root is an empty tmpfs with a fresh /proc.
func enterEmptyRoot(setup func() error) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare mount namespace: %w", err)
	}
	steps := []struct {
		name string
		do   func() error
	}{
		{"make mounts private", func() error { return unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "") }},
		// Any directory will do to hang the new root on: nobody else sees it.
		{"mount root", func() error {
			return unix.Mount("fastcontainer", "/proc", "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=755,size=1m")
		}},
		{"enter root", func() error { return unix.Chdir("/proc") }},
		{"make directories", func() error { return mkdirs("host", "proc") }},
		{"mount proc", func() error {
			return unix.Mount("proc", "proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
		}},
		{"pivot", func() error { return unix.PivotRoot(".", "host") }},
		{"enter root", func() error { return unix.Chdir("/") }},
		{"set up", setup},
		{"let go of the host's tree", func() error { return unix.Unmount("/host", unix.MNT_DETACH) }},
	}
	for _, s := range steps {
		if err := s.do(); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return nil
}

func mkdirs(names ...string) error {
	for _, n := range names {
		if err := unix.Mkdir(n, 0o755); err != nil {
			return fmt.Errorf("make directory %s: %w", n, err)
		}
	}
	return nil
}

// cradle is where sandboxes are born: the namespace of the first machine. Each
// child copies it, so it holds only what every container needs: a visible
// /proc and /sys (without which the kernel refuses to mount new ones), the
// device nodes, and places to mount on.
func setupCradle() error {
	if err := mkdirs("sys", "dev", "root", "new", "new/proc", "new/sys", "new/dev", "empty"); err != nil {
		return err
	}
	if err := unix.Chmod("empty", 0); err != nil {
		return fmt.Errorf("make empty directory: %w", err)
	}
	if err := unix.Mount("sysfs", "sys", "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("mount sysfs: %w", err)
	}
	if err := unix.Mount("dev", "dev", "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=755,size=64k"); err != nil {
		return fmt.Errorf("mount dev: %w", err)
	}
	old := unix.Umask(0)
	defer unix.Umask(old)
	for _, d := range []struct {
		name         string
		major, minor uint32
	}{
		{"null", 1, 3}, {"zero", 1, 5}, {"full", 1, 7}, {"random", 1, 8}, {"urandom", 1, 9}, {"tty", 5, 0},
	} {
		if err := unix.Mknod("dev/"+d.name, unix.S_IFCHR|0o666, int(unix.Mkdev(d.major, d.minor))); err != nil { //nolint:gosec // small
			return fmt.Errorf("make device %s: %w", d.name, err)
		}
	}
	for _, l := range [][2]string{
		{"/proc/self/fd", "fd"}, {"/proc/self/fd/0", "stdin"}, {"/proc/self/fd/1", "stdout"},
		{"/proc/self/fd/2", "stderr"}, {"pts/ptmx", "ptmx"},
	} {
		if err := unix.Symlink(l[0], "dev/"+l[1]); err != nil {
			return fmt.Errorf("make link %s: %w", l[1], err)
		}
	}
	if err := mkdirs("dev/pts", "dev/shm", "dev/mqueue"); err != nil {
		return err
	}
	for _, dir := range []string{"/dev", "/"} {
		if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NOEXEC, ""); err != nil {
			return fmt.Errorf("make %s read-only: %w", dir, err)
		}
	}
	return nil
}
