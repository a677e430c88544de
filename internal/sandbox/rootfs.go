package sandbox

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

const defaultDisk = 64 << 20

// writable is the memory filesystem of one sandbox, as a detached mount. It
// holds the writable layer of its root filesystem, in which the daemon's own
// files (hosts, resolv.conf) and the places for /proc, /sys and /dev are laid out
// beforehand, so that no symbolic link of an image is ever followed for them.
// It dies with the last process that sees it: nothing is left on the host's
// disk at any moment.
type writable struct {
	fd    int
	owner int
	size  int64 // that it may hold; 0: next to nothing
}

func newWritable(owner int, resolvConf []byte) (_ *writable, err error) {
	fd, err := newMount("tmpfs", unix.MOUNT_ATTR_NODEV, [][2]string{{"source", "fastcontainer"}, {"size", "1m"}, {"mode", "0755"}})
	if err != nil {
		return nil, fmt.Errorf("mount writable layer: %w", err)
	}
	w := &writable{fd: fd, owner: owner}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	if err := unix.Mkdirat(fd, "work", 0o700); err != nil {
		return nil, fmt.Errorf("make work directory: %w", err)
	}
	for _, d := range []string{"upper", "upper/proc", "upper/sys", "upper/dev", "upper/etc"} {
		if err := unix.Mkdirat(fd, d, 0o755); err != nil {
			return nil, fmt.Errorf("make directory %s: %w", d, err)
		}
		if err := unix.Fchownat(fd, d, owner, owner, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return nil, fmt.Errorf("give %s to the container: %w", d, err)
		}
	}
	if resolvConf != nil {
		if err := w.write("etc/resolv.conf", resolvConf); err != nil {
			return nil, err
		}
	}
	return w, nil
}

// resize sets how much it may hold, in bytes.
func (w *writable) resize(size int64) error {
	if size <= 0 {
		size = defaultDisk
	}
	if size == w.size {
		return nil
	}
	fs, err := unix.Fspick(w.fd, "", unix.FSPICK_EMPTY_PATH|unix.FSPICK_CLOEXEC)
	if err != nil {
		return fmt.Errorf("size writable layer: %w", err)
	}
	defer func() { _ = unix.Close(fs) }()
	for _, p := range [][2]string{{"size", strconv.FormatInt(size, 10)}, {"nr_inodes", strconv.FormatInt(size/4096+4096, 10)}} {
		if err := unix.FsconfigSetString(fs, p[0], p[1]); err != nil {
			return fmt.Errorf("size writable layer: %w", withMessages(fs, err))
		}
	}
	if err := unix.FsconfigReconfigure(fs); err != nil {
		return fmt.Errorf("size writable layer: %w", withMessages(fs, err))
	}
	w.size = size
	return nil
}

// write makes a file that every user of the container can read.
func (w *writable) write(name string, content []byte) error {
	fd, err := unix.Openat(w.fd, "upper/"+name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return fmt.Errorf("write /%s: %w", name, err)
	}
	defer func() { _ = unix.Close(fd) }()
	if _, err := unix.Write(fd, content); err != nil {
		return fmt.Errorf("write /%s: %w", name, err)
	}
	return unix.Fchown(fd, w.owner, w.owner)
}

// place copies a file of the host there, for a user of the container.
func (w *writable) place(name, source string, uid, gid int, mode uint32) error {
	in, err := os.Open(source) //nolint:gosec // ours
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	fd, err := unix.Openat(w.fd, "upper/"+name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("write /%s: %w", name, err)
	}
	out := os.NewFile(uintptr(fd), name)
	_, err = io.Copy(out, in)
	return errors.Join(err, unix.Fchown(fd, w.owner+uid, w.owner+gid), unix.Fchmod(fd, mode), out.Close())
}

func (w *writable) close() { _ = unix.Close(w.fd) }

