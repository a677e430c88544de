package e2e

import (
	"context"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/homeostat"
)

// A restored instance is entered, writes to a log of its own, streams, gets
// more memory when it needs some, and ends when it is asked to.
func TestCheckpoint_RestoredOnesAreNormal(t *testing.T) {
	d := newSaver(t)
	d.deployFile("app", sluggish(t), "start: checkpoint\nresources: {memory: {rest: 48Mi, peak: 160Mi}}\nenv: {BOOT: 100ms}\n")
	d.expect("app.localhost", "/", "hello")
	d.saved("app")
	d.asleep("app")
	if code, body := d.get("app.localhost", "/stream"); code != http.StatusOK || body != "0\n1\n2\n" {
		t.Errorf("stream: %d %q", code, body)
	}
	i := d.started("app", fleet.CheckpointStart)

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
		t.Errorf("echo: %q, %v", b, err)
	}
	_ = ws.Close(websocket.StatusNormalClosure, "")

	if out := d.must("exec", "app", "--", "/app", "enter"); !strings.HasPrefix(out, "[enter]") || !strings.Contains(out, "FASTCONTAINER_APP=app") {
		t.Errorf("exec: %q", out)
	}
	if code, _ := d.get("app.localhost", "/say?text=restored+words"); code != http.StatusOK {
		t.Errorf("say: %d", code)
	}
	if out := d.must("logs", string(i.ID)); out != "restored words\n" {
		t.Errorf("its log: %q", out)
	}

	if i.Memory.Limit != 48<<20 {
		t.Errorf("it has %d bytes of memory", i.Memory.Limit)
	}
	d.expect("app.localhost", "/eat?n=90", "eaten")
	d.await("app", fleet.EventResize, func(e fleet.Event) bool { return e.Cause == homeostat.CauseMemory })
	if now := d.started("app", fleet.CheckpointStart); now.PID != i.PID || now.Memory.Limit <= 48<<20 || now.Memory.Used < 90<<20 {
		t.Errorf("before %+v, after %+v", i, now)
	}

	d.asleep("app")
	e := d.await("app", fleet.EventStop, func(e fleet.Event) bool { return e.Instance == i.ID })
	if e.Detail != "" {
		t.Errorf("it did not stop by itself: %s", e.Detail)
	}
	if out := d.must("logs", string(i.ID)); !strings.HasSuffix(out, "it was asked to end\n") {
		t.Errorf("its log: %q", out)
	}

	// The kernel ends what needs more than the peak, and the next one is restored.
	if code, _ := d.get("app.localhost", "/eat?n=300"); code != http.StatusBadGateway {
		t.Errorf("beyond the peak: %d", code)
	}
	d.await("app", fleet.EventFail, func(e fleet.Event) bool { return strings.Contains(e.Cause, homeostat.CauseOOM) })
	d.until("it is started again", func() bool { code, _ := d.get("app.localhost", "/"); return code == http.StatusOK })
	d.started("app", fleet.CheckpointStart)
}

// Renewals are restored, too, and nothing is lost.
func TestCheckpoint_RenewalsAreRestored(t *testing.T) {
	d := newSaver(t)
	d.deployFile("app", sluggish(t), "start: checkpoint\nlifetime: 2s\nenv: {BOOT: 300ms}\n")
	d.expect("app.localhost", "/", "hello")
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	for range 2 {
		wg.Go(func() {
			for ctx.Err() == nil {
				if code, body := d.get("app.localhost", "/"); code != http.StatusOK {
					t.Errorf("got %d %q", code, body)
					return
				}
			}
		})
	}
	d.until("two restored renewals", func() bool {
		restored := 0
		for _, e := range d.events("app", fleet.EventReady) {
			if e.Kind == fleet.CheckpointStart && strings.HasPrefix(e.Cause, homeostat.CauseRenewal) {
				restored++
			}
		}
		return restored >= 2
	})
	cancel()
	wg.Wait()
	if list := d.events("app", fleet.EventFail); len(list) != 0 {
		t.Errorf("failures: %+v", list)
	}
}
