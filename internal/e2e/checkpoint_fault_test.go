package e2e

import (
	"bytes"
	"errors"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/etcd"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/store"
)

// stored are the files and directories of the daemon's checkpoints that match.
func (d *daemon) stored(pattern string) []string {
	d.t.Helper()
	found, err := filepath.Glob(filepath.Join(d.dir, "data/checkpoints", pattern))
	if err != nil {
		d.t.Fatal(err)
	}
	return found
}

// coldAgain expects that an app's next start is a cold one, and that nothing
// was or will be tried to make another checkpoint of it. witness is another app,
// which will be saved: one is at a time, in the order of the starts.
func (d *daemon) coldAgain(app fleet.AppName, witness string) {
	d.t.Helper()
	tried := len(d.events(app, fleet.EventCheckpoint))
	d.asleep(app)
	d.expect(string(app)+".localhost", "/", "hello")
	d.started(app, fleet.ColdStart)
	d.deployFile(witness, sluggish(d.t), "start: checkpoint\n")
	d.expect(witness+".localhost", "/", "hello")
	d.saved(fleet.AppName(witness))
	if list := d.events(app, fleet.EventCheckpoint); len(list) != tried {
		d.t.Errorf("it was tried again: %+v", list)
	}
	if found := d.stored("*/" + string(app) + ".*/content"); len(found) != 0 {
		d.t.Errorf("kept: %q", found)
	}
}

// Processes that CRIU does not know how to save stay as they are, start cold,
// and are not tried again, also by the next daemon.
func TestCheckpoint_WhatCannotBeSavedStartsCold(t *testing.T) {
	d := newSaver(t)
	for app, c := range map[string]struct{ hold, want string }{
		"odd":    {"landlock", "CRIU failed: Can't dump file"},
		"huge":   {"deleted", "increase limit"},
		"shared": {"shared", "System V shared memory"},
	} {
		d.deployFile(app, sluggish(t), "start: checkpoint\nresources: {memory: {rest: 300Mi}}\nenv: {HOLD: "+c.hold+"}\n")
		d.expect(app+".localhost", "/", "hello")
		e := d.await(fleet.AppName(app), fleet.EventCheckpoint, nil)
		if !strings.Contains(e.Cause, "cannot be saved") || !strings.Contains(e.Detail, c.want) || len(e.Log) == 0 {
			t.Errorf("%s: %+v", app, e)
		}
		d.coldAgain(fleet.AppName(app), app+"-witness")
	}
	d.stop()
	d.start()
	d.knowsCRIU()
	d.coldAgain("odd", "later-witness")
	if found := d.stored("tmp/*"); len(found) != 0 {
		t.Errorf("left: %q", found)
	}
}

// A checkpoint that is not as it was saved is noticed before anything is made
// of it. The app starts cold instead, and is saved anew.
func TestCheckpoint_DamagedImageIsAColdStart(t *testing.T) {
	d := newSaver(t)
	d.deployFile("app", sluggish(t), "start: checkpoint\n")
	d.expect("app.localhost", "/", "hello")
	d.saved("app")
	for _, c := range []struct {
		name    string
		stopped bool
		file    string
		damage  func(file string) error
	}{
		{"cut off", false, "images/pages-1.img", func(file string) error { return os.Truncate(file, 8192) }},
		{"flipped, at the time it had", true, "images/pages-1.img", func(file string) error {
			info, err := os.Stat(file)
			if err != nil {
				return err
			}
			b, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			b[len(b)/2] ^= 1
			return errors.Join(os.WriteFile(file, b, 0o600), os.Chtimes(file, info.ModTime(), info.ModTime()))
		}},
		{"removed", true, "images/core-1.img", os.Remove},
	} {
		d.asleep("app")
		if c.stopped {
			d.stop()
		}
		files := d.stored("kept/app.*/content/" + c.file)
		if len(files) != 1 {
			t.Fatalf("%s: checkpoints: %q", c.name, files)
		}
		if err := c.damage(files[0]); err != nil {
			t.Fatal(err)
		}
		if c.stopped {
			d.start()
			d.knowsCRIU()
		}
		before := len(d.events("app", fleet.EventCheckpoint))
		d.expect("app.localhost", "/", "hello")
		d.started("app", fleet.ColdStart)
		var news []fleet.Event
		d.until("saved anew", func() bool {
			news = d.events("app", fleet.EventCheckpoint)[before:]
			return len(news) > 0 && strings.Contains(news[len(news)-1].Detail, " in ")
		})
		if len(news) != 2 || !strings.Contains(news[0].Cause, "damaged") {
			t.Errorf("%s: checkpoints: %+v", c.name, news)
		}
		d.asleep("app")
		d.expect("app.localhost", "/", "hello")
		d.started("app", fleet.CheckpointStart)
	}
}

