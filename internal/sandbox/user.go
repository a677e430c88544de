package sandbox

import (
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

// open opens a path inside the root.
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

// readBounded opens a regular file of the root, at most a mebibyte of which is
// read. A file that does not exist reads as empty.
func (r root) readBounded(name string) (io.ReadCloser, error) {
	// A hostile image may put a FIFO there: O_NONBLOCK keeps the open from
	// waiting for a writer.
	f, err := r.open(name, unix.O_RDONLY|unix.O_NONBLOCK)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return io.NopCloser(strings.NewReader("")), nil
	}
	if err != nil {
		return nil, err
	}
	if st, serr := f.Stat(); serr != nil || !st.Mode().IsRegular() {
		_ = f.Close()
		return io.NopCloser(strings.NewReader("")), nil //nolint:nilerr // what is no file has no lines
	}
	return struct {
		io.Reader
		io.Closer
	}{io.LimitReader(f, 1<<20), f}, nil
}

// Identity is who a program runs as.
type Identity struct {
	UID, GID int
	Groups   []int
	Home     string
}

// lookup resolves a user as an image says it: "", name, uid, name:group or
// uid:gid, against /etc/passwd and /etc/group of the root.
func (r root) lookup(who string) (Identity, error) {
	passwd, err := r.readBounded("/etc/passwd")
	if err != nil {
		return Identity{}, err
	}
	defer func() { _ = passwd.Close() }()
	group, err := r.readBounded("/etc/group")
	if err != nil {
		return Identity{}, err
	}
	defer func() { _ = group.Close() }()
	u, err := user.GetExecUser(who, &user.ExecUser{Home: "/"}, passwd, group)
	if err != nil {
		return Identity{}, &fleet.Error{
			Op: "find user", Subject: who, Kind: fleet.ErrInvalid, Err: err,
			Hint: "name a user of the image's /etc/passwd, or give a number as in user: 1000:1000",
		}
	}
	const maxID = 65535
	if u.Uid > maxID || u.Gid > maxID {
		return Identity{}, &fleet.Error{
			Op: "find user", Subject: who, Kind: fleet.ErrInvalid,
			Err:  fmt.Errorf("uid %d, gid %d: a container has the ids 0 to %d", u.Uid, u.Gid, maxID),
			Hint: "choose a smaller number",
		}
	}
	return Identity{UID: u.Uid, GID: u.Gid, Groups: u.Sgids, Home: u.Home}, nil
}

// executable finds the program that args[0] means: itself if it holds a
// slash, else the first hit along PATH.
func (r root) executable(name, dir string, env []string) (string, error) {
	var tried []string
	if strings.Contains(name, "/") {
		if !path.IsAbs(name) {
			name = path.Join("/", dir, name)
		}
		tried = []string{name}
	} else {
		for _, p := range strings.Split(envValue(env, "PATH", defaultPath), ":") {
			if p != "" {
				tried = append(tried, path.Join("/", p, name))
			}
		}
	}
	err := error(unix.ENOENT)
	for _, p := range tried {
		f, oerr := r.open(p, unix.O_PATH)
		if oerr != nil {
			continue
		}
		st, serr := f.Stat()
		_ = f.Close()
		switch {
		case serr != nil || st.IsDir():
			err = unix.EACCES
		case st.Mode()&0o111 == 0:
			err = unix.EACCES
		default:
			return p, nil
		}
	}
	hint := "it must be in the image: look with fastcontainer run IMAGE ls, or set entrypoint/command in the app file"
	if errors.Is(err, unix.EACCES) {
		hint = "make the file executable in the image"
	}
	return "", &fleet.Error{Op: "find program", Subject: name, Kind: fleet.ErrInvalid, Err: err, Hint: hint}
}

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

func envValue(env []string, key, fallback string) string {
	for i := len(env) - 1; i >= 0; i-- {
		if v, ok := strings.CutPrefix(env[i], key+"="); ok {
			return v
		}
	}
	return fallback
}
