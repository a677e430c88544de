package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/api"
	"github.com/fastcontainer/fastcontainer/internal/appfile"
	"github.com/fastcontainer/fastcontainer/internal/control"
	"github.com/fastcontainer/fastcontainer/internal/events"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/image"
	"github.com/fastcontainer/fastcontainer/internal/node"
	"github.com/fastcontainer/fastcontainer/internal/sandbox"
	"github.com/fastcontainer/fastcontainer/internal/store"
)

// backend is what the management interface shows and does.
type backend struct{ d *Daemon }

func (b backend) Version() api.Version {
	return api.Version{Version: b.d.version, Go: runtime.Version()}
}

func (b backend) Node(ctx context.Context) api.Node {
	n := api.Node{
		Name: fleet.NodeName(b.d.cfg.Node), Version: b.d.version, StartedAt: b.d.started,
		CPUs: cpus(), Memory: int64(memory()), Apps: len(b.d.control.Apps()), Instances: len(b.d.node.List()),
	}
	if err := b.d.store.Ping(ctx); err != nil {
		n.Store = err.Error()
	}
	return n
}

// Apps tells what this node knows, also while the store is away.
func (b backend) Apps(context.Context) ([]api.App, error) {
	var list []api.App
	for _, a := range b.d.control.Apps() {
		if r, ok := b.d.routes.get(a.Name()); ok {
			list = append(list, summary(r, a.Status()))
		}
	}
	return list, nil
}

func summary(r route, s control.Status) api.App {
	out := api.App{
		Name: r.app.Name, Revision: s.Revision, Image: r.image, Hosts: r.hosts, State: "asleep",
		Instances: s.Ready, Standbys: s.Standby, Waiting: s.Waiting, InFlight: s.InFlight, UpdatedAt: r.app.UpdatedAt, LastError: s.LastError,
	}
	switch {
	case s.Stopped:
		out.State = "stopped"
	case s.Ready > 0:
		out.State = "running"
	case s.Starting > 0:
		out.State = "starting"
	case s.Standby > 0:
		out.State = "standby"
	case s.Failures > 0:
		out.State = "failing"
	}
	return out
}

func missing(op string, name fleet.AppName) error {
	return &fleet.Error{Op: op, Subject: string(name), Kind: fleet.ErrNotFound, Hint: "fastcontainer apps lists them"}
}

func (b backend) App(ctx context.Context, name fleet.AppName) (api.AppDetail, error) {
	r, ok := b.d.routes.get(name)
	a, known := b.d.control.App(name)
	if !ok || !known {
		return api.AppDetail{}, missing("inspect", name)
	}
	d := api.AppDetail{
		App: summary(r, a.Status()), Previous: r.app.Previous,
		Running: b.instances(name), Events: b.d.events.Last(name, 10), Revisions: []api.RevisionInfo{},
	}
	for _, s := range a.Starts() {
		d.Starts = append(d.Starts, api.Start{
			Kind: s.Kind, Count: s.Starts, UsualUS: s.Usual.Microseconds(), LongestUS: s.Tail.Microseconds(), Memory: s.Memory, Disk: s.Disk, Next: s.Next,
		})
	}
	revs, err := store.Revisions(ctx, b.d.store, name)
	if err != nil {
		return d, err
	}
	for _, v := range revs {
		d.Revisions = append(d.Revisions, api.RevisionInfo{ID: v.ID, Image: v.Spec.Image, Digest: v.Image, Cause: v.Cause, CreatedAt: v.CreatedAt})
		if v.ID == d.Revision {
			d.Spec, d.Digest = v.Spec, v.Image
			d.Spec.Env = maps.Clone(v.Spec.Env)
			for k := range d.Spec.Env {
				d.Spec.Env[k] = "(hidden)" // it may be a secret
			}
		}
	}
	return d, nil
}

func (b backend) Deploy(ctx context.Context, spec fleet.Spec, p image.Progress) (fleet.Revision, error) {
	appfile.Complete(&spec)
	if err := appfile.Validate(&spec); err != nil {
		return fleet.Revision{}, err
	}
	rev, err := b.d.releases.Deploy(ctx, spec, p)
	if err != nil {
		return rev, err
	}
	return rev, b.routable(ctx, rev)
}

