package image

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	it "github.com/fastcontainer/fastcontainer/internal/image/imagetest"
)

func hexes(c string) string { return strings.Repeat(c, 64) }

func TestPull_HostileArchives(t *testing.T) {
	t.Parallel()
	layer := it.Tar(t, it.File("f", "x"))
	config := func(diffID string) string {
		return fmt.Sprintf(`{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}`, diffID)
	}
	right := strings.TrimPrefix(string(digestOf(layer)), "sha256:")
	manifest := func(config, layer string) it.Entry {
		return it.File("manifest.json", fmt.Sprintf(`[{"Config":%q,"Layers":[%q]}]`, config, layer))
	}
	for name, c := range map[string]struct {
		entries []it.Entry
		says    string
	}{
		"member outside":     {[]it.Entry{manifest("../../etc/passwd", "l"), it.File(hexes("a")+".json", config(right))}, "not whole"},
		"link outside":       {[]it.Entry{it.Symlink(hexes("a")+".json", "/etc/passwd"), manifest(hexes("a")+".json", hexes("b")+".tar")}, "not whole"},
		"link loop":          {[]it.Entry{it.Symlink(hexes("a")+".json", hexes("a")+".json"), manifest(hexes("a")+".json", hexes("b")+".tar")}, "link to a link"},
		"layer is missing":   {[]it.Entry{it.File(hexes("a")+".json", config(right)), manifest(hexes("a")+".json", hexes("b")+".tar")}, "not whole"},
		"other diff id":      {[]it.Entry{it.File(hexes("a")+".json", config(hexes("0"))), it.File(hexes("b")+".tar", string(layer)), manifest(hexes("a")+".json", hexes("b")+".tar")}, "diff id"},
		"path as diff id":    {[]it.Entry{it.File(hexes("a")+".json", config("../../up")), it.File(hexes("b")+".tar", string(layer)), manifest(hexes("a")+".json", hexes("b")+".tar")}, ""},
		"no JSON":            {[]it.Entry{it.File("manifest.json", "{{{")}, "read manifest.json"},
		"two images":         {[]it.Entry{it.File("manifest.json", `[{"RepoTags":["a:1"]},{"RepoTags":["b:2"]}]`)}, "a:1, b:2"},
		"no image":           {[]it.Entry{it.File("manifest.json", `[]`)}, "0 images"},
		"huge manifest":      {[]it.Entry{it.File("manifest.json", strings.Repeat(" ", maxRecord+1))}, "small document"},
		"device as a member": {[]it.Entry{{Header: tar.Header{Typeflag: tar.TypeChar, Name: "manifest.json", Devmajor: 1, Devminor: 5}}}, "type"},
		"empty":              {nil, "empty"},
		"layout without":     {[]it.Entry{it.File("oci-layout", "{}"), it.File("index.json", `{"manifests":[]}`)}, "none for"},
		"layout bad digest":  {[]it.Entry{it.File("index.json", `{"manifests":[{"digest":"sha512:`+hexes("a")+hexes("a")+`","size":1}]}`)}, "sha"},
		"layout blob lies":   {[]it.Entry{it.File("index.json", `{"manifests":[{"digest":"sha256:`+hexes("a")+`","size":1}]}`), it.File("blobs/sha256/"+hexes("a"), "other")}, "digest of the content"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, pack := range []func([]byte) []byte{func(b []byte) []byte { return b }, func(b []byte) []byte { return gz(t, b) }} {
				file := filepath.Join(t.TempDir(), "a.tar")
				if err := os.WriteFile(file, pack(it.Tar(t, c.entries...)), 0o600); err != nil {
					t.Fatal(err)
				}
				s := openStore(t, t.TempDir(), Options{Platform: "linux/amd64"})
				_, err := s.Pull(t.Context(), "tar:"+file, nil)
				if !errors.Is(err, fleet.ErrInvalid) || !strings.Contains(err.Error(), c.says) {
					t.Errorf("got %v, want %q", err, c.says)
				}
				if n := len(readDir(t, s.path("layers"))) + len(readDir(t, s.path("images"))); n != 0 {
					t.Errorf("%d objects are left", n)
				}
				clean(t, s, 0)
			}
		})
	}
}

func FuzzArchive(f *testing.F) {
	img := it.Image(f, v1.Config{}, it.Layer(f, it.File("f", "x")))
	for _, file := range []string{it.DockerArchive(f, img), it.OCIArchive(f, img)} {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	s := openStore(f, f.TempDir(), Options{MaxSize: 1 << 20, MaxEntries: 100})
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte) {
		file := filepath.Join(dir, "a.tar")
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := s.Pull(t.Context(), "tar:"+file, nil)
		if err != nil && !errors.Is(err, fleet.ErrInvalid) {
			t.Errorf("an error that is not the archive's fault: %v", err)
		}
		if n := len(readDir(t, s.path("tmp"))); n != 0 {
			t.Errorf("%d leftovers", n)
		}
		if _, err := s.GC(t.Context(), nil); err != nil {
			t.Error(err)
		}
	})
}

