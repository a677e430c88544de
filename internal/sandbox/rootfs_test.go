package sandbox

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// bothWays runs a test with root filesystems made by descriptor, and as on
// older kernels.
func bothWays(t *testing.T, group string, test func(t *testing.T, n *Native)) {
	t.Helper()
	for name, byFD := range map[string]bool{"by descriptor": true, "by path": false} {
		t.Run(name, func(t *testing.T) {
			n, err := Open(t.Context(), Config{Cgroup: group, Pool: -1})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = n.Close() }()
			if byFD && !n.overlayByFD {
				t.Log("this kernel makes overlays by path only: the other half of this test covers it")
				return
			}
			if !byFD && n.workshop == nil {
				if n.workshop, err = newWorkshop(); err != nil {
					t.Fatal(err)
				}
			}
			n.overlayByFD = byFD
			test(t, n)
		})
	}
}

// output of a shell script in a container.
func output(t *testing.T, n *Native, change func(*Spec), script string) string {
	t.Helper()
	var out strings.Builder
	spec := testSpec(busyboxRoot(t), "", script)
	spec.Stdio = &Stdio{Stdout: &out, Stderr: &out}
	if change != nil {
		change(&spec)
	}
	c, err := n.Start(testContext(t), spec)
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-c.Done():
	case <-testContext(t).Done():
		t.Fatal("the script does not end")
	}
	if err := c.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func TestRootfs_UpperLayersWin(t *testing.T) {
	bothWays(t, "/fastcontainer-test-rootfs", func(t *testing.T, n *Native) {
		for _, layers := range []int{1, 5, 110} { // the last needs more than one mount option's 255 bytes
			got := output(t, n, func(s *Spec) {
				for i := range layers {
					dir := t.TempDir()
					if err := os.Chmod(dir, 0o755); err != nil { //nolint:gosec // the root of a container
						t.Fatal(err)
					}
					for _, name := range []string{"top", fmt.Sprintf("layer%d", i)} {
						if err := os.WriteFile(filepath.Join(dir, name), []byte(fmt.Sprint(i)), 0o644); err != nil { //nolint:gosec // content of an image
							t.Fatal(err)
						}
					}
					s.Layers = append([]string{dir}, s.Layers...)
				}
			}, "cat /top; ls / | busybox grep -c layer; echo x > /top && cat /top")
			if want := fmt.Sprintf("%d%d\nx\n", layers-1, layers); got != want {
				t.Errorf("%d layers: got %q, want %q", layers, got, want)
			}
		}
	})
}

func TestRootfs_ImagesLinksAreNotFollowedForTheDaemonsFiles(t *testing.T) {
	bothWays(t, "/fastcontainer-test-links", func(t *testing.T, n *Native) {
		trap := filepath.Join(t.TempDir(), "trap")
		if err := os.Mkdir(trap, 0o777); err != nil { //nolint:gosec // a trap
			t.Fatal(err)
		}
		got := output(t, n, func(s *Spec) {
			dir := s.Layers[0]
			for _, name := range []string{"proc", "sys", "dev", "etc", "data"} {
				if err := os.Symlink(trap, filepath.Join(dir, name)); err != nil {
					t.Fatal(err)
				}
			}
		}, "cat /etc/hostname; ls -d /proc/self; test -c /dev/null && echo null")
		if want := "test\n/proc/self\nnull\n"; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
		if entries, err := os.ReadDir(trap); err != nil || len(entries) != 0 {
			t.Errorf("the host's directory now holds %v (%v)", entries, err)
		}
	})
}

func TestRootfs_ReadonlyAndFull(t *testing.T) {
	bothWays(t, "/fastcontainer-test-full", func(t *testing.T, n *Native) {
		if got := output(t, n, func(s *Spec) { s.ReadonlyRoot = true }, "echo x > /x; echo y > /etc/hosts; cat /etc/hostname"); !strings.Contains(got, "Read-only file system") || !strings.HasSuffix(got, "test\n") {
			t.Errorf("read-only root: got %q", got)
		}
		if got := output(t, n, func(s *Spec) { s.Disk = 2 << 20 }, "busybox dd if=/dev/zero of=/x bs=1M count=8"); !strings.Contains(got, "No space left on device") {
			t.Errorf("full layer: got %q", got)
		}
	})
}

func TestRootfs_OwnershipIsMapped(t *testing.T) {
	bothWays(t, "/fastcontainer-test-owner", func(t *testing.T, n *Native) {
		volume := t.TempDir()
		if err := os.Chmod(volume, 0o700); err != nil { //nolint:gosec // a volume
			t.Fatal(err)
		}
		if err := os.Chown(volume, 33, 33); err != nil {
			t.Fatal(err)
		}
		got := output(t, n, func(s *Spec) {
			s.User = "33:33"
			s.Mounts = []Mount{{Source: volume, Target: "/var/lib/data"}}
		}, "id -u; cd /var/lib/data && echo x > file && ls -ln file | busybox awk '{print $3, $4}'")
		if want := "33\n33 33\n"; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(volume, "file"), &st); err != nil || st.Uid != 33 || st.Gid != 33 {
			t.Errorf("on the host the file belongs to %d:%d (%v), want 33:33", st.Uid, st.Gid, err)
		}
	})
}