// mountRoot makes the root filesystem of a container and gives it as a
// detached mount: an overlay of its layers below the writable one.
func (n *Native) mountRoot(spec *Spec, p *prepared) (root, error) {
	layers := make([]int, 0, len(spec.Layers))
	defer func() { p.garbage = append(p.garbage, layers...) }()
	for _, dir := range spec.Layers {
		fd, err := cloneMount(dir, p, true)
		if err != nil {
			return -1, fmt.Errorf("layer %s: %w", dir, err)
		}
		layers = append(layers, fd)
	}
	if len(layers) == 0 {
		return -1, &fleet.Error{Op: "mount root filesystem", Kind: fleet.ErrInvalid, Err: errors.New("the image has no layers")}
	}
	if err := p.disk.resize(int64(spec.Disk)); err != nil {
		return -1, err
	}
	hosts := "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
	if p.link.Address.IsValid() && spec.Hostname != "" {
		hosts += p.link.Address.String() + "\t" + spec.Hostname + "\n"
	}
	if err := errors.Join(p.disk.write("etc/hosts", []byte(hosts)), p.disk.write("etc/hostname", []byte(spec.Hostname+"\n"))); err != nil {
		return -1, err
	}
	if n.overlayByFD {
		fd, err := overlayOf(p.disk, layers, spec.ReadonlyRoot)
		return root(fd), err
	}
	fd := -1
	err := n.workshop.do(func(thread int) (err error) {
		if err := layOut("/slot"+strconv.Itoa(thread), p.disk, layers); err != nil {
			return err
		}
		fd, err = mountOverlay(len(layers), spec.ReadonlyRoot)
		return err
	}, func(thread int) {
		// The overlay holds what it needs; the rest goes once the caller has gone on.
		_ = unix.Chdir("/")
		_ = unix.Unmount("/slot"+strconv.Itoa(thread), unix.MNT_DETACH)
	})
	return root(fd), err
}

// overlayOf makes the overlay from descriptors (since Linux 6.13, and for
// detached mounts since 6.15): nothing has to be attached anywhere.
func overlayOf(disk *writable, layers []int, readonly bool) (_ int, err error) {
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("mount overlay: %w", err)
	}
	defer func() { _ = unix.Close(fs) }()
	set := func(key string, fd int) {
		if err == nil {
			err = unix.FsconfigSetFd(fs, key, fd)
		}
	}
	part := func(key, name string) {
		fd, oerr := unix.Openat(disk.fd, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if oerr != nil {
			err = errors.Join(err, oerr)
			return
		}
		set(key, fd)
		_ = unix.Close(fd)
	}
	if readonly {
		part("lowerdir+", "upper")
	}
	for _, fd := range layers {
		set("lowerdir+", fd)
	}
	attr := unix.MOUNT_ATTR_NODEV
	if readonly {
		attr |= unix.MOUNT_ATTR_RDONLY
	} else {
		part("upperdir", "upper")
		part("workdir", "work")
		if err == nil {
			err = unix.FsconfigSetFlag(fs, "volatile")
		}
	}
	if err == nil {
		err = unix.FsconfigCreate(fs)
	}
	if err != nil {
		return -1, fmt.Errorf("mount overlay: %w", withMessages(fs, err))
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, attr)
	if err != nil {
		return -1, fmt.Errorf("mount overlay: %w", err)
	}
	return fd, nil
}

// canOverlayByFD asks the kernel.
func canOverlayByFD() bool {
	disk, err := newWritable(0, nil)
	if err != nil {
		return false
	}
	defer disk.close()
	layer, err := newWritable(0, nil)
	if err != nil {
		return false
	}
	defer layer.close()
	fd, err := overlayOf(disk, []int{layer.fd}, false)
	if err != nil {
		return false
	}
	_ = unix.Close(fd)
	return true
}

// layOut attaches the memory filesystem on slot, changes into it and attaches
// the image's layers there as 0, 1, ..., for mountOverlay.
func layOut(slot string, disk *writable, layers []int) error {
	if err := unix.MoveMount(disk.fd, "", unix.AT_FDCWD, slot, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount writable layer: %w", err)
	}
	if err := unix.Chdir(slot); err != nil {
		return fmt.Errorf("enter writable layer: %w", err)
	}
	for i, fd := range layers {
		name := layerName(i)
		if err := unix.Mkdir(name, 0o700); err != nil {
			return fmt.Errorf("make directory: %w", err)
		}
		if err := unix.MoveMount(fd, "", unix.AT_FDCWD, name, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return fmt.Errorf("attach layer: %w", err)
		}
	}
	return nil
}

// layerName is short because the kernel bounds the list of all names to 255
// bytes in one parameter.
func layerName(i int) string { return strconv.FormatInt(int64(i), 36) }

// mountOverlay makes the overlay from what layOut left in the working directory.
func mountOverlay(layers int, readonly bool) (int, error) {
	names := make([]string, 0, layers+1)
	if readonly {
		names = append(names, "upper")
	}
	for i := range layers {
		names = append(names, layerName(i))
	}
	lower := strings.Join(names, ":")
	if len(lower) > 255 {
		return mountLongOverlay(lower, readonly)
	}
	params := [][2]string{{"source", "overlay"}, {"lowerdir", lower}}
	attr := unix.MOUNT_ATTR_NODEV
	if readonly {
		attr |= unix.MOUNT_ATTR_RDONLY
	} else {
		params = append(params, [2]string{"upperdir", "upper"}, [2]string{"workdir", "work"}, [2]string{"volatile", ""})
	}
	fd, err := newMount("overlay", attr, params)
	if err != nil {
		return -1, fmt.Errorf("mount overlay: %w", err)
	}
	return fd, nil
}

