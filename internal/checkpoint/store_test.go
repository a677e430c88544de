package checkpoint

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

func key(n int) string {
	sum := sha256.Sum256(fmt.Append(nil, n))
	return hex.EncodeToString(sum[:])
}

const plenty = 1 << 30

func open(t testing.TB, dir string, budget fleet.Bytes) *Store {
	t.Helper()
	s, err := Open(Config{Dir: dir, Budget: budget, Logger: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// ramdisk is a directory of so much memory, and of its own.
func ramdisk(t testing.TB, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// files is a fill: names, also of directories that are missing, and contents.
type files map[string]string

func (f files) fill(dir string) error {
	for name, content := range f {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}

var twoFiles = files{"images/pages-1.img": "pages", "images/core-1.img": "core", "saved.json": "{}"}

func mustMake(t testing.TB, s *Store, app fleet.AppName, key string, f files) {
	t.Helper()
	if err := s.Make(t.Context(), app, key, f.fill); err != nil {
		t.Fatal(err)
	}
}

func mustFind(t testing.TB, s *Store, app fleet.AppName, key string) *Checkpoint {
	t.Helper()
	c, err := s.Find(app, key)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// finds says what Find says, and lets go at once.
func finds(s *Store, app fleet.AppName, key string) error {
	c, err := s.Find(app, key)
	if err == nil {
		c.Release()
	}
	return err
}

func entries(t testing.TB, s *Store, dir string) []string {
	t.Helper()
	var names []string
	list, err := os.ReadDir(s.path(dir))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names
}

// clean fails unless the disk has so many checkpoints and nothing unfinished.
func clean(t testing.TB, s *Store, kept int) {
	t.Helper()
	for dir, want := range map[string]int{"kept": kept, "tmp": 0, "trash": 0} {
		if got := entries(t, s, dir); len(got) != want {
			t.Errorf("%s has %q, want %d", dir, got, want)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.making) != 0 || s.reserved != 0 || len(s.all) != kept {
		t.Errorf("%d are made, %d reserved, %d known", len(s.making), s.reserved, len(s.all))
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestMake_ThenFind(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new", "checkpoints")
	began := time.Now()
	s := open(t, dir, plenty)
	mustMake(t, s, "blog", key(1), twoFiles)
	mustMake(t, s, "blog", key(1), nil) // there is one: nothing is filled
	for range 2 {
		for range 2 { // verified, then looked at
			c := mustFind(t, s, "blog", key(1))
			for name, want := range twoFiles {
				if got, err := os.ReadFile(filepath.Join(c.Dir(), name)); err != nil || string(got) != want {
					t.Errorf("%s has %q, %v", name, got, err)
				}
			}
			if c.Size() != 4*block || c.Created().Before(began.Add(-time.Second)) || c.Created().After(time.Now()) {
				t.Errorf("size %d, created %s", c.Size(), c.Created())
			}
			c.Release()
			c.Release() // does nothing
		}
		list := s.List("blog")
		if len(list) != 1 || list[0].Key != key(1) || list[0].Size != 4*block || list[0].Refused != "" || list[0].Used.Before(began.Add(-time.Second)) {
			t.Errorf("list %+v", list)
		}
		clean(t, s, 1)
		s = open(t, dir, plenty)
	}
	for name, err := range map[string]error{
		"another key": finds(s, "blog", key(2)), "another app": finds(s, "shop", key(1)),
		"no app": finds(s, "", key(1)), "no key": finds(s, "blog", ""),
	} {
		if !errors.Is(err, ErrNone) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if list := s.List("shop"); len(list) != 0 {
		t.Errorf("list of another app: %+v", list)
	}
}

// zoo fills a directory with one of each kind that a container can leave.
func zoo(dir string) error {
	if err := (files{"files/a": "1", "files/x\xff&%": "2", "files/setuid": "3", "files/closed/secret": "4", "files/empty": ""}).fill(dir); err != nil {
		return err
	}
	in := func(name string) string { return filepath.Join(dir, "files", name) }
	long := in(strings.Repeat("d", 200) + "/" + strings.Repeat("e", 200))
	return errors.Join(
		unix.Mknod(in("socket"), unix.S_IFSOCK|0o600, 0), os.MkdirAll(long, 0o700), os.Symlink("/etc/passwd", in("link")), os.Symlink("..", in("up")), os.Symlink("nowhere", in("broken")),
		unix.Mkfifo(in("fifo"), 0o666), unix.Mknod(in("whiteout"), unix.S_IFCHR, 0), unix.Mknod(in("disk"), unix.S_IFBLK|0o600, int(unix.Mkdev(240, 77))),
		os.Link(in("a"), in("hard")), os.Lchown(in("link"), 5, 6), os.Chown(in("setuid"), 1000, 1000), os.Chmod(in("setuid"), 0o755|os.ModeSetuid),
		os.Chmod(in("closed"), 0), os.Chown(in("closed"), 99, 99), os.Chtimes(in("a"), time.Unix(1, 0), time.Unix(-5, 7)))
}

func TestMake_TakesAnythingAndFollowsNothing(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, plenty)
	if err := s.Make(t.Context(), "blog", key(1), zoo); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		for range 2 {
			if err := finds(s, "blog", key(1)); err != nil {
				t.Error(err)
			}
		}
		s = open(t, dir, plenty)
	}
	c := mustFind(t, s, "blog", key(1))
	info, err := os.Lstat(filepath.Join(c.Dir(), "files/setuid"))
	if err != nil || info.Mode() != 0o755|os.ModeSetuid || info.Sys().(*syscall.Stat_t).Uid != 1000 {
		t.Errorf("%v, %v", info, err)
	}
	c.Release()
	if err := s.Delete("blog"); err != nil {
		t.Error(err)
	}
	clean(t, s, 0)
}

func TestMake_ErrorLeavesNothing(t *testing.T) {
	failed := errors.New("CRIU failed")
	ctx := t.Context()
	for name, c := range map[string]struct {
		fill func(dir string) error
		want error
		hint string
	}{
		"fill fails":        {func(dir string) error { return errors.Join(zoo(dir), failed) }, failed, ""},
		"larger than all":   {files{"a": strings.Repeat("x", 1<<20+1)}.fill, fleet.ErrOverloaded, "checkpoint.budget"},
		"many empty files":  {func(dir string) error { return many(dir, 300) }, fleet.ErrOverloaded, "checkpoint.budget"},
		"sparse":            {func(dir string) error { return sparse(dir, 1<<40) }, fleet.ErrOverloaded, "checkpoint.budget"},
		"its directory":     {os.Remove, fs.ErrNotExist, ""},
		"a link instead":    {func(dir string) error { return errors.Join(os.Remove(dir), os.Symlink("/etc", dir)) }, unix.ENOTDIR, ""},
		"names that grow":   {deep, fleet.ErrInvalid, ""},
		"a file as content": {func(dir string) error { return errors.Join(os.Remove(dir), os.WriteFile(dir, nil, 0o600)) }, unix.ENOTDIR, ""},
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t, ramdisk(t, "16m"), 1<<20)
			err := s.Make(ctx, "blog", key(1), c.fill)
			if !errors.Is(err, c.want) || !strings.Contains(fleet.Hint(err), c.hint) {
				t.Errorf("%v, hint %q", err, fleet.Hint(err))
			}
			clean(t, s, 0)
			if err := finds(s, "blog", key(1)); !errors.Is(err, ErrNone) {
				t.Errorf("then: %v", err)
			}
		})
	}
}

func many(dir string, n int) error {
	for i := range n {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), nil, 0o600); err != nil {
			return err
		}
	}
	return nil
}

func sparse(dir string, size int64) error {
	path := filepath.Join(dir, "sparse")
	return errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size))
}

// deep makes directories that cannot be reached by one name.
func deep(dir string) error { return nest(dir, 20, 0) }

// nest makes so many directories within one another, and in the last one files.
func nest(dir string, depth, files int) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	name := strings.Repeat("d", 255)
	for range depth {
		next := -1
		if err = unix.Mkdirat(fd, name, 0o700); err == nil {
			next, err = unix.Openat(fd, name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
		}
		_ = unix.Close(fd)
		if err != nil {
			return err
		}
		fd = next
	}
	for i := range files {
		err = errors.Join(err, unix.Mknodat(fd, fmt.Sprint(i), unix.S_IFREG|0o600, 0))
	}
	return errors.Join(err, unix.Close(fd))
}

func TestMake_BoundsNames(t *testing.T) {
	s := open(t, ramdisk(t, "64m"), plenty)
	for files, want := range map[int]error{4000: nil, 4500: fleet.ErrInvalid} {
		err := s.Make(t.Context(), "blog", key(files), func(dir string) error { return nest(dir, 15, files) })
		if !errors.Is(err, want) {
			t.Errorf("%d files: %v", files, err)
		}
	}
	if err := finds(s, "blog", key(4000)); err != nil {
		t.Error(err)
	}
	clean(t, s, 1)
}

func TestMake_PanicLeavesNothing(t *testing.T) {
	s := open(t, t.TempDir(), plenty)
	func() {
		defer func() { _ = recover() }()
		_ = s.Make(t.Context(), "blog", key(1), func(dir string) error { panic(zoo(dir)) })
	}()
	clean(t, s, 0)
	mustMake(t, s, "blog", key(1), twoFiles)
}

func TestMake_Cancelled(t *testing.T) {
	s := open(t, t.TempDir(), plenty)
	gone := errors.New("daemon stops")
	ctx, cancel := causes(t)
	err := s.Make(ctx, "blog", key(1), func(dir string) error { cancel(gone); return twoFiles.fill(dir) })
	if !errors.Is(err, gone) {
		t.Error(err)
	}
	if err := s.Make(ctx, "blog", key(1), func(string) error { t.Error("was filled"); return nil }); !errors.Is(err, gone) {
		t.Error(err)
	}
	clean(t, s, 0)
}

func TestMake_FullDiskLeavesNothing(t *testing.T) {
	dir := ramdisk(t, "1m")
	s := open(t, dir, plenty)
	mustMake(t, s, "blog", key(1), twoFiles)
	ballast := func(dir string) error {
		f, err := os.Create(filepath.Join(dir, "ballast"))
		if err != nil {
			return err
		}
		defer f.Close()
		for err == nil {
			_, err = f.Write(make([]byte, block))
		}
		return err
	}
	for name, fill := range map[string]func(dir string) error{
		"while it is filled":      ballast,
		"before the manifest":     func(dir string) error { _ = ballast(dir); return nil },
		"before there is a place": nil,
	} {
		if fill == nil {
			if err := ballast(dir); !errors.Is(err, unix.ENOSPC) {
				t.Fatal(err)
			}
			fill = twoFiles.fill
		}
		if err := s.Make(t.Context(), "blog", key(2), fill); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("%s: %v", name, err)
		}
		clean(t, s, 1)
		_ = os.Remove(filepath.Join(dir, "ballast"))
	}
	if err := finds(s, "blog", key(1)); err != nil {
		t.Errorf("the one before: %v", err)
	}
	mustMake(t, s, "blog", key(2), twoFiles)
}

