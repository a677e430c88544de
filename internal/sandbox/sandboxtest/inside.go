package sandboxtest

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/sandbox"
)

// tests are all of the suite's, by name.
func (s *suite) tests() []namedTest {
	return append(s.scripts(),
		namedTest{"check", func(t *testing.T) { must(t, s.runtime(t, nil).Check()) }},
		namedTest{"mistakes are invalid", s.mistakes},
		namedTest{"volumes keep their owners", s.volumes},
		namedTest{"layers are never written", s.layers},
		namedTest{"memory limit", s.memory},
		namedTest{"pids limit", s.pids},
		namedTest{"log", s.log},
		namedTest{"signals and exit codes", s.signals},
		namedTest{"terminal", s.terminal},
		namedTest{"exec", s.exec},
		namedTest{"exec is confined", s.execConfined},
		namedTest{"exec with terminal", s.execTerminal},
		namedTest{"exec canceled", s.execCanceled},
		namedTest{"resize", s.resize},
		namedTest{"stats", s.stats},
		namedTest{"numbers about the processor", s.cpu},
		namedTest{"weights", s.weights},
		namedTest{"memory alarm", s.alarm},
		namedTest{"freeze", s.freeze},
		namedTest{"adopt", s.adopt},
		namedTest{"adopt what has ended", s.adoptGone},
		namedTest{"clean", s.clean},
		namedTest{"destroy", s.destroyTwice},
		namedTest{"canceled start", s.canceledStart},
		namedTest{"many at once", s.many},
		namedTest{"network", s.network},
	)
}

const (
	denied   = "Operation not permitted"
	readonly = "Read-only file system"
)

