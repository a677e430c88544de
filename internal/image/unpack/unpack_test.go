package unpack_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	it "github.com/fastcontainer/fastcontainer/internal/image/imagetest"
	"github.com/fastcontainer/fastcontainer/internal/image/unpack"
)

// layerDir is an empty directory beside a file that no layer may touch.
func layerDir(t testing.TB) (dir string, untouched func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("unpacking needs root: run the tests as root")
	}
	top := t.TempDir()
	dir = filepath.Join(top, "a", "b", "layer")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(top, "secret"), []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir, func() {
		t.Helper()
		var names []string
		_ = filepath.WalkDir(top, func(p string, e fs.DirEntry, err error) error {
			if p == dir {
				return fs.SkipDir
			}
			names = append(names, strings.TrimPrefix(p, top))
			return err
		})
		data, err := os.ReadFile(filepath.Join(top, "secret"))
		var st unix.Stat_t
		serr := unix.Stat(filepath.Join(top, "secret"), &st)
		if err != nil || serr != nil || string(data) != "secret" || st.Nlink != 1 || st.Mode != unix.S_IFREG|0o600 || len(names) != 4 {
			t.Errorf("the layer reached out of its directory: %q %v %v %o %v", data, err, names, st.Mode, serr)
		}
	}
}

func budget() *unpack.Budget { return unpack.NewBudget(8<<20, 10_000) }

func untar(t testing.TB, dir string, entries ...it.Entry) (unpack.Result, error) {
	t.Helper()
	return unpack.Tar(t.Context(), bytes.NewReader(it.Tar(t, entries...)), dir, budget())
}

func xattr(e it.Entry, kv ...string) it.Entry {
	e.PAXRecords = map[string]string{}
	e.Format = tar.FormatPAX
	for i := 0; i < len(kv); i += 2 {
		e.PAXRecords["SCHILY.xattr."+kv[i]] = kv[i+1]
	}
	return e
}

func TestTar_HostileLayersAreRefused(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("n", 256)
	for name, entries := range map[string][]it.Entry{
		"file above":                   {it.File("../secret", "owned")},
		"file far above":               {it.File("../../../../../../../../../../tmp/owned", "owned")},
		"hidden dots":                  {it.File("a/../../../secret", "owned")},
		"absolute with dots":           {it.File("/../../secret", "owned")},
		"through absolute link":        {it.Symlink("link", "/etc"), it.File("link/owned-by-test", "owned")},
		"through relative link":        {it.Symlink("link", "../../.."), it.File("link/secret", "owned")},
		"through link to link":         {it.Symlink("a", "b"), it.Symlink("b", "../.."), it.File("a/x/secret", "owned")},
		"through link into proc":       {it.Symlink("p", "/proc/self/root"), it.File("p/tmp/owned", "owned")},
		"through itself":               {it.Symlink("loop", "loop"), it.File("loop/x", "owned")},
		"mkdir through link":           {it.Symlink("link", "../.."), it.Dir("link/made/", 0o755)},
		"symlink through link":         {it.Symlink("link", ".."), it.Symlink("link/made", "x")},
		"whiteout through link":        {it.Symlink("link", "../../.."), it.Whiteout("link/secret")},
		"opaque through link":          {it.Symlink("link", "../../.."), it.Opaque("link")},
		"whiteout above":               {it.File("../.wh.secret", "")},
		"whiteout of dot":              {it.File("d/.wh..", "")},
		"whiteout of dotdot":           {it.File("d/.wh...", "")},
		"whiteout of nothing":          {it.File("d/.wh.", "")},
		"hard link above":              {it.Link("mine", "../../../secret")},
		"hard link absolute":           {it.Link("mine", "/etc/passwd")},
		"hard link through link":       {it.Symlink("l", "../../.."), it.Link("mine", "l/secret")},
		"hard link to directory":       {it.Dir("d", 0o755), it.Link("mine", "d")},
		"hard link to root":            {it.Link("mine", ".")},
		"hard link to itself":          {it.File("f", ""), it.Link("f", "f")},
		"hard link to lower layer":     {it.Link("mine", "bin/sh")},
		"hard link before target":      {it.Link("mine", "f"), it.File("f", "")},
		"hard link to whiteout":        {it.Whiteout("f"), it.Link("mine", "f")},
		"name too long":                {it.File(long, "")},
		"path too long":                {it.File(strings.Repeat("d/", 2100)+"f", "")},
		"link target too long":         {it.Symlink("l", strings.Repeat("x", 5000))},
		"file as directory":            {it.File("f", ""), it.File("f/g", "")},
		"root as file":                 {it.File(".", "")},
		"root as link":                 {it.Symlink(".", "/etc")},
		"huge xattr":                   {xattr(it.File("f", ""), "user.big", strings.Repeat("v", 65<<10))},
		"many xattrs":                  {xattr(it.File("f", ""), manyXattrs()...)},
		"bad capability":               {xattr(it.File("f", ""), "security.capability", "junk")},
		"default acl on file":          {xattr(it.File("f", ""), "system.posix_acl_default", "junk")},
		"owner too large":              {owner(it.File("f", ""), 1<<32, 0)},
		"owner of nobody":              {owner(it.File("f", ""), 0, 1<<32-1)},
		"negative owner":               {owner(it.File("f", ""), -5, 0)},
		"device that cannot be":        {device("d", 1<<20, 1)},
		"unknown type":                 {{Header: tar.Header{Typeflag: 'Z', Name: "f"}}},
		"file larger than the budget":  {it.File("f", strings.Repeat("x", 9<<20))},
		"files larger than the budget": {it.File("f", strings.Repeat("x", 5<<20)), it.File("g", strings.Repeat("x", 5<<20))},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, untouched := layerDir(t)
			_, err := untar(t, dir, entries...)
			if !errors.Is(err, unpack.ErrRefused) {
				t.Errorf("not refused: %v", err)
			}
			untouched()
			for _, p := range []string{"/etc/owned-by-test", "/tmp/owned"} {
				if _, err := os.Lstat(p); err == nil {
					t.Errorf("%s was made", p)
				}
			}
		})
	}
}

