package events

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

func open(t *testing.T, cfg Config) *Log {
	t.Helper()
	l, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func closeLog(t *testing.T, l *Log) {
	t.Helper()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

func fill(l *Log, app fleet.AppName, n int) {
	for i := range n {
		l.Append(fleet.Event{Type: fleet.EventStart, App: app, Cause: fmt.Sprint("cause ", i)})
	}
}

func seqs(events []fleet.Event) string {
	var b strings.Builder
	for _, e := range events {
		fmt.Fprint(&b, e.Seq, " ")
	}
	return strings.TrimSpace(b.String())
}

func TestAppend_FillsInAndCopies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := open(t, Config{Node: "n1"})
		stages := &fleet.Stages{Hold: 7}
		inputs := map[string]float64{"load": 2, "nan": math.NaN(), "inf": math.Inf(-1)}
		lines := []string{"one"}
		l.Append(fleet.Event{Type: fleet.EventReady, App: "a", Stages: stages, Inputs: inputs, Log: lines})
		stages.Hold, inputs["load"], lines[0] = 8, 3, "two"
		l.Append(fleet.Event{Seq: 1, Time: time.Unix(5, 0), Node: "n2", Detail: strings.Repeat("é", maxText), Log: []string{strings.Repeat("x", maxText), strings.Repeat("y", maxText)}})
		l.Append(fleet.Event{Seq: 40})
		got := l.Last("", 10)
		if seqs(got) != "1 2 40" {
			t.Fatalf("seqs %s", seqs(got))
		}
		e := got[0]
		if e.Stages.Hold != 7 || e.Inputs["load"] != 2 || len(e.Inputs) != 1 || e.Log[0] != "one" || e.Node != "n1" || !e.Time.Equal(time.Now()) {
			t.Errorf("first event is %+v", e)
		}
		e = got[1]
		if e.Node != "n2" || e.Time.Unix() != 5 || len(e.Detail) > maxText+3 || len(e.Log) != 1 || e.Log[0][0] != 'y' {
			t.Errorf("second event is %+v", e)
		}
	})
}

