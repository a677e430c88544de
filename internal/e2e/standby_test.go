package e2e

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// ticker is a server that counts how often its own timer fired, closes kept
// connections soon, and tells its process's number.
func ticker(t *testing.T) string {
	t.Helper()
	return goApp(t, `package main

import (
	"fmt"
	"net/http"
	"os"
	"sync/atomic"
	"time"
)

func main() {
	time.Sleep(200 * time.Millisecond) // it boots
	var ticks atomic.Int64
	go func() {
		for range time.Tick(5 * time.Millisecond) {
			ticks.Add(1)
		}
	}()
	http.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "ticks ", ticks.Load()) })
	s := &http.Server{Addr: ":" + os.Getenv("PORT"), IdleTimeout: 100 * time.Millisecond}
	s.ListenAndServe()
}
`)
}

// isStandby waits until an app has one instance, which is frozen.
func (d *daemon) isStandby(app fleet.AppName) {
	d.t.Helper()
	d.until("standby", func() bool {
		list := d.instances(app)
		return len(list) == 1 && list[0].State == fleet.StateStandby
	})
}

// What is idle freezes and uses no processor; a request thaws it, over a
// connection that is not stale, also when many come at once.
func TestStandby_FreezesAndThaws(t *testing.T) {
	d := newDaemon(t, "server_timing: true")
	d.deploy("nap", ticker(t), "--idle", "100ms", "--", "/app")
	d.expect("nap.localhost", "/", "ticks")
	d.isStandby("nap")
	time.Sleep(20 * time.Millisecond)
	before := d.instances("nap")[0].CPU
	ticks := func() (n int) {
		_, body := d.get("nap.localhost", "/")
		if _, err := fmt.Sscanf(body, "ticks %d", &n); err != nil {
			t.Fatalf("got %q", body)
		}
		return n
	}
	time.Sleep(time.Second)
	if used := d.instances("nap")[0].CPU.Used; used > 0.001 {
		t.Errorf("it uses %v of a core while it is frozen (before: %+v)", used, before)
	}
	if out := d.must("apps"); !strings.Contains(out, "standby") {
		t.Errorf("apps:\n%s", out)
	}
	first := ticks()
	if first > 200 {
		t.Errorf("its timer went on: %d ticks", first)
	}
	thaw := d.await("nap", fleet.EventThaw, nil)
	if s := thaw.Stages; thaw.Kind != fleet.StandbyStart || s == nil || s.Claim == 0 || s.FirstByte == 0 || s.Exec != 0 || thaw.Cause == "" {
		t.Errorf("thaw: %+v %+v", thaw, thaw.Stages)
	}
	// Again and again, with a client that keeps its connection, at every moment
	// of a freeze.
	client := &http.Client{Timeout: time.Minute, Transport: &http.Transport{MaxIdleConnsPerHost: 8}}
	dice := rand.New(rand.NewPCG(3, 5))
	for round := range 40 {
		var wg sync.WaitGroup
		for range 1 + round%8 {
			wg.Go(func() {
				req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+d.http+"/", nil)
				if err != nil {
					t.Error(err)
					return
				}
				req.Host = "nap.localhost"
				resp, err := client.Do(req)
				if err != nil {
					t.Error(err)
					return
				}
				defer func() { _ = resp.Body.Close() }()
				if b, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != http.StatusOK {
					t.Errorf("round %d: %d %q %v", round, resp.StatusCode, b, err)
				}
			})
		}
		wg.Wait()
		time.Sleep(90*time.Millisecond + time.Duration(dice.IntN(30))*time.Millisecond)
	}
	if n := len(d.events("nap", fleet.EventStart)); n != 1 {
		t.Errorf("%d starts", n)
	}
	// What is open is in use.
	d.deploy("socket", websocketApp(t, "one"), "--idle", "100ms", "--", "/app")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	ws, _, err := websocket.Dial(ctx, "ws://"+d.http+"/ws", &websocket.DialOptions{Host: "socket.localhost"})
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(500 * time.Millisecond)
	if state := d.instances("socket")[0].State; state != fleet.StateReady {
		t.Errorf("with an open WebSocket it is %s", state)
	}
	_ = ws.Close(websocket.StatusNormalClosure, "")
	d.isStandby("socket")
}