// A full disk is no fault of the app: it starts cold, nothing is left of the
// try, and it may be saved when there is room.
func TestCheckpoint_DiskIsFull(t *testing.T) {
	d := newSaver(t)
	d.stop()
	disk := filepath.Join(d.dir, "data/checkpoints")
	if err := unix.Mount("full", disk, "tmpfs", 0, "size=2m,mode=700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(disk, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	d.start()
	d.knowsCRIU()
	d.deployFile("app", sluggish(t), "start: checkpoint\nenv: {BALLAST: \"4\"}\n")
	d.expect("app.localhost", "/", "hello")
	e := d.await("app", fleet.EventCheckpoint, nil)
	if !strings.Contains(e.Cause, "no room") {
		t.Errorf("checkpoint: %+v", e)
	}
	d.until("nothing is left", func() bool { return len(d.stored("tmp/*"))+len(d.stored("kept/*")) == 0 })
	if found := d.stored("refused/*"); len(found) != 0 {
		t.Errorf("refused for good: %q", found)
	}
	d.asleep("app")
	d.expect("app.localhost", "/", "hello")
	d.started("app", fleet.ColdStart)
	// The operator makes room.
	if err := unix.Mount("", disk, "", unix.MS_REMOUNT, "size=64m"); err != nil {
		t.Fatal(err)
	}
	d.stop()
	d.start()
	d.knowsCRIU()
	d.asleep("app")
	d.expect("app.localhost", "/", "hello")
	d.until("it is saved", func() bool { return len(d.stored("kept/app.*/content")) == 1 })
}

// Without a CRIU that is of use apps start cold, and doctor says why.
func TestCheckpoint_WithoutCRIU(t *testing.T) {
	dir := t.TempDir()
	old := filepath.Join(dir, "criu")
	// Whoever runs it has no rights here.
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(filepath.Dir(dir), 0o755), os.WriteFile(old, []byte("#!/bin/sh\necho Version: 3.17\n"), 0o755)); err != nil {
		t.Fatal(err)
	}
	for program, want := range map[string]string{"/none": "no such file", old: "version 3.17 is too old", `""`: "not wanted"} {
		t.Run(want, func(t *testing.T) {
			d := newDaemon(t, "checkpoint: {criu: "+program+"}")
			d.deployFile("app", sluggish(t), "start: checkpoint\n")
			for range 2 {
				d.expect("app.localhost", "/", "hello")
				d.started("app", fleet.ColdStart)
				d.asleep("app")
			}
			if list := d.events("app", fleet.EventCheckpoint); len(list) != 0 {
				t.Errorf("checkpoints: %+v", list)
			}
			out, _ := d.cli("doctor", "--config", d.config)
			_, line, ok := strings.Cut(out, "note  criu ")
			if !ok || !strings.Contains(strings.Split(line, "\n")[0], want) || !strings.Contains(strings.Split(line, "\n")[1], "checkpoint") {
				t.Errorf("doctor:\n%s", out)
			}
		})
	}
}

// A deleted app's memory is gone from the disk, except for what one of its
// instances still stands on, and that goes with it.
func TestCheckpoint_GoesWithItsApp(t *testing.T) {
	d := newSaver(t)
	d.deployFile("app", sluggish(t), "start: checkpoint\nenv: {LINGER: 2s}\n")
	d.expect("app.localhost", "/", "hello")
	d.saved("app")
	// Memory has secrets in it.
	root := filepath.Join(d.dir, "data/checkpoints")
	for _, dir := range append(d.stored("kept/app.*"), root, filepath.Join(root, "kept")) {
		if info, err := os.Stat(dir); err != nil || info.Mode() != fs.ModeDir|0o700 {
			t.Errorf("mode of %s: %v, %v", dir, info.Mode(), err)
		}
	}
	d.asleep("app")
	d.expect("app.localhost", "/", "hello")
	pid := d.started("app", fleet.CheckpointStart).PID
	gone := make(chan error)
	go func() { gone <- d.client.Delete(t.Context(), "app", true) }()
	d.until("it is to go", func() bool { return len(d.stored("kept/app.*/doomed.json")) == 1 })
	if err := unix.Kill(pid, 0); err != nil {
		t.Errorf("its instance: %v", err)
	}
	if len(d.stored("kept/app.*/content/images/pages-1.img")) != 1 {
		t.Error("what an instance stands on is gone")
	}
	if err := <-gone; err != nil {
		t.Error(err)
	}
	d.until("nothing is left", func() bool { return len(d.stored("*/*")) == 0 })

	// While it is being saved.
	d.deployFile("early", sluggish(t), "start: checkpoint\nenv: {BOOT: 300ms}\n")
	d.expect("early.localhost", "/", "hello")
	d.until("it is being saved", func() bool { return len(d.stored("tmp/*")) > 0 })
	if err := d.client.Delete(t.Context(), "early", true); err != nil {
		t.Error(err)
	}
	d.until("nothing is left", func() bool { return len(d.stored("*/*")) == 0 })
	if list := d.events("early", fleet.EventCheckpoint); len(list) != 0 {
		t.Errorf("checkpoints: %+v", list)
	}
}

