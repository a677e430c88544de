package sandbox

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// busyboxRoot is a root filesystem with busybox and a few of its names.
func busyboxRoot(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil { //nolint:gosec // the root of a container
		t.Fatal(err)
	}
	bin := filepath.Join(dir, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil { //nolint:gosec // the same
		t.Fatal(err)
	}
	if out, err := exec.Command("cp", "/bin/busybox", bin+"/busybox").CombinedOutput(); err != nil {
		t.Fatalf("install the package busybox-static: %v: %s", err, out)
	}
	for _, name := range []string{"sh", "true", "cat", "sleep", "echo", "ls", "id"} {
		if err := os.Symlink("busybox", filepath.Join(bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// BenchmarkStart starts /bin/true and waits for its end. The pool is filled
// between the starts, as it is between requests.
func BenchmarkStart(b *testing.B) {
	n, err := Open(b.Context(), Config{Cgroup: "/fastcontainer-bench", Pool: 8})
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = n.Close() }()
	spec := Spec{
		ID: "bench.a", App: "bench", Hostname: "bench", Layers: []string{busyboxRoot(b)}, Args: []string{"/bin/true"},
		UserNS: true, Log: filepath.Join(b.TempDir(), "log"), Limits: Limits{CPU: 1, Memory: 64 << 20, PIDs: 100},
	}
	var stages [4][]time.Duration
	for b.Loop() {
		b.StopTimer()
		time.Sleep(10 * time.Millisecond)
		b.StartTimer()
		began := time.Now()
		c, err := n.Start(b.Context(), spec)
		if err != nil {
			b.Fatal(err)
		}
		stages[3] = append(stages[3], time.Since(began))
		<-c.Done()
		b.StopTimer()
		t := c.Timings()
		stages[0] = append(stages[0], t.Claim)
		stages[1] = append(stages[1], t.Rootfs)
		stages[2] = append(stages[2], t.Exec)
		if err := c.Destroy(context.Background()); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
	for i, name := range []string{"claim", "rootfs", "exec", "start"} {
		slices.Sort(stages[i])
		b.ReportMetric(float64(stages[i][len(stages[i])/2].Microseconds()), name+"-p50-us")
		b.ReportMetric(float64(stages[i][len(stages[i])*99/100].Microseconds()), name+"-p99-us")
	}
}
