package image

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/image/unpack"
)

// Options of a store. The zero value is usable.
type Options struct {
	// Logger for what nobody waits for; nil: none.
	Logger *slog.Logger
	// Parallel layers at once, over all pulls. 0: 4.
	Parallel int
	// MaxSize of one image unpacked. 0: 8Gi.
	MaxSize fleet.Bytes
	// MaxEntries of one image: files, directories and the rest. 0: 500,000.
	MaxEntries int
	// Keychain knows the credentials of registries. nil: the docker
	// configuration file ($DOCKER_CONFIG, ~/.docker/config.json).
	Keychain authn.Keychain
	// Insecure says which registries (host or host:port) may be spoken to
	// without TLS. nil: loopback only.
	Insecure func(host string) bool
	// Platform to choose from an index, as os/architecture[/variant]. "": this machine's.
	Platform string
	// Transport to reach registries with. nil: direct, or the proxy of the environment.
	Transport http.RoundTripper
	// Stall: a registry that sends nothing for so long is asked again. 0: 30s.
	Stall time.Duration
	// PartialAge: GC removes what an interrupted pull left once it is so old. 0: 24h.
	PartialAge time.Duration
	// Grace: GC keeps an image this long after its last pull, although nothing
	// uses it yet. 0: none.
	Grace time.Duration
}

// maxLayers is below what overlayfs can stack (500) and above what builders make (127).
const maxLayers = 256

// Store keeps images in one directory. Its methods may be called from any goroutine.
type Store struct {
	dir      string
	opts     Options
	log      *slog.Logger
	platform v1.Platform
	keychain authn.Keychain
	base     http.RoundTripper
	slots    chan struct{}
	lockFile *os.File
	flusher  *diskSync
	idle     func()

	// ctx ends with Close; pulls run under it, because several callers may
	// share one and none of them owns it.
	ctx    context.Context
	cancel context.CancelCauseFunc
	pulls  sync.WaitGroup

	layerLocks, blobLocks keyed

	// change orders what adds to or removes from the disk's whole objects.
	change sync.Mutex

	mu      sync.Mutex // guards the fields below; never held across I/O
	closed  bool
	images  map[fleet.Digest]record
	refs    map[string]refRecord
	refsOf  map[fleet.Digest][]string  // the same by image, sorted
	touched map[fleet.Digest]time.Time // last pull that found it present
	layers  map[string]layerInfo       // by hex of the diff id
	using   map[string]int             // layers (hex) and blobs ("blob:"+hex) that a pull needs
	held    map[fleet.Digest]int
	flights map[string]*flight
}

// record is images/HEX.json.
type record struct {
	Image
	// LayerIDs are the hex names of Layers.
	LayerIDs []string `json:"layer_ids"`
}

// refRecord is refs/HEX.json.
type refRecord struct {
	Ref    string       `json:"ref"`
	Digest fleet.Digest `json:"digest"`
	// Fingerprint of a local source when it had that digest.
	Fingerprint string `json:"fingerprint,omitempty"`
}

// layerInfo is layers/HEX/layer.json.
type layerInfo struct {
	unpack.Result
}

var hexName = regexp.MustCompile(`^[0-9a-f]{64}$`)