func TestMake_TwoAtOnce(t *testing.T) {
	s := open(t, t.TempDir(), plenty)
	mustMake(t, s, "shop", key(1), twoFiles)
	err := s.Make(t.Context(), "blog", key(1), func(dir string) error {
		// Nothing is locked meanwhile.
		if err := s.Make(t.Context(), "blog", key(1), twoFiles.fill); !errors.Is(err, ErrBusy) {
			t.Errorf("the same once more: %v", err)
		}
		mustMake(t, s, "blog", key(2), twoFiles)
		if err := errors.Join(finds(s, "shop", key(1)), finds(s, "blog", key(2)), s.Delete("shop"), s.Refuse("other", key(1), "no")); err != nil {
			t.Error(err)
		}
		if err := finds(s, "blog", key(1)); !errors.Is(err, ErrNone) {
			t.Errorf("half made: %v", err)
		}
		if n, err := s.Keep(func(fleet.AppName, string) bool { return false }); n != 1 || err != nil {
			t.Errorf("removed %d, %v", n, err)
		}
		return twoFiles.fill(dir)
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := finds(s, "blog", key(1)); err != nil {
		t.Error(err)
	}
	clean(t, s, 1)
}

func TestMake_StoppedMeanwhile(t *testing.T) {
	for name, c := range map[string]struct {
		stop func(s *Store) error
		want error
		then error
	}{
		"deleted":        {func(s *Store) error { return s.Delete("blog") }, fleet.ErrConflict, ErrNone},
		"refused":        {func(s *Store) error { return s.Refuse("blog", key(1), "it hung") }, ErrRefused, ErrRefused},
		"another's fate": {func(s *Store) error { return errors.Join(s.Delete("shop"), s.Refuse("blog", key(2), "no")) }, nil, nil},
	} {
		s := open(t, t.TempDir(), plenty)
		err := s.Make(t.Context(), "blog", key(1), func(dir string) error { return errors.Join(twoFiles.fill(dir), c.stop(s)) })
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
		if err := finds(s, "blog", key(1)); !errors.Is(err, c.then) {
			t.Errorf("%s, then: %v", name, err)
		}
		kept := 0
		if c.want == nil {
			kept = 1
		}
		clean(t, s, kept)
	}
}

func TestDelete_WaitsForWhatIsAsGoodAsMade(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := open(t, t.TempDir(), plenty)
		mustMake(t, s, "blog", key(1), twoFiles)
		n := id{"blog", key(1)}
		m := &making{placing: true, done: make(chan struct{})} // the last moment of a Make
		s.making[n] = m
		deleted := make(chan error, 1)
		go func() { deleted <- s.Delete("blog") }()
		synctest.Wait()
		select {
		case err := <-deleted:
			t.Errorf("did not wait: %v", err)
		default:
		}
		s.finish(n, m)
		if err := <-deleted; err != nil {
			t.Error(err)
		}
		clean(t, s, 0)
	})
}

