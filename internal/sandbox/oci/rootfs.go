package oci

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/sandbox"
)

const defaultDisk = 64 << 20

// rootPath is where the root filesystem is found on the stage.
const rootPath = workshop + "/rootfs"

// emptyWorkshop makes rootPath an empty directory, on a stage: runc enters it
// before it enters a container.
func emptyWorkshop() error {
	if err := unix.Mount("fastcontainer", workshop, "tmpfs", unix.MS_NODEV, "mode=0755,size=4k"); err != nil {
		return fmt.Errorf("mount workshop: %w", err)
	}
	if err := os.Mkdir(rootPath, 0o755); err != nil { //nolint:gosec // every user of the container enters it
		return fmt.Errorf("make workshop: %w", err)
	}
	return nil
}

// assembly puts a root filesystem together, on a stage.
type assembly struct {
	spec   *sandbox.Spec
	owner  int
	userns *os.File
	flags  uintptr // of the root filesystem's mount
	fds    []int
}

func (a *assembly) close() {
	for _, fd := range a.fds {
		_ = unix.Close(fd)
	}
}

// mount makes workshop/rootfs and gives the binds for the spec's volumes,
// whose sources are workshop/v0, v1, ... Layers and volumes are opened first:
// they may lie below the directory that the workshop hides.
func (a *assembly) mount(hosts, resolvConf []byte) (root, []specs.Mount, error) {
	layers := make([]int, len(a.spec.Layers))
	for i, dir := range a.spec.Layers {
		fd, err := a.clone(dir, true)
		if err != nil {
			return -1, nil, fmt.Errorf("layer %s: %w", dir, err)
		}
		layers[i] = fd
	}
	volumes := make([]int, len(a.spec.Mounts))
	for i, m := range a.spec.Mounts {
		if _, err := os.Stat(m.Source); err != nil {
			return -1, nil, &fleet.Error{Op: "mount volume", Subject: m.Source, Kind: fleet.ErrInvalid, Err: err, Hint: "make it on the host first"}
		}
		fd, err := a.clone(m.Source, m.Readonly)
		if err != nil {
			return -1, nil, err
		}
		volumes[i] = fd
	}

	size := int64(a.spec.Disk)
	if size <= 0 {
		size = defaultDisk
	}
	options := fmt.Sprintf("mode=0755,size=%d,nr_inodes=%d", size, size/4096+4096)
	if err := unix.Mount("fastcontainer", workshop, "tmpfs", unix.MS_NODEV, options); err != nil {
		return -1, nil, fmt.Errorf("mount writable layer: %w", err)
	}
	if err := unix.Chdir(workshop); err != nil {
		return -1, nil, fmt.Errorf("enter writable layer: %w", err)
	}
	if err := a.furnish(hosts, resolvConf); err != nil {
		return -1, nil, err
	}
	names := make([]string, len(layers))
	for i, fd := range layers {
		names[i] = strconv.FormatInt(int64(i), 36)
		if err := attach(fd, names[i], true); err != nil {
			return -1, nil, err
		}
	}
	overlay := "lowerdir=" + strings.Join(names, ":") + ",upperdir=upper,workdir=work,volatile"
	if len(overlay) >= os.Getpagesize() {
		return -1, nil, &fleet.Error{Op: "mount root filesystem", Kind: fleet.ErrInvalid, Err: errors.New("the image has too many layers"), Hint: "rebuild it with fewer layers"}
	}
	if err := unix.Mount("overlay", "rootfs", "overlay", a.flags, overlay); err != nil {
		return -1, nil, fmt.Errorf("mount overlay: %w", err)
	}
	fd, err := unix.Open("rootfs", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, nil, fmt.Errorf("open root filesystem: %w", err)
	}
	a.fds = append(a.fds, fd)
	binds, err := a.attachVolumes(volumes, root(fd))
	return root(fd), binds, err
}

// furnish lays out what hides the image's own: the places for /proc, /sys and
// /dev, and the daemon's files, so that no symbolic link of an image is
// followed for them.
func (a *assembly) furnish(hosts, resolvConf []byte) error {
	for _, d := range []string{"work", "rootfs", "upper", "upper/proc", "upper/sys", "upper/dev", "upper/etc"} {
		if err := unix.Mkdir(d, 0o755); err != nil {
			return fmt.Errorf("make directory %s: %w", d, err)
		}
		if err := unix.Lchown(d, a.owner, a.owner); err != nil {
			return fmt.Errorf("give %s to the container: %w", d, err)
		}
	}
	files := map[string][]byte{"hosts": hosts, "hostname": []byte(a.spec.Hostname + "\n"), "resolv.conf": resolvConf}
	for name, content := range files {
		if content == nil {
			continue
		}
		name = "upper/etc/" + name
		if err := os.WriteFile(name, content, 0o644); err != nil { //nolint:gosec // every user of the container reads it
			return fmt.Errorf("write /etc/%s: %w", filepath.Base(name), err)
		}
		if err := unix.Lchown(name, a.owner, a.owner); err != nil {
			return fmt.Errorf("write /etc/%s: %w", filepath.Base(name), err)
		}
	}
	return nil
}

func (a *assembly) attachVolumes(volumes []int, r root) ([]specs.Mount, error) {
	var binds []specs.Mount
	for i, m := range a.spec.Mounts {
		var st unix.Stat_t
		if err := unix.Fstat(volumes[i], &st); err != nil {
			return nil, fmt.Errorf("look at volume %s: %w", m.Source, err)
		}
		dir := st.Mode&unix.S_IFMT == unix.S_IFDIR
		name := "v" + strconv.Itoa(i)
		if err := attach(volumes[i], name, dir); err != nil {
			return nil, err
		}
		fd, err := r.place(m.Target, dir, a.owner)
		if err != nil {
			return nil, err
		}
		_ = unix.Close(fd)
		mode := "rw"
		if m.Readonly {
			mode = "ro"
		}
		binds = append(binds, specs.Mount{
			Destination: path.Clean("/" + m.Target), Source: workshop + "/" + name, Type: "bind",
			Options: []string{"bind", "private", "nosuid", "nodev", mode},
		})
	}
	return binds, nil
}

// attach puts a detached mount at a new place of the working directory.
func attach(fd int, name string, dir bool) error {
	var err error
	if dir {
		err = unix.Mkdir(name, 0o755)
	} else {
		err = os.WriteFile(name, nil, 0o600)
	}
	if err == nil {
		err = unix.MoveMount(fd, "", unix.AT_FDCWD, name, unix.MOVE_MOUNT_F_EMPTY_PATH)
	}
	if err != nil {
		return fmt.Errorf("attach mount: %w", err)
	}
	return nil
}

// clone gives a host directory or file as a detached mount, with its ownership
// mapped into the container's user namespace.
func (a *assembly) clone(source string, readonly bool) (int, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("clone mount of %s: %w", source, err)
	}
	a.fds = append(a.fds, fd)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NODEV}
	if readonly {
		attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	if a.userns != nil {
		attr.Attr_set |= unix.MOUNT_ATTR_IDMAP
		attr.Userns_fd = uint64(a.userns.Fd())
	}
	err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr)
	switch {
	case errors.Is(err, unix.EINVAL) && a.userns != nil:
		return -1, &fleet.Error{
			Op: "map ownership", Subject: source, Kind: fleet.ErrInvalid, Err: err,
			Hint: "its filesystem cannot map ownership (ext4, xfs, btrfs and tmpfs can): move it, or set isolation.userns: false",
		}
	case err != nil:
		return -1, fmt.Errorf("set mount attributes of %s: %w", source, err)
	}
	return fd, nil
}