// routable returns when requests reach a revision, or a newer one.
func (b backend) routable(ctx context.Context, rev fleet.Revision) error {
	return b.d.routes.wait(ctx, rev.App, func(r route, ok bool) bool {
		return ok && (r.app.Current == rev.ID || newer(r.app.Current, rev.ID))
	})
}

func newer(a, b fleet.RevisionID) bool {
	_, x, err := a.Split()
	_, y, err2 := b.Split()
	return err == nil && err2 == nil && x > y
}

func (b backend) Rollback(ctx context.Context, name fleet.AppName) (fleet.Revision, error) {
	rev, err := b.d.releases.Rollback(ctx, name)
	if err != nil {
		return rev, err
	}
	return rev, b.d.routes.wait(ctx, name, func(r route, ok bool) bool { return !ok || r.app.Current == rev.ID })
}

func (b backend) SetStopped(ctx context.Context, name fleet.AppName, stopped bool) error {
	if err := b.d.releases.SetStopped(ctx, name, stopped); err != nil {
		return err
	}
	if err := b.d.routes.wait(ctx, name, func(r route, ok bool) bool { return !ok || r.app.Stopped == stopped }); err != nil {
		return err
	}
	if stopped {
		return b.d.node.Gone(ctx, name)
	}
	return nil
}

func (b backend) Delete(ctx context.Context, name fleet.AppName, volumes bool) error {
	if err := b.d.releases.Delete(ctx, name); err != nil {
		return err
	}
	if err := b.d.routes.wait(ctx, name, func(_ route, ok bool) bool { return !ok }); err != nil {
		return err
	}
	if err := b.d.node.Gone(ctx, name); err != nil {
		return err
	}
	return b.d.node.Forget(name, volumes)
}

func (b backend) Instances(app fleet.AppName) ([]api.Instance, error) {
	if _, ok := b.d.routes.get(app); app != "" && !ok {
		return nil, missing("list instances of", app)
	}
	return b.instances(app), nil
}

func (b backend) instances(app fleet.AppName) []api.Instance {
	var list []api.Instance
	inFlight := map[fleet.InstanceID]int{}
	seen := map[fleet.AppName]bool{}
	for _, i := range b.d.node.List() {
		info := i.Info()
		if app != "" && info.App != app {
			continue
		}
		if a, ok := b.d.control.App(info.App); ok && !seen[info.App] {
			seen[info.App] = true
			maps.Copy(inFlight, a.InFlight())
		}
		list = append(list, describe(i, info, inFlight[info.ID]))
	}
	return list
}

func describe(i *node.Instance, info fleet.Instance, inFlight int) api.Instance {
	out := api.Instance{
		App: info.App, Revision: info.Revision, ID: info.ID, Node: info.Node, State: info.State, Kind: info.Kind,
		PID: info.PID, InFlight: inFlight,
	}
	if info.Address.IsValid() {
		out.Address = info.Address.String()
	}
	if !info.ReadyAt.IsZero() {
		out.ReadyAt = &info.ReadyAt
	}
	if !info.ExpiresAt.IsZero() {
		out.ExpiresAt = &info.ExpiresAt
	}
	limits := i.Limits()
	out.CPU.Limit, out.Memory.Limit = limits.CPU, int64(limits.Memory)
	if info.State != fleet.StateReady && info.State != fleet.StateRetiring {
		return out
	}
	stats, err := i.Stats()
	if err == nil {
		out.CPUSeconds = stats.CPUTime.Seconds()
		out.CPU.Used = out.CPUSeconds / max(time.Since(info.StartedAt).Seconds(), 0.001)
		out.Memory.Used = int64(stats.Memory)
	}
	return out
}

func (b backend) Logs(ctx context.Context, name string, lines int, follow bool, w io.Writer) error {
	return b.d.node.Logs(ctx, name, lines, follow, w)
}