func TestMake_RefusesNames(t *testing.T) {
	s := open(t, t.TempDir(), plenty)
	for _, n := range []id{{"", key(1)}, {"..", key(1)}, {"a/b", key(1)}, {"a.b", key(1)}, {"blog", ""}, {"blog", "../" + key(1)[3:]}, {"blog", strings.ToUpper(key(1))}} {
		err := s.Make(t.Context(), n.app, n.key, func(string) error { t.Error("was filled"); return nil })
		if !errors.Is(err, fleet.ErrInvalid) {
			t.Errorf("make %q: %v", n, err)
		}
		if err := s.Refuse(n.app, n.key, "no"); !errors.Is(err, fleet.ErrInvalid) {
			t.Errorf("refuse %q: %v", n, err)
		}
	}
	clean(t, s, 0)
}

// flip changes one bit of a file and nothing else.
func flip(t *testing.T, path string) {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/2] ^= 1
	if err := errors.Join(os.WriteFile(path, data, 0o600), os.Chtimes(path, time.Time{}, info.ModTime())); err != nil {
		t.Fatal(err)
	}
}

func TestFind_FindsDamage(t *testing.T) {
	const pages = "images/pages-1.img"
	for name, c := range map[string]struct {
		damage func(t *testing.T, dir string) error
		first  bool // only a reading finds it
		says   string
	}{
		"a flipped bit": {func(t *testing.T, dir string) error { flip(t, filepath.Join(dir, pages)); return nil }, true, "content of"},
		"a short file":  {func(_ *testing.T, dir string) error { return os.Truncate(filepath.Join(dir, pages), 3) }, false, "is 3, not 5"},
		"a long file": {func(_ *testing.T, dir string) error {
			return os.Truncate(filepath.Join(dir, pages), 9)
		}, false, "is 9, not 5"},
		"a huge file":    {func(_ *testing.T, dir string) error { return os.Truncate(filepath.Join(dir, pages), 1<<40) }, false, ""},
		"a missing file": {func(_ *testing.T, dir string) error { return os.Remove(filepath.Join(dir, pages)) }, false, pages},
		"a file written to": {func(_ *testing.T, dir string) error {
			path := filepath.Join(dir, pages) // the clock of files is coarse
			return errors.Join(os.WriteFile(path, []byte("pages"), 0o600), os.Chtimes(path, time.Time{}, time.Now().Add(time.Second)))
		}, false, "written to"},
		"a file added": {func(_ *testing.T, dir string) error {
			return os.WriteFile(filepath.Join(dir, "images/more"), nil, 0o600)
		}, true, ""},
		"a link added": {func(_ *testing.T, dir string) error { return os.Symlink("/", filepath.Join(dir, "more")) }, true, ""},
		"a link for a file": {func(_ *testing.T, dir string) error {
			return errors.Join(os.Rename(filepath.Join(dir, pages), filepath.Join(dir, "other")), os.Symlink("../other", filepath.Join(dir, pages)))
		}, false, pages},
		"a link for a directory": {func(_ *testing.T, dir string) error {
			return errors.Join(os.Rename(filepath.Join(dir, "images"), filepath.Join(dir, "other")), os.Symlink("other", filepath.Join(dir, "images")))
		}, false, "images"},
		"a fifo for a file": {func(_ *testing.T, dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, pages)), unix.Mkfifo(filepath.Join(dir, pages), 0o600))
		}, false, pages},
		"no content": {func(_ *testing.T, dir string) error { return os.RemoveAll(dir) }, false, ""},
		"a link for the content": {func(_ *testing.T, dir string) error {
			return errors.Join(os.Rename(dir, dir+"2"), os.Symlink("content2", dir))
		}, false, ""},
	} {
		for _, warm := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, warm %t", name, warm), func(t *testing.T) {
				dir := t.TempDir()
				s := open(t, dir, plenty)
				mustMake(t, s, "blog", key(1), twoFiles)
				content := filepath.Join(s.path("kept", entries(t, s, "kept")[0]), "content")
				if warm {
					if err := finds(s, "blog", key(1)); err != nil {
						t.Fatal(err)
					}
				}
				if err := c.damage(t, content); err != nil {
					t.Fatal(err)
				}
				if warm && c.first {
					if err := finds(s, "blog", key(1)); err != nil {
						t.Errorf("found by a look: %v", err)
					}
					s = open(t, dir, plenty)
				}
				err := finds(s, "blog", key(1))
				if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), c.says) || fleet.Hint(err) == "" {
					t.Errorf("%v, hint %q", err, fleet.Hint(err))
				}
				clean(t, s, 0)
				if err := finds(s, "blog", key(1)); !errors.Is(err, ErrNone) {
					t.Errorf("then: %v", err)
				}
				mustMake(t, s, "blog", key(1), twoFiles)
				if err := finds(s, "blog", key(1)); err != nil {
					t.Errorf("made again: %v", err)
				}
			})
		}
	}
}