func TestLast(t *testing.T) {
	l := open(t, Config{Ring: 5})
	for i := range 8 {
		l.Append(fleet.Event{App: fleet.AppName([]string{"a", "b"}[i%2])})
	}
	for name, c := range map[string]struct {
		app  fleet.AppName
		n    int
		want string
	}{
		"all that is left": {"", 100, "4 5 6 7 8"},
		"some":             {"", 2, "7 8"},
		"one app":          {"a", 100, "5 7"},
		"newest of an app": {"b", 1, "8"},
		"unknown app":      {"c", 3, ""},
		"none":             {"", 0, ""},
		"negative":         {"", -1, ""},
	} {
		if got := seqs(l.Last(c.app, c.n)); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

var errEnough = errors.New("enough")

// collect follows until n events were seen.
func collect(ctx context.Context, l *Log, app fleet.AppName, from From, n int) ([]fleet.Event, error) {
	var got []fleet.Event
	err := l.Follow(ctx, app, from, func(e fleet.Event) error {
		if got = append(got, e); len(got) == n {
			return errEnough
		}
		return nil
	})
	return got, err
}

func TestFollow_Begins(t *testing.T) {
	for name, c := range map[string]struct {
		app  fleet.AppName
		from From
		want string
	}{
		"future only":       {"", From{}, "9 10"},
		"last two":          {"", From{Last: 2}, "7 8 9 10"},
		"last two of a":     {"a", From{Last: 2}, "5 7 9"},
		"after six":         {"", From{After: 6}, "7 8 9 10"},
		"after the newest":  {"", From{After: 8}, "9 10"},
		"after the future":  {"", From{After: 80}, "9 10"},
		"more than it has":  {"", From{Last: 80}, "4 5 6 7 8 9 10"},
		"right at the edge": {"", From{After: 3}, "4 5 6 7 8 9 10"},
		"before the edge":   {"", From{After: 1}, "3 4 5 6 7 8 9 10"}, // 3: two were lost
	} {
		synctest.Test(t, func(t *testing.T) {
			l := open(t, Config{Ring: 5})
			add := func(i int) { l.Append(fleet.Event{App: fleet.AppName([]string{"b", "a"}[i%2])}) }
			for i := 1; i <= 8; i++ {
				add(i)
			}
			var got []fleet.Event
			done := make(chan error, 1)
			go func() {
				var err error
				got, err = collect(t.Context(), l, c.app, c.from, len(strings.Fields(c.want)))
				done <- err
			}()
			synctest.Wait()
			add(9)
			synctest.Wait()
			add(10)
			if err := <-done; !errors.Is(err, errEnough) {
				t.Errorf("%s: %v", name, err)
			}
			if seqs(got) != c.want {
				t.Errorf("%s: %q, want %q", name, seqs(got), c.want)
			}
			if name == "before the edge" && (got[0].Type != Lost || got[0].Inputs["lost"] != 2) {
				t.Errorf("%s: began with %+v", name, got[0])
			}
		})
	}
}

func TestFollow_NoLossNoDupAmongManyWriters(t *testing.T) {
	const writers, each = 4, 500
	l := open(t, Config{Ring: writers * each})
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() { fill(l, fleet.AppName(fmt.Sprint("app", w)), each) })
	}
	for range 3 {
		wg.Go(func() {
			got, err := collect(t.Context(), l, "", From{Last: writers * each}, writers*each)
			if !errors.Is(err, errEnough) {
				t.Error(err)
			}
			for i, e := range got {
				if e.Seq != uint64(i+1) {
					t.Errorf("event %d has number %d", i, e.Seq)
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestFollow_SlowIsToldWhatItLost(t *testing.T) {
	l := open(t, Config{Ring: 10})
	fill(l, "a", 1)
	var got []fleet.Event
	err := l.Follow(t.Context(), "", From{Last: 1}, func(e fleet.Event) error {
		if got = append(got, e); len(got) == 1 {
			fill(l, "a", 100) // while this one is slow
		}
		if e.Seq == 101 {
			return errEnough
		}
		return nil
	})
	if !errors.Is(err, errEnough) || len(got) != 12 {
		t.Fatalf("%v, saw %s", err, seqs(got))
	}
	if lost := got[1]; lost.Type != Lost || lost.Inputs["lost"] != 90 || lost.Seq != 91 {
		t.Errorf("told %+v", lost)
	}
	if seqs(got[2:]) != "92 93 94 95 96 97 98 99 100 101" {
		t.Errorf("then saw %s", seqs(got[2:]))
	}
}

func TestFollow_Ends(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := open(t, Config{})
		gone := errors.New("client is gone")
		ctx, cancel := context.WithCancelCause(t.Context())
		byCtx, byClose := make(chan error, 1), make(chan error, 1)
		go func() {
			_, err := collect(ctx, l, "", From{}, 0)
			byCtx <- err
		}()
		go func() {
			got, err := collect(t.Context(), l, "", From{}, 0)
			if len(got) != 1 {
				t.Errorf("saw %d events before the end, want 1", len(got))
			}
			byClose <- err
		}()
		synctest.Wait()
		cancel(gone)
		if err := <-byCtx; !errors.Is(err, gone) {
			t.Errorf("after cancel: %v", err)
		}
		fill(l, "a", 1)
		closeLog(t, l)
		closeLog(t, l)
		if err := <-byClose; !errors.Is(err, ErrClosed) {
			t.Errorf("after close: %v", err)
		}
		fill(l, "a", 1) // does nothing bad
	})
}

func TestOpen_GoesOnAfterClose(t *testing.T) {
	file := filepath.Join(t.TempDir(), "events")
	var last uint64
	for life := range 3 {
		l := open(t, Config{File: file})
		fill(l, "a", 3)
		l.Append(fleet.Event{Type: fleet.EventReady, App: "b", Kind: fleet.ColdStart, Stages: &fleet.Stages{Exec: 9}, Log: []string{"x"}, Inputs: map[string]float64{"n": 1}})
		last = l.Last("", 1)[0].Seq
		if got := len(l.Last("", 100)); got != 4*(life+1) {
			t.Errorf("life %d sees %d events", life, got)
		}
		closeLog(t, l)
	}
	if last != 12 {
		t.Errorf("the last number is %d, want 12", last)
	}
	e := open(t, Config{File: file}).Last("b", 1)[0]
	if e.Stages.Exec != 9 || e.Log[0] != "x" || e.Inputs["n"] != 1 || e.Kind != fleet.ColdStart || e.Time.IsZero() {
		t.Errorf("read back %+v", e)
	}
	info, err := os.Stat(file)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v %v", info.Mode(), err)
	}
}

func TestOpen_AfterACrash(t *testing.T) {
	for name, c := range map[string]struct {
		data     string
		want     string // the past
		wantNext uint64
	}{
		"killed":            {`{"seq":1}` + "\n" + `{"seq":2}` + "\n", "1 2", 100_003},
		"torn":              {`{"seq":1}` + "\n" + `{"seq":2,"ca`, "1", 100_002},
		"only torn":         {`{"seq":1`, "", 1},
		"zeros":             {`{"seq":1}` + "\n\x00\x00\x00\x00", "1", 100_002},
		"rubbish":           {`{"seq":1}` + "\nrubbish\n" + `{"seq":3}` + "\n", "1 3", 100_004},
		"numbers fall":      {`{"seq":5}` + "\n" + `{"seq":3}` + "\n\n", "5", 6},
		"number too large":  {`{"seq":18446744073709551615}` + "\n\n", "", 1},
		"closed":            {`{"seq":1}` + "\n\n", "1", 2},
		"closed, then torn": {`{"seq":1}` + "\n\n" + `{"se`, "1", 2},
		"empty":             {"", "", 1},
	} {
		file := filepath.Join(t.TempDir(), "events")
		if err := os.WriteFile(file, []byte(c.data), 0o644); err != nil {
			t.Fatal(err)
		}
		l := open(t, Config{File: file})
		if got := seqs(l.Last("", 10)); got != c.want {
			t.Errorf("%s: past %q, want %q", name, got, c.want)
		}
		fill(l, "a", 1)
		if got := l.Last("", 1)[0].Seq; got != c.wantNext {
			t.Errorf("%s: next is %d, want %d", name, got, c.wantNext)
		}
		closeLog(t, l)
		want := fmt.Sprint(strings.TrimSpace(c.want+" "), " ", c.wantNext)
		if got := seqs(open(t, Config{File: file}).Last("", 10)); got != strings.TrimSpace(want) {
			t.Errorf("%s: afterwards %q, want %q", name, got, want)
		}
	}
}

func TestRotate(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "events")
	l := open(t, Config{File: file, Size: 2000})
	for range 100 {
		fill(l, "a", 1)
	}
	closeLog(t, l)
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 3 {
		t.Fatalf("%v, %v", entries, err)
	}
	for _, e := range entries {
		if info, err := e.Info(); err != nil || info.Size() > 2001 || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v, %v", e.Name(), info.Size(), info.Mode(), err)
		}
	}
	got := open(t, Config{File: file, Size: 2000}).Last("", 1000)
	if len(got) < 30 || got[len(got)-1].Seq != 100 {
		t.Fatalf("read back %s", seqs(got))
	}
	for i, e := range got {
		if want := 101 - uint64(len(got)-i); e.Seq != want {
			t.Fatalf("event %d read back has number %d, want %d", i, e.Seq, want)
		}
	}
}

// buffer is a writer for slog that tests may read at the same time.
type buffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func TestFullDisk_CostsHistoryOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) }()
		ballast := filepath.Join(dir, "ballast")
		if err := os.WriteFile(ballast, make([]byte, 48<<10), 0o600); err != nil {
			t.Fatal(err)
		}
		var out buffer
		file := filepath.Join(dir, "events")
		l, err := Open(Config{File: file, Logger: slog.New(slog.NewTextHandler(&out, nil))})
		if err != nil {
			t.Fatal(err)
		}
		for range 4 { // each fills what is there
			fill(l, "a", 200)
			synctest.Wait()
		}
		if got := l.Last("", 1000); len(got) != 800 {
			t.Errorf("the ring has %d events, want 800", len(got))
		}
		if got := strings.Count(out.String(), "cannot be written"); got != 1 {
			t.Errorf("%d warnings, want 1:\n%s", got, &out)
		}
		if err := os.Remove(ballast); err != nil {
			t.Fatal(err)
		}
		time.Sleep(pause)
		fill(l, "a", 1)
		closeLog(t, l)
		if !strings.Contains(out.String(), "can be written again") {
			t.Errorf("nothing said about the recovery:\n%s", &out)
		}
		l, err = Open(Config{File: file, Logger: slog.New(slog.NewTextHandler(&out, nil))})
		if err != nil {
			t.Fatal(err)
		}
		if got := l.Last("", 1); len(got) != 1 || got[0].Seq != 801 {
			t.Errorf("read back %s", seqs(got))
		}
		closeLog(t, l)
		if strings.Contains(out.String(), "no events") {
			t.Errorf("half a line was left behind:\n%s", &out)
		}
	})
}

