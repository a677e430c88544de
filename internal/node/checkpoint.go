package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/checkpoint"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/sandbox"
)

// Causes of checkpoint events, beside those that control gives.
const (
	causeUnsaved   = "its processes cannot be saved: its starts stay cold"
	causeUnroomed  = "there is no room for its saved processes"
	causeUnrestore = "its saved processes cannot be restored: a cold start instead, and from now on"
	causeMissed    = "its saved processes could not be restored this time: a cold start instead"
	causeDamaged   = "its saved processes are damaged: a cold start instead"
)

const (
	// restoredReady is the longest that a restored instance may take to answer:
	// it was about to.
	restoredReady = 10 * time.Second
	// roomAgain is how long nothing is saved after there was no room.
	roomAgain = 10 * time.Minute
	// lookWait is the longest that a start waits until it is known whether this
	// host restores: the daemon began a moment ago.
	lookWait = 500 * time.Millisecond
)

// saver is the runtime that can save a revision's processes, and the key of
// its checkpoint; nil: there is none. An error says that what it needs is missing
// (doctor says why), or was not looked at before ctx ended.
func (n *Node) saver(ctx context.Context, rev fleet.Revision) (sandbox.Checkpointer, string, error) {
	c, ok := n.cfg.Runtimes[rev.Spec.Isolation.Runtime].(sandbox.Checkpointer)
	if !ok || n.cfg.Checkpoints == nil {
		return nil, "", nil
	}
	host, err := c.CheckpointHost(ctx)
	if err != nil {
		return nil, "", err
	}
	return c, checkpoint.Key(host, rev.Image, rev.ID, rev.Spec), nil
}

// SavedKey is the key of a revision's checkpoint on this host, whether there is
// one or not; "": its runtime makes none. An error says that it cannot be known now.
func (n *Node) SavedKey(ctx context.Context, rev fleet.Revision) (string, error) {
	_, key, err := n.saver(ctx, rev)
	return key, err
}

// Save makes a checkpoint of a revision: its processes are started once more,
// for nobody, and saved as they are about to listen. It gives the checkpoint's
// size; 0: there is none, which is no error, and said in an event if it is new.
// A few are made at a time. Before it starts anything it asks for room on the
// machine, does not when there is none, and gives back what it got.
func (n *Node) Save(ctx context.Context, rev fleet.Revision, cause string, inputs map[string]float64, room func() (free func(), ok bool)) fleet.Bytes {
	looking, stop := context.WithTimeout(ctx, savingTime)
	defer stop()
	c, key, err := n.saver(looking, rev)
	if err != nil || c == nil {
		return 0
	}
	select {
	case n.saves <- struct{}{}:
		defer func() { <-n.saves }()
	case <-ctx.Done():
		return 0
	}
	found, err := n.cfg.Checkpoints.Find(rev.App, key)
	if err == nil {
		defer found.Release()
		return found.Size()
	}
	if errors.Is(err, checkpoint.ErrRefused) || n.hadNoRoom() {
		return 0
	}
	free, ok := room()
	if !ok {
		return 0
	}
	defer free()
	e := fleet.Event{Time: time.Now(), Type: fleet.EventCheckpoint, App: rev.App, Revision: rev.ID, Node: n.cfg.Name, Cause: cause, Inputs: inputs}
	id := fleet.NewInstanceID(rev.App)
	n.setSaving(id, true)
	defer n.setSaving(id, false)
	log := n.logPath(id)
	began := time.Now()
	err = n.cfg.Checkpoints.Make(ctx, rev.App, key, func(dir string) error { return n.capture(ctx, c, id, rev, dir) })
	switch {
	case err == nil:
	case ctx.Err() != nil || errors.Is(err, fleet.ErrConflict) || errors.Is(err, checkpoint.ErrBusy): // the app was deleted, or it is being made
		return 0
	case scarce(err):
		n.mu.Lock()
		n.unroomed = time.Now()
		n.mu.Unlock()
		e.Cause, e.Detail = causeUnroomed, withHint(err)
		n.cfg.Events(e)
		return 0
	default:
		e.Cause, e.Detail, e.Log = causeUnsaved, withHint(err), tailLines(log, 20, 4<<10)
		n.cfg.Events(e)
		n.refuse(rev.App, key, err)
		return 0
	}
	if err := os.Remove(log); err != nil && !errors.Is(err, os.ErrNotExist) {
		n.cfg.Logger.Warn("remove log", "file", log, "error", err)
	}
	found, err = n.cfg.Checkpoints.Find(rev.App, key)
	if err != nil { // the app was deleted meanwhile
		return 0
	}
	defer found.Release()
	e.Detail = fmt.Sprintf("%s in %s", found.Size(), time.Since(began).Round(time.Millisecond))
	n.cfg.Events(e)
	return found.Size()
}