func TestFind_DamagedWhileHeld(t *testing.T) {
	s := open(t, t.TempDir(), plenty)
	mustMake(t, s, "blog", key(1), twoFiles)
	c := mustFind(t, s, "blog", key(1))
	if err := os.Truncate(filepath.Join(c.Dir(), "saved.json"), 0); err != nil {
		t.Fatal(err)
	}
	if err := finds(s, "blog", key(1)); !errors.Is(err, ErrDamaged) {
		t.Error(err)
	}
	if _, err := os.Stat(c.Dir()); err != nil {
		t.Error("it went while it was held")
	}
	// A new one can stand beside it.
	mustMake(t, s, "blog", key(1), twoFiles)
	next := mustFind(t, s, "blog", key(1))
	if next.Dir() == c.Dir() {
		t.Error("the new one is the old one")
	}
	clean(t, s, 2)
	c.Release()
	clean(t, s, 1)
	next.Release()
	clean(t, s, 1)
}

func TestFind_ManyAtOnceReadOnceAndAgree(t *testing.T) {
	for _, damaged := range []bool{false, true} {
		dir := t.TempDir()
		s := open(t, dir, plenty)
		mustMake(t, s, "blog", key(1), twoFiles)
		if damaged {
			flip(t, filepath.Join(s.path("kept", entries(t, s, "kept")[0]), "content/saved.json"))
		}
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				err := finds(s, "blog", key(1))
				if damaged && !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNone) || !damaged && err != nil {
					t.Errorf("damaged %t: %v", damaged, err)
				}
			})
		}
		wg.Wait()
		clean(t, s, map[bool]int{true: 0, false: 1}[damaged])
	}
}

func TestFind_OthersDoNotWait(t *testing.T) {
	s := open(t, t.TempDir(), plenty)
	mustMake(t, s, "blog", key(1), twoFiles)
	mustMake(t, s, "shop", key(1), twoFiles)
	slow := s.kept[id{"blog", key(1)}]
	slow.check.Lock() // as while it is read
	found := make(chan error, 1)
	go func() { found <- finds(s, "blog", key(1)) }()
	if err := errors.Join(finds(s, "shop", key(1)), s.Delete("shop")); err != nil {
		t.Error(err)
	}
	s.List("blog")
	select {
	case err := <-found:
		t.Errorf("was found unverified: %v", err)
	default:
	}
	slow.check.Unlock()
	if err := <-found; err != nil {
		t.Error(err)
	}
}

func TestFind_DeletedDuringVerification(t *testing.T) {
	s := open(t, t.TempDir(), plenty)
	mustMake(t, s, "blog", key(1), twoFiles)
	slow := s.kept[id{"blog", key(1)}]
	slow.check.Lock()
	found := make(chan error, 1)
	go func() { found <- finds(s, "blog", key(1)) }()
	for held := false; !held; {
		s.mu.Lock()
		held = slow.holds > 0
		s.mu.Unlock()
	}
	if err := s.Refuse("blog", key(1), "it hung"); err != nil {
		t.Error(err)
	}
	slow.check.Unlock()
	if err := <-found; !errors.Is(err, ErrRefused) {
		t.Error(err)
	}
	clean(t, s, 0)
}

func TestFind_LackOfDescriptorsIsNoDamage(t *testing.T) {
	s := open(t, t.TempDir(), plenty)
	mustMake(t, s, "blog", key(1), twoFiles)
	var usual unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &usual); err != nil {
		t.Fatal(err)
	}
	for _, warm := range []bool{false, true} {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 0, Max: usual.Max}); err != nil {
			t.Fatal(err)
		}
		err := finds(s, "blog", key(1))
		if rerr := unix.Setrlimit(unix.RLIMIT_NOFILE, &usual); rerr != nil {
			t.Fatal(rerr)
		}
		if !errors.Is(err, unix.EMFILE) || errors.Is(err, ErrDamaged) {
			t.Errorf("warm %t: %v", warm, err)
		}
		if err := finds(s, "blog", key(1)); err != nil {
			t.Errorf("warm %t, then: %v", warm, err)
		}
	}
}

