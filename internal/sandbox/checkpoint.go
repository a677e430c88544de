package sandbox

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/checkpoint-restore/go-criu/v8/rpc"
	continuity "github.com/containerd/continuity/fs"
	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/sandbox/criu"
)

// What a checkpoint's directory holds.
const (
	// imagesDir are CRIU's images.
	imagesDir = "images"
	// filesDir is what the processes had written to their root filesystem: one
	// more layer, above those of the image.
	filesDir = "files"
	// ghostsDir are the deleted files that they had open.
	ghostsDir = "ghosts"
	// savedFile is what Restore has to know, as JSON: type saved.
	savedFile = "saved.json"
)

// saved is what a restore has to know of the sandbox of its checkpoint.
type saved struct {
	// Log is the name that the log file has in the images.
	Log string `json:"log,omitempty"`
	// Ghosts are to be in the root directory until the processes go on; then
	// they go, and so do Links.
	Ghosts []criu.Ghost `json:"ghosts,omitempty"`
	Links  []string     `json:"links,omitempty"`
	// Shared is the memory that processes share.
	Shared []criu.Shared `json:"shared,omitempty"`
}

// ghostLimit bounds, in bytes, a file that was deleted and is still open.
const ghostLimit = 64 << 20

// Checkpoint implements Checkpointer.
func (n *Native) Checkpoint(ctx context.Context, spec Spec, o Capture, dir string) (err error) {
	if _, err := n.saver.wait(ctx); err != nil {
		return err
	}
	files := filepath.Join(dir, filesDir)
	if err := errors.Join(os.Mkdir(filepath.Join(dir, imagesDir), 0o700), os.Mkdir(filepath.Join(dir, ghostsDir), 0o700), os.Mkdir(files, 0o755)); err != nil { //nolint:gosec // the root directory of containers; the parent is closed
		return fmt.Errorf("save %s: %w", spec.ID, err)
	}
	c, claimed, err := n.claim(ctx, spec)
	if err != nil {
		return err
	}
	if o.Warm == nil {
		if c.trap, err = setTrap(ctx, c.p.machine, o.Port); err == nil {
			defer c.trap.close()
		}
	}
	if err == nil {
		err = c.become(ctx, claimed)
	}
	if err != nil {
		return errors.Join(err, n.discard(c.p))
	}
	disk := c.p.disk
	c.p.disk = nil // kept open here, for what is written there
	n.letGo(c.p)
	defer disk.close()
	defer func() { err = errors.Join(err, c.Destroy(context.WithoutCancel(ctx))) }()

	if err := c.await(ctx, o); err != nil {
		return fmt.Errorf("save %s: %w", spec.ID, err)
	}
	if err := c.dump(ctx, dir); err != nil {
		return fmt.Errorf("save %s: %w", spec.ID, err)
	}
	// CRIU has ended the processes: nobody writes any more.
	if err := saveFiles(disk, c.p.uids, files); err != nil {
		return fmt.Errorf("save files of %s: %w", spec.ID, err)
	}
	return nil
}

// await returns when the container's program stands still in listen(2), or
// answers without, and is warm.
func (c *container) await(ctx context.Context, o Capture) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	caught, ready := make(chan error, 1), make(chan error, 1)
	address := c.Address() // whoever asks may do so longer than the container lives
	if c.trap != nil {
		c.n.background.Go(func() { caught <- c.trap.wait(ctx) })
	}
	if o.Ready != nil {
		c.n.background.Go(func() {
			err := o.Ready(ctx, address)
			if err == nil && o.Warm != nil {
				if err = o.Warm(ctx, address); err == nil {
					err = c.rest(ctx, o.Rest)
				}
			}
			ready <- err
		})
	}
	select {
	case err := <-caught:
		return err
	case err := <-ready:
		if err != nil {
			return err
		}
		// It answered, so it was not caught: unless the two happened at once.
		select {
		case err := <-caught:
			return err
		case <-time.After(settle):
			return nil
		}
	case <-c.done:
		return fmt.Errorf("it ended before it listened: exit code %d", c.exit.Code)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// rest returns when the container was left alone for a while, and is idle. What a
// program does when nobody has asked it for some seconds (V8 collects garbage three
// times) would be done by each restored sibling otherwise, and at once: its timers are due.
func (c *container) rest(ctx context.Context, least time.Duration) error {
	look := least / 10
	pause, before := least, time.Duration(0)
	for n := range 21 { // the last twenty take twice as long again
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		now, err := c.CPU()
		if err != nil || n > 0 && now.CPUTime-before <= look/100 {
			return err
		}
		pause, before = look, now.CPUTime
	}
	return nil
}

// settle is how long a program that answers is left alone before it is saved:
// it may still hold the probe's connection.
const settle = 200 * time.Millisecond

// dump has CRIU save the container's processes, and end them, and takes off
// them what tied them to this sandbox: its namespaces and its trap.
func (c *container) dump(ctx context.Context, dir string) error {
	images := filepath.Join(dir, imagesDir)
	about := saved{}
	var err error
	if about.Log, err = c.logName(); err != nil {
		return err
	}
	if err := c.order(ctx, images, about.Log); err != nil {
		return err
	}
	if err := criu.Share(images, 1); err != nil {
		return err
	}
	if c.trap != nil {
		filter, err := trapFilter()
		if err == nil {
			err = criu.DropFilter(images, filter)
		}
		if err != nil {
			return err
		}
	}
	if about.Ghosts, about.Links, err = criu.TakeGhosts(images, filepath.Join(dir, ghostsDir)); err != nil {
		return err
	}
	if err := criu.Lost(images); err != nil {
		return err
	}
	if about.Shared, err = criu.TakeShared(images); err != nil {
		return err
	}
	if err := criu.Populate(images); err != nil {
		return err
	}
	text, err := json.Marshal(about)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, savedFile), text, 0o600)
}