// One is kept frozen from the deploy on where that is wanted; a newer revision
// replaces it, exec says what is the matter, and delete leaves nothing.
func TestStandby_IsKeptWhereItIsWanted(t *testing.T) {
	d := newDaemon(t, "")
	d.deploy("shop", ticker(t), "--start", "standby", "--idle", "200ms", "--lifetime", "2s", "--", "/app")
	d.isStandby("shop")
	first := d.instances("shop")[0].ID
	if out, code := d.cli("exec", string(first), "--", "/app"); code == 0 || !strings.Contains(out, "frozen") || !strings.Contains(out, "hint:") {
		t.Errorf("exec: %d %q", code, out)
	}
	began := time.Now()
	d.expect("shop.localhost", "/", "ticks")
	t.Logf("the first request took %v", time.Since(began))
	if n := len(d.events("shop", fleet.EventStart)); n != 1 {
		t.Errorf("%d starts before the first answer", n)
	}
	// Its life ends, frozen, and the next one stands by.
	d.until("a successor stands by", func() bool {
		list := d.instances("shop")
		return len(list) == 1 && list[0].State == fleet.StateStandby && list[0].ID != first
	})
	d.deploy("shop", ticker(t), "--start", "standby", "--idle", "200ms", "--", "/app")
	d.until("the new revision stands by", func() bool {
		list := d.instances("shop")
		return len(list) == 1 && list[0].State == fleet.StateStandby && list[0].Revision == "shop@2"
	})
	d.must("stop", "shop")
	d.until("stopped, none is kept", func() bool { return len(d.instances("shop")) == 0 })
}

// A process that is killed while it is frozen is noticed, and the next request
// starts another.
func TestStandby_DiesFrozen(t *testing.T) {
	d := newDaemon(t, "")
	d.deploy("frail", ticker(t), "--idle", "100ms", "--", "/app")
	d.expect("frail.localhost", "/", "ticks")
	d.isStandby("frail")
	pid := d.instances("frail")[0].PID
	if err := killPID(pid); err != nil {
		t.Fatal(err)
	}
	// (On cgroup v1 it dies with the thaw.)
	d.expect("frail.localhost", "/", "ticks")
	d.until("an event says what became of it", func() bool {
		list := append(d.events("frail", fleet.EventFail), d.events("frail", fleet.EventStop)...)
		return len(list) > 0 && strings.Contains(list[0].Detail, "SIGKILL")
	})
	if n := len(d.events("frail", fleet.EventStart)); n != 2 {
		t.Errorf("%d starts", n)
	}
}

// The daemon is killed while instances freeze and thaw. The next one takes the
// frozen ones over as they are, thaws what was about to, and loses none.
func TestStandby_DaemonKilled(t *testing.T) {
	d := newDaemon(t, "")
	img := ticker(t)
	apps := []string{"a", "b", "c"}
	for _, n := range apps {
		d.deploy(n, img, "--idle", "30ms", "--", "/app")
		d.expect(n+".localhost", "/", "ticks")
	}
	d.isStandby("a")
	id := d.instances("a")[0].ID
	for range 6 {
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for _, n := range apps[1:] {
			wg.Go(func() {
				for ctx.Err() == nil {
					d.poke(ctx, n+".localhost")
					time.Sleep(time.Duration(25+rand.IntN(10)) * time.Millisecond)
				}
			})
		}
		time.Sleep(time.Duration(50+rand.IntN(150)) * time.Millisecond)
		d.kill()
		cancel()
		wg.Wait()
		d.start()
		for _, n := range apps[1:] {
			d.expect(n+".localhost", "/", "ticks")
		}
	}
	if list := d.instances("a"); len(list) != 1 || list[0].ID != id || list[0].State != fleet.StateStandby {
		t.Errorf("the frozen one is %+v", list)
	}
	d.expect("a.localhost", "/", "ticks")
	for _, n := range apps {
		if starts := len(d.events(fleet.AppName(n), fleet.EventStart)); starts != 1 {
			t.Errorf("%s: %d starts", n, starts)
		}
	}
}