// scripts look around from inside. want holds lines that must be in what a
// script prints; forbidden, what must not.
func (s *suite) scripts() []namedTest {
	var tests []namedTest
	for _, c := range []struct {
		name, script    string
		change          func(*sandbox.Spec)
		want, forbidden []string
	}{
		{
			name: "arguments, environment, directory",
			change: func(s *sandbox.Spec) {
				s.Args = []string{"/bin/sh", "-c", `echo "$0|$1|$A|$B|$#"; pwd; env`, "zero", "one  two"}
				s.Env, s.Dir = []string{"A=1", "B=x y=z"}, "/made/for/it"
			},
			want: []string{"zero|one  two|1|x y=z|1", "/made/for/it", "A=1"}, forbidden: []string{"HOME=/root", "GOROOT", "SHELL="},
		},
		{name: "program along the usual path", change: func(s *sandbox.Spec) { s.Args, s.Env = []string{"id", "-u"}, nil }, want: []string{"0"}},
		{name: "program along PATH", change: func(s *sandbox.Spec) { s.Args, s.Env = []string{"id", "-u"}, []string{"PATH=/none:/bin"} }, want: []string{"0"}},
		{name: "user by name", script: "id -u; id -g; id -G", change: func(s *sandbox.Spec) { s.User = "app" }, want: []string{"1000", "1000 2000"}},
		{name: "user by number", script: "id -u; id -g", change: func(s *sandbox.Spec) { s.User = "33:44" }, want: []string{"33", "44"}},
		{name: "user and group by name", script: "id -u; id -g", change: func(s *sandbox.Spec) { s.User = "app:staff" }, want: []string{"1000", "2000"}},
		{name: "host name", script: "hostname; cat /etc/hostname", want: []string{"inside"}},
		{name: "hosts file", script: "cat /etc/hosts", want: []string{"127.0.0.1\tlocalhost"}},
		{name: "first process is 1", script: "echo pid $$; test -d /proc/1000 || echo alone", want: []string{"pid 1", "alone"}},
		{
			name:   "loopback",
			script: "httpd -p 127.0.0.1:80 -h /etc; wget -q -O - http://127.0.0.1/hostname; ls /sys/class/net; killall httpd",
			want:   []string{"inside", "lo"}, forbidden: []string{"eth0"},
		},
		{name: "without user namespace", script: "id -u; cat /proc/self/uid_map", change: func(s *sandbox.Spec) { s.UserNS = false }, want: []string{"0", "0          0 4294967295"}},
		{name: "user namespace", script: "cat /proc/self/uid_map | while read a b c; do echo $a $c; test $b -ge 65536 && echo far; done", want: []string{"0 65536", "far"}},
		{
			name: "read-only root", script: "echo x > /file; echo x > /etc/hosts; cat /etc/hostname; echo y > /dev/shm/file && echo shm",
			change: func(s *sandbox.Spec) { s.ReadonlyRoot = true },
			want:   []string{"/bin/sh: can't create /file: " + readonly, "inside", "shm"},
		},
		{
			name: "bounded disk", script: "dd if=/dev/zero of=/big bs=1M count=8",
			change: func(s *sandbox.Spec) { s.Disk = 2 << 20 }, want: []string{"dd: error writing '/big': No space left on device"},
		},
		{name: "default capabilities", script: "grep CapBnd /proc/self/status; grep CapEff /proc/self/status", want: []string{"CapBnd:\t00000000a00405fb", "CapEff:\t00000000a00405fb"}},
		{
			name: "capabilities added and dropped", script: "grep Cap /proc/self/status",
			change: func(s *sandbox.Spec) { s.CapDrop, s.CapAdd = []string{"ALL"}, []string{"net_admin", "CAP_CHOWN"} },
			want:   []string{"CapBnd:\t0000000000001001", "CapEff:\t0000000000001001"},
		},
		{name: "capabilities of other users", script: "grep Cap /proc/self/status", change: func(s *sandbox.Spec) { s.User = "app" }, want: []string{"CapPrm:\t0000000000000000", "CapEff:\t0000000000000000"}},
		{name: "no new privileges", script: "grep NoNewPrivs /proc/self/status", want: []string{"NoNewPrivs:\t1"}},
		{name: "seccomp", script: "unshare -U true; mount -t tmpfs x /tmp; grep Seccomp: /proc/self/status", want: []string{"unshare: unshare(0x10000000): " + denied, "Seccomp:\t2"}},
		{name: "seccomp unconfined", script: "unshare -U echo new", change: func(s *sandbox.Spec) { s.Seccomp = "unconfined" }, want: []string{"new"}},
		{
			name: "what tells about the host is hidden",
			script: "head -c 1 /proc/kcore | wc -c; cat /proc/keys /proc/timer_list | wc -c; ls -A /sys/firmware /sys/fs/cgroup/memory 2>/dev/null; " +
				"echo h > /proc/sysrq-trigger || echo no sysrq; echo other > /proc/sys/kernel/hostname || echo no sysctl; hostname",
			want: []string{"0", "no sysctl", "inside"}, forbidden: []string{"acpi\n", "efi\n", "memory.limit"},
		},
		{
			name: "host's files cannot be written", change: func(s *sandbox.Spec) { s.UserNS = false },
			script: "echo 1 > /proc/sys/vm/overcommit_memory || echo no sysctl; echo x > /sys/kernel/mm/ksm/run || echo no sysfs; mknod /tmp/null c 1 3 || echo no device",
			want:   []string{"no sysctl", "no sysfs", "no device"},
		},
		{name: "no descriptors of the daemon", script: "exec ls /proc/self/fd", want: []string{"0", "1", "2"}, forbidden: []string{"4", "5", "6", "7", "8", "9"}},
		{name: "devices", script: "ls /dev; echo x > /dev/null && head -c 1 /dev/zero | wc -c", want: []string{"null", "zero", "urandom", "1"}, forbidden: []string{"kmsg", "mem\n", "vda", "sda"}},
		{name: "other containers' layers are out of sight", script: "cat /proc/self/mountinfo /proc/mounts; ls /mnt /tmp", forbidden: []string{s.root, "lower/"}},
		{name: "core files are forbidden", script: "ulimit -c", want: []string{"0"}},
	} {
		tests = append(tests, namedTest{c.name, func(t *testing.T) {
			got := s.run(t, s.runtime(t, nil), c.script, c.change)
			for _, want := range c.want {
				found := false
				for line := range strings.Lines(got) {
					found = found || strings.TrimSpace(line) == want
				}
				if !found {
					t.Errorf("got %q, want the line %q", got, want)
				}
			}
			for _, f := range c.forbidden {
				if strings.Contains(got, f) {
					t.Errorf("got %q, with %q in it", got, f)
				}
			}
		}})
	}
	return tests
}

