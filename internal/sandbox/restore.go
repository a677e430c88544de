package sandbox

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/checkpoint-restore/go-criu/v8/rpc"
	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/sandbox/criu"
)

// Restore implements Checkpointer. A prepared sandbox gets its root filesystem
// as for a start. Then CRIU, which runs with the rights of the sandbox's root
// and in its namespaces but sees the host's files, makes the processes, which enter
// the sandbox's mounts: nothing is mounted or configured anew but /proc, which belongs
// to the processes' new PID namespace.
func (n *Native) Restore(ctx context.Context, spec Spec, dir string) (Sandbox, error) {
	if _, err := n.saver.wait(ctx); err != nil {
		return nil, err
	}
	spec.Layers = slices.Concat([]string{filepath.Join(dir, filesDir)}, spec.Layers)
	c, claimed, err := n.claim(ctx, spec)
	if err != nil {
		return nil, err
	}
	prepared := c.p
	if err := c.restore(ctx, claimed, dir); err != nil {
		return nil, errors.Join(fmt.Errorf("restore %s: %w", spec.ID, err), n.discard(prepared))
	}
	n.keep(c)
	return c, nil
}

func (c *container) restore(ctx context.Context, began time.Time, dir string) error {
	p := c.p
	about, err := readSaved(dir)
	if err != nil {
		return err
	}
	if err := errors.Join(c.announce(), c.placeGhosts(dir, about.Ghosts)); err != nil {
		return err
	}
	// What CRIU does is ours, so it has no limit of the processor. The others hold
	// for what it fills.
	limits := c.spec.Limits
	limits.CPU = 0
	if err := c.limit(limits); err != nil {
		return err
	}
	images := filepath.Join(dir, imagesDir)
	shared, err := c.lend(ctx, images, about.Shared)
	if err != nil {
		return err
	}
	defer shared.close()
	hired, err := c.hire(ctx, images, about, shared)
	if err != nil {
		return err
	}
	// It starts while the root filesystem is made.
	o, err := c.fit()
	if err == nil {
		defer o.close()
		o.tape.done()
		err = p.machine.play(ctx, o.tape, o.fds...)
	}
	mounted := time.Now()
	c.timings.Rootfs = mounted.Sub(began)
	h := <-hired
	if h.err != nil {
		return errors.Join(h.err, err)
	}
	if err != nil {
		h.worker.kill()
		return err
	}
	resp, err := criu.Order(ctx, h.worker.conn, h.opts, rpc.CriuReqType_RESTORE, func(stage string, pid int) error {
		switch stage {
		case "setup-namespaces":
			return c.remountProc(ctx, pid)
		case "pre-resume":
			return errors.Join(shared.wait(), c.Resize(c.spec.Limits), c.removeGhosts(about))
		default:
			return nil
		}
	}, h.worker.log)
	if err != nil {
		h.worker.kill()
		if errors.Is(err, criu.ErrRefused) && p.group.OOMKills() == 0 {
			err = fmt.Errorf("%w: %w", ErrUnrestorable, err)
		}
		return err
	}
	c.n.background.Go(h.worker.done)
	if err := c.replace(int(resp.GetRestore().GetPid())); err != nil {
		return err
	}
	c.timings.Exec = time.Since(mounted)
	c.lives(o.stdio)
	return nil
}

// hire is a CRIU that was started, or not, and what it is to be told.
type hire struct {
	worker *worker
	opts   *rpc.CriuOpts
	err    error
}

// hire starts the CRIU that will restore the container.
func (c *container) hire(ctx context.Context, dir string, about saved, shared *loan) (_ <-chan hire, err error) {
	p := c.p
	var fds []int // its own
	defer func() {
		if err != nil {
			closeAll(fds)
		}
	}()
	// Images are the host root's alone. In the sandbox they are its root's, and
	// read-only.
	images, err := cloneMount(dir, p, true)
	if err != nil {
		return nil, err
	}
	fds = append(fds, images)
	mounts, err := unix.Open("/proc/"+strconv.Itoa(p.machine.pid)+"/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open mount namespace: %w", err)
	}
	fds = append(fds, mounts)
	opts := &rpc.CriuOpts{
		ImagesDirFd: new(int32(-1)), ImagesDir: new(fmt.Sprintf("/proc/self/fd/%d", criuFD)),
		JoinNs:       []*rpc.JoinNamespace{{Ns: new("mnt"), NsFile: new(fmt.Sprintf("/proc/self/fd/%d", criuFD+1))}},
		Unprivileged: new(true), RstSibling: new(true), NotifyScripts: new(true),
		TcpClose: new(true), FileLocks: new(true), LinkRemap: new(true),
		ManageCgroupsMode: new(rpc.CriuCgMode_IGNORE), NetworkLock: new(rpc.CriuNetworkLockMethod_SKIP),
		LogToStderr: new(true), LogLevel: new(criuLogLevel),
	}
	if about.Log != "" && c.spec.Log != "" {
		log, err := unix.Open(c.spec.Log, logFlags, 0o600)
		if err != nil {
			return nil, fmt.Errorf("open log %s: %w", c.spec.Log, err)
		}
		opts.InheritFd = append(opts.InheritFd, &rpc.InheritFd{Key: &about.Log, Fd: new(int32(criuFD + len(fds)))}) //nolint:gosec // small
		fds = append(fds, log)
	}
	all := slices.Clone(fds)
	for i, s := range about.Shared {
		opts.InheritFd = append(opts.InheritFd, &rpc.InheritFd{Key: new(s.Name), Fd: new(int32(criuFD + len(all)))}) //nolint:gosec // small
		all = append(all, shared.files[i])
	}
	hired := make(chan hire, 1)
	c.n.background.Go(func() {
		defer closeAll(fds)
		w, err := c.n.employ(ctx, &errand{sandbox: p, fds: all})
		hired <- hire{w, opts, err}
	})
	return hired, nil
}

