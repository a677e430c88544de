package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// A sleeping app, ten first requests at once: one start, ten answers.
func TestFirstRequests_MakeOneStart(t *testing.T) {
	d := newDaemon(t, "server_timing: true")
	d.deploy("hello", busybox(t, map[string]string{"index.html": "hello\n"}), httpd...)
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			if code, body := d.get("hello.localhost", "/"); code != 200 || body != "hello\n" {
				t.Errorf("got %d %q", code, body)
			}
		})
	}
	wg.Wait()
	if starts := d.events("hello", fleet.EventStart); len(starts) != 1 || starts[0].Cause == "" {
		t.Errorf("starts: %+v", starts)
	}
	ready := d.await("hello", fleet.EventReady, nil)
	if s := ready.Stages; ready.Kind != fleet.ColdStart || s == nil || s.Exec == 0 || s.Listen == 0 || s.Connect == 0 || s.FirstByte == 0 {
		t.Errorf("ready: %+v %+v", ready, ready.Stages)
	}
	if code, body := d.get("nobody.localhost", "/"); code != http.StatusNotFound || !strings.Contains(body, "404") {
		t.Errorf("unknown host: %d %q", code, body)
	}
}

// Idleness ends an instance, the next request starts another.
func TestIdle_RetiresAndTheNextRequestStarts(t *testing.T) {
	d := newDaemon(t, "")
	d.deploy("nap", busybox(t, map[string]string{"index.html": "z"}), append([]string{"--idle", "300ms", "--start", "cold"}, httpd...)...)
	d.expect("nap.localhost", "/", "z")
	first := d.await("nap", fleet.EventStop, nil)
	if n := len(d.instances("nap")); n != 0 {
		t.Errorf("%d instances", n)
	}
	d.expect("nap.localhost", "/", "z")
	if second := d.events("nap", fleet.EventStart); len(second) != 2 || second[1].Instance == first.Instance {
		t.Errorf("starts: %+v", second)
	}
}

// Under load nothing is lost while instances live half a second, and every one
// of them is replaced before it leaves.
func TestLifetime_RenewsWithoutLoss(t *testing.T) {
	d := newDaemon(t, "")
	d.deploy("short", busybox(t, map[string]string{"index.html": "alive"}), append([]string{"--lifetime", "500ms"}, httpd...)...)
	stop := time.Now().Add(4 * time.Second)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for time.Now().Before(stop) {
				if code, body := d.get("short.localhost", "/"); code != 200 {
					t.Errorf("got %d %q", code, body)
					return
				}
			}
		})
	}
	wg.Wait()
	if n := len(d.events("short", fleet.EventRetire)); n < 3 {
		t.Errorf("%d instances retired in 4 s", n)
	}
}

// The daemon is killed while a WebSocket is open; the next one adopts the
// instance, which goes on; and when its life ends, the next request comes from
// the newer image.
func TestKill_NewDaemonAdopts(t *testing.T) {
	d := newDaemon(t, "")
	d.deploy("app", websocketApp(t, "one"), "--", "/app")
	d.expect("app.localhost", "/version", "one")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	ws, _, err := websocket.Dial(ctx, "ws://"+d.http+"/ws", &websocket.DialOptions{Host: "app.localhost"})
	if err != nil {
		t.Fatal(err)
	}
	if err := ws.Write(ctx, websocket.MessageText, []byte("ping")); err != nil {
		t.Fatal(err)
	}
	if _, b, err := ws.Read(ctx); err != nil || string(b) != "ping" {
		t.Fatalf("echo: %q, %v", b, err)
	}
	before := d.instances("app")
	d.kill()
	if _, _, err := ws.Read(ctx); err == nil {
		t.Error("the WebSocket outlived its daemon")
	}
	_ = ws.CloseNow()
	d.start()
	after := d.instances("app")
	if !slices.Equal(names(before), names(after)) || after[0].PID != before[0].PID {
		t.Fatalf("before %+v, after %+v", before, after)
	}
	d.await("app", fleet.EventAdopt, nil)
	d.expect("app.localhost", "/version", "one")
	if n := len(d.events("app", fleet.EventStart)); n != 1 {
		t.Errorf("%d starts", n)
	}
	d.deploy("app", websocketApp(t, "two"), "--", "/app")
	d.until("the newer image answers", func() bool { _, body := d.get("app.localhost", "/version"); return body == "two" })
}

