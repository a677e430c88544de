package image

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/image/unpack"
)

// parse reads a reference; it touches neither network nor disk.
func (s *Store) parse(ref string) (source, error) {
	scheme, path, _ := strings.Cut(ref, ":")
	switch scheme {
	case "oci", "tar", "dir":
		if !filepath.IsAbs(path) {
			return nil, invalid("the path is read by the daemon: write it in full, as in "+scheme+":/srv/app", "the path %q is not absolute", path)
		}
		path = filepath.Clean(path)
		switch scheme {
		case "oci":
			return &layoutSource{s: s, name: "oci:" + path, path: path}, nil
		case "tar":
			return &tarSource{s: s, path: path}, nil
		}
		return &dirSource{s: s, path: path}, nil
	}
	var opts []name.Option
	r, err := name.ParseReference(ref, opts...)
	if err == nil && s.opts.Insecure(r.Context().RegistryStr()) {
		r, err = name.ParseReference(ref, append(opts, name.Insecure)...)
	}
	if err != nil {
		return nil, invalid("write it as [HOST[:PORT]/]NAME[:TAG|@sha256:…], or oci:DIR, tar:FILE, dir:ROOTFS", "%w", err)
	}
	return &registrySource{s: s, name: r}, nil
}

// documents gives manifests and configs by descriptor, verified.
type documents func(ctx context.Context, d v1.Descriptor) ([]byte, error)

// checkDocument verifies a small blob against its descriptor.
func checkDocument(data []byte, d v1.Descriptor) ([]byte, error) {
	if got := digestOf(data); string(got) != d.Digest.String() {
		return nil, invalid("the source is damaged, or something between changes what it sends",
			"the digest of the content is %s instead of %s", got, d.Digest)
	}
	return data, nil
}

// chosen is one image of this platform, with all that is small about it.
type chosen struct {
	manifest v1.Manifest
	config   v1.ConfigFile
}

// choose follows an index to the manifest of this platform, and reads the
// manifest and its config.
func (s *Store) choose(ctx context.Context, raw []byte, docs documents) (chosen, error) {
	for range 4 { // an index may point to an index, but not for ever
		var head struct {
			SchemaVersion int             `json:"schemaVersion"`
			MediaType     types.MediaType `json:"mediaType"`
			Manifests     json.RawMessage `json:"manifests"`
			Config        json.RawMessage `json:"config"`
		}
		if err := json.Unmarshal(raw, &head); err != nil {
			return chosen{}, invalid("", "the manifest is not JSON: %w", err)
		}
		if head.SchemaVersion == 1 {
			return chosen{}, invalid("push the image again with a builder of this decade", "its manifest has schema version 1")
		}
		if head.Manifests == nil {
			return s.readImage(ctx, raw, docs)
		}
		var index v1.IndexManifest
		if err := json.Unmarshal(raw, &index); err != nil {
			return chosen{}, invalid("", "read index: %w", err)
		}
		d, err := s.pick(index.Manifests)
		if err != nil {
			return chosen{}, err
		}
		if raw, err = docs(ctx, d); err != nil {
			return chosen{}, fmt.Errorf("manifest %s: %w", d.Digest, err)
		}
	}
	return chosen{}, invalid("", "its indexes are nested too deeply")
}

// pick chooses this platform's manifest. An exact match wins over one that has
// no variant, that over one of another variant's level.
func (s *Store) pick(list []v1.Descriptor) (v1.Descriptor, error) {
	var offered []string
	best, rank := v1.Descriptor{}, 0
	for _, d := range list {
		if d.Platform == nil {
			// A layout's only manifest often names no platform.
			if rank < 1 && (d.MediaType.IsImage() || d.MediaType.IsIndex()) {
				best, rank = d, 1
			}
			continue
		}
		if d.Platform.OS == "unknown" { // signatures and attestations
			continue
		}
		offered = append(offered, d.Platform.String())
		if d.Platform.OS != s.platform.OS || d.Platform.Architecture != s.platform.Architecture {
			continue
		}
		r := 2
		switch d.Platform.Variant {
		case s.platform.Variant:
			r = 4
		case "", "v8": // arm64 is always v8
			r = 3
		}
		if r > rank {
			best, rank = d, r
		}
	}
	if rank == 0 {
		slices.Sort(offered)
		return best, invalid("build the image for this platform (docker build --platform "+s.platform.String()+"), or choose another one",
			"there is none for %s; offered: %s", s.platform.String(), strings.Join(slices.Compact(offered), ", "))
	}
	return best, nil
}

func (s *Store) readImage(ctx context.Context, raw []byte, docs documents) (chosen, error) {
	m, err := v1.ParseManifest(bytes.NewReader(raw))
	if err != nil {
		return chosen{}, invalid("", "read manifest: %w", err)
	}
	if m.Config.Size < 0 || m.Config.Size > maxRecord {
		return chosen{}, invalid("", "its config is said to have %d bytes", m.Config.Size)
	}
	if !m.Config.MediaType.IsConfig() {
		return chosen{}, invalid("this is some other artifact in a registry", "it is not a container image (config of type %q)", m.Config.MediaType)
	}
	if len(m.Layers) > maxLayers {
		return chosen{}, invalid("squash the image", "it has %d layers; at most %d can be stacked", len(m.Layers), maxLayers)
	}
	data, err := docs(ctx, m.Config)
	if err != nil {
		return chosen{}, fmt.Errorf("config %s: %w", m.Config.Digest, err)
	}
	c, err := parseConfig(data)
	if err != nil {
		return chosen{}, err
	}
	if len(c.RootFS.DiffIDs) != len(m.Layers) {
		return chosen{}, invalid("", "its manifest has %d layers, its config %d", len(m.Layers), len(c.RootFS.DiffIDs))
	}
	for i, l := range m.Layers {
		switch {
		case l.Digest.Algorithm != "sha256" || !hexName.MatchString(l.Digest.Hex):
			return chosen{}, invalid("", "layer %d has the digest %q; only sha256 is known", i, l.Digest)
		case l.Size < 0 || l.Size > int64(s.opts.MaxSize):
			return chosen{}, fmt.Errorf("%w: layer %d alone has %d bytes; at most %d are allowed unpacked", unpack.ErrTooLarge, i, l.Size, s.opts.MaxSize)
		case !hexName.MatchString(c.RootFS.DiffIDs[i].Hex) || c.RootFS.DiffIDs[i].Algorithm != "sha256":
			return chosen{}, invalid("", "layer %d has the diff id %q; only sha256 is known", i, c.RootFS.DiffIDs[i])
		}
	}
	return chosen{*m, *c}, nil
}

func parseConfig(data []byte) (*v1.ConfigFile, error) {
	c, err := v1.ParseConfigFile(bytes.NewReader(data))
	if err != nil {
		return nil, invalid("", "read config: %w", err)
	}
	return c, nil
}

// planOf joins a chosen image with the way to its blobs.
func planOf(d fleet.Digest, c chosen, open func(v1.Descriptor) func(context.Context, func(int64)) (blob, error)) *plan {
	pl := &plan{digest: d, config: c.config, close: func() {}}
	for i, l := range c.manifest.Layers {
		pl.layers = append(pl.layers, planLayer{
			blob: fleet.Digest(l.Digest.String()), size: l.Size, diffID: c.config.RootFS.DiffIDs[i].Hex, open: open(l),
		})
	}
	return pl
}

// localBlob is a layer that is read where it lies.
type localBlob struct {
	io.Reader
	close func()
}

func (b *localBlob) finish(error) { b.close() }
