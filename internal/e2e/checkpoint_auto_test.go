package e2e

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/api"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// sluggish is a server that needs BOOT until it listens, with BALLAST MiB of
// memory, and holds then what HOLD names. It is built once.
func sluggish(t *testing.T) string {
	t.Helper()
	root := filepath.Join(filepath.Dir(binary), "sluggish")
	if _, err := os.Stat(root); err == nil {
		return "dir:" + root
	}
	built := goApp(t, `package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"github.com/coder/websocket"
	"golang.org/x/sys/unix"
)

var kept [][]byte

func eat(mebibytes int, pause time.Duration) {
	for range mebibytes {
		b := make([]byte, 1<<20)
		rand.Read(b)
		kept = append(kept, b)
		time.Sleep(pause)
	}
}

func hold(what string) error {
	switch what {
	case "landlock": // a descriptor of a kind that CRIU does not know
		attr, size := unix.LandlockRulesetAttr{Handled_access_fs: unix.LANDLOCK_ACCESS_FS_EXECUTE}, unsafe.Sizeof(uint64(0))
		if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), size, 0); errno != 0 {
			return errno
		}
	case "deleted": // a large file that has no name any more
		fd, err := unix.Open("/large", unix.O_RDWR|unix.O_CREAT, 0o600)
		if err != nil {
			return err
		}
		b := make([]byte, 1<<20)
		for range 70 {
			if _, err := unix.Write(fd, b); err != nil {
				return err
			}
		}
		return os.Remove("/large")
	case "shared": // memory that belongs to the namespace
		id, err := unix.SysvShmGet(unix.IPC_PRIVATE, 4096, unix.IPC_CREAT|0o600)
		if err == nil {
			_, err = unix.SysvShmAttach(id, 0, 0)
		}
		return err
	case "file": // one of a volume
		_, err := unix.Open("/data/file", unix.O_RDWR|unix.O_CREAT, 0o600)
		return err
	}
	return nil
}

func main() {
	if len(os.Args) > 1 { // entered
		fmt.Println(os.Args[1:], os.Environ())
		return
	}
	fmt.Println("it boots")
	boot, _ := time.ParseDuration(os.Getenv("BOOT"))
	time.Sleep(boot)
	ballast, _ := strconv.Atoi(os.Getenv("BALLAST"))
	eat(ballast, 0)
	if err := hold(os.Getenv("HOLD")); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	var told atomic.Int64
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGUSR2, syscall.SIGTERM)
	go func() {
		for s := range signals {
			if s == syscall.SIGTERM {
				fmt.Println("it was asked to end")
				linger, _ := time.ParseDuration(os.Getenv("LINGER"))
				time.Sleep(linger)
				os.Exit(0)
			}
			told.Add(1)
		}
	}()
	http.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello") })
	var count atomic.Int64
	http.HandleFunc("/count", func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "count ", count.Add(1), " ", r.Host) })
	http.HandleFunc("/signals", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "signals ", told.Load()) })
	http.HandleFunc("/restored", func(w http.ResponseWriter, _ *http.Request) {
		name, ok := os.LookupEnv("FASTCONTAINER_RESTORED")
		text, err := os.ReadFile(name)
		switch {
		case !ok:
			io.WriteString(w, "unnamed")
		case errors.Is(err, fs.ErrNotExist):
			io.WriteString(w, "none")
		case err != nil:
			http.Error(w, err.Error(), 500)
		default:
			w.Write(text)
		}
	})
	http.HandleFunc("/say", func(w http.ResponseWriter, r *http.Request) { fmt.Println(r.FormValue("text")) })
	http.HandleFunc("/eat", func(w http.ResponseWriter, r *http.Request) {
		n, _ := strconv.Atoi(r.FormValue("n"))
		eat(n, 5*time.Millisecond)
		io.WriteString(w, "eaten")
	})
	http.HandleFunc("/stream", func(w http.ResponseWriter, _ *http.Request) {
		for n := range 3 {
			fmt.Fprintln(w, n)
			w.(http.Flusher).Flush()
			time.Sleep(20 * time.Millisecond)
		}
	})
	http.HandleFunc("/ws", func(w http.ResponseWriter, r *http.Request) {
		c, err := websocket.Accept(w, r, &websocket.AcceptOptions{InsecureSkipVerify: true})
		if err != nil {
			return
		}
		defer c.CloseNow()
		for {
			kind, b, err := c.Read(r.Context())
			if err != nil || c.Write(r.Context(), kind, b) != nil {
				return
			}
		}
	})
	http.ListenAndServe(":"+os.Getenv("PORT"), nil)
}
`)
	if err := os.Rename(strings.TrimPrefix(built, "dir:"), root); err != nil {
		t.Fatal(err)
	}
	return "dir:" + root
}

