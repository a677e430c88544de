package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/image/unpack"
)

// source is a place that images come from.
type source interface {
	// ref is the reference in its one canonical form.
	ref() string
	// fingerprint is cheap to read and changes whenever a local source does;
	// "" for a source that resolve asks about anyway.
	fingerprint(ctx context.Context) (string, error)
	// resolve says what the reference means now, without fetching layers.
	resolve(ctx context.Context) (fleet.Digest, error)
	// plan says what must be unpacked. The caller closes the plan.
	plan(ctx context.Context) (*plan, error)
}

// plan is everything about an image except its layers' content.
type plan struct {
	digest fleet.Digest // "": of the config, once the layer's diff id is known
	config v1.ConfigFile
	layers []planLayer // lowest first
	close  func()
}

type planLayer struct {
	blob   fleet.Digest // what it is called on its way
	size   int64        // of the blob; 0: not known
	diffID string       // hex; "": known once it is unpacked
	open   func(ctx context.Context, done func(int64)) (blob, error)
}

// blob is the (perhaps compressed) tar stream of a layer.
type blob interface {
	Read(p []byte) (int, error)
	// finish closes it. err says how unpacking went, and decides what is kept.
	finish(err error)
}

// Resolve says what a reference means at this moment: it asks the registry, or
// reads the local source. Nothing is downloaded.
func (s *Store) Resolve(ctx context.Context, ref string) (fleet.Digest, error) {
	src, err := s.parse(ref)
	if err != nil {
		return "", s.explain("resolve image", ref, err)
	}
	d, _, err := s.resolve(ctx, src)
	return d, s.explain("resolve image", src.ref(), err)
}

func (s *Store) resolve(ctx context.Context, src source) (fleet.Digest, string, error) {
	print, err := src.fingerprint(ctx)
	if err != nil {
		return "", "", err
	}
	if print != "" {
		s.mu.Lock()
		r := s.refs[src.ref()]
		s.mu.Unlock()
		if r.Fingerprint == print {
			return r.Digest, print, nil
		}
	}
	d, err := src.resolve(ctx)
	return d, print, err
}

// Pull makes sure that the image that ref means now is whole on disk. Pulls of
// the same reference at the same time are one; the last caller that leaves
// interrupts it. An interrupted pull is continued by the next.
//
// A reference is one of a registry ("docker.io/library/nginx:1",
// "host:5000/app@sha256:…"), oci:DIR[:TAG] (OCI layout), tar:FILE (docker or
// OCI archive, or the tarball of a root filesystem; plain, gzip or zstd) or
// dir:ROOTFS (a directory, copied). Paths are absolute, on this machine.
func (s *Store) Pull(ctx context.Context, ref string, p Progress) (Image, error) {
	src, err := s.parse(ref)
	if err != nil {
		return Image{}, s.explain("pull image", ref, err)
	}
	f, err := s.join(src)
	if err != nil {
		return Image{}, s.explain("pull image", src.ref(), err)
	}
	defer s.leave(f)
	if err := f.follow(ctx, p); err != nil {
		return Image{}, s.explain("pull image", src.ref(), err)
	}
	return f.img, s.explain("pull image", src.ref(), f.err)
}

// flight is one pull under way and everybody who waits for it.
type flight struct {
	ref     string
	cancel  context.CancelCauseFunc
	callers int // guarded by Store.mu

	done chan struct{} // closed after img and err are set
	img  Image
	err  error

	mu      sync.Mutex
	steps   []Step        // by layer; the last is the pull's own
	version []int         // of each step
	changed chan struct{} // closed and replaced at each change
}

var errNobodyWaits = fmt.Errorf("%w: nobody waits for this pull any more", context.Canceled)

func (s *Store) join(src source) (*flight, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errClosed
	}
	if f := s.flights[src.ref()]; f != nil {
		f.callers++
		return f, nil
	}
	ctx, cancel := context.WithCancelCause(s.ctx)
	f := &flight{ref: src.ref(), cancel: cancel, callers: 1, done: make(chan struct{}), changed: make(chan struct{})}
	f.begin(nil)
	s.flights[f.ref] = f
	s.pulls.Go(func() {
		defer cancel(nil)
		img, err := s.pull(ctx, src, f)
		s.mu.Lock()
		if s.flights[f.ref] == f {
			delete(s.flights, f.ref)
		}
		s.mu.Unlock()
		f.img, f.err = img, err
		close(f.done)
	})
	return f, nil
}

func (s *Store) leave(f *flight) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f.callers--; f.callers > 0 {
		return
	}
	if s.flights[f.ref] == f {
		delete(s.flights, f.ref) // who comes now starts anew, and waits for the layer locks
	}
	f.cancel(errNobodyWaits)
}