// each is a checkpoint that takes three blocks: a directory and two files.
var each = files{"images/a": "a", "images/b": "b"}

const eachSize = 3 * block

func keys(list []Info) []string {
	var keys []string
	for _, i := range list {
		keys = append(keys, i.Key)
	}
	slices.Sort(keys)
	return keys
}

func wantKept(t *testing.T, s *Store, app fleet.AppName, want ...int) {
	t.Helper()
	var names []string
	for _, n := range want {
		names = append(names, key(n))
	}
	slices.Sort(names)
	if got := keys(s.List(app)); !slices.Equal(got, names) {
		t.Errorf("kept %v, want %v", got, names)
	}
	clean(t, s, len(want))
}

func TestBudget_LeastRecentlyUsedGoesFirst(t *testing.T) {
	dir := ramdisk(t, "16m")
	s := open(t, dir, 3*eachSize)
	for n := 1; n <= 3; n++ {
		mustMake(t, s, "blog", key(n), each)
	}
	wantKept(t, s, "blog", 1, 2, 3)
	if err := finds(s, "blog", key(1)); err != nil {
		t.Fatal(err)
	}
	mustMake(t, s, "blog", key(4), each)
	wantKept(t, s, "blog", 1, 3, 4)
	mustMake(t, s, "blog", key(5), files{"a": "", "b": "", "c": "", "d": ""}) // two have to go for it
	wantKept(t, s, "blog", 4, 5)

	// It is the same after a restart, as of a minute ago.
	for base, used := range map[int]time.Duration{4: -time.Hour, 5: -2 * time.Hour} {
		path := filepath.Join(s.kept[id{"blog", key(base)}].dir, manifestFile)
		if err := os.Chtimes(path, time.Time{}, time.Now().Add(used)); err != nil {
			t.Fatal(err)
		}
	}
	s = open(t, dir, 3*eachSize)
	if err := finds(s, "blog", key(5)); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir, 3*eachSize)
	mustMake(t, s, "blog", key(6), each)
	wantKept(t, s, "blog", 5, 6)
}

func TestBudget_HeldOnesStay(t *testing.T) {
	s := open(t, ramdisk(t, "16m"), 2*eachSize)
	mustMake(t, s, "blog", key(1), each)
	mustMake(t, s, "blog", key(2), each)
	one := mustFind(t, s, "blog", key(1))
	mustMake(t, s, "blog", key(3), each)
	wantKept(t, s, "blog", 1, 3)
	three := mustFind(t, s, "blog", key(3))
	err := s.Make(t.Context(), "blog", key(4), each.fill)
	if !errors.Is(err, fleet.ErrOverloaded) || !strings.Contains(fleet.Hint(err), "checkpoint.budget") {
		t.Errorf("%v, hint %q", err, fleet.Hint(err))
	}
	wantKept(t, s, "blog", 1, 3)

	// What is doomed takes its room until it is let go.
	if err := s.Refuse("blog", key(3), "no"); err != nil {
		t.Fatal(err)
	}
	if err := s.Make(t.Context(), "blog", key(4), each.fill); !errors.Is(err, fleet.ErrOverloaded) {
		t.Error(err)
	}
	three.Release()
	mustMake(t, s, "blog", key(4), each)
	one.Release()
	mustMake(t, s, "blog", key(5), each)
	clean(t, s, 2)
	if err := errors.Join(finds(s, "blog", key(4)), finds(s, "blog", key(5))); err != nil {
		t.Error(err)
	}
}

func TestBudget_DoomedOnesGoFirst(t *testing.T) {
	dir := ramdisk(t, "16m")
	s := open(t, dir, 2*eachSize)
	mustMake(t, s, "blog", key(1), each)
	mustMake(t, s, "blog", key(2), each)
	mustFind(t, s, "blog", key(2))
	if err := s.Refuse("blog", key(2), "no"); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir, 2*eachSize)
	clean(t, s, 2)
	mustMake(t, s, "blog", key(3), each)
	clean(t, s, 2)
	if err := errors.Join(finds(s, "blog", key(1)), finds(s, "blog", key(3))); err != nil {
		t.Error(err)
	}
}

func TestBudget_NothingGoesForWhatDoesNotFit(t *testing.T) {
	s := open(t, ramdisk(t, "16m"), 2*eachSize)
	mustMake(t, s, "blog", key(1), each)
	mustMake(t, s, "blog", key(2), each)
	hold := mustFind(t, s, "blog", key(2))
	defer hold.Release()
	for _, n := range []int{4, 7} { // more than is free, more than all
		if err := s.Make(t.Context(), "blog", key(3), func(dir string) error { return many(dir, n) }); !errors.Is(err, fleet.ErrOverloaded) {
			t.Errorf("%d files: %v", n, err)
		}
	}
	wantKept(t, s, "blog", 1, 2)
}

func TestBudget_Zero(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, plenty)
	mustMake(t, s, "blog", key(1), each)
	s = open(t, dir, 0)
	release, ok := s.Hold("blog", key(1))
	if !ok {
		t.Error("an instance that runs has lost its files")
	}
	if err := finds(s, "blog", key(1)); !errors.Is(err, ErrNone) {
		t.Error(err)
	}
	err := s.Make(t.Context(), "blog", key(2), func(string) error { t.Error("was filled"); return nil })
	if !errors.Is(err, fleet.ErrOverloaded) {
		t.Error(err)
	}
	clean(t, s, 1)
	release()
	clean(t, s, 0)
}