// starts of one kind, as they were measured.
func (d *daemon) starts(app fleet.AppName, kind fleet.StartKind) api.Start {
	d.t.Helper()
	detail, err := d.client.App(d.t.Context(), app)
	if err != nil {
		d.t.Fatal(err)
	}
	return d.of(detail, kind)
}

func (d *daemon) of(detail api.AppDetail, kind fleet.StartKind) api.Start {
	d.t.Helper()
	i := slices.IndexFunc(detail.Starts, func(s api.Start) bool { return s.Kind == kind })
	if i < 0 {
		d.t.Fatalf("nothing is known of %s starts: %+v", kind, detail.Starts)
	}
	return detail.Starts[i]
}

// An app that is slow is saved and restored without being asked for; one that
// is quick is not, nor one that wants to be started anew.
func TestCheckpoint_SlowAppsAreRestored(t *testing.T) {
	d := newSaver(t)
	img := sluggish(t)
	d.deployFile("quick", img, "restored_signal: USR2\n")
	d.deployFile("anew", img, "start: cold\nenv: {BOOT: 300ms}\n")
	d.deployFile("slow", img, "restored_signal: USR2\nenv: {BOOT: 300ms}\n")
	d.expect("quick.localhost", "/restored", "none")
	d.expect("anew.localhost", "/restored", "unnamed")
	d.expect("slow.localhost", "/restored", "none")
	for _, app := range []fleet.AppName{"quick", "anew", "slow"} {
		d.started(app, fleet.ColdStart)
	}
	// One is saved at a time, so those that came before would be saved by now.
	if e := d.saved("slow"); e.Cause == "" || e.Inputs["cold_ms"] < 300 || e.Instance != "" {
		t.Errorf("checkpoint: %+v", e)
	}
	if n := len(d.events("anew", fleet.EventCheckpoint)); n != 0 {
		t.Errorf("%d checkpoints of an app that wants none", n)
	}
	if s := d.starts("quick", fleet.ColdStart); s.UsualUS > 55_000 {
		t.Logf("this machine is too busy: the quick app took %d µs", s.UsualUS)
	} else if n := len(d.events("quick", fleet.EventCheckpoint)); n != 0 {
		t.Errorf("%d checkpoints of a quick app", n)
	}
	if s := d.starts("slow", fleet.CheckpointStart); s.Count != 0 || s.Disk < 100<<10 || !s.Next {
		t.Errorf("before the first restored start: %+v", s)
	}
	for range 2 {
		d.asleep("slow")
		d.expect("slow.localhost", "/", "hello")
		d.started("slow", fleet.CheckpointStart)
	}
	d.until("its memory is known", func() bool { return d.starts("slow", fleet.CheckpointStart).Memory > 0 })
	var detail api.AppDetail
	if err := json.Unmarshal([]byte(d.must("inspect", "slow", "-o", "json")), &detail); err != nil {
		t.Fatal(err)
	}
	cold, restored, thawed := d.of(detail, fleet.ColdStart), d.of(detail, fleet.CheckpointStart), d.of(detail, fleet.StandbyStart)
	if cold.Count != 1 || cold.UsualUS < 300_000 || cold.Memory == 0 || cold.Disk != 0 || cold.Next {
		t.Errorf("cold starts: %+v", cold)
	}
	if restored.Count != 2 || restored.UsualUS == 0 || restored.UsualUS > cold.UsualUS || restored.LongestUS < restored.UsualUS || restored.Disk == 0 || !restored.Next {
		t.Errorf("restored starts: %+v", restored)
	}
	if thawed.Count != 0 || thawed.Next {
		t.Errorf("thaws: %+v", thawed)
	}
}