// begin sets what is known of the layers.
func (f *flight) begin(layers []planLayer) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.steps, f.version = nil, nil
	for i, l := range layers {
		f.steps = append(f.steps, Step{Ref: f.ref, Layer: l.blob, Index: i, Layers: len(layers), Phase: PhaseWaiting, Total: fleet.Bytes(l.size)})
	}
	f.steps = append(f.steps, Step{Ref: f.ref, Layers: len(layers), Phase: PhaseResolving})
	for range f.steps {
		f.version = append(f.version, 1)
	}
	f.wake()
}

func (f *flight) wake() {
	close(f.changed)
	f.changed = make(chan struct{})
}

// set changes the step of layer i; of the pull itself if i is -1.
func (f *flight) set(i int, phase Phase, done, total int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if i < 0 {
		i = len(f.steps) - 1
	}
	st := &f.steps[i]
	st.Phase, st.Done, st.Total = phase, fleet.Bytes(done), fleet.Bytes(total)
	f.version[i]++
	f.wake()
}

// progressPace bounds how often one caller is told of steps.
const progressPace = 50 * time.Millisecond

// follow tells p of every step until the pull ends or ctx does.
func (f *flight) follow(ctx context.Context, p Progress) error {
	var seen []int
	tell := func() <-chan struct{} {
		f.mu.Lock()
		var news []Step
		if len(seen) != len(f.version) {
			seen = make([]int, len(f.version))
		}
		for i, v := range f.version {
			if seen[i] != v {
				seen[i] = v
				news = append(news, f.steps[i])
			}
		}
		changed := f.changed
		f.mu.Unlock()
		if p != nil {
			for _, st := range news {
				p.Step(st)
			}
		}
		return changed
	}
	pace := time.NewTicker(progressPace)
	defer pace.Stop()
	for {
		changed := tell()
		select {
		case <-f.done:
			tell()
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-changed:
		}
		select {
		case <-f.done:
		case <-ctx.Done():
		case <-pace.C:
		}
	}
}