func manyXattrs() (kv []string) {
	for i := range 30 {
		kv = append(kv, fmt.Sprintf("user.k%d", i), strings.Repeat("v", 10<<10))
	}
	return kv
}

func owner(e it.Entry, uid, gid int) it.Entry {
	e.Uid, e.Gid, e.Format = uid, gid, tar.FormatGNU
	return e
}

func device(name string, major, minor int64) it.Entry {
	return it.Entry{Header: tar.Header{Typeflag: tar.TypeChar, Name: name, Devmajor: major, Devminor: minor, Mode: 0o620}}
}

func TestTar_MillionEntries(t *testing.T) {
	t.Parallel()
	dir, untouched := layerDir(t)
	r, w := io.Pipe()
	defer r.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		tw := tar.NewWriter(w)
		for i := range 1_000_000 {
			if tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("f%d", i%3), Mode: 0o644}) != nil {
				return // the reader had enough
			}
		}
	}()
	_, err := unpack.Tar(t.Context(), r, dir, budget())
	if !errors.Is(err, unpack.ErrTooLarge) || !strings.Contains(err.Error(), "10000 entries") {
		t.Errorf("not refused: %v", err)
	}
	_ = r.Close()
	<-done
	untouched()
}

func TestTar_SparseBombCostsNothing(t *testing.T) {
	t.Parallel()
	// A GNU sparse header that claims 1 PiB and holds nothing.
	var block [512]byte
	copy(block[:], "bomb")
	copy(block[100:], "0000644\x00")
	copy(block[108:], "0000000\x000000000\x00")
	copy(block[124:], "00000000000\x0000000000000\x00")
	block[156] = 'S'
	copy(block[257:], "ustar  \x00")
	// Real size, base-256.
	block[483] = 0x80
	block[483+12-7] = 0x04
	copy(block[148:], "        ")
	sum := 0
	for _, b := range block {
		sum += int(b)
	}
	copy(block[148:], fmt.Sprintf("%06o\x00 ", sum))
	dir, untouched := layerDir(t)
	start := time.Now()
	_, err := unpack.Tar(t.Context(), bytes.NewReader(append(block[:], make([]byte, 1024)...)), dir, budget())
	if !errors.Is(err, unpack.ErrRefused) {
		t.Errorf("not refused: %v", err)
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("took %v", took)
	}
	untouched()
}