// loan is the memory that restored processes will share, in files of memory that
// are filled beside.
type loan struct {
	files  []int              // of memory
	pages  []*os.File         // what goes there
	cancel context.CancelFunc // stops the filling
	filled chan struct{}      // closed when err is known
	err    error
}

// lend makes the memory that processes share. What fills it is in the
// container's cgroup, so it is the container's memory that it takes.
func (c *container) lend(ctx context.Context, images string, shared []criu.Shared) (*loan, error) {
	ctx, cancel := context.WithCancel(ctx)
	l := &loan{cancel: cancel, filled: make(chan struct{})}
	for i := range shared {
		if err := l.add(images, &shared[i]); err != nil {
			close(l.filled)
			l.close()
			return nil, fmt.Errorf("make shared memory: %w", err)
		}
	}
	if len(shared) == 0 {
		close(l.filled)
		return l, nil
	}
	c.n.background.Go(func() {
		defer close(l.filled)
		l.err = c.fill(ctx, l, shared)
	})
	return l, nil
}

// add makes one file of memory, with nothing in it.
func (l *loan) add(images string, s *criu.Shared) error {
	pages, err := s.Open(images)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnrestorable, err)
	}
	l.pages = append(l.pages, pages)
	memory, err := unix.MemfdCreate(s.Name, unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	l.files = append(l.files, memory)
	return unix.Ftruncate(memory, s.Size) // takes no memory
}

// fill copies the content of shared memory into its files.
func (c *container) fill(ctx context.Context, l *loan, shared []criu.Shared) (err error) {
	fail := func(err error) error { return fmt.Errorf("fill shared memory: %w", err) }
	ended := make(chan struct{})
	m, err := c.n.spawnInto(ctx, c.p.group, 0, func(status, bool) { close(ended) })
	if m != nil {
		defer func() {
			m.close()
			select {
			case <-ended:
				return
			default:
			}
			if err != nil { // it may be copying; it is our child, and its number its own until it has ended
				_ = unix.Kill(m.pid, unix.SIGKILL)
			}
			<-ended
		}()
	}
	if err != nil {
		return fail(err)
	}
	for i, s := range shared {
		t := &tape{}
		for _, p := range s.Parts {
			t.call("seek", unix.SYS_LSEEK, num(firstFD), num(p.Offset), num(unix.SEEK_SET))
			t.call("copy", unix.SYS_SENDFILE, num(firstFD), num(firstFD+1), num(0), num(p.Length))
		}
		t.call("close descriptors", unix.SYS_CLOSE_RANGE, num(firstFD), num(^uint32(0)), num(0))
		t.done()
		if err := m.play(ctx, t, l.files[i], int(l.pages[i].Fd())); err != nil {
			return fail(err)
		}
		// It reads by the same open file as we do.
		if at, err := l.pages[i].Seek(0, io.SeekCurrent); err != nil || at != s.Length() {
			return fail(errors.Join(errors.New("it is not whole"), err))
		}
	}
	return nil
}

// wait returns when the files are filled.
func (l *loan) wait() error {
	<-l.filled
	return l.err
}

// close lets go of the files, which live on where they are mapped.
func (l *loan) close() {
	l.cancel()
	<-l.filled
	closeAll(l.files)
	for _, f := range l.pages {
		_ = f.Close()
	}
}

func readSaved(dir string) (about saved, err error) {
	text, err := os.ReadFile(filepath.Join(dir, savedFile)) //nolint:gosec // ours
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return about, fmt.Errorf("read checkpoint: %w", err)
	}
	if err == nil {
		err = json.Unmarshal(text, &about)
	}
	if err != nil { // it is damaged
		return about, fmt.Errorf("%w: read checkpoint: %w", ErrUnrestorable, err)
	}
	return about, nil
}

// replace makes a restored process the container's first one. The machine that
// held the sandbox ends.
func (c *container) replace(pid int) error {
	old := c.p
	c.p = &prepared{name: old.name, machine: &machine{pid: pid}, group: old.group, link: old.link, uids: old.uids, bounding: old.bounding, diag: old.diag, ended: make(chan struct{})}
	old.diag = 0
	// It is our child and nobody has waited for it.
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return fmt.Errorf("watch process: %w", err)
	}
	if err := c.n.reaper.watch(pidfd, c.p.end); err != nil {
		_ = unix.Close(pidfd)
		return err
	}
	old.machine.close()
	c.n.letGo(old)
	return nil
}

