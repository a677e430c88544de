package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/image/unpack"
)

// registrySource is a reference to a registry.
type registrySource struct {
	s    *Store
	name name.Reference

	mu     sync.Mutex
	client *http.Client // authenticated; nil until first needed
}

func (r *registrySource) ref() string {
	return strings.Replace(r.name.Name(), "index.docker.io/", "docker.io/", 1)
}

func (r *registrySource) fingerprint(context.Context) (string, error) { return "", nil }

// plainGuard refuses plain HTTP, also after a redirect, where it was not allowed.
type plainGuard struct {
	base     http.RoundTripper
	insecure func(host string) bool
}

func (g *plainGuard) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme != "https" && !g.insecure(req.URL.Host) {
		return nil, invalid("serve the registry with TLS, or name it in the list of insecure registries",
			"%s is spoken to without TLS only if that is allowed", req.URL.Host)
	}
	return g.base.RoundTrip(req)
}

// connect authenticates once per pull.
func (r *registrySource) connect(ctx context.Context) (*http.Client, error) {
	r.mu.Lock()
	c := r.client
	r.mu.Unlock()
	if c != nil {
		return c, nil
	}
	repo := r.name.Context()
	auth, err := authn.Resolve(ctx, r.s.keychain, repo)
	if err != nil {
		return nil, &fault{kind: fleet.ErrDenied, err: fmt.Errorf("read credentials: %w", err),
			hint: "check the docker configuration file and its credential helpers"}
	}
	base := &plainGuard{r.s.base, r.s.opts.Insecure}
	rt, err := transport.NewWithContext(ctx, repo.Registry, auth, base, []string{repo.Scope(transport.PullScope)})
	if err != nil {
		return nil, err
	}
	c = &http.Client{Transport: rt}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.client = c
	return c, nil
}

func (r *registrySource) url(kind, id string) string {
	repo := r.name.Context()
	return fmt.Sprintf("%s://%s/v2/%s/%s/%s", repo.Scheme(), repo.RegistryStr(), repo.RepositoryStr(), kind, id)
}

var manifestTypes = strings.Join([]string{
	string(types.OCIImageIndex), string(types.OCIManifestSchema1),
	string(types.DockerManifestList), string(types.DockerManifestSchema2),
}, ", ")

const (
	attempts  = 5 // in a row, without a byte of progress
	firstWait = 100 * time.Millisecond
)

// again calls try until it succeeds, fails for good, or failed often enough in
// a row. try says whether it got further than the time before.
func again(ctx context.Context, try func() (progress bool, err error)) error {
	wait := firstWait
	for left := attempts; ; {
		progress, err := try()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if progress {
			left, wait = attempts, firstWait
		}
		if left--; left <= 0 || !transient(err) {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(wait + rand.N(wait/2)):
		}
		wait = min(2*wait, 2*time.Second)
	}
}

// document fetches a manifest or a config.
func (r *registrySource) document(ctx context.Context, method, url string, limit int64) (data []byte, h http.Header, err error) {
	err = again(ctx, func() (bool, error) {
		ctx, cancel := context.WithTimeoutCause(ctx, r.s.opts.Stall, errStall)
		defer cancel()
		client, err := r.connect(ctx)
		if err != nil {
			return false, err
		}
		req, err := http.NewRequestWithContext(ctx, method, url, nil)
		if err != nil {
			return false, err
		}
		req.Header.Set("Accept", manifestTypes)
		resp, err := client.Do(req)
		if err != nil {
			return false, stalled(ctx, err)
		}
		defer resp.Body.Close()
		if err := transport.CheckError(resp, http.StatusOK); err != nil {
			return false, err
		}
		h = resp.Header
		data, err = readAll(resp.Body, limit)
		return false, broken(ctx, err)
	})
	return data, h, err
}

