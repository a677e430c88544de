package sandbox_test

import (
	"testing"

	"github.com/fastcontainer/fastcontainer/internal/sandbox"
	"github.com/fastcontainer/fastcontainer/internal/sandbox/oci"
	"github.com/fastcontainer/fastcontainer/internal/sandbox/sandboxtest"
)

func TestConformance_Native(t *testing.T) {
	const group = "/fastcontainer-test-conformance"
	sandboxtest.Run(t, func(t *testing.T, net sandbox.Network) sandbox.Runtime {
		t.Helper()
		r, err := sandbox.Open(t.Context(), sandbox.Config{Cgroup: group, Pool: -1, Network: net})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}, sandboxtest.Features{Cgroup: group})
}

func TestConformance_Crun(t *testing.T) { testOCI(t, "crun", nil) }

func TestConformance_Runc(t *testing.T) { testOCI(t, "runc", nil) }

// gVisor's release of December 2022, which Debian 12 has, with its ptrace
// platform. Its programs see the sandbox's kernel, never the host's, which is
// why the lack of some layers of defence inside it is no hole.
func TestConformance_Runsc(t *testing.T) {
	testOCI(t, "runsc", map[string]string{
		"user namespace":                 "the sandbox is in one, but its programs see the sandbox's own map, of all ids",
		"no new privileges":              "the sandbox's /proc/PID/status lacks the line",
		"host's files cannot be written": "mknod makes devices of the sandbox, which are none of the host's",
		"pids limit":                     "the sandbox's processes are none of the host, which the limit counts",
		"weights":                        "its processes are begun by others of the host than its first, so that the test cannot keep them on one processor",
		"exec is confined":               "programs of runsc exec get no OCI seccomp filter, and the line of no new privileges lacks",
		"network":                        "this release finds a file in every network namespace that older kernels show in the first one only, and refuses",
	})
}

func testOCI(t *testing.T, runtime string, lacks map[string]string) {
	t.Helper()
	group, dir := "/fastcontainer-test-conformance-"+runtime, t.TempDir()
	sandboxtest.Run(t, func(t *testing.T, net sandbox.Network) sandbox.Runtime {
		t.Helper()
		r, err := oci.Open(t.Context(), oci.Config{Runtime: runtime, Dir: dir, Cgroup: group, Network: net})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}, sandboxtest.Features{Cgroup: group, Lacks: lacks})
}