// pull carries out one flight.
func (s *Store) pull(ctx context.Context, src source, f *flight) (img Image, err error) {
	defer func() {
		if err != nil {
			f.set(-1, PhaseFailed, 0, 0)
		} else {
			f.set(-1, PhaseDone, int64(img.Size), int64(img.Size))
		}
	}()
	var digest fleet.Digest
	print, err := src.fingerprint(ctx)
	if err != nil {
		return Image{}, err
	}
	if print == "" {
		digest, err = src.resolve(ctx)
	} else {
		s.mu.Lock()
		if r := s.refs[src.ref()]; r.Fingerprint == print {
			digest = r.Digest
		}
		s.mu.Unlock()
	}
	if err != nil {
		return Image{}, err
	}
	if digest != "" {
		defer s.use("image:" + string(digest))()
		if _, err := s.Get(digest); err == nil {
			return s.commitRef(refRecord{src.ref(), digest, print})
		}
		s.forget(digest)
	}
	pl, err := src.plan(ctx)
	if err != nil {
		return Image{}, err
	}
	defer pl.close()
	if err := s.admit(pl.config, len(pl.layers)); err != nil {
		return Image{}, err
	}
	f.begin(pl.layers)

	budget := unpack.NewBudget(int64(s.opts.MaxSize), int64(s.opts.MaxEntries))
	ids := make([]string, len(pl.layers))
	releases := make([]func(), len(pl.layers))
	defer func() {
		for _, release := range releases {
			if release != nil {
				release()
			}
		}
	}()
	g, gctx := errgroup.WithContext(ctx)
	for i, l := range pl.layers {
		defer s.use("blob:"+hexOf(l.blob), l.diffID)()
		g.Go(func() error {
			report := func(ph Phase, done, total int64) { f.set(i, ph, done, total) }
			id, release, err := s.layer(gctx, l, budget, report)
			if err != nil {
				f.set(i, PhaseFailed, 0, 0)
				return fmt.Errorf("layer %s: %w", l.blob.Short(), err)
			}
			ids[i], releases[i] = id, release
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return Image{}, err
	}
	if pl.digest == "" {
		pl.config.RootFS.DiffIDs = nil
		for _, id := range ids {
			pl.config.RootFS.DiffIDs = append(pl.config.RootFS.DiffIDs, v1.Hash{Algorithm: "sha256", Hex: id})
		}
		pl.digest = configDigest(pl.config)
	}
	defer s.use("image:" + string(pl.digest))()
	fix, release, err := s.fixup(ctx, ids)
	if err != nil {
		return Image{}, err
	}
	defer release()
	if fix != "" {
		ids = append(ids, fix)
	}
	return s.commit(refRecord{src.ref(), pl.digest, print}, pl.config, ids)
}

func hexOf(d fleet.Digest) string {
	_, hex, _ := strings.Cut(string(d), ":")
	return hex
}

// admit refuses what cannot run here before anything is downloaded.
func (s *Store) admit(c v1.ConfigFile, layers int) error {
	switch {
	case c.OS != "" && c.OS != s.platform.OS, c.Architecture != "" && c.Architecture != s.platform.Architecture:
		return invalid("build the image for this platform (docker build --platform "+s.platform.String()+"), or choose another one",
			"it is made for %s/%s, this node is %s", c.OS, c.Architecture, s.platform.String())
	case layers == 0:
		return invalid("an image needs at least one layer with a program in it", "it has no layers")
	case layers > maxLayers:
		return invalid("squash the image", "it has %d layers; at most %d can be stacked", layers, maxLayers)
	}
	return nil
}

// commit makes the image visible: its record is the last thing that is written.
func (s *Store) commit(ref refRecord, c v1.ConfigFile, lowestFirst []string) (Image, error) {
	rec := record{Image: Image{
		Digest: ref.Digest, Config: configOf(c.Config), PulledAt: time.Now().UTC(),
		Architecture: c.Architecture, OS: c.OS,
	}}
	if rec.Architecture == "" {
		rec.Architecture = runtime.GOARCH
	}
	if rec.OS == "" {
		rec.OS = runtime.GOOS
	}
	// The same layer twice adds nothing: whatever it says, its upper copy says
	// again; and overlayfs refuses it.
	for _, id := range slices.Backward(lowestFirst) {
		if !slices.Contains(rec.LayerIDs, id) {
			rec.LayerIDs = append(rec.LayerIDs, id)
			rec.Layers = append(rec.Layers, s.layerDir(id))
		}
	}
	if err := s.commitRecord(&rec); err != nil {
		return Image{}, err
	}
	return s.commitRef(ref)
}

func (s *Store) commitRecord(rec *record) error {
	s.change.Lock()
	defer s.change.Unlock()
	s.mu.Lock()
	var entries int64
	missing := false
	for _, id := range rec.LayerIDs {
		l, ok := s.layers[id]
		missing = missing || !ok
		rec.Size += fleet.Bytes(l.Size)
		entries += l.Entries
	}
	s.mu.Unlock()
	// Layers that were there already did not count until now.
	if rec.Size > s.opts.MaxSize || entries > int64(s.opts.MaxEntries) {
		return fmt.Errorf("%w: %d bytes and %d entries in all layers; at most %d and %d are allowed",
			unpack.ErrTooLarge, rec.Size, entries, s.opts.MaxSize, s.opts.MaxEntries)
	}
	if missing {
		return errors.New("a layer disappeared while it was in use")
	}
	if err := writeJSON(s.path("tmp"), s.imagePath(rec.Digest), rec); err != nil {
		return err
	}
	s.mu.Lock()
	s.images[rec.Digest] = *rec
	s.mu.Unlock()
	return nil
}

// commitRef notes what the reference means, and gives back its image.
func (s *Store) commitRef(ref refRecord) (Image, error) {
	s.change.Lock()
	defer s.change.Unlock()
	s.mu.Lock()
	old := s.refs[ref.Ref]
	s.mu.Unlock()
	if old != ref {
		if err := writeJSON(s.path("tmp"), s.refPath(ref.Ref), ref); err != nil {
			return Image{}, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	rec, ok := s.images[ref.Digest]
	if !ok {
		return Image{}, errors.New("the image was removed while it was pulled")
	}
	s.setRefLocked(ref)
	s.touched[ref.Digest] = time.Now()
	return s.imageLocked(rec), nil
}

// forget drops a record whose layers somebody removed by hand, so that the
// pull that found out makes them again.
func (s *Store) forget(d fleet.Digest) {
	s.change.Lock()
	defer s.change.Unlock()
	s.mu.Lock()
	rec, ok := s.images[d]
	if ok {
		delete(s.images, d)
	}
	s.mu.Unlock()
	for _, id := range rec.LayerIDs {
		if !exists(s.layerDir(id)) {
			s.mu.Lock()
			delete(s.layers, id)
			s.mu.Unlock()
		}
	}
}

// configDigest is the identity of an image that has no manifest, as docker's
// image id is.
func configDigest(c v1.ConfigFile) fleet.Digest {
	data, err := json.Marshal(c)
	if err != nil {
		panic(err) // a struct of strings always encodes
	}
	return digestOf(data)
}
