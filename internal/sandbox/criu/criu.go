// Package criu orders CRIU (https://criu.org) about, which writes processes
// into files and makes processes from them. What surrounds those processes is
// the caller's: it starts CRIU where it wants it (Program) and hands it one
// order over a socket (Order), as CRIU's RPC protocol has it.
package criu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// Program is CRIU as this host has it.
type Program struct {
	// Path of the executable in the namespace Mounts.
	Path string
	// Version, as "4.2.1".
	Version string
	// Mounts is the mount namespace to start it in. It differs from the host's
	// in one thing: /run is a memory filesystem, the only place that CRIU accepts for
	// what it finds out about the kernel, which would take 35 ms each time. It has
	// found that out already, and who runs CRIU without privileges can read it.
	Mounts *os.File
}

// Env is what CRIU and the programs that it calls need of an environment. It does
// not speak TLS here, whose library would test itself whenever it is loaded.
var Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C", "XDG_RUNTIME_DIR=/run", "GNUTLS_NO_IMPLICIT_INIT=1"}

// Args make CRIU take one order from the socket that is descriptor fd.
func (p *Program) Args(fd int) []string {
	return []string{"criu", "--no-default-config", "swrk", strconv.Itoa(fd)}
}

// Close lets go of the namespace.
func (p *Program) Close() error { return p.Mounts.Close() }

// nobody is a user without rights.
const nobody = 65534

var versionLine = regexp.MustCompile(`(?m)^Version: (\d+)\.(\d+)(\.\d+)*`)

// Open looks for CRIU by a name or a path. ErrUnavailable, with a hint: it is
// missing, or too old for today's kernels.
func Open(ctx context.Context, path string) (*Program, error) {
	if path == "" {
		path = "criu"
	}
	unusable := func(err error) error {
		return &fleet.Error{Op: "use CRIU", Subject: path, Kind: fleet.ErrUnavailable, Err: err, Hint: "install CRIU 4.2 or newer, or set checkpoint.criu to where it is"}
	}
	found, err := exec.LookPath(path)
	if err != nil {
		return nil, unusable(err)
	}
	if found, err = filepath.Abs(found); err != nil {
		return nil, unusable(err)
	}
	// It restores with the rights of a container, so anybody must be able to run it.
	cmd := exec.CommandContext(ctx, found, "--version") //nolint:gosec // the operator's choice
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	cmd.Env, cmd.Dir = Env, "/"
	out, err := cmd.Output()
	if err != nil {
		return nil, unusable(err)
	}
	m := versionLine.FindStringSubmatch(string(out))
	if m == nil {
		return nil, unusable(errors.New("it does not tell its version"))
	}
	p := &Program{Path: found, Version: m[0][len("Version: "):]}
	major, _ := strconv.Atoi(m[1])
	minor, _ := strconv.Atoi(m[2])
	if major < 4 || major == 4 && minor < 2 {
		return nil, unusable(fmt.Errorf("version %s is too old", p.Version))
	}
	if p.Mounts, err = newMounts(ctx, found); err != nil {
		return nil, unusable(err)
	}
	return p, nil
}

// newMounts makes the mount namespace, and lets CRIU look at the kernel there.
func newMounts(ctx context.Context, path string) (ns *os.File, err error) {
	var wg sync.WaitGroup
	wg.Go(func() {
		ns, err = onThread(func() (*os.File, error) { return makeMounts(ctx, path) })
	})
	wg.Wait()
	return ns, err
}

// onThread calls f on a thread that ends afterwards, so that nothing of what f does
// to it is left. The process's first thread does not end, and is passed over.
func onThread(f func() (*os.File, error)) (out *os.File, err error) {
	runtime.LockOSThread()
	if unix.Gettid() != unix.Getpid() {
		return f()
	}
	defer runtime.UnlockOSThread()
	var wg sync.WaitGroup
	wg.Go(func() { out, err = onThread(f) })
	wg.Wait()
	return out, err
}

func makeMounts(ctx context.Context, path string) (*os.File, error) {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return nil, fmt.Errorf("unshare mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return nil, fmt.Errorf("detach mounts: %w", err)
	}
	if err := unix.Mount("criu", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=755,size=4m"); err != nil {
		return nil, fmt.Errorf("mount /run: %w", err)
	}
	// A child of this thread is where it is.
	cmd := exec.CommandContext(ctx, path, "--no-default-config", "check") //nolint:gosec // the operator's choice
	cmd.Env = Env
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("criu check: %w%s", err, because(string(out)))
	}
	if err := os.Chmod("/run/criu.kdat", 0o644); err != nil { //nolint:gosec // nothing in it is secret
		return nil, fmt.Errorf("look at the kernel: %w", err)
	}
	return os.Open("/proc/thread-self/ns/mnt")
}