func TestBudget_BoundsTheStream(t *testing.T) {
	t.Parallel()
	b := unpack.NewBudget(1<<20, 10)
	n, err := io.Copy(io.Discard, b.Reader(zeroReader{}))
	if !errors.Is(err, unpack.ErrTooLarge) || n > 70<<20 {
		t.Errorf("read %d bytes: %v", n, err)
	}
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestTar_Damaged(t *testing.T) {
	t.Parallel()
	good := it.Tar(t, it.File("f", strings.Repeat("x", 10_000)))
	for name, data := range map[string][]byte{
		"cut in content": good[:5000], "cut in header": good[:300], "noise": bytes.Repeat([]byte("noise"), 1000),
	} {
		dir, _ := layerDir(t)
		if _, err := unpack.Tar(t.Context(), bytes.NewReader(data), dir, budget()); !errors.Is(err, unpack.ErrRefused) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestTar_Canceled(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	dir, _ := layerDir(t)
	_, err := unpack.Tar(ctx, bytes.NewReader(it.Tar(t, it.File("f", ""))), dir, budget())
	if !errors.Is(err, context.Canceled) || errors.Is(err, unpack.ErrRefused) {
		t.Error(err)
	}
}

func stat(t testing.TB, dir, name string) unix.Stat_t {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(dir, name), &st); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return st
}

func getXattr(dir, name, key string) string {
	buf := make([]byte, 1024)
	n, err := unix.Lgetxattr(filepath.Join(dir, name), key, buf)
	if err != nil {
		return "none: " + err.Error()
	}
	return string(buf[:n])
}

func TestTar_WhatComesOut(t *testing.T) {
	t.Parallel()
	dir, _ := layerDir(t)
	when := time.Unix(1_234_567_890, 123_456_789)
	at := func(e it.Entry, uid, gid int) it.Entry {
		e.Uid, e.Gid, e.ModTime, e.Format = uid, gid, when, tar.FormatPAX
		return e
	}
	setuid := at(it.Program("bin/su", "x"), 0, 7)
	setuid.Mode = 0o6755
	capability := "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" // cap_net_bind_service+ep
	sparse := strings.Repeat("\x00", 1<<20) + "middle" + strings.Repeat("\x00", 3<<20)
	res, err := untar(t, dir,
		at(it.Dir("./", 0o751), 1, 2),
		at(it.Dir("home/", 0o2770), 1000, 100),
		at(it.File("home/f", "content"), 1000, 100),
		at(it.Symlink("home/link", "/absolute/../target"), 1000, 100),
		it.Link("home/hard", "home/f"),
		it.Link("home/hardlink", "home/link"),
		setuid,
		xattr(it.Program("bin/ping", "x"), "security.capability", capability, "user.note", "n\x00ul",
			"trusted.overlay.opaque", "y", "user.overlay.origin", "x", "security.selinux", "label"),
		it.File("sparse", sparse),
		device("dev/null", 1, 3),
		it.Entry{Header: tar.Header{Typeflag: tar.TypeBlock, Name: "dev/sda", Devmajor: 8, Devminor: 300, Mode: 0o600}},
		it.Entry{Header: tar.Header{Typeflag: tar.TypeFifo, Name: "pipe", Mode: 0o622}},
		it.File("/abs/from/root", "rooted"),
		it.Symlink("lib", "usr/lib"), it.Dir("usr/lib/", 0o755), it.File("lib/in.so", "followed inside"),
		it.File("twice", "first"), it.File("twice", "second"),
		it.File("now-dir", ""), it.Dir("now-dir", 0o700), it.File("now-dir/x", ""),
		it.Dir("now-file", 0o700), it.File("now-file/x", ""), it.File("now-file", "file"),
		it.Entry{Header: tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "c"}}},
	)
	if err != nil {
		t.Fatal(err)
	}
	if st := stat(t, dir, "."); st.Mode&0o7777 != 0o751 || st.Uid != 1 || st.Gid != 2 || st.Mtim.Nano() != when.UnixNano() {
		t.Errorf("root: %+v", st)
	}
	if st := stat(t, dir, "home"); st.Mode&0o7777 != 0o2770 || st.Uid != 1000 || st.Gid != 100 || st.Mtim.Nano() != when.UnixNano() {
		t.Errorf("home: %+v", st)
	}
	f, hard := stat(t, dir, "home/f"), stat(t, dir, "home/hard")
	if f.Ino != hard.Ino || f.Nlink != 2 || f.Mode&0o7777 != 0o644 || f.Uid != 1000 || f.Mtim.Nano() != when.UnixNano() {
		t.Errorf("hard link: %+v %+v", f, hard)
	}
	if a, b := stat(t, dir, "home/link"), stat(t, dir, "home/hardlink"); a.Ino != b.Ino || a.Mode&unix.S_IFMT != unix.S_IFLNK || a.Mtim.Nano() != when.UnixNano() {
		t.Errorf("hard link to a symbolic one: %+v %+v", a, b)
	}
	if target, _ := os.Readlink(filepath.Join(dir, "home/link")); target != "/absolute/../target" {
		t.Errorf("link target %q", target)
	}
	if st := stat(t, dir, "bin/su"); st.Mode&0o7777 != 0o6755 || st.Gid != 7 {
		t.Errorf("setuid: %o", st.Mode)
	}
	if got := getXattr(dir, "bin/ping", "security.capability"); got != capability {
		t.Errorf("capability %q", got)
	}
	if got := getXattr(dir, "bin/ping", "user.note"); got != "n\x00ul" {
		t.Errorf("user attribute %q", got)
	}
	for _, key := range []string{"trusted.overlay.opaque", "user.overlay.origin", "security.selinux"} {
		if got := getXattr(dir, "bin/ping", key); !strings.HasPrefix(got, "none") {
			t.Errorf("%s came through: %q", key, got)
		}
	}
	if st := stat(t, dir, "sparse"); st.Size != int64(len(sparse)) || st.Blocks*512 > 64<<10 {
		t.Errorf("sparse: %d bytes in %d blocks", st.Size, st.Blocks)
	}
	if data, _ := os.ReadFile(filepath.Join(dir, "sparse")); string(data) != sparse {
		t.Error("sparse file has other content")
	}
	if st := stat(t, dir, "dev/null"); st.Mode != unix.S_IFCHR|0o620 || st.Rdev != unix.Mkdev(1, 3) {
		t.Errorf("device: %o %d", st.Mode, st.Rdev)
	}
	if st := stat(t, dir, "dev/sda"); st.Mode != unix.S_IFBLK|0o600 || st.Rdev != unix.Mkdev(8, 300) {
		t.Errorf("block device: %o %d", st.Mode, st.Rdev)
	}
	if st := stat(t, dir, "pipe"); st.Mode != unix.S_IFIFO|0o622 {
		t.Errorf("fifo: %o", st.Mode)
	}
	for name, want := range map[string]string{"abs/from/root": "rooted", "usr/lib/in.so": "followed inside", "twice": "second", "now-file": "file", "now-dir/x": ""} {
		if data, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(data) != want {
			t.Errorf("%s: %q %v", name, data, err)
		}
	}
	if want := "abs abs/from bin dev usr"; strings.Join(res.Implicit, " ") != want {
		t.Errorf("implicit %q, want %q", res.Implicit, want)
	}
}