// setSaving says whether an instance is being saved, and its log written to.
func (n *Node) setSaving(id fleet.InstanceID, on bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if on {
		n.saving[id] = true
	} else {
		delete(n.saving, id)
	}
}

// hadNoRoom tells whether there was no room for a checkpoint a short time ago.
func (n *Node) hadNoRoom() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return time.Since(n.unroomed) < roomAgain
}

// scarce tells whether an error says that something of the machine is used up,
// and nothing about an app.
func scarce(err error) bool {
	for _, e := range []error{fleet.ErrOverloaded, unix.ENOSPC, unix.EDQUOT, unix.ENOMEM, unix.EMFILE, unix.ENFILE, unix.EAGAIN, unix.EINTR} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// refuse remembers that a checkpoint is of no use.
func (n *Node) refuse(app fleet.AppName, key string, why error) {
	if err := n.cfg.Checkpoints.Refuse(app, key, why.Error()); err != nil {
		n.cfg.Logger.Warn("remember a failed checkpoint", "app", app, "error", err)
	}
}

// capture starts a revision for nobody and saves its processes.
func (n *Node) capture(ctx context.Context, c sandbox.Checkpointer, id fleet.InstanceID, rev fleet.Revision, dir string) error {
	img, err := n.cfg.Images.Get(rev.Image)
	if err != nil {
		return err
	}
	release, err := n.cfg.Images.Hold(rev.Image)
	if err != nil {
		return err
	}
	defer release()
	want, err := n.sandboxSpec(id, rev, img)
	if err != nil {
		return err
	}
	want.Limits.Memory = max(want.Limits.Memory, rev.Spec.Resources.Memory.Peak)
	want.Limits.CPU = max(want.Limits.CPU, rev.Spec.Resources.CPU.Peak)
	want.Limits.CPUWeight = savingWeight
	o := sandbox.Capture{Port: rev.Spec.Port, Ready: func(ctx context.Context, a netip.Addr) error {
		return n.listens(ctx, addrPort(a, rev.Spec.Port).String())
	}}
	if rev.Spec.Warm != "" {
		o.Rest = warmRest
		o.Warm = func(ctx context.Context, a netip.Addr) error {
			return n.warm(ctx, addrPort(a, rev.Spec.Port).String(), rev.Spec)
		}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, rev.Spec.Ready.Timeout.Std()+3*o.Rest+savingTime, errNotReady)
	defer cancel()
	return c.Checkpoint(ctx, want, o, dir)
}

// warm asks an app's own path once.
func (n *Node) warm(ctx context.Context, addr string, s fleet.Spec) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+s.Warm, nil)
	if err != nil {
		return err
	}
	req.Host, req.Close = firstHost(s), true
	req.Header.Set("User-Agent", "fastcontainer-warm")
	// Of its own, so that no connection is kept.
	resp, err := (&http.Transport{DialContext: n.dialer(time.Second).DialContext, DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	_, err = io.Copy(io.Discard, io.LimitReader(resp.Body, 16<<20))
	if err == nil && resp.StatusCode >= http.StatusInternalServerError {
		err = &fleet.Error{Op: "warm", Subject: s.Warm, Kind: fleet.ErrInvalid, Err: fmt.Errorf("it answered %s", resp.Status), Hint: "look at warm in the app file and at the app's log"}
	}
	return err
}

const (
	// savingWeight is a small part of what an instance has that somebody waits for.
	savingWeight = 10
	// savingTime is more than saving takes once the processes stand still.
	savingTime = time.Minute
	// warmRest is how long a warm program is left alone: V8 collects garbage three
	// times, 8 s apart, when it is not busy any more. It takes a Node.js app's restore and
	// first answer from 57 to 34 ms of processor time.
	warmRest = 30 * time.Second
	// mostSaves at once: most of the time they rest.
	mostSaves = 4
)

// listens waits until somebody accepts connections there. Nobody is in a
// hurry, and a program that is caught in listen(2) accepts, too: it has to be
// seen twice.
func (n *Node) listens(ctx context.Context, addr string) error {
	dialer := n.dialer(time.Second)
	timer := time.NewTicker(200 * time.Millisecond)
	defer timer.Stop()
	for seen := 0; ; {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-timer.C:
		}
		conn, err := dialer.DialContext(ctx, "tcp", addr)
		if err != nil {
			seen = 0
			continue
		}
		_ = conn.Close()
		if seen++; seen == 2 {
			return nil
		}
	}
}