// mistakes are the user's: they are told so, with a hint, and leave nothing.
func (s *suite) mistakes(t *testing.T) {
	r := s.runtime(t, nil)
	for name, change := range map[string]func(*sandbox.Spec){
		"no program":              func(s *sandbox.Spec) { s.Args = nil },
		"unknown program":         func(s *sandbox.Spec) { s.Args = []string{"nothing"} },
		"unknown path":            func(s *sandbox.Spec) { s.Args = []string{"/bin/nothing"} },
		"not executable":          func(s *sandbox.Spec) { s.Args = []string{"/etc/plain"} },
		"directory":               func(s *sandbox.Spec) { s.Args = []string{"/etc"} },
		"missing interpreter":     func(s *sandbox.Spec) { s.Args = []string{"/bin/noscript"} },
		"neither program":         func(s *sandbox.Spec) { s.Args = []string{"/bin/noexec"} },
		"unknown user":            func(s *sandbox.Spec) { s.User = "nobody-here" },
		"unknown group":           func(s *sandbox.Spec) { s.User = "app:nothing" },
		"uid beyond the range":    func(s *sandbox.Spec) { s.User = "70000" },
		"unknown capability":      func(s *sandbox.Spec) { s.CapAdd = []string{"FLY"} },
		"unknown seccomp profile": func(s *sandbox.Spec) { s.Seccomp = "none" },
		"missing volume":          func(s *sandbox.Spec) { s.Mounts = []sandbox.Mount{{Source: "/no/such/volume", Target: "/data"}} },
	} {
		if s.f.Lacks["mistake: "+name] != "" {
			continue
		}
		spec := s.spec("exit 0", nil)
		change(&spec)
		c, err := r.Start(testContext(t), spec)
		if err == nil {
			t.Errorf("%s: it starts", name)
			destroy(t, c)
			continue
		}
		if !errors.Is(err, fleet.ErrInvalid) || fleet.Hint(err) == "" {
			t.Errorf("%s: got %v (hint %q), want invalid with a hint", name, err, fleet.Hint(err))
		}
	}
}

func (s *suite) volumes(t *testing.T) {
	data, fixed, file := t.TempDir(), t.TempDir(), filepath.Join(t.TempDir(), "file")
	must(t, os.Chown(data, 1000, 1000))
	must(t, os.Chmod(data, 0o700)) //nolint:gosec // a volume
	must(t, os.WriteFile(file, []byte("from the host\n"), 0o644))
	must(t, os.WriteFile(filepath.Join(fixed, "a"), []byte("fixed\n"), 0o644))
	must(t, os.Chmod(fixed, 0o755)) //nolint:gosec // a volume
	r := s.runtime(t, nil)
	for name, userns := range map[string]bool{"with user namespace": true, "without": false} {
		got := s.run(t, r, "cd /var/lib/data && echo x > made && ls -ln made | awk '{print $3, $4}'; cat /fixed/a; echo y > /fixed/b; cat /etc/one", func(s *sandbox.Spec) {
			s.User, s.UserNS = "1000:1000", userns
			s.Mounts = []sandbox.Mount{{Source: data, Target: "/var/lib/data"}, {Source: fixed, Target: "/fixed", Readonly: true}, {Source: file, Target: "/etc/one", Readonly: true}}
		})
		if !strings.HasPrefix(got, "1000 1000\nfixed\n/bin/sh: can't create /fixed/b: ") || !strings.HasSuffix(got, "\nfrom the host\n") {
			t.Errorf("%s: got %q", name, got)
		}
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(data, "made"), &st); err != nil || st.Uid != 1000 || st.Gid != 1000 {
			t.Errorf("%s: on the host the file belongs to %d:%d (%v), want 1000:1000", name, st.Uid, st.Gid, err)
		}
		_ = os.Remove(filepath.Join(data, "made"))
	}
}

func (s *suite) layers(t *testing.T) {
	top := t.TempDir()
	must(t, os.Chmod(top, 0o755)) //nolint:gosec // the root of a container
	must(t, os.WriteFile(filepath.Join(top, "both"), []byte("top\n"), 0o644))
	must(t, os.WriteFile(filepath.Join(s.root, "both"), []byte("bottom\n"), 0o644))
	r := s.runtime(t, nil)
	for range 2 {
		got := s.run(t, r, "cat /both; echo changed > /both; rm /etc/group /bin/noexec; echo new > /new; ls -ln /both | awk '{print $3}'", func(sp *sandbox.Spec) { sp.Layers = []string{top, s.root} })
		if want := "top\n0\n"; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	if b, err := os.ReadFile(filepath.Join(top, "both")); err != nil || string(b) != "top\n" {
		t.Errorf("the layer now holds %q, %v", b, err)
	}
	if _, err := os.Stat(filepath.Join(s.root, "etc/group")); err != nil {
		t.Error(err)
	}
}