func FuzzParse(f *testing.F) {
	for _, ref := range []string{"nginx", "docker.io/library/nginx:1", "h:5000/a@sha256:" + hexes("a"), "oci:/a:b", "tar:/x", "dir:/", ":", "dir:", "tar:../x"} {
		f.Add(ref)
	}
	s := openStore(f, f.TempDir(), Options{})
	f.Fuzz(func(t *testing.T, ref string) {
		src, err := s.parse(ref)
		if err != nil {
			if !errors.Is(s.explain("parse", ref, err), fleet.ErrInvalid) {
				t.Errorf("%q: %v", ref, err)
			}
			return
		}
		again, err := s.parse(src.ref())
		if err != nil || again.ref() != src.ref() {
			t.Errorf("%q has the form %q, which is not its own: %v", ref, src.ref(), err)
		}
	})
}

// A directory comes out as it was, with everything a file system can hold.
func TestPull_DirectoryIsCopiedAsItIs(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Chmod(dir, 0o751))
	must(os.MkdirAll(in("home/user"), 0o755))
	must(os.Chown(in("home/user"), 1000, 1001))
	must(os.Chmod(in("home/user"), 0o2770))
	must(os.WriteFile(in("su"), []byte("x"), 0o755))
	must(os.Chmod(in("su"), 0o4755|os.ModeSetuid))
	must(unix.Setxattr(in("su"), "user.note", []byte("note"), 0))
	must(unix.Setxattr(in("su"), "security.capability", []byte("\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0))
	must(os.Link(in("su"), in("home/hard")))
	must(os.Symlink("/etc/../x", in("link")))
	must(unix.Mknod(in("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	must(unix.Mkfifo(in("pipe"), 0o600))
	must(unix.Mknod(in("socket"), unix.S_IFSOCK|0o600, 0))
	hole, err := os.Create(in("sparse"))
	must(err)
	_, err = hole.WriteAt([]byte("end"), 8<<20)
	must(err)
	must(hole.Close())
	s := openStore(t, t.TempDir(), Options{})
	img := mustPull(t, s, "dir:"+dir)
	if len(img.Layers) != 1 {
		t.Fatalf("layers %v", img.Layers)
	}
	out := img.Layers[0]
	must(os.Remove(in("socket"))) // no content; it is left out
	must(os.Chtimes(dir, modTime(t, out), modTime(t, out)))
	if got, want := tree(t, out), tree(t, dir); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	var a, b, sp unix.Stat_t
	must(unix.Lstat(filepath.Join(out, "su"), &a))
	must(unix.Lstat(filepath.Join(out, "home/hard"), &b))
	must(unix.Lstat(filepath.Join(out, "sparse"), &sp))
	if a.Ino != b.Ino || a.Nlink != 2 {
		t.Error("the hard link is a copy")
	}
	if sp.Blocks*512 > 1<<20 {
		t.Errorf("the hole was filled: %d blocks", sp.Blocks)
	}
	buf := make([]byte, 64)
	for _, key := range []string{"user.note", "security.capability"} {
		n, err := unix.Lgetxattr(filepath.Join(out, "su"), key, buf)
		m, werr := unix.Lgetxattr(in("su"), key, bytes.Clone(buf))
		if err != nil || werr != nil || n != m {
			t.Errorf("%s: %d %v, want %d %v", key, n, err, m, werr)
		}
	}
}

func TestPull_LayoutByTag(t *testing.T) {
	t.Parallel()
	one, two := twoLayers(t, "one"), twoLayers(t, "two")
	dir := it.Layout(t, one, two)
	data, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err != nil {
		t.Fatal(err)
	}
	text := string(data)
	for img, tag := range map[v1.Image]string{one: "v1", two: "v2"} {
		d := `"digest": "` + it.Digest(t, img) + `"`
		text = strings.Replace(text, d, d+`, "annotations": {"`+refName+`": "`+tag+`"}`, 1)
	}
	if err := os.WriteFile(filepath.Join(dir, "index.json"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	s := openStore(t, t.TempDir(), Options{})
	if img := mustPull(t, s, "oci:"+dir+":v2"); string(img.Digest) != it.Digest(t, two) {
		t.Errorf("v2 is %s", img.Digest)
	}
	if _, err := s.Pull(t.Context(), "oci:"+dir+":v3", nil); !errors.Is(err, fleet.ErrNotFound) || !strings.Contains(fleet.Hint(err), "v1") {
		t.Errorf("v3: %v (%s)", err, fleet.Hint(err))
	}
}
