package imagetest

import (
	"bytes"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"
)

// Registry is a process of Debian's docker-registry on a loopback port, with
// storage of its own.
type Registry struct {
	// Host is its address, as it stands in references.
	Host   string
	t      testing.TB
	config string
	cmd    *exec.Cmd
	out    bytes.Buffer
	done   chan struct{}
}

// StartRegistry starts a registry that anybody may use. It ends with the test.
func StartRegistry(t testing.TB) *Registry {
	t.Helper()
	return startRegistry(t, "")
}

// StartPrivateRegistry starts a registry that asks for user and password.
func StartPrivateRegistry(t testing.TB, user, password string) *Registry {
	t.Helper()
	hash, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "htpasswd")
	write(t, file, user+":"+string(hash)+"\n")
	return startRegistry(t, fmt.Sprintf("auth:\n  htpasswd:\n    realm: test\n    path: %s\n", file))
}

func startRegistry(t testing.TB, auth string) *Registry {
	t.Helper()
	if _, err := exec.LookPath("docker-registry"); err != nil {
		t.Fatal("docker-registry is missing: apt-get install docker-registry")
	}
	dir := t.TempDir()
	r := &Registry{t: t, config: filepath.Join(dir, "config.yml")}
	for range 5 {
		// Somebody may take the port between our look and the registry's: try again.
		r.Host = freeAddress(t)
		write(t, r.config, fmt.Sprintf("version: 0.1\nlog:\n  level: error\n  accesslog:\n    disabled: true\nstorage:\n  filesystem:\n    rootdirectory: %s\n  delete:\n    enabled: true\nhttp:\n  addr: %s\n%s",
			filepath.Join(dir, "storage"), r.Host, auth))
		if r.start() {
			t.Cleanup(r.Kill)
			return r
		}
	}
	t.Fatalf("docker-registry does not start:\n%s", r.out.String())
	return nil
}

func freeAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func (r *Registry) start() bool {
	cmd := exec.Command("docker-registry", "serve", r.config)
	r.out.Reset()
	cmd.Stdout, cmd.Stderr = &r.out, &r.out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Env = append(os.Environ(), "OTEL_TRACES_EXPORTER=none")
	if err := cmd.Start(); err != nil {
		r.t.Fatalf("start docker-registry: %v", err)
	}
	r.cmd, r.done = cmd, make(chan struct{})
	go func(done chan struct{}) {
		_ = cmd.Wait()
		close(done)
	}(r.done)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); {
		resp, err := http.Get("http://" + r.Host + "/v2/")
		if err == nil {
			_ = resp.Body.Close()
			return true
		}
		select {
		case <-r.done:
			return false
		case <-tick.C:
		}
	}
	r.Kill()
	return false
}

// Kill ends the registry at once, as a crash does. It may be repeated.
func (r *Registry) Kill() {
	_ = r.cmd.Process.Kill()
	<-r.done
}

// Restart starts it again after Kill, at the same address with the same content.
func (r *Registry) Restart() {
	r.t.Helper()
	if !r.start() {
		r.t.Fatalf("docker-registry does not start again:\n%s", r.out.String())
	}
}