// Open opens the store in dir, making it if it is missing, and cleans up what
// a crash left unfinished. fleet.ErrConflict: another process has it open.
func Open(dir string, o Options) (*Store, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	s := &Store{
		dir: dir, opts: o, log: cmp.Or(o.Logger, slog.New(slog.DiscardHandler)),
		flusher: &diskSync{dir: dir},
		images:  map[fleet.Digest]record{}, refs: map[string]refRecord{}, layers: map[string]layerInfo{},
		refsOf: map[fleet.Digest][]string{}, touched: map[fleet.Digest]time.Time{},
		using: map[string]int{}, held: map[fleet.Digest]int{}, flights: map[string]*flight{},
	}
	s.opts.MaxSize = cmp.Or(o.MaxSize, 8<<30)
	s.opts.MaxEntries = cmp.Or(o.MaxEntries, 500_000)
	s.opts.Stall = cmp.Or(o.Stall, 30*time.Second)
	s.opts.PartialAge = cmp.Or(o.PartialAge, 24*time.Hour)
	s.slots = make(chan struct{}, cmp.Or(o.Parallel, 4))
	if s.opts.Insecure == nil {
		s.opts.Insecure = loopback
	}
	s.keychain = cmp.Or[authn.Keychain](o.Keychain, authn.DefaultKeychain)
	platform := cmp.Or(o.Platform, "linux/"+runtime.GOARCH)
	p, err := v1.ParsePlatform(platform)
	if err != nil || p.OS == "" || p.Architecture == "" {
		return nil, &fleet.Error{Op: "open image store", Subject: dir, Kind: fleet.ErrInvalid,
			Err: fmt.Errorf("platform %q is not os/architecture[/variant]", platform)}
	}
	s.platform = *p
	s.base = o.Transport
	s.idle = func() {}
	if s.base == nil {
		t := http.DefaultTransport.(*http.Transport).Clone()
		t.ResponseHeaderTimeout = s.opts.Stall
		t.DialContext = (&net.Dialer{Timeout: 10 * time.Second}).DialContext
		t.DisableCompression = true // blobs are compressed, and verified as they come
		s.base, s.idle = t, t.CloseIdleConnections
	}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	if err := s.open(); err != nil {
		if s.lockFile != nil {
			_ = s.lockFile.Close()
		}
		s.cancel(err)
		return nil, s.explain("open image store", dir, err)
	}
	return s, nil
}

func loopback(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	ip := net.ParseIP(strings.Trim(host, "[]"))
	return host == "localhost" || strings.HasSuffix(host, ".localhost") || ip != nil && ip.IsLoopback()
}