// A restored program finds what is new about it, and gets the signal that its
// app asked for.
func TestCheckpoint_RestoredOnesAreTold(t *testing.T) {
	d := newSaver(t)
	d.deployFile("told", sluggish(t), "start: checkpoint\nrestored_signal: USR2\nenv: {BOOT: 300ms}\n")
	d.expect("told.localhost", "/restored", "none")
	d.expect("told.localhost", "/signals", "signals 0")
	d.saved("told")
	var seeds []string
	for range 2 {
		d.asleep("told")
		before := time.Now()
		_, text := d.get("told.localhost", "/restored")
		i := d.started("told", fleet.CheckpointStart)
		var news struct {
			Time     time.Time        `json:"time"`
			Seed     string           `json:"seed"`
			Instance fleet.InstanceID `json:"instance"`
			Address  netip.Addr       `json:"address"`
		}
		if err := json.Unmarshal([]byte(text), &news); err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		if news.Time.Before(before) || news.Time.After(time.Now()) || len(news.Seed) != 64 || news.Instance != i.ID || news.Address.String()+":8080" != i.Address {
			t.Errorf("it is told %s, and is %s at %s", text, i.ID, i.Address)
		}
		seeds = append(seeds, news.Seed)
		d.until("the signal is there", func() bool { _, s := d.get("told.localhost", "/signals"); return s == "signals 1" })
	}
	differ(t, "seed", seeds, func(s string) string { return s })
}

// An app that wants to be warm is asked once before its processes are saved, as
// its visitors ask, and left alone for a while.
func TestCheckpoint_WarmOnesWereAskedOnce(t *testing.T) {
	d := newSaver(t)
	d.deployFile("warmed", sluggish(t), "start: checkpoint\nwarm: /count\nenv: {BOOT: 300ms}\n")
	d.expect("warmed.localhost", "/count", "count 1 warmed.localhost")
	d.saved("warmed")
	for range 2 {
		d.asleep("warmed")
		d.expect("warmed.localhost", "/count", "count 2 warmed.localhost")
		d.started("warmed", fleet.CheckpointStart)
	}
}

// A standby that is always wanted is filled by a restored start.
func TestCheckpoint_FillsStandbys(t *testing.T) {
	d := newSaver(t)
	d.deployFile("shop", sluggish(t), "start: standby\nrestored_signal: USR2\nidle: 200ms\nlifetime: 3s\nenv: {BOOT: 300ms}\n")
	d.isStandby("shop")
	d.started("shop", fleet.ColdStart)
	d.saved("shop")
	d.until("a restored one stands by", func() bool {
		list := d.instances("shop")
		return len(list) == 1 && list[0].State == fleet.StateStandby && list[0].Kind == fleet.CheckpointStart
	})
	id, starts := d.instances("shop")[0].ID, len(d.events("shop", fleet.EventStart))
	d.expect("shop.localhost", "/", "hello")
	if e := d.await("shop", fleet.EventThaw, nil); e.Instance != id {
		t.Errorf("%s was thawed, not %s", e.Instance, id)
	}
	if n := len(d.events("shop", fleet.EventStart)); n != starts {
		t.Errorf("%d starts for a request that a standby can answer", n-starts)
	}
	d.isStandby("shop")
}