// announce writes what tells the program that it was restored.
func (c *container) announce() error {
	seed := make([]byte, 32)
	_, _ = rand.Read(seed) // never fails
	text, err := json.Marshal(map[string]string{
		"time": time.Now().UTC().Format(time.RFC3339Nano), "seed": hex.EncodeToString(seed),
		"instance": string(c.spec.ID), "address": c.p.link.Address.String(),
	})
	if err != nil {
		return fmt.Errorf("write %s: %w", RestoredFile, err)
	}
	dir := filepath.Dir(RestoredFile)
	if err := unix.Mkdirat(c.p.disk.fd, "upper"+dir, 0o755); err != nil {
		return fmt.Errorf("make %s: %w", dir, err)
	}
	if err := unix.Fchownat(c.p.disk.fd, "upper"+dir, c.p.disk.owner, c.p.disk.owner, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("make %s: %w", dir, err)
	}
	return c.p.disk.write(RestoredFile[1:], append(text, '\n'))
}

// placeGhosts puts the files that are deleted, and still open, where CRIU opens
// them.
func (c *container) placeGhosts(dir string, ghosts []criu.Ghost) error {
	for _, g := range ghosts {
		if err := c.p.disk.place(g.Name, filepath.Join(dir, ghostsDir, g.Name), g.UID, g.GID, g.Mode); err != nil {
			return fmt.Errorf("place a deleted file: %w", err)
		}
	}
	return nil
}

// removeGhosts deletes them again. The container's processes do not run yet.
func (c *container) removeGhosts(about saved) error {
	if len(about.Ghosts)+len(about.Links) == 0 {
		return nil
	}
	top, err := os.OpenRoot("/proc/" + strconv.Itoa(c.p.machine.pid) + "/root")
	if err != nil {
		return fmt.Errorf("delete files: %w", err)
	}
	defer func() { _ = top.Close() }()
	var errs []error
	for _, g := range about.Ghosts {
		errs = append(errs, top.Remove(g.Name))
	}
	for _, l := range about.Links {
		errs = append(errs, top.Remove(strings.TrimPrefix(l, "/")))
	}
	return errors.Join(errs...)
}

// remountProc puts the /proc of a restored process's PID namespace in the place
// of that of the sandbox's machine. That process is alone in its namespace so
// far; whoever mounts is there for a moment, and gone before others come.
func (c *container) remountProc(ctx context.Context, pid int) error {
	n := c.n
	helper, err := n.spawn(ctx, nil, 0, -1, func(status, bool) {})
	if err != nil {
		return err
	}
	defer helper.close()
	var fds []int
	defer func() { closeAll(fds) }()
	for _, pid := range []int{c.p.machine.pid, pid} {
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			return fmt.Errorf("mount proc: %w", err)
		}
		fds = append(fds, fd)
	}
	enter := &tape{}
	namespaces := unix.CLONE_NEWNS
	if c.p.uids.size > 0 {
		namespaces |= unix.CLONE_NEWUSER
	}
	enter.call("enter PID namespace", unix.SYS_SETNS, num(firstFD+1), num(unix.CLONE_NEWPID))
	enter.call("enter namespaces", unix.SYS_SETNS, num(firstFD), num(namespaces))
	enter.call("close descriptors", unix.SYS_CLOSE_RANGE, num(firstFD), num(^uint32(0)), num(0))
	enter.call("drop groups", unix.SYS_SETGROUPS, num(0), num(0))
	enter.call("become root", unix.SYS_SETRESGID, num(0), num(0), num(0))
	enter.call("become root", unix.SYS_SETRESUID, num(0), num(0), num(0))
	enter.done()
	if err := helper.play(ctx, enter, fds...); err != nil {
		return err
	}
	ended := make(chan struct{})
	m, err := n.spawn(ctx, helper, 0, -1, func(status, bool) { close(ended) })
	if err != nil {
		return err
	}
	t := &tape{}
	// The kernel lets a user namespace mount a /proc as long as it sees one, so
	// the new one is made before the old one goes.
	t.call("make proc", sysFsopen, t.str("proc"), num(0))
	t.call("make proc", sysFsconfig, num(firstFD), num(unix.FSCONFIG_CMD_CREATE), num(0), num(0), num(0))
	t.call("make proc", sysFsmount, num(firstFD), num(0), num(unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC))
	t.call("let go of proc", unix.SYS_UMOUNT2, t.str("/proc"), num(unix.MNT_DETACH))
	t.call("mount proc", unix.SYS_MOVE_MOUNT, num(firstFD+1), t.str(""), num(unix.AT_FDCWD), t.str("/proc"), num(unix.MOVE_MOUNT_F_EMPTY_PATH))
	guardProc(t, "/proc", "")
	t.done()
	err = m.play(ctx, t)
	m.close()
	<-ended
	return err
}

const (
	sysFsopen   = uint64(unix.SYS_FSOPEN)
	sysFsconfig = uint64(unix.SYS_FSCONFIG)
	sysFsmount  = uint64(unix.SYS_FSMOUNT)
)
