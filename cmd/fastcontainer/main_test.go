package main

import (
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"fastcontainer": func() { os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) },
	})
}

func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			e.Setenv("FASTCONTAINER_SERVER", "unix://"+e.WorkDir+"/run/api.sock")
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"rootfs": rootfs, "await": await, "unplug": unplug,
		},
	})
}

// rootfs makes a root filesystem with busybox: rootfs DIR.
func rootfs(ts *testscript.TestScript, _ bool, args []string) {
	root := ts.MkAbs(args[0])
	for _, d := range []string{"bin", "www", "tmp"} {
		ts.Check(os.MkdirAll(filepath.Join(root, d), 0o755))
	}
	b, err := os.ReadFile("/bin/busybox")
	ts.Check(err)
	ts.Check(os.WriteFile(filepath.Join(root, "bin/busybox"), b, 0o755))
	for _, name := range []string{"sh", "httpd", "echo", "cat", "id"} {
		ts.Check(os.Symlink("busybox", filepath.Join(root, "bin", name)))
	}
	ts.Check(os.WriteFile(filepath.Join(root, "www/index.html"), []byte("hello\n"), 0o644))
}

// await waits until somebody listens on a socket: await PATH.
func await(ts *testscript.TestScript, _ bool, args []string) {
	deadline := time.Now().Add(30 * time.Second)
	for {
		conn, err := net.Dial("unix", ts.MkAbs(args[0]))
		if err == nil {
			_ = conn.Close()
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("nobody listens on %s: %v", args[0], err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// unplug removes the network that a daemon left for the next one.
func unplug(ts *testscript.TestScript, _ bool, args []string) {
	name := "fastcontainer-" + args[0]
	ts.Check(ts.Exec("ip", "netns", "delete", name)) // the host's interface goes with it
	for _, family := range []string{"ip", "inet"} {
		ts.Check(ts.Exec("nft", "delete", "table", family, name))
	}
}