// Kept are the checkpoints of an app's revision and of the one that a rollback
// goes to, as this host makes them. All else goes by itself.
func TestCheckpoint_OnlyWhatMayBeUsedIsKept(t *testing.T) {
	d := newSaver(t)
	deploy := func(n string) string {
		d.deployFile("app", sluggish(t), "start: checkpoint\nenv: {N: \""+n+"\"}\n")
		d.asleep("app")
		before := d.stored("kept/app.*/manifest.json")
		d.expect("app.localhost", "/", "hello")
		saved := ""
		d.until("it is saved", func() bool {
			for _, f := range d.stored("kept/app.*/manifest.json") {
				if !slices.Contains(before, f) {
					saved = filepath.Dir(f)
				}
			}
			return saved != ""
		})
		d.asleep("app")
		return saved
	}
	keeps := func(want ...string) {
		t.Helper()
		slices.Sort(want)
		d.until("what may be used is kept", func() bool {
			return slices.Equal(d.stored("kept/*"), want)
		})
	}
	first := deploy("1")
	second := deploy("2")
	keeps(first, second)
	third := deploy("3")
	keeps(second, third)
	d.must("rollback", "app")
	d.asleep("app")
	d.expect("app.localhost", "/", "hello")
	d.started("app", fleet.CheckpointStart)
	keeps(second, third)

	// One of another kernel has another key, and no start asks for it.
	d.stop()
	parts := strings.SplitN(filepath.Base(third), ".", 3)
	other := strings.Repeat("0", len(parts[1]))
	foreign := filepath.Join(filepath.Dir(third), parts[0]+"."+other+"."+parts[2])
	if err := os.CopyFS(foreign, os.DirFS(third)); err != nil {
		t.Fatal(err)
	}
	manifest, err := os.ReadFile(filepath.Join(third, "manifest.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(foreign, "manifest.json"), bytes.ReplaceAll(manifest, []byte(parts[1]), []byte(other)), 0o600); err != nil {
		t.Fatal(err)
	}
	d.start()
	keeps(second, third)
}

// An app that was deleted while no daemon looked leaves nothing, once the instance
// has ended that was taken over from before and stands on its checkpoint.
func TestCheckpoint_GoesWithAnAppThatWasDeletedMeanwhile(t *testing.T) {
	d := newSaver(t)
	d.deployFile("app", sluggish(t), "start: checkpoint\nenv: {LINGER: 2s}\n")
	d.expect("app.localhost", "/", "hello")
	d.saved("app")
	d.asleep("app")
	d.expect("app.localhost", "/", "hello")
	pid := d.started("app", fleet.CheckpointStart).PID
	d.stop()
	s, err := etcd.OpenEmbedded(t.Context(), filepath.Join(d.dir, "data/etcd"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Commit(t.Context(), store.DeleteApp("app", store.AnyRev))
	if err := errors.Join(err, s.Close()); err != nil {
		t.Fatal(err)
	}
	d.start()
	d.until("it is to go", func() bool { return len(d.stored("kept/app.*/doomed.json")) == 1 })
	if err := unix.Kill(pid, 0); err != nil || len(d.stored("kept/app.*/content/images/pages-1.img")) != 1 {
		t.Errorf("its instance: %v, on %q", err, d.stored("kept/*/*"))
	}
	d.until("nothing is left", func() bool { return len(d.stored("*/*")) == 0 })
}

// What a restore finds changed, as a file on a volume that the program has
// open, makes it a cold start, and the next ones, too.
func TestCheckpoint_ChangedVolumeIsAColdStart(t *testing.T) {
	d := newSaver(t)
	volume := t.TempDir()
	file := filepath.Join(volume, "file")
	if err := errors.Join(os.Chmod(volume, 0o755), os.WriteFile(file, []byte("before"), 0o600)); err != nil {
		t.Fatal(err)
	}
	d.deployFile("app", sluggish(t), "start: checkpoint\nvolumes: [{bind: "+volume+", mount: /data}]\nenv: {HOLD: file}\n")
	d.expect("app.localhost", "/", "hello")
	d.saved("app")
	if err := os.WriteFile(file, bytes.Repeat([]byte("after"), 100), 0o600); err != nil {
		t.Fatal(err)
	}
	d.asleep("app")
	if code, body := d.get("app.localhost", "/"); code != http.StatusOK {
		t.Errorf("answer: %d %q", code, body)
	}
	d.started("app", fleet.ColdStart)
	list := d.events("app", fleet.EventCheckpoint)
	if len(list) != 2 || !strings.Contains(list[1].Cause, "cannot be restored") || !strings.Contains(list[1].Detail, "size") {
		t.Errorf("checkpoints: %+v", list)
	}
	d.coldAgain("app", "witness")
	d.stop()
	d.start()
	d.knowsCRIU()
	d.coldAgain("app", "later-witness")
}