// resolve asks with HEAD, which registries count less than a pull.
func (r *registrySource) resolve(ctx context.Context) (fleet.Digest, error) {
	if d, ok := r.name.(name.Digest); ok {
		return fleet.Digest(d.DigestStr()), nil
	}
	url := r.url("manifests", r.name.Identifier())
	_, h, err := r.document(ctx, http.MethodHead, url, 0)
	if err == nil {
		if d, err := v1.NewHash(h.Get("Docker-Content-Digest")); err == nil && d.Algorithm == "sha256" && hexName.MatchString(d.Hex) {
			return fleet.Digest(d.String()), nil
		}
	}
	if te, ok := errors.AsType[*transport.Error](err); err != nil && (!ok || te.StatusCode == http.StatusTooManyRequests || te.StatusCode >= 500) {
		return "", err
	}
	// Without the header, or where HEAD is not allowed. GET also says why.
	data, _, err := r.document(ctx, http.MethodGet, url, maxRecord)
	if err != nil {
		return "", err
	}
	return digestOf(data), nil
}

func (r *registrySource) plan(ctx context.Context) (*plan, error) {
	data, _, err := r.document(ctx, http.MethodGet, r.url("manifests", r.name.Identifier()), maxRecord)
	if err != nil {
		return nil, err
	}
	d := digestOf(data)
	if want, ok := r.name.(name.Digest); ok && want.DigestStr() != string(d) {
		return nil, invalid("something between changes what the registry sends", "the registry gave a manifest with the digest %s", d)
	}
	c, err := r.s.choose(ctx, data, func(ctx context.Context, d v1.Descriptor) ([]byte, error) {
		kind := "blobs"
		if d.MediaType.IsImage() || d.MediaType.IsIndex() {
			kind = "manifests"
		}
		data, _, err := r.document(ctx, http.MethodGet, r.url(kind, d.Digest.String()), maxRecord)
		if err != nil {
			return nil, err
		}
		return checkDocument(data, d)
	})
	if err != nil {
		return nil, err
	}
	return planOf(d, c, func(d v1.Descriptor) func(context.Context, func(int64)) (blob, error) {
		return func(ctx context.Context, done func(int64)) (blob, error) { return r.download(ctx, d, done) }
	}), nil
}

// partialBlob is a downloaded layer. It is kept for the next pull unless it was
// unpacked, or can never be.
type partialBlob struct {
	*os.File
	unlock func()
}

func (b *partialBlob) finish(err error) {
	if err == nil || useless(err) {
		_ = os.Remove(b.Name())
	}
	_ = b.Close()
	b.unlock()
}

// useless says that what was downloaded cannot help the next pull, or must not
// stay because it filled the disk.
func useless(err error) bool {
	f, ok := errors.AsType[*fault](err)
	return ok && errors.Is(f.kind, fleet.ErrInvalid) || errors.Is(err, unpack.ErrRefused) || isFull(err)
}