func TestBudget_Lowered(t *testing.T) {
	dir := ramdisk(t, "16m")
	s := open(t, dir, plenty)
	for n := 1; n <= 4; n++ {
		mustMake(t, s, "blog", key(n), each)
	}
	s = open(t, dir, 2*eachSize)
	release, _ := s.Hold("blog", key(1))
	defer release()
	if n, err := s.Keep(func(fleet.AppName, string) bool { return true }); n != 2 || err != nil {
		t.Errorf("removed %d, %v", n, err)
	}
	wantKept(t, s, "blog", 1, 4)
}

func TestRefuse_StaysRefused(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, plenty)
	mustMake(t, s, "blog", key(1), twoFiles)
	mustMake(t, s, "blog", key(2), twoFiles)
	for n, reason := range map[int]string{1: "io_uring cannot be saved \xff", 3: strings.Repeat("é", maxReason)} {
		if err := s.Refuse("blog", key(n), reason); err != nil {
			t.Fatal(err)
		}
	}
	clean(t, s, 1)
	for range 2 {
		err := finds(s, "blog", key(1))
		if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "io_uring cannot be saved") {
			t.Error(err)
		}
		if err := finds(s, "blog", key(3)); !errors.Is(err, ErrRefused) || len(err.Error()) > maxReason+100 {
			t.Error(err)
		}
		if err := s.Make(t.Context(), "blog", key(1), func(string) error { t.Error("was filled"); return nil }); !errors.Is(err, ErrRefused) {
			t.Error(err)
		}
		list := s.List("blog")
		if len(list) != 3 || list[0].Key != key(2) || !slices.ContainsFunc(list, func(i Info) bool { return i.Key == key(1) && i.Refused != "" && !i.Created.IsZero() }) {
			t.Errorf("list %+v", list)
		}
		if err := finds(s, "blog", key(2)); err != nil {
			t.Error(err)
		}
		s = open(t, dir, plenty)
	}
	if err := s.Delete("blog"); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir, plenty)
	if list := s.List("blog"); len(list) != 0 || len(entries(t, s, "refused")) != 0 {
		t.Errorf("after delete: %+v", list)
	}
	mustMake(t, s, "blog", key(1), twoFiles)
}

func TestRefuse_CrashBeforeItIsRemoved(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, plenty)
	mustMake(t, s, "blog", key(1), twoFiles)
	must(t, s.record(id{"blog", key(1)}, refusal{Reason: "no", At: time.Now()}))
	s = open(t, dir, plenty)
	if err := finds(s, "blog", key(1)); !errors.Is(err, ErrRefused) {
		t.Error(err)
	}
	if _, err := s.Keep(func(fleet.AppName, string) bool { return true }); err != nil {
		t.Error(err)
	}
	clean(t, s, 0)
	if err := finds(s, "blog", key(1)); !errors.Is(err, ErrRefused) {
		t.Error(err)
	}
}

func TestRefuse_FullDisk(t *testing.T) {
	dir := ramdisk(t, "64k")
	s := open(t, dir, plenty)
	f, err := os.Create(filepath.Join(dir, "ballast"))
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = f.Write(make([]byte, block))
	}
	f.Close()
	if err := s.Refuse("blog", key(1), "no"); !errors.Is(err, unix.ENOSPC) {
		t.Error(err)
	}
	if err := finds(s, "blog", key(1)); !errors.Is(err, ErrRefused) {
		t.Errorf("forgotten at once: %v", err)
	}
	clean(t, s, 0)
}

func TestRefuse_DamagedRecordRefuses(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, plenty)
	if err := s.Refuse("blog", key(1), "no"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.refusalPath(id{"blog", key(1)}), []byte("rubbish"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := finds(open(t, dir, plenty), "blog", key(1)); !errors.Is(err, ErrRefused) {
		t.Error(err)
	}
}

func TestDelete_WhileHeld(t *testing.T) {
	for name, remove := range map[string]func(s *Store) error{
		"deleted": func(s *Store) error { return s.Delete("blog") },
		"refused": func(s *Store) error { return s.Refuse("blog", key(1), "no") },
	} {
		s := open(t, t.TempDir(), plenty)
		mustMake(t, s, "blog", key(1), twoFiles)
		mustMake(t, s, "shop", key(1), twoFiles)
		first, second := mustFind(t, s, "blog", key(1)), mustFind(t, s, "blog", key(1))
		third, ok := s.Hold("blog", key(1))
		if !ok {
			t.Fatal("not held")
		}
		for range 2 {
			if err := remove(s); err != nil {
				t.Fatal(err)
			}
		}
		if err := finds(s, "blog", key(1)); !errors.Is(err, ErrNone) && !errors.Is(err, ErrRefused) {
			t.Errorf("%s: %v", name, err)
		}
		for _, release := range []func(){first.Release, third, third, first.Release, second.Release} {
			if data, err := os.ReadFile(filepath.Join(second.Dir(), "saved.json")); err != nil || string(data) != "{}" {
				t.Errorf("%s: %q, %v", name, data, err)
			}
			release()
		}
		clean(t, s, 1)
		if err := finds(s, "shop", key(1)); err != nil {
			t.Errorf("%s: another app's: %v", name, err)
		}
	}
}

func TestDelete_WhileHeldThenCrash(t *testing.T) {
	for name, remove := range map[string]func(s *Store) error{
		"deleted": func(s *Store) error { return s.Delete("blog") },
		"refused": func(s *Store) error { return s.Refuse("blog", key(1), "no") },
	} {
		for _, adopted := range []bool{false, true} {
			dir := t.TempDir()
			s := open(t, dir, plenty)
			mustMake(t, s, "blog", key(1), twoFiles)
			content := mustFind(t, s, "blog", key(1)).Dir()
			if err := remove(s); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				s = open(t, dir, plenty) // the old one is dead
				if err := finds(s, "blog", key(1)); !errors.Is(err, ErrNone) && !errors.Is(err, ErrRefused) {
					t.Errorf("%s: came back: %v", name, err)
				}
			}
			if adopted {
				release, ok := s.Hold("blog", key(1))
				if _, err := os.Stat(filepath.Join(content, "saved.json")); err != nil || !ok {
					t.Errorf("%s: held %t, %v", name, ok, err)
				}
				if n, err := s.Keep(func(fleet.AppName, string) bool { return false }); n != 0 || err != nil {
					t.Errorf("%s: removed %d, %v", name, n, err)
				}
				clean(t, s, 1)
				release()
			} else if n, err := s.Keep(func(fleet.AppName, string) bool { return true }); n != 1 || err != nil {
				t.Errorf("%s: removed %d, %v", name, n, err)
			}
			clean(t, s, 0)
		}
	}
}