// An instance that ends by itself is noticed at once, and the next request
// starts another.
func TestCrash_NextRequestStarts(t *testing.T) {
	d := newDaemon(t, "")
	d.deploy("frail", busybox(t, map[string]string{"index.html": "here"}), httpd...)
	d.expect("frail.localhost", "/", "here")
	// A shell inside cannot kill the first process of its namespace; the host can.
	pid := d.instances("frail")[0].PID
	if err := killPID(pid); err != nil {
		t.Fatal(err)
	}
	d.await("frail", fleet.EventFail, func(e fleet.Event) bool { return strings.Contains(e.Detail, "SIGKILL") })
	d.expect("frail.localhost", "/", "here")
}

// What a tenant does wrong is answered quickly and explained in the events,
// never in the response.
func TestFailing_AnsweredQuicklyAndExplained(t *testing.T) {
	d := newDaemon(t, "")
	img := busybox(t, nil)
	for name, c := range map[string]struct {
		command []string
		status  int
		detail  string
	}{
		"exits":  {[]string{"sh", "-c", "echo secret words; exit 3"}, http.StatusBadGateway, "exit code 3"},
		"absent": {[]string{"no-such-program"}, http.StatusBadGateway, "no-such-program"},
	} {
		d.deploy(name, img, append([]string{"--"}, c.command...)...)
		code, body := d.get(name+".localhost", "/")
		if code != c.status || strings.Contains(body, "secret") || strings.Contains(body, "exit code") {
			t.Errorf("%s: %d %q", name, code, body)
		}
		e := d.await(fleet.AppName(name), fleet.EventFail, nil)
		if !strings.Contains(e.Detail, c.detail) {
			t.Errorf("%s: %+v", name, e)
		}
		// While it is failing, nobody waits and little is tried.
		began := time.Now()
		for range 20 {
			if code, _ := d.get(name+".localhost", "/"); code != c.status {
				t.Errorf("%s: got %d", name, code)
			}
		}
		if n := len(d.events(fleet.AppName(name), fleet.EventStart)); n > 10 {
			t.Errorf("%s: %d starts in %v", name, n, time.Since(began))
		}
	}
	if e := d.await("exits", fleet.EventFail, nil); !slices.Contains(e.Log, "secret words") {
		t.Errorf("log of the event: %q", e.Log)
	}
}

// A port that is never opened is a 504 after the start's time is over.
func TestNeverListens_GatewayTimeout(t *testing.T) {
	d := newDaemon(t, "")
	file := d.dir + "/app.yaml"
	write(t, file, fmt.Sprintf("name: mute\nimage: %s\ncommand: [sleep, '1000']\nready: {timeout: 1s}\n", busybox(t, nil)))
	d.must("deploy", "-f", file)
	if code, _ := d.get("mute.localhost", "/"); code != http.StatusGatewayTimeout {
		t.Errorf("got %d", code)
	}
	d.await("mute", fleet.EventFail, func(e fleet.Event) bool { return strings.Contains(e.Detail, "port 8080 is not open") })
}

// Clients that leave stop waiting; the start goes on for the others.
func TestHold_ClientLeaves(t *testing.T) {
	d := newDaemon(t, "")
	d.deploy("slow", busybox(t, map[string]string{"index.html": "at last"}), "--", "sh", "-c", "sleep 1; exec httpd -f -p 8080 -h /www")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+d.http+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Host = "slow.localhost"
	if _, err := d.do(req); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	d.expect("slow.localhost", "/", "at last")
	if n := len(d.events("slow", fleet.EventStart)); n != 1 {
		t.Errorf("%d starts", n)
	}
}