// order has CRIU save the processes.
func (c *container) order(ctx context.Context, images, log string) error {
	external, err := c.external()
	if err != nil {
		return err
	}
	if log != "" {
		external = append(external, log)
	}
	dir, err := os.OpenFile(images, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	w, err := c.n.employ(ctx, &errand{})
	if err != nil {
		return err
	}
	// A process that was caught in listen(2) is seized there, so it makes the
	// call again when it goes on.
	_, err = criu.Order(ctx, w.conn, &rpc.CriuOpts{
		ImagesDirFd: new(int32(dir.Fd())), Pid: new(int32(c.p.machine.pid)), //nolint:gosec // small
		External: external, TcpClose: new(true), TcpSkipInFlight: new(true), FileLocks: new(true), LinkRemap: new(true),
		GhostLimit: new(uint32(ghostLimit)), ManageCgroupsMode: new(rpc.CriuCgMode_IGNORE), NetworkLock: new(rpc.CriuNetworkLockMethod_SKIP),
		LogToStderr: new(true), LogLevel: new(criuLogLevel),
	}, rpc.CriuReqType_DUMP, nil, w.log)
	if err != nil {
		w.kill()
		return err
	}
	w.done()
	return nil
}

// criuLogLevel: errors and warnings.
const criuLogLevel = int32(2)

// external names what the container's processes use and CRIU must not save:
// what a sandbox brings with it.
func (c *container) external() ([]string, error) {
	proc := "/proc/" + strconv.Itoa(c.p.machine.pid)
	var st unix.Stat_t
	if err := unix.Stat(proc+"/ns/net", &st); err != nil {
		return nil, fmt.Errorf("look at the network namespace: %w", err)
	}
	external := []string{fmt.Sprintf("net[%d]:net", st.Ino)}
	// Everything that is mounted, but for the root itself.
	f, err := os.Open(proc + "/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	defer func() { _ = f.Close() }()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) < 5 || fields[4] == "/" {
			continue
		}
		point := unescape(fields[4])
		if strings.ContainsAny(point, "[]:") {
			return nil, &fleet.Error{Op: "save", Subject: string(c.spec.ID), Kind: fleet.ErrInvalid, Err: fmt.Errorf("the name of %s cannot be told to CRIU", point), Hint: "mount the volume where its path has no brackets and colons"}
		}
		external = append(external, fmt.Sprintf("mnt[%s]:m%d", point, len(external)))
	}
	return external, nil
}

// logName is what CRIU calls the log, which lies outside of the root
// filesystem: by the mount that it was opened on, and its inode.
func (c *container) logName() (string, error) {
	if c.spec.Log == "" {
		return "", nil
	}
	var st unix.Stat_t
	if err := unix.Stat(c.spec.Log, &st); err != nil {
		return "", fmt.Errorf("look at the log: %w", err)
	}
	mount, err := mountID(c.spec.Log)
	if err != nil {
		return "", fmt.Errorf("look at the log: %w", err)
	}
	return fmt.Sprintf("file[%x:%x]", mount, st.Ino), nil
}

// unescape reads a path of mountinfo, where some characters are octal numbers.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// mountID is the number of the mount that a file is opened on.
func mountID(name string) (int, error) {
	f, err := os.Open(name) //nolint:gosec // ours
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close() }()
	info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", f.Fd()))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(info)) {
		if v, ok := strings.CutPrefix(line, "mnt_id:"); ok {
			return strconv.Atoi(strings.TrimSpace(v))
		}
	}
	return 0, errors.New("the kernel does not tell its mount")
}

// saveFiles copies what was written to a sandbox's root filesystem, with the
// owners that it has inside.
func saveFiles(disk *writable, uids uidRange, dir string) error {
	if err := continuity.CopyDir(dir, fmt.Sprintf("/proc/self/fd/%d/upper", disk.fd)); err != nil {
		return err
	}
	top, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer func() { _ = top.Close() }()
	return filepath.WalkDir(dir, func(name string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if name, err = filepath.Rel(dir, name); err != nil {
			return err
		}
		info, err := top.Lstat(name)
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t) //nolint:forcetypeassert // Linux's
		uid, gid := int(st.Uid)-int(uids.base), int(st.Gid)-int(uids.base)
		if uid < 0 || gid < 0 { // the host's: a whiteout
			return nil
		}
		if err := top.Lchown(name, uid, gid); err != nil {
			return err
		}
		if info.Mode()&(fs.ModeSetuid|fs.ModeSetgid) != 0 && info.Mode().IsRegular() { // chown takes them away
			return top.Chmod(name, info.Mode())
		}
		return nil
	})
}
