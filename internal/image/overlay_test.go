package image

import (
	"archive/tar"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	it "github.com/fastcontainer/fastcontainer/internal/image/imagetest"
)

// inMountNamespace runs the calling test again in a process with a mount
// namespace of its own, and says whether this is that process. What it mounts
// is gone with it, however it ends.
func inMountNamespace(t *testing.T) bool {
	t.Helper()
	const mark = "IMAGE_TEST_MOUNT_NAMESPACE"
	if os.Getenv(mark) == t.Name() {
		return true
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=60s")
	cmd.Env = append(os.Environ(), mark+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("in a mount namespace: %v\n%s", err, out)
	}
	return false
}

// overlay mounts the layers of an image as the sandbox does.
func overlay(t *testing.T, img Image) string {
	t.Helper()
	dir, rw := t.TempDir(), filepath.Join(t.TempDir(), "rw")
	upper, work := filepath.Join(rw, "upper"), filepath.Join(rw, "work")
	if err := os.Mkdir(rw, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", rw, "tmpfs", 0, ""); err != nil {
		t.Fatalf("mount tmpfs: %v (the tests need root)", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(rw, unix.MNT_DETACH) })
	for _, d := range []string{upper, work} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	opts := "lowerdir=" + strings.Join(img.Layers, ":") + ",upperdir=" + upper + ",workdir=" + work
	if err := unix.Mount("overlay", dir, "overlay", 0, opts); err != nil {
		t.Fatalf("mount overlay: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// tree is one line per file below dir.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		what := ""
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			what = string(data)
		case unix.S_IFLNK:
			what, _ = os.Readlink(p)
			what = "-> " + what
		case unix.S_IFDIR:
			what = "/"
		case unix.S_IFCHR:
			what = fmt.Sprintf("c %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
		fmt.Fprintf(&b, "%s %04o %d:%d %s\n", rel, st.Mode&0o7777, st.Uid, st.Gid, what)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func owned(e it.Entry, uid, gid int) it.Entry {
	e.Uid, e.Gid = uid, gid
	return e
}

// What a stack of layers means, seen through a real overlay mount.
func TestLayers_ThroughOverlay(t *testing.T) {
	if !inMountNamespace(t) {
		return
	}
	a := it.Layer(t, it.Dir("./", 0o755),
		it.Dir("tmp/", 0o1777), owned(it.Dir("home/", 0o700), 1000, 1000), owned(it.File("home/old", "old"), 1000, 1000),
		it.Dir("gone/", 0o755), it.File("gone/x", "x"), it.File("file", "a"), it.File("removed", "a"),
		it.Dir("opaque/", 0o755), it.File("opaque/a", "a"),
		it.Dir("again/", 0o755), it.File("again/a", "a"),
		it.Dir("kind/", 0o755), it.File("kind/a", "a"),
		it.Dir("dev/", 0o755), it.Entry{Header: tar.Header{Typeflag: tar.TypeChar, Name: "dev/zero", Devmajor: 1, Devminor: 5, Mode: 0o600}},
		it.Symlink("sh", "bin/sh"))
	b := it.Layer(t,
		it.Whiteout("gone"), it.Whiteout("removed"), it.File("file", "b"),
		it.Dir("opaque/", 0o750), it.Opaque("opaque"), it.File("opaque/b", "b"),
		it.Whiteout("again"), it.Dir("again/", 0o711), it.File("again/b", "b"),
		it.File("kind", "now a file"),
		it.File("tmp/f", "in tmp"), owned(it.File("home/new", "new"), 1000, 1000)) // neither tmp nor home has an entry
	c := it.Layer(t, it.File("removed", "back"), it.Whiteout("opaque/b"))
	reg := it.StartRegistry(t)
	s := openStore(t, t.TempDir(), Options{})
	img := mustPull(t, s, it.Push(t, reg.Host, "stack", it.Image(t, v1.Config{}, a, b, c, b)))
	dir := overlay(t, img)
	want := `. 0755 0:0 /
again 0711 0:0 /
again/b 0644 0:0 b
dev 0755 0:0 /
dev/zero 0600 0:0 c 1:5
file 0644 0:0 b
home 0700 1000:1000 /
home/new 0644 1000:1000 new
home/old 0644 1000:1000 old
kind 0644 0:0 now a file
opaque 0750 0:0 /
opaque/b 0644 0:0 b
sh 0777 0:0 -> bin/sh
tmp 1777 0:0 /
tmp/f 0644 0:0 in tmp
`
	if got := tree(t, dir); got != want {
		t.Errorf("the stack shows\n%swant\n%s", got, want)
	}
	// Layers a, b, c and the one that mends tmp and home; b is there once.
	if len(img.Layers) != 4 {
		t.Errorf("%d layers: %v", len(img.Layers), img.Layers)
	}
	// Writing goes to the upper layer only.
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("changed"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := read(t, img, "file"); got != "b" {
		t.Errorf("the layer was written: %q", got)
	}
}