func TestAppend_DoesNotWaitForTheDisk(t *testing.T) {
	// A log whose writer never runs: what a stuck disk looks like.
	l := &Log{size: 10, disk: &disk{}, kick: make(chan struct{}, 1)}
	fill(l, "a", maxPending+5)
	if len(l.pending) != maxPending || l.dropped != 5 {
		t.Errorf("%d pending, %d dropped", len(l.pending), l.dropped)
	}
	if got := l.Last("", 1)[0].Seq; got != maxPending+5 {
		t.Errorf("the ring ends with %d", got)
	}
}

func TestOpen_Refuses(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(dir, "link")
	if err := os.Symlink("/etc/passwd", link); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{link, dir, "/dev/null", filepath.Join(dir, "no", "events")} {
		l, err := Open(Config{File: file})
		if err == nil {
			closeLog(t, l)
			t.Errorf("%s was opened", file)
		} else if fleet.Hint(err) == "" {
			t.Errorf("%s: no hint in %v", file, err)
		}
	}
}

func TestRotate_FailsAndRecovers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		file := filepath.Join(dir, "events")
		if err := os.MkdirAll(filepath.Join(file+".1", "in the way"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Join(file+".2", "in the way"), 0o700); err != nil {
			t.Fatal(err)
		}
		var out buffer
		l := open(t, Config{File: file, Size: 1000, Logger: slog.New(slog.NewTextHandler(&out, nil))})
		fill(l, "a", 50)
		synctest.Wait()
		if !strings.Contains(out.String(), "cannot be written") {
			t.Errorf("said only:\n%s", &out)
		}
		for _, old := range []string{".1", ".2"} {
			if err := os.RemoveAll(file + old); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(pause)
		fill(l, "a", 1)
		closeLog(t, l)
		if got := open(t, Config{File: file, Size: 1000}).Last("", 1); len(got) != 1 || got[0].Seq != 51 {
			t.Errorf("read back %s", seqs(got))
		}
	})
}