// mountLongOverlay is for images of very many layers: mount(2) takes a page
// of options.
func mountLongOverlay(lower string, readonly bool) (int, error) {
	options := "lowerdir=" + lower
	flags := uintptr(unix.MS_NODEV)
	if readonly {
		flags |= unix.MS_RDONLY
	} else {
		options += ",upperdir=upper,workdir=work,volatile"
	}
	if len(options) >= os.Getpagesize() {
		return -1, &fleet.Error{Op: "mount root filesystem", Kind: fleet.ErrInvalid, Err: errors.New("the image has too many layers"), Hint: "rebuild it with fewer layers"}
	}
	if err := unix.Mkdir("all", 0o700); err != nil {
		return -1, fmt.Errorf("make directory: %w", err)
	}
	if err := unix.Mount("overlay", "all", "overlay", flags, options); err != nil {
		return -1, fmt.Errorf("mount overlay: %w", err)
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, "all", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("clone overlay: %w", err)
	}
	return fd, nil
}

// newMount makes a detached mount. A parameter without a value is a flag.
func newMount(fstype string, attr int, params [][2]string) (int, error) {
	fs, err := unix.Fsopen(fstype, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, err
	}
	defer func() { _ = unix.Close(fs) }()
	for _, p := range params {
		if p[1] == "" {
			err = unix.FsconfigSetFlag(fs, p[0])
		} else {
			err = unix.FsconfigSetString(fs, p[0], p[1])
		}
		if err != nil {
			return -1, fmt.Errorf("option %s: %w", p[0], withMessages(fs, err))
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, withMessages(fs, err)
	}
	return unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, attr)
}

// withMessages adds what the kernel says about a mount that it refused.
func withMessages(fs int, err error) error {
	var buf [1024]byte
	n, rerr := unix.Read(fs, buf[:])
	if rerr != nil || n <= 0 {
		return err
	}
	return fmt.Errorf("%w (%s)", err, strings.TrimSpace(string(buf[:n])))
}

// cloneMount gives a host directory or file as a detached mount, with its
// ownership mapped into the container's user namespace.
func cloneMount(source string, p *prepared, readonly bool) (int, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("clone mount: %w", err)
	}
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NODEV}
	if readonly {
		attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	if p.userns != nil {
		attr.Attr_set |= unix.MOUNT_ATTR_IDMAP
		attr.Userns_fd = uint64(p.userns.Fd())
	}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		_ = unix.Close(fd)
		if errors.Is(err, unix.EINVAL) && p.userns != nil {
			return -1, &fleet.Error{
				Op: "map ownership", Subject: source, Kind: fleet.ErrInvalid, Err: err,
				Hint: "its filesystem cannot map ownership (ext4, xfs, btrfs and tmpfs can): move it, or set isolation.userns: false",
			}
		}
		return -1, fmt.Errorf("set mount attributes: %w", err)
	}
	return fd, nil
}

// place makes the target of a mount, and the directories on the way, inside
// the root, and gives it as a descriptor. What is made belongs to the
// container's root.
func (r root) place(target string, dir bool, owner int) (int, error) {
	at, err := r.open("/", unix.O_PATH)
	if err != nil {
		return -1, err
	}
	parts := strings.Split(strings.Trim(path.Clean("/"+target), "/"), "/")
	for i := range parts {
		name := "/" + strings.Join(parts[:i+1], "/")
		next, err := r.open(name, unix.O_PATH)
		if errors.Is(err, os.ErrNotExist) {
			if err = makeAt(int(at.Fd()), parts[i], dir || i < len(parts)-1, owner); err == nil {
				next, err = r.open(name, unix.O_PATH)
			}
		}
		_ = at.Close()
		if err != nil {
			return -1, fmt.Errorf("make mount point %s: %w", target, err)
		}
		at = next
	}
	fd, err := unix.FcntlInt(at.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	_ = at.Close()
	return fd, err
}

func makeAt(parent int, name string, dir bool, owner int) error {
	if dir {
		if err := unix.Mkdirat(parent, name, 0o755); err != nil {
			return err
		}
	} else {
		fd, err := unix.Openat(parent, name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
		if err != nil {
			return err
		}
		_ = unix.Close(fd)
	}
	return unix.Fchownat(parent, name, owner, owner, unix.AT_SYMLINK_NOFOLLOW)
}

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}