func (b backend) Exec(ctx context.Context, name string, p sandbox.Process) (int, error) {
	i, err := b.d.node.Find(name)
	if err != nil {
		return 0, err
	}
	return i.Exec(ctx, p)
}

func (b backend) Run(ctx context.Context, spec fleet.Spec, streams sandbox.Stdio) (int, error) {
	appfile.Complete(&spec)
	if err := appfile.Validate(&spec); err != nil {
		return 0, err
	}
	if err := b.d.check(spec); err != nil {
		return 0, err
	}
	img, err := b.find(spec.Image)
	if errors.Is(err, fleet.ErrNotFound) {
		img, err = b.d.images.Pull(ctx, spec.Image, nil)
	}
	if err != nil {
		return 0, err
	}
	rev := fleet.Revision{ID: fleet.MakeRevisionID(spec.Name, 1), App: spec.Name, Spec: spec, Image: img.Digest}
	return b.d.node.Run(ctx, rev, streams)
}

// find gives an image that is here, by reference or (part of its) digest.
func (b backend) find(ref string) (image.Image, error) {
	list, err := b.d.images.List()
	if err != nil {
		return image.Image{}, err
	}
	var found []image.Image
	for _, img := range list {
		_, hex, _ := strings.Cut(string(img.Digest), ":")
		switch {
		case string(img.Digest) == ref, slices.Contains(img.Refs, ref):
			return img, nil
		case len(ref) >= 6 && strings.HasPrefix(hex, strings.TrimPrefix(ref, "sha256:")):
			found = append(found, img)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return image.Image{}, &fleet.Error{Op: "find image", Subject: ref, Kind: fleet.ErrNotFound, Hint: "fastcontainer image ls lists them"}
	default:
		return image.Image{}, &fleet.Error{Op: "find image", Subject: ref, Kind: fleet.ErrInvalid, Err: fmt.Errorf("%d images begin with it", len(found)), Hint: "write more of the digest"}
	}
}

func wireImage(i image.Image) api.Image {
	refs := i.Refs
	if refs == nil {
		refs = []string{}
	}
	return api.Image{Digest: i.Digest, Refs: refs, Size: int64(i.Size), Layers: len(i.Layers), PulledAt: i.PulledAt}
}

func (b backend) Images(context.Context) ([]api.Image, error) {
	list, err := b.d.images.List()
	if err != nil {
		return nil, err
	}
	out := make([]api.Image, len(list))
	for i, img := range list {
		out[i] = wireImage(img)
	}
	return out, nil
}

func (b backend) Pull(ctx context.Context, ref string, p image.Progress) (api.Image, error) {
	img, err := b.d.images.Pull(ctx, ref, p)
	return wireImage(img), err
}

func (b backend) RemoveImage(ctx context.Context, ref string) error {
	img, err := b.find(ref)
	if err != nil {
		return err
	}
	used, err := b.d.releases.UsedImages(ctx)
	if err != nil {
		return err
	}
	if slices.Contains(used, img.Digest) {
		return &fleet.Error{Op: "remove image", Subject: ref, Kind: fleet.ErrConflict, Err: errors.New("an app uses it, or could be rolled back to it"), Hint: "delete that app first; fastcontainer apps lists them"}
	}
	return b.d.images.Remove(ctx, img.Digest)
}

func (b backend) CollectImages(ctx context.Context) (api.GCResult, error) {
	used, err := b.d.releases.UsedImages(ctx)
	if err != nil {
		return api.GCResult{}, err
	}
	r, err := b.d.images.GC(ctx, used)
	if r.Images == nil {
		r.Images = []fleet.Digest{}
	}
	return api.GCResult{Images: r.Images, Layers: r.Layers, Freed: int64(r.Freed)}, err
}

func (b backend) Follow(ctx context.Context, app fleet.AppName, from events.From, f func(fleet.Event) error) error {
	return b.d.events.Follow(ctx, app, from, f)
}

func (b backend) LastEvents(app fleet.AppName, n int) []fleet.Event { return b.d.events.Last(app, n) }
