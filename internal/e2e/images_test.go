package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func killPID(pid int) error { return syscall.Kill(pid, syscall.SIGKILL) }

// goApp builds a static Go program into a root filesystem.
func goApp(t *testing.T, source string) string {
	t.Helper()
	root := filepath.Join(t.TempDir(), "rootfs")
	if err := os.MkdirAll(root, 0o755); err != nil {
		t.Fatal(err)
	}
	// Inside the module, so that it may use what the module requires.
	dir, err := os.MkdirTemp(".", "testdata-app")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	write(t, filepath.Join(dir, "main.go"), source)
	cmd := exec.Command("go", "build", "-o", filepath.Join(root, "app"), "./"+dir)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build app: %v\n%s", err, out)
	}
	return "dir:" + root
}

// websocketApp echoes messages at /ws and tells its version.
func websocketApp(t *testing.T, version string) string {
	t.Helper()
	img := goApp(t, `package main

import (
	"io"
	"net/http"

	"github.com/coder/websocket"
)

func main() {
	http.HandleFunc("/version", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "`+version+`") })
	http.HandleFunc("/ws", func(w http.ResponseWriter, r *http.Request) {
		c, err := websocket.Accept(w, r, &websocket.AcceptOptions{InsecureSkipVerify: true})
		if err != nil {
			return
		}
		defer c.CloseNow()
		for {
			kind, b, err := c.Read(r.Context())
			if err != nil {
				return
			}
			if err := c.Write(r.Context(), kind, b); err != nil {
				return
			}
		}
	})
	http.ListenAndServe(":8080", nil)
}
`)
	return img
}