// Per OCI a whiteout says nothing about its own layer, in whatever order.
func TestTar_Whiteouts(t *testing.T) {
	t.Parallel()
	dir, _ := layerDir(t)
	_, err := untar(t, dir,
		it.Whiteout("gone"), it.Whiteout("d/gone"),
		it.Whiteout("file"), it.File("file", "new"),
		it.File("file2", "new"), it.Whiteout("file2"),
		it.Whiteout("dir"), it.Dir("dir/", 0o755), it.File("dir/x", ""),
		it.Whiteout("imp"), it.File("imp/x", ""),
		it.Dir("dir2/", 0o755), it.Whiteout("dir2"),
		it.Dir("opq/", 0o755), it.Opaque("opq"), it.File("opq/x", ""),
		it.Opaque("opq-implicit"),
		it.Whiteout("twice"), it.Whiteout("twice"),
		it.File(".wh..wh.plnk/x", "bookkeeping"), it.File(".wh..wh.aufs", "bookkeeping"),
	)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"gone", "d/gone", "twice"} {
		if st := stat(t, dir, name); st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != 0 {
			t.Errorf("%s is no whiteout: %o", name, st.Mode)
		}
	}
	for _, name := range []string{"file", "file2", "dir/x", "imp/x", "opq/x"} {
		if st := stat(t, dir, name); st.Mode&unix.S_IFMT != unix.S_IFREG {
			t.Errorf("%s is no file: %o", name, st.Mode)
		}
	}
	for _, name := range []string{"dir", "dir2", "imp", "opq", "opq-implicit"} {
		if got := getXattr(dir, name, unpack.OpaqueXattr); got != "y" {
			t.Errorf("%s is not opaque: %s", name, got)
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 10 {
		t.Errorf("%d entries: %v", len(entries), entries)
	}
}

func FuzzTar(f *testing.F) {
	f.Add(it.Tar(f, it.File("a/b", "x"), it.Symlink("l", "../.."), it.File("l/x", "y"), it.Link("m", "a/b"), it.Whiteout("a/b"), it.Opaque("a")))
	f.Add(it.Tar(f, xattr(it.Dir("d/", 0o2755), "user.a", "b"), device("d/n", 1, 3), it.File("../x", "")))
	f.Fuzz(func(t *testing.T, data []byte) {
		dir, untouched := layerDir(t)
		_, err := unpack.Tar(t.Context(), bytes.NewReader(data), dir, unpack.NewBudget(1<<20, 100))
		untouched()
		if err != nil && !errors.Is(err, unpack.ErrRefused) {
			t.Errorf("an error that is not the layer's fault: %v", err)
		}
	})
}