// restore starts an instance from saved processes, if there are some. Without
// an error and without a container it is to be started anew. Only what is of no use
// is not tried again: what the machine lacks will be there another time.
func (n *Node) restore(ctx context.Context, i *Instance, want sandbox.Spec, stages *fleet.Stages) error {
	if n.cfg.Checkpoints == nil || !n.cfg.Checkpoints.Has(i.rev.App) {
		return nil
	}
	looking, stop := context.WithTimeout(ctx, lookWait)
	c, key, err := n.saver(looking, i.rev)
	stop()
	if err != nil || c == nil || n.paused(key) {
		return nil //nolint:nilerr // it is started anew
	}
	saved, err := n.cfg.Checkpoints.Find(i.rev.App, key)
	switch {
	case err == nil:
	case errors.Is(err, checkpoint.ErrNone) || errors.Is(err, checkpoint.ErrRefused):
		return nil
	case errors.Is(err, checkpoint.ErrDamaged):
		n.event(i, fleet.EventCheckpoint, causeDamaged, err.Error())
		return nil
	default:
		n.event(i, fleet.EventCheckpoint, causeMissed, err.Error())
		return nil
	}
	began := time.Now()
	limited, cancel := context.WithTimeoutCause(ctx, restoredReady, errNotReady)
	defer cancel()
	box, err := c.Restore(limited, want, saved.Dir())
	if err == nil {
		i.box = box
		i.become(fleet.CheckpointStart)
		if err = n.settle(limited, i, stages); err == nil {
			n.unpause(key)
			i.saved, i.release = key, both(i.release, saved.Release)
			n.tellRestored(i)
			return nil
		}
		if derr := box.Destroy(context.WithoutCancel(ctx)); derr != nil {
			n.cfg.Logger.Error("destroy instance", "instance", i.info.ID, "error", derr)
		}
		i.box = nil
		i.become(fleet.ColdStart)
	}
	saved.Release()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	n.metrics.started(err, stages, fleet.CheckpointStart)
	if !errors.Is(err, sandbox.ErrUnrestorable) {
		n.event(i, fleet.EventCheckpoint, causeMissed, withHint(err))
		n.pause(key, time.Since(began))
		return nil
	}
	n.event(i, fleet.EventCheckpoint, causeUnrestore, withHint(err))
	n.refuse(i.rev.App, key, err)
	return nil
}

// pause is for how long a checkpoint is left alone whose restores failed, in a row,
// for reasons of the moment.
type pause struct {
	failed int
	until  time.Time
}

const longestPause = time.Hour

func (n *Node) paused(key string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return time.Now().Before(n.pauses[key].until)
}

// pause leaves a checkpoint alone for twice the time that a restore took to
// fail, and for twice as long each further time, up to an hour: should the reason
// not pass, few visitors wait for it. Those that fail together count once.
func (n *Node) pause(key string, took time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	p, now := n.pauses[key], time.Now()
	if now.Before(p.until) {
		return
	}
	maps.DeleteFunc(n.pauses, func(_ string, p pause) bool { return now.Sub(p.until) > longestPause })
	p.failed = min(p.failed+1, 16)
	p.until = now.Add(min(took<<p.failed, longestPause))
	n.pauses[key] = p
}

func (n *Node) unpause(key string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.pauses, key)
}

// tellRestored sends the signal that the app asked for.
func (n *Node) tellRestored(i *Instance) {
	if i.rev.Spec.RestoredSignal == "" {
		return
	}
	if err := i.box.Signal(stopSignal(i.rev.Spec.RestoredSignal)); err != nil {
		n.cfg.Logger.Warn("tell an instance that it was restored", "instance", i.info.ID, "error", err)
	}
}

// ForgetSaved removes the saved processes of an app that was deleted, also those that are
// being saved just now.
func (n *Node) ForgetSaved(app fleet.AppName) error {
	if n.cfg.Checkpoints == nil {
		return nil
	}
	return n.cfg.Checkpoints.Delete(app)
}

func both(f, g func()) func() { return func() { f(); g() } }

// withHint is an error with what to do about it.
func withHint(err error) string {
	if hint := fleet.Hint(err); hint != "" && !strings.Contains(err.Error(), hint) {
		return err.Error() + "; " + hint
	}
	return err.Error()
}
