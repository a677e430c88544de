// Bench measures every figure of docs/benchmarks.md, each beside its peers in
// the same run, and writes that file; with -experiments it makes those of
// docs/experiments instead. It needs root and `make build`.
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/e2e/realapps"
)

// bench is one run.
type bench struct {
	ctx   context.Context //nolint:containedctx // of the whole run
	dir   string
	root  string // root filesystem with the static server
	quick bool
	nodes int            // that were started
	site  []realapps.App // the light ones, once they were made
	out   bytes.Buffer   // the document
}

func main() {
	only := flag.String("only", "", "one of cold, rate, kinds, warm, apps, instances; kinds-starts, kinds-siblings, kinds-runc and kinds-thousand are parts of kinds; or names of experiments, with commas")
	trials := flag.Bool("experiments", false, "make the experiments")
	quick := flag.Bool("quick", false, "fewer rounds: for trying it out, not for the document")
	file := flag.String("out", "docs/benchmarks.md", "document to write; not written with -only or -quick")
	flag.Parse()
	if order := os.Getenv(clientsOrder); order != "" {
		if err := beClients(order); err != nil {
			log.Fatal(err)
		}
		return
	}
	if err := alone(); err != nil {
		log.Fatal(err)
	}
	b := &bench{ctx: context.Background(), quick: *quick}
	if err := b.run(*only, *trials); err != nil {
		_, _ = os.Stderr.Write(b.out.Bytes()) // what it has so far
		log.Fatal(err)
	}
	if *trials {
		return
	}
	if *only != "" || *quick {
		fmt.Print(b.out.String())
		return
	}
	if err := os.WriteFile(*file, b.out.Bytes(), 0o644); err != nil { //nolint:gosec // a document
		log.Fatal(err)
	}
}

// alone moves this program into a mount namespace of its own, without the
// cgroup v2 tree that hosts with v1 have beside it: crun refuses such hosts.
// /run is in memory there, as on any host with systemd. Everything that is
// measured runs there alike.
func alone() error {
	if os.Getenv("BENCH_ALONE") != "" {
		return nil
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	unshare, err := exec.LookPath("unshare")
	if err != nil {
		return err
	}
	args := append([]string{unshare, "-m", "sh", "-c", `umount /sys/fs/cgroup/unified 2>/dev/null; mount -t tmpfs -o mode=755 tmpfs /run && exec "$0" "$@"`, self}, os.Args[1:]...)
	return unix.Exec(unshare, args, append(os.Environ(), "BENCH_ALONE=1"))
}

func (b *bench) run(only string, trials bool) error {
	var err error
	if b.dir, err = os.MkdirTemp("", "fcbench"); err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(b.dir) }()
	b.root = filepath.Join(b.dir, "rootfs")
	build := exec.CommandContext(b.ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", b.root+"/server", "./bench/server")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build server: %w\n%s", err, out)
	}
	for _, dir := range []string{"proc", "dev", "sys"} { // crun and runc would race to make them
		if err := os.Mkdir(filepath.Join(b.root, dir), 0o755); err != nil { //nolint:gosec // a root filesystem
			return err
		}
	}
	if trials {
		return b.experiment(only, "docs/experiments")
	}
	b.head()
	for _, part := range []struct {
		name string
		f    func() error
	}{
		{"cold", b.cold}, {"rate", b.rate},
		{"kinds-starts", b.kinds}, {"kinds-siblings", b.siblings}, {"kinds-runc", b.besideRunc}, {"kinds-thousand", b.thousand},
		{"warm", b.warm}, {"apps", b.apps}, {"instances", b.instances},
	} {
		if group, _, _ := strings.Cut(part.name, "-"); only != "" && only != part.name && only != group {
			continue
		}
		began := time.Now()
		log.Printf("%s...", part.name)
		if err := part.f(); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
		log.Printf("%s took %s", part.name, time.Since(began).Truncate(time.Second))
	}
	return nil
}

func (b *bench) say(format string, a ...any) { fmt.Fprintf(&b.out, format+"\n", a...) }

// command is the first line of what a command says, or why it does not.
func command(name string, args ...string) string {
	out, err := exec.Command(name, args...).CombinedOutput() //nolint:gosec,noctx // fixed commands
	if err != nil {
		return err.Error()
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return line
}

func (b *bench) head() {
	var u unix.Utsname
	_ = unix.Uname(&u)
	var info unix.Sysinfo_t
	_ = unix.Sysinfo(&info)
	groups := "v2"
	if exists("/sys/fs/cgroup/memory") {
		groups = "v1"
	}
	cpu := command("sh", "-c", "grep -m1 'model name' /proc/cpuinfo | cut -d: -f2")
	b.say("# Benchmarks\n")
	b.say("Every figure is measured by `make bench` beside its peers in the same run, and stands here as it came out. Absolute times depend on the")
	b.say("machine: compare within a table.\n")
	b.say("| | |\n|---|---|")
	for _, r := range [][2]string{
		{"run", time.Now().UTC().Format("2006-01-02 15:04") + " UTC"}, {"fastcontainer", strings.Join(strings.Fields(strings.TrimPrefix(command("bin/fastcontainer", "version"), "client")), " ")},
		{"machine", fmt.Sprintf("%s cores of%s, %d GiB, Linux %s, cgroup %s", command("nproc"), cpu, uint64(info.Totalram)*uint64(info.Unit)>>30, unix.ByteSliceToString(u.Release[:]), groups)}, //nolint:unconvert // differs by architecture
		{"crun", command("crun", "--version")}, {"runc", command("runc", "--version")}, {"CRIU", strings.TrimPrefix(command(criuProgram, "--version"), "Version: ")}, {"nginx", command("sh", "-c", "nginx -v 2>&1")}, {"Caddy", command("caddy", "version")},
	} {
		b.say("| %s | %s |", r[0], r[1])
	}
	b.say("")
}