func TestDelete_FailsAndIsTriedAgain(t *testing.T) {
	s := open(t, ramdisk(t, "1m"), 3*eachSize)
	for n := 1; n <= 3; n++ {
		mustMake(t, s, "blog", key(n), each)
	}
	must(t, os.RemoveAll(s.path("kept", s.kept[id{"blog", key(1)}].base))) // by somebody's hand
	must(t, os.Remove(s.path("trash")))
	if err := s.Delete("blog"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	for n := 1; n <= 3; n++ {
		if err := finds(s, "blog", key(n)); !errors.Is(err, ErrNone) {
			t.Error(err)
		}
	}
	if err := s.Make(t.Context(), "shop", key(1), func(dir string) error { return many(dir, 4) }); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("made where there was no room: %v", err)
	}
	must(t, os.Mkdir(s.path("trash"), 0o700))
	clean(t, s, 2)
	if n, err := s.Keep(func(fleet.AppName, string) bool { return true }); n != 2 || err != nil {
		t.Errorf("removed %d, %v", n, err)
	}
	clean(t, s, 0)
}

func TestHold_EitherOfTwo(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, plenty)
	if _, ok := s.Hold("blog", key(1)); ok {
		t.Error("held nothing")
	}
	mustMake(t, s, "blog", key(1), twoFiles)
	mustFind(t, s, "blog", key(1))
	if err := s.Delete("blog"); err != nil {
		t.Fatal(err)
	}
	mustMake(t, s, "blog", key(1), twoFiles)
	s = open(t, dir, plenty)
	release, ok := s.Hold("blog", key(1))
	if !ok {
		t.Error("held nothing")
	}
	if err := s.Delete("blog"); err != nil {
		t.Fatal(err)
	}
	clean(t, s, 2)
	release()
	clean(t, s, 0)
}

func TestKeep(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, plenty)
	for n := 1; n <= 3; n++ {
		mustMake(t, s, "blog", key(n), twoFiles)
		mustMake(t, s, "shop", key(n), twoFiles)
	}
	for n := 4; n <= 5; n++ {
		if err := s.Refuse("blog", key(n), "no"); err != nil {
			t.Fatal(err)
		}
	}
	held := mustFind(t, s, "shop", key(3))
	n, err := s.Keep(func(app fleet.AppName, k string) bool {
		s.List("blog") // is not locked out
		return app == "blog" && (k == key(1) || k == key(4))
	})
	if n != 4 || err != nil {
		t.Errorf("removed %d, %v", n, err)
	}
	// What is held stays until it is let go of, and is found no more.
	clean(t, s, 2)
	if _, err := os.Stat(filepath.Join(held.Dir(), "saved.json")); err != nil {
		t.Error(err)
	}
	held.Release()
	for range 2 {
		clean(t, s, 1)
		want := []string{key(1), key(4)}
		slices.Sort(want)
		if got := keys(s.List("blog")); !slices.Equal(got, want) {
			t.Errorf("kept %v, want %v", got, want)
		}
		if s.Has("shop") || !s.Has("blog") {
			t.Error("what is there is not what is kept")
		}
		s = open(t, dir, plenty)
	}
}

