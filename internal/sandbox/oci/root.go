package oci

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/moby/sys/user"
	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// root is a root filesystem that is not trusted: every path in it is resolved
// as if it were "/" already, so that no symbolic link leads out of it.
type root int

func (r root) open(name string, flags int) (*os.File, error) {
	how := unix.OpenHow{
		Flags:   uint64(flags | unix.O_CLOEXEC), //nolint:gosec // open flags
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	for try := 1; ; try++ {
		fd, err := unix.Openat2(int(r), "."+path.Clean("/"+name), &how)
		switch {
		case err == nil:
			return os.NewFile(uintptr(fd), name), nil
		case try < 100 && (errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR)):
			continue // a rename or a mount elsewhere on the host disturbed the walk
		default:
			return nil, &os.PathError{Op: "open", Path: name, Err: err}
		}
	}
}

// read gives at most a mebibyte of a regular file; anything else is empty.
func (r root) read(name string) (string, error) {
	// A hostile image may put a FIFO there: O_NONBLOCK keeps the open from
	// waiting for a writer.
	f, err := r.open(name, unix.O_RDONLY|unix.O_NONBLOCK)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer func() { _ = f.Close() }()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return "", nil
	}
	b, err := io.ReadAll(io.LimitReader(f, 1<<20))
	return string(b), err
}

// lookup resolves a user as an image says it: "", name, uid, name:group or
// uid:gid, against /etc/passwd and /etc/group of the root.
func (r root) lookup(who string) (*user.ExecUser, error) {
	passwd, err := r.read("/etc/passwd")
	if err != nil {
		return nil, err
	}
	group, err := r.read("/etc/group")
	if err != nil {
		return nil, err
	}
	invalid := func(err error, hint string) error {
		return &fleet.Error{Op: "find user", Subject: who, Kind: fleet.ErrInvalid, Err: err, Hint: hint}
	}
	u, err := user.GetExecUser(who, &user.ExecUser{Home: "/"}, strings.NewReader(passwd), strings.NewReader(group))
	if err != nil {
		return nil, invalid(err, "name a user of the image's /etc/passwd, or give a number as in user: 1000:1000")
	}
	if u.Uid >= idsPerContainer || u.Gid >= idsPerContainer {
		return nil, invalid(fmt.Errorf("uid %d, gid %d: a container has the ids 0 to %d", u.Uid, u.Gid, idsPerContainer-1), "choose a smaller number")
	}
	return u, nil
}

// pathOf is the value of PATH in an environment.
func pathOf(env []string) (value string, ok bool) {
	for _, e := range env {
		if v, found := strings.CutPrefix(e, "PATH="); found {
			value, ok = v, true
		}
	}
	return value, ok
}

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// executable finds the program that args[0] means: itself if it holds a
// slash, else the first hit along PATH.
func (r root) executable(name, dir string, env []string) (string, error) {
	tried := []string{name}
	switch {
	case !strings.Contains(name, "/"):
		search, ok := pathOf(env)
		if !ok {
			search = defaultPath
		}
		tried = nil
		for _, p := range strings.Split(search, ":") {
			if p != "" {
				tried = append(tried, path.Join("/", p, name))
			}
		}
	case !path.IsAbs(name):
		tried = []string{path.Join("/", dir, name)}
	}
	err := error(unix.ENOENT)
	for _, p := range tried {
		f, oerr := r.open(p, unix.O_PATH)
		if oerr != nil {
			continue
		}
		st, serr := f.Stat()
		_ = f.Close()
		if serr == nil && !st.IsDir() && st.Mode()&0o111 != 0 {
			return p, r.runnable(p)
		}
		err = unix.EACCES
	}
	hint := "it must be in the image: look with fastcontainer run IMAGE ls, or set entrypoint/command in the app file"
	if errors.Is(err, unix.EACCES) {
		hint = "make the file executable in the image"
	}
	return "", &fleet.Error{Op: "find program", Subject: name, Kind: fleet.ErrInvalid, Err: err, Hint: hint}
}

// runnable tells whether the kernel can execute a program. Runtimes find out
// too late to tell: they have answered by then.
func (r root) runnable(name string) error {
	f, err := r.open(name, unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	invalid := func(err error, hint string) error {
		return &fleet.Error{Op: "execute", Subject: name, Kind: fleet.ErrInvalid, Err: err, Hint: hint}
	}
	head := make([]byte, 256)
	n, _ := io.ReadFull(f, head)
	head = head[:n]
	interpreter := ""
	if script, ok := bytes.CutPrefix(head, []byte("#!")); ok {
		line, _, _ := bytes.Cut(script, []byte{'\n'})
		if words := bytes.Fields(line); len(words) > 0 {
			interpreter = string(words[0])
		}
	} else {
		program, err := elf.NewFile(f)
		if err != nil {
			return invalid(unix.ENOEXEC, "it is neither a program for this machine's architecture nor a script that begins with #!")
		}
		for _, p := range program.Progs {
			if p.Type == elf.PT_INTERP && p.Filesz <= 4096 {
				b, _ := io.ReadAll(p.Open())
				interpreter = string(bytes.TrimRight(b, "\x00"))
			}
		}
	}
	if interpreter == "" {
		return nil
	}
	i, err := r.open(interpreter, unix.O_PATH)
	if err != nil {
		return invalid(err, "the program exists, but its interpreter (the #! line, or the dynamic loader) does not: is it made for this image's libc?")
	}
	return i.Close()
}

// place makes a file or directory, and the directories on the way, and gives
// it as a descriptor. What is made belongs to the container's root.
func (r root) place(target string, dir bool, owner int) (int, error) {
	at, err := r.open("/", unix.O_PATH)
	if err != nil {
		return -1, err
	}
	defer func() { _ = at.Close() }()
	parts := strings.Split(strings.Trim(path.Clean("/"+target), "/"), "/")
	for i := range parts {
		name := "/" + strings.Join(parts[:i+1], "/")
		next, err := r.open(name, unix.O_PATH)
		if errors.Is(err, os.ErrNotExist) {
			if err = makeAt(int(at.Fd()), parts[i], dir || i < len(parts)-1, owner); err == nil {
				next, err = r.open(name, unix.O_PATH)
			}
		}
		if err != nil {
			return -1, fmt.Errorf("make mount point %s: %w", target, err)
		}
		_ = at.Close()
		at = next
	}
	return unix.FcntlInt(at.Fd(), unix.F_DUPFD_CLOEXEC, 0)
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