// download fetches a blob to partial/HEX, from where an earlier pull stopped.
func (r *registrySource) download(ctx context.Context, d v1.Descriptor, done func(int64)) (b blob, err error) {
	// Two images may claim the same blob for different layers.
	unlock, err := r.s.blobLocks.lock(ctx, d.Digest.Hex)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(r.s.path("partial", d.Digest.Hex), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		unlock()
		return nil, err
	}
	p := &partialBlob{f, unlock}
	defer func() {
		if err != nil {
			p.finish(err)
		}
	}()
	dl := &download{r: r, d: d, f: f, sum: sha256.New(), told: done}
	if err := dl.resume(ctx); err != nil {
		return nil, err
	}
	resumed := dl.have > 0
	for {
		if err := again(ctx, func() (bool, error) { return dl.fetch(ctx) }); err != nil {
			return nil, err
		}
		got := hex.EncodeToString(dl.sum.Sum(nil))
		if got == d.Digest.Hex {
			break
		}
		if !resumed {
			return nil, invalid("the registry's copy is damaged, or something between changes what it sends",
				"the content has the digest sha256:%s, the manifest promises %s", got, d.Digest)
		}
		// What was left from before may have been damaged by a power cut.
		resumed = false
		if err := dl.restart(); err != nil {
			return nil, err
		}
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	return p, nil
}

// download is one blob on its way: the file holds have bytes, which sum has seen.
type download struct {
	r    *registrySource
	d    v1.Descriptor
	f    *os.File
	sum  hash.Hash
	have int64
	told func(int64)
}

// resume takes in what an earlier pull left.
func (dl *download) resume(ctx context.Context) error {
	n, err := io.Copy(dl.sum, &ctxReader{ctx, io.LimitReader(dl.f, dl.d.Size+1)})
	if err != nil {
		return err
	}
	if n > dl.d.Size {
		return dl.restart()
	}
	dl.have = n
	dl.told(n)
	return nil
}

func (dl *download) restart() error {
	dl.sum.Reset()
	dl.have = 0
	if err := dl.f.Truncate(0); err != nil {
		return err
	}
	_, err := dl.f.Seek(0, io.SeekStart)
	return err
}

// fetch asks once for all that is missing.
func (dl *download) fetch(ctx context.Context) (progress bool, err error) {
	if dl.have == dl.d.Size {
		return false, nil
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	client, err := dl.r.connect(ctx)
	if err != nil {
		return false, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, dl.r.url("blobs", dl.d.Digest.String()), nil)
	if err != nil {
		return false, err
	}
	// Else the transport would ask for gzip, and a range of that is another one.
	req.Header.Set("Accept-Encoding", "identity")
	if dl.have > 0 {
		req.Header.Set("Range", "bytes="+strconv.FormatInt(dl.have, 10)+"-")
	}
	watch := time.AfterFunc(dl.r.s.opts.Stall, func() { cancel(errStall) })
	defer watch.Stop()
	resp, err := client.Do(req)
	if err != nil {
		return false, stalled(ctx, err)
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode == http.StatusPartialContent && strings.HasPrefix(resp.Header.Get("Content-Range"), fmt.Sprintf("bytes %d-", dl.have)):
	case resp.StatusCode == http.StatusOK, resp.StatusCode == http.StatusPartialContent, resp.StatusCode == http.StatusRequestedRangeNotSatisfiable:
		if resp.StatusCode != http.StatusOK {
			// It does not understand ranges as we do: ask for all of it.
			if dl.have == 0 {
				return false, &transport.Error{StatusCode: resp.StatusCode, Request: req}
			}
			if err := dl.restart(); err != nil {
				return false, err
			}
			return false, errRange
		}
		if err := dl.restart(); err != nil {
			return false, err
		}
	default:
		return false, transport.CheckError(resp, http.StatusOK)
	}
	buf := make([]byte, 128<<10)
	for {
		n, rerr := resp.Body.Read(buf)
		watch.Reset(dl.r.s.opts.Stall)
		if n > 0 {
			if dl.have+int64(n) > dl.d.Size {
				return progress, invalid("the registry's copy is damaged", "the registry sends more than the %d bytes of the manifest", dl.d.Size)
			}
			if _, err := dl.f.Write(buf[:n]); err != nil {
				return progress, err
			}
			_, _ = dl.sum.Write(buf[:n])
			dl.have += int64(n)
			progress = true
			dl.told(dl.have)
		}
		switch {
		case errors.Is(rerr, io.EOF) && dl.have == dl.d.Size:
			return true, nil
		case errors.Is(rerr, io.EOF):
			return progress, broken(ctx, io.ErrUnexpectedEOF)
		case rerr != nil:
			return progress, broken(ctx, rerr)
		}
	}
}

// netError is a fault of the way to the registry.
type netError struct{ error }

func (e netError) Unwrap() error { return e.error }
func (netError) Timeout() bool   { return false }
func (netError) Temporary() bool { return true }

var (
	errStall error = netError{errors.New("the registry sends nothing")}
	errRange error = netError{errors.New("the registry refused to continue")}
)

// stalled gives the reason of a request that our own watch ended.
func stalled(ctx context.Context, err error) error {
	if errors.Is(context.Cause(ctx), errStall) {
		return errStall
	}
	return err
}

// broken marks an error while a body was read.
func broken(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*fault](err); ok {
		return err
	}
	if err = stalled(ctx, err); err == errStall { //nolint:errorlint // the very value
		return err
	}
	return netError{fmt.Errorf("the connection broke: %w", err)}
}