func TestOpen_AfterACrash(t *testing.T) {
	base := "blog." + key(1) + ".ABC"
	whole := func(s *Store) { mustMake(t, s, "blog", key(1), twoFiles) }
	first := func(s *Store) string { return s.path("kept", entries(t, s, "kept")[0]) }
	for name, c := range map[string]struct {
		before func(s *Store)
		kept   int // of which none is found, unless found
		found  bool
	}{
		"while it was filled": {func(s *Store) { must(t, errors.Join(files{base + "/content/a": "a"}.fill(s.path("tmp")))) }, 0, false},
		"while a manifest was written": {func(s *Store) {
			whole(s)
			must(t, os.Rename(first(s), s.path("tmp", base)))
			must(t, os.WriteFile(s.path("tmp", "file-1"), []byte("{"), 0o600))
		}, 0, false},
		"while it was removed": {func(s *Store) {
			whole(s)
			must(t, errors.Join(os.Rename(first(s), s.path("trash", base)), zoo(s.path("trash", base))))
		}, 0, false},
		"after all":              {whole, 1, true},
		"rubbish beside it":      {func(s *Store) { whole(s); must(t, zoo(s.path("kept"))) }, 1, true},
		"no manifest":            {func(s *Store) { whole(s); must(t, os.Remove(filepath.Join(first(s), manifestFile))) }, 1, false},
		"a damaged manifest":     {func(s *Store) { whole(s); must(t, os.Truncate(filepath.Join(first(s), manifestFile), 100)) }, 1, false},
		"a manifest as a fifo":   {func(s *Store) { whole(s); fifo(t, filepath.Join(first(s), manifestFile)) }, 1, false},
		"a manifest as a link":   {func(s *Store) { whole(s); link(t, filepath.Join(first(s), manifestFile)) }, 1, false},
		"neither":                {func(s *Store) { must(t, os.Mkdir(s.path("kept", base), 0o700)) }, 0, false},
		"a manifest of a stray":  {func(s *Store) { must(t, files{base + "/manifest.json": "{}"}.fill(s.path("kept"))) }, 0, false},
		"a file with its name":   {func(s *Store) { must(t, files{base: "x"}.fill(s.path("kept"))) }, 0, false},
		"another app's manifest": {func(s *Store) { whole(s); must(t, os.Rename(first(s), s.path("kept", "shop."+key(1)+".ABC"))) }, 1, false},
		"a stray refusal":        {func(s *Store) { whole(s); must(t, files{"blog.json": "x"}.fill(s.path("refused"))) }, 1, true},
		"two of one name": {func(s *Store) {
			whole(s)
			hold := mustFind(t, s, "blog", key(1))
			must(t, s.Delete("blog"))
			whole(s)
			doomed := filepath.Dir(hold.Dir())
			must(t, os.Rename(filepath.Join(doomed, doomedFile), filepath.Join(doomed, manifestFile)))
		}, 2, true},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			c.before(open(t, dir, plenty))
			s := open(t, dir, plenty)
			clean(t, s, c.kept)
			want := error(nil)
			if !c.found {
				want = ErrNone
			}
			if err := finds(s, "blog", key(1)); !errors.Is(err, want) {
				t.Error(err)
			}
			if len(entries(t, s, "refused")) != 0 {
				t.Error("a stray refusal stayed")
			}
			// What could be held is gone when nobody did.
			if _, err := s.Keep(func(app fleet.AppName, _ string) bool { return app == "blog" }); err != nil {
				t.Error(err)
			}
			clean(t, s, map[bool]int{true: 1}[c.found])
			mustMake(t, s, "blog", key(1), twoFiles)
			if err := finds(s, "blog", key(1)); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestOpen_TheNewerOfTwo(t *testing.T) {
	for range 5 { // their order on the disk is chance
		dir := t.TempDir()
		s := open(t, dir, plenty)
		for _, content := range []string{"old", "new"} {
			mustMake(t, s, "blog", key(1), files{"a": content})
			must(t, os.Rename(s.path("kept"), s.path("kept "+content)))
			must(t, os.Mkdir(s.path("kept"), 0o700))
			s = open(t, dir, plenty)
		}
		for _, content := range []string{"old", "new"} {
			names := entries(t, s, "kept "+content)
			must(t, os.Rename(s.path("kept "+content, names[0]), s.path("kept", names[0])))
		}
		s = open(t, dir, plenty)
		c := mustFind(t, s, "blog", key(1))
		if data, err := os.ReadFile(filepath.Join(c.Dir(), "a")); err != nil || string(data) != "new" {
			t.Errorf("found the %s one, %v", data, err)
		}
	}
}

func fifo(t *testing.T, path string) {
	must(t, errors.Join(os.Remove(path), unix.Mkfifo(path, 0o600)))
}

func link(t *testing.T, path string) {
	must(t, errors.Join(os.Rename(path, path+"2"), os.Symlink(path+"2", path)))
}

func TestOpen_SaysWhatIsWrong(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(file, nil, 0o600))
	for _, dir := range []string{file, "/proc/checkpoints"} {
		_, err := Open(Config{Dir: dir, Budget: 1})
		if err == nil || fleet.Hint(err) == "" {
			t.Errorf("%s: %v", dir, err)
		}
	}
}

func TestPermissions_RootOnly(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "checkpoints")
	must(t, os.Mkdir(dir, 0o777))
	must(t, errors.Join(os.Chmod(dir, 0o777), os.Chmod(filepath.Dir(filepath.Dir(dir)), 0o755))) // whoever made it
	s := open(t, dir, plenty)
	if err := s.Make(t.Context(), "blog", key(1), func(d string) error {
		return errors.Join(files{"files/public": "secret"}.fill(d), os.Chmod(d, 0o777))
	}); err != nil {
		t.Fatal(err)
	}
	must(t, s.Refuse("shop", key(1), "no"))
	for _, d := range []string{"", "kept", "tmp", "trash", "refused", "kept/" + entries(t, s, "kept")[0]} {
		if info, err := os.Stat(s.path(d)); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("%q has mode %v, %v", d, info.Mode(), err)
		}
	}
	c := mustFind(t, s, "blog", key(1))
	defer c.Release()
	for path, want := range map[string]bool{filepath.Join(c.Dir(), "files/public"): false, s.refusalPath(id{"shop", key(1)}): false, dir: false, filepath.Dir(dir): true} {
		cmd := exec.Command("ls", path)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		var out bytes.Buffer
		cmd.Stderr = &out
		if err := cmd.Run(); (err == nil) != want {
			t.Errorf("somebody else reads %s: %v %s", path, err, &out)
		}
	}
}

func BenchmarkFind_Warm(b *testing.B) {
	s := open(b, b.TempDir(), plenty)
	err := s.Make(b.Context(), "blog", key(1), func(dir string) error {
		images, files := filepath.Join(dir, "images"), filepath.Join(dir, "files/var/lib/app")
		return errors.Join(os.Mkdir(images, 0o700), os.MkdirAll(files, 0o755), many(images, 35), many(files, 5))
	})
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if err := finds(s, "blog", key(1)); err != nil {
			b.Fatal(err)
		}
	}
}