func (s *Store) open() error {
	for _, d := range []string{"", "layers", "images", "refs", "partial", "tmp"} {
		if err := os.MkdirAll(s.path(d), 0o700); err != nil {
			return err
		}
	}
	// Layers hold setuid programs and other tenants' files.
	if err := os.Chmod(s.dir, 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(s.path("lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	s.lockFile = f
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return &fault{kind: fleet.ErrConflict, err: errors.New("another process has it open"),
			hint: "stop the other daemon, or give this one another data directory"}
	}
	if err := s.emptyTmp(); err != nil {
		return err
	}
	if err := s.loadLayers(); err != nil {
		return err
	}
	if err := s.loadImages(); err != nil {
		return err
	}
	return s.loadRefs()
}

func (s *Store) path(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

func (s *Store) layerDir(hex string) string { return s.path("layers", hex, "fs") }

func (s *Store) emptyTmp() error {
	entries, err := os.ReadDir(s.path("tmp"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.RemoveAll(s.path("tmp", e.Name())); err != nil {
			return err
		}
		s.log.Info("unfinished work removed", "path", s.path("tmp", e.Name()))
	}
	return nil
}

// bury moves a file or directory to tmp, at once, and returns its new name for
// the slow removal.
func (s *Store) bury(path string) (string, error) {
	grave, err := os.MkdirTemp(s.path("tmp"), "grave-")
	if err != nil {
		return "", err
	}
	return grave, os.Rename(path, filepath.Join(grave, "x"))
}

// discard removes something that is damaged or belongs to nothing.
func (s *Store) discard(path, why string) error {
	s.log.Warn("image store entry removed", "path", path, "cause", why)
	grave, err := s.bury(path)
	if err != nil {
		return err
	}
	return os.RemoveAll(grave)
}

func (s *Store) loadLayers() error {
	entries, err := os.ReadDir(s.path("layers"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		var info layerInfo
		name := e.Name()
		err := readJSON(s.path("layers", name, "layer.json"), &info)
		if _, serr := os.Stat(s.layerDir(name)); err != nil || serr != nil || !hexName.MatchString(name) {
			if err := s.discard(s.path("layers", name), "not a whole layer"); err != nil {
				return err
			}
			continue
		}
		s.layers[name] = info
	}
	return nil
}

func (s *Store) loadImages() error {
	entries, err := os.ReadDir(s.path("images"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		var rec record
		path := s.path("images", e.Name())
		if err := readJSON(path, &rec); err != nil || path != s.imagePath(rec.Digest) {
			if err := s.discard(path, "not an image record"); err != nil {
				return err
			}
			continue
		}
		rec.Layers = nil
		whole := len(rec.LayerIDs) > 0
		for _, id := range rec.LayerIDs {
			_, ok := s.layers[id]
			whole = whole && ok
			rec.Layers = append(rec.Layers, s.layerDir(id))
		}
		if !whole {
			if err := s.discard(path, "a layer is missing"); err != nil {
				return err
			}
			continue
		}
		s.images[rec.Digest] = rec
	}
	return nil
}

func (s *Store) loadRefs() error {
	entries, err := os.ReadDir(s.path("refs"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		var r refRecord
		path := s.path("refs", e.Name())
		err := readJSON(path, &r)
		_, known := s.images[r.Digest]
		if err != nil || !known || path != s.refPath(r.Ref) {
			if err := s.discard(path, "its image is gone"); err != nil {
				return err
			}
			continue
		}
		s.setRefLocked(r)
	}
	return nil
}

// setRefLocked notes what a reference means. s.mu is held, or not needed yet.
func (s *Store) setRefLocked(r refRecord) {
	s.dropRefLocked(r.Ref)
	s.refs[r.Ref] = r
	list := append(slices.Clone(s.refsOf[r.Digest]), r.Ref)
	slices.Sort(list)
	s.refsOf[r.Digest] = list
}

// dropRefLocked forgets a reference. s.mu is held.
func (s *Store) dropRefLocked(name string) {
	r, ok := s.refs[name]
	if !ok {
		return
	}
	delete(s.refs, name)
	// Images that were handed out share the old list: it is never changed.
	list := slices.DeleteFunc(slices.Clone(s.refsOf[r.Digest]), func(n string) bool { return n == name })
	if s.refsOf[r.Digest] = list; len(list) == 0 {
		delete(s.refsOf, r.Digest)
	}
}

func (s *Store) imagePath(d fleet.Digest) string {
	_, hex, _ := strings.Cut(string(d), ":")
	return s.path("images", hex+".json")
}

func (s *Store) refPath(ref string) string {
	sum := sha256.Sum256([]byte(ref))
	return s.path("refs", hex.EncodeToString(sum[:])+".json")
}

// Close interrupts the pulls under way, waits for them, and lets another
// process open the store.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.mu.Unlock()
	s.cancel(errClosed)
	s.pulls.Wait()
	s.idle()
	return s.lockFile.Close()
}

var errClosed = fmt.Errorf("%w: the image store is closed", context.Canceled)

// Get gives an image that is whole on disk, else fleet.ErrNotFound.
func (s *Store) Get(d fleet.Digest) (Image, error) {
	s.mu.Lock()
	rec, ok := s.images[d]
	img := s.imageLocked(rec)
	s.mu.Unlock()
	for _, dir := range img.Layers {
		if _, err := os.Lstat(dir); err != nil {
			ok = false
		}
	}
	if !ok {
		return Image{}, &fleet.Error{Op: "get image", Subject: string(d), Kind: fleet.ErrNotFound,
			Err: errors.New("not on this node"), Hint: "pull it: fastcontainer image pull REF"}
	}
	return img, nil
}

// imageLocked copies what callers may keep. s.mu is held.
func (s *Store) imageLocked(rec record) Image {
	img := rec.Image
	img.Refs = s.refsOf[img.Digest]
	img.Layers = slices.Clone(img.Layers)
	return img
}

// List gives all images, those pulled last first.
func (s *Store) List() ([]Image, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]Image, 0, len(s.images))
	for _, rec := range s.images {
		out = append(out, s.imageLocked(rec))
	}
	slices.SortFunc(out, func(a, b Image) int {
		return cmp.Or(b.PulledAt.Compare(a.PulledAt), cmp.Compare(a.Digest, b.Digest))
	})
	return out, nil
}

// Hold keeps an image from Remove and GC until release is called, which may be
// repeated. Who runs instances of an image holds it.
func (s *Store) Hold(d fleet.Digest) (release func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.images[d]; !ok {
		return nil, &fleet.Error{Op: "hold image", Subject: string(d), Kind: fleet.ErrNotFound,
			Err: errors.New("not on this node"), Hint: "pull it: fastcontainer image pull REF"}
	}
	s.held[d]++
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.held[d]--; s.held[d] == 0 {
			delete(s.held, d)
		}
	}), nil
}

// Remove removes an image and those of its layers that no other one shares.
// fleet.ErrConflict while it is held.
func (s *Store) Remove(ctx context.Context, d fleet.Digest) error {
	s.mu.Lock()
	_, ok := s.images[d]
	held := s.held[d] > 0
	s.mu.Unlock()
	switch {
	case !ok:
		return &fleet.Error{Op: "remove image", Subject: string(d), Kind: fleet.ErrNotFound, Err: errors.New("not on this node")}
	case held:
		return &fleet.Error{Op: "remove image", Subject: string(d), Kind: fleet.ErrConflict,
			Err: errors.New("instances use it"), Hint: "delete the apps that run it, or deploy them from another image"}
	}
	_, err := s.sweep(ctx, func(rec record) bool { return rec.Digest == d }, false)
	return s.explain("remove image", string(d), err)
}

// GCResult says what a collection freed.
type GCResult struct {
	Images []fleet.Digest `json:"images"`
	Layers int            `json:"layers"`
	// Partials are interrupted downloads that nobody continued.
	Partials int         `json:"partials"`
	Freed    fleet.Bytes `json:"freed"`
}

// GC removes every image that is not in keep and not held, every layer that no
// image has, and old remains of interrupted pulls; never what a pull under way needs.
func (s *Store) GC(ctx context.Context, keep []fleet.Digest) (GCResult, error) {
	kept := map[fleet.Digest]bool{}
	for _, d := range keep {
		kept[d] = true
	}
	now := time.Now()
	res, err := s.sweep(ctx, func(rec record) bool {
		last := rec.PulledAt
		if t := s.touched[rec.Digest]; t.After(last) { // sweep holds s.mu
			last = t
		}
		return !kept[rec.Digest] && (s.opts.Grace == 0 || now.Sub(last) > s.opts.Grace)
	}, true)
	return res, s.explain("collect images", s.dir, err)
}

// sweep forgets the images that drop chooses and removes what then belongs to
// none. Everything is moved away at once, under the change lock, so that a pull
// sees a layer whole or not at all; the slow removal follows.
func (s *Store) sweep(ctx context.Context, drop func(record) bool, partials bool) (res GCResult, err error) {
	var graves []string
	defer func() {
		for _, g := range graves {
			err = errors.Join(err, os.RemoveAll(g))
		}
	}()
	bury := func(path string) error {
		grave, err := s.bury(path)
		if grave != "" {
			graves = append(graves, grave)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	s.change.Lock()
	defer s.change.Unlock()

	s.mu.Lock()
	var images []record
	var refs []string
	for d, rec := range s.images {
		if drop(rec) && s.held[d] == 0 && s.using["image:"+string(d)] == 0 {
			images = append(images, rec)
			delete(s.images, d)
			delete(s.touched, d)
		}
	}
	for name, r := range s.refs {
		if _, ok := s.images[r.Digest]; !ok {
			refs = append(refs, name)
			s.dropRefLocked(name)
		}
	}
	used := map[string]bool{}
	for _, rec := range s.images {
		for _, id := range rec.LayerIDs {
			used[id] = true
		}
	}
	layers := map[string]layerInfo{}
	for id, info := range s.layers {
		if !used[id] && s.using[id] == 0 {
			layers[id] = info
			delete(s.layers, id)
		}
	}
	s.mu.Unlock()

	for _, rec := range images {
		if err := bury(s.imagePath(rec.Digest)); err != nil {
			return res, err
		}
		res.Images = append(res.Images, rec.Digest)
	}
	slices.Sort(res.Images)
	for _, name := range refs {
		if err := bury(s.refPath(name)); err != nil {
			return res, err
		}
	}
	for id, info := range layers {
		if err := bury(s.path("layers", id)); err != nil {
			return res, err
		}
		res.Layers++
		res.Freed += fleet.Bytes(info.Size)
	}
	if !partials {
		return res, context.Cause(ctx)
	}
	entries, err := os.ReadDir(s.path("partial"))
	if err != nil {
		return res, err
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || time.Since(info.ModTime()) < s.opts.PartialAge {
			continue
		}
		s.mu.Lock()
		busy := s.using["blob:"+e.Name()] > 0
		s.mu.Unlock()
		if busy {
			continue
		}
		if err := bury(s.path("partial", e.Name())); err != nil {
			return res, err
		}
		res.Partials++
		res.Freed += fleet.Bytes(info.Size())
	}
	return res, context.Cause(ctx)
}

// use protects names from sweeps until the returned function is called.
func (s *Store) use(names ...string) (release func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range names {
		s.using[n]++
	}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, n := range names {
			if s.using[n]--; s.using[n] == 0 {
				delete(s.using, n)
			}
		}
	}
}
