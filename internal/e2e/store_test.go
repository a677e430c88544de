package e2e

import (
	"bufio"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"testing"

	"go.etcd.io/etcd/server/v3/embed"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// serveEtcd is a server of etcd in a process of its own.
func serveEtcd(client, dir string) {
	c := embed.NewConfig()
	c.Dir, c.LogLevel = dir, "error"
	u, err := url.Parse(client)
	if err == nil {
		c.ListenClientUrls, c.AdvertiseClientUrls = []url.URL{*u}, []url.URL{*u}
		c.ListenPeerUrls = []url.URL{}
		var e *embed.Etcd
		if e, err = embed.StartEtcd(c); err == nil {
			<-e.Server.ReadyNotify()
			fmt.Println("ready")
			select {}
		}
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// With the store away, running apps go on and sleeping ones wake; a deploy says
// plainly why it cannot be; and when the store is back, so are deploys.
func TestStore_AwayIsNotOnTheRequestsPath(t *testing.T) {
	endpoint, dir := "http://"+freeAddr(t), t.TempDir()
	var etcd *exec.Cmd
	t.Cleanup(func() { _ = etcd.Process.Kill(); _ = etcd.Wait() }) // after the daemon's end
	launch := func() *exec.Cmd {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), "E2E_ETCD="+endpoint, "E2E_DIR="+dir)
		cmd.Stderr = t.Output()
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
			t.Fatalf("etcd: %q, %v", line, err)
		}
		return cmd
	}
	etcd = launch()
	d := newDaemon(t, "", "--etcd", endpoint)
	img := busybox(t, map[string]string{"index.html": "served"})
	d.deploy("awake", img, httpd...)
	d.deploy("asleep", img, httpd...)
	d.expect("awake.localhost", "/", "served")

	_ = etcd.Process.Kill()
	_ = etcd.Wait()
	d.expect("awake.localhost", "/", "served")
	d.expect("asleep.localhost", "/", "served")
	if err := killPID(d.instances("awake")[0].PID); err != nil {
		t.Fatal(err)
	}
	d.await("awake", fleet.EventFail, nil)
	d.expect("awake.localhost", "/", "served")
	out, code := d.cli(append([]string{"deploy", "more", "--image", img}, httpd...)...)
	if code != 1 || !strings.Contains(out, "store is away") || !strings.Contains(out, "what runs goes on") {
		t.Errorf("deploy: %d %q", code, out)
	}
	if out := d.must("apps"); !strings.Contains(out, "awake") {
		t.Errorf("apps: %q", out)
	}

	etcd = launch()
	d.until("deploys are possible again", func() bool {
		_, code := d.cli(append([]string{"deploy", "more", "--image", img}, httpd...)...)
		return code == 0
	})
	d.expect("more.localhost", "/", "served")
}
