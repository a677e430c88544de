package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"syscall"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// files are the members of a layout or an archive by name. What open gives can
// be read while others are opened.
type files interface {
	open(name string) (r io.ReadCloser, size int64, err error)
}

// refName is the annotation by which a layout tags its images.
const refName = "org.opencontainers.image.ref.name"

// layoutSource is an OCI layout: oci:DIR or oci:DIR:TAG.
type layoutSource struct {
	s    *Store
	name string
	path string
}

func (l *layoutSource) ref() string                                 { return l.name }
func (l *layoutSource) fingerprint(context.Context) (string, error) { return "", nil }

// dirFiles never leave their directory, whatever links are in it.
type dirFiles struct{ root *os.Root }

func (d dirFiles) open(name string) (io.ReadCloser, int64, error) {
	f, err := d.root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = invalid("", "%s is not a file", name)
	}
	if err != nil {
		_ = f.Close()
		return nil, 0, err
	}
	return f, st.Size(), nil
}

// openRoot opens the layout; a tag may follow the directory after a colon.
func (l *layoutSource) openRoot() (root *os.Root, tag string, err error) {
	root, err = os.OpenRoot(l.path)
	if errors.Is(err, fs.ErrNotExist) {
		if i := strings.LastIndexByte(l.path, ':'); i > strings.LastIndexByte(l.path, '/') {
			if r, err := os.OpenRoot(l.path[:i]); err == nil {
				return r, l.path[i+1:], nil
			}
		}
	}
	return root, "", err
}

func (l *layoutSource) resolve(ctx context.Context) (fleet.Digest, error) {
	root, tag, err := l.openRoot()
	if err != nil {
		return "", err
	}
	defer root.Close()
	d, err := l.s.layoutTop(dirFiles{root}, tag)
	return fleet.Digest(d.Digest.String()), err
}

func (l *layoutSource) plan(ctx context.Context) (*plan, error) {
	root, tag, err := l.openRoot()
	if err != nil {
		return nil, err
	}
	pl, err := l.s.planLayout(ctx, dirFiles{root}, tag)
	if err != nil {
		_ = root.Close()
		return nil, err
	}
	pl.close = func() { _ = root.Close() }
	return pl, nil
}

func readMember(f files, name string) ([]byte, error) {
	r, _, err := f.open(name)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return readAll(r, maxRecord)
}

// layoutTop is the descriptor that the layout, or its tag, means.
func (s *Store) layoutTop(f files, tag string) (v1.Descriptor, error) {
	raw, err := readMember(f, "index.json")
	if errors.Is(err, fs.ErrNotExist) {
		return v1.Descriptor{}, invalid("an OCI layout has the files oci-layout and index.json", "it is not an OCI layout: %w", err)
	}
	if err != nil {
		return v1.Descriptor{}, err
	}
	var index v1.IndexManifest
	if err := json.Unmarshal(raw, &index); err != nil {
		return v1.Descriptor{}, invalid("", "read index.json: %w", err)
	}
	list := index.Manifests
	if tag != "" {
		list = nil
		var tags []string
		for _, d := range index.Manifests {
			if d.Annotations[refName] == tag {
				list = append(list, d)
			}
			tags = append(tags, d.Annotations[refName])
		}
		if list == nil {
			return v1.Descriptor{}, &fault{kind: fleet.ErrNotFound, err: fmt.Errorf("the layout has no tag %q", tag), hint: fmt.Sprintf("it has %q", tags)}
		}
	}
	var d v1.Descriptor
	if len(list) == 1 {
		d = list[0]
	} else if d, err = s.pick(list); err != nil {
		return d, err
	}
	if d.Digest.Algorithm != "sha256" || !hexName.MatchString(d.Digest.Hex) {
		return d, invalid("", "index.json has the digest %q; only sha256 is known", d.Digest)
	}
	return d, nil
}

func blobName(h v1.Hash) (string, error) {
	if h.Algorithm != "sha256" || !hexName.MatchString(h.Hex) {
		return "", invalid("", "the digest %q is none of sha256", h)
	}
	return "blobs/sha256/" + h.Hex, nil
}

// planLayout plans an image of a layout, be it a directory or an archive.
func (s *Store) planLayout(ctx context.Context, f files, tag string) (*plan, error) {
	docs := func(ctx context.Context, d v1.Descriptor) ([]byte, error) {
		name, err := blobName(d.Digest)
		if err != nil {
			return nil, err
		}
		data, err := readMember(f, name)
		if err != nil {
			return nil, missing(err)
		}
		return checkDocument(data, d)
	}
	top, err := s.layoutTop(f, tag)
	if err != nil {
		return nil, err
	}
	raw, err := docs(ctx, top)
	if err != nil {
		return nil, err
	}
	c, err := s.choose(ctx, raw, docs)
	if err != nil {
		return nil, err
	}
	return planOf(fleet.Digest(top.Digest.String()), c, func(d v1.Descriptor) func(context.Context, func(int64)) (blob, error) {
		return func(context.Context, func(int64)) (blob, error) {
			name, err := blobName(d.Digest)
			if err != nil {
				return nil, err
			}
			r, _, err := f.open(name)
			if err != nil {
				return nil, missing(err)
			}
			return &localBlob{verify(r, fleet.Digest(d.Digest.String()), d.Size), func() { _ = r.Close() }}, nil
		}
	}), nil
}

// missing says of a file that is not there that the image is not whole.
func missing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return invalid("export the image again", "the archive is not whole: %w", err)
	}
	return err
}

// planDocker plans the only image of what `docker save` writes.
func (s *Store) planDocker(f files) (*plan, error) {
	raw, err := readMember(f, "manifest.json")
	if err != nil {
		return nil, missing(err)
	}
	var list []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	if err := json.NewDecoder(bytes.NewReader(raw)).Decode(&list); err != nil {
		return nil, invalid("", "read manifest.json: %w", err)
	}
	if len(list) != 1 {
		var tags []string
		for _, m := range list {
			tags = append(tags, m.RepoTags...)
		}
		return nil, invalid("save one image per archive", "the archive has %d images: %s", len(list), strings.Join(tags, ", "))
	}
	m := list[0]
	data, err := readMember(f, m.Config)
	if err != nil {
		return nil, missing(err)
	}
	c, err := parseConfig(data)
	if err != nil {
		return nil, err
	}
	if len(c.RootFS.DiffIDs) != len(m.Layers) {
		return nil, invalid("", "manifest.json has %d layers, the config %d", len(m.Layers), len(c.RootFS.DiffIDs))
	}
	if len(m.Layers) > maxLayers {
		return nil, invalid("squash the image", "it has %d layers; at most %d can be stacked", len(m.Layers), maxLayers)
	}
	// Docker calls an image by the digest of its config, and so do we where
	// there is no manifest.
	pl := &plan{digest: digestOf(data), config: *c, close: func() {}}
	for i, name := range m.Layers {
		id := c.RootFS.DiffIDs[i]
		if id.Algorithm != "sha256" || !hexName.MatchString(id.Hex) {
			return nil, invalid("", "layer %d has the diff id %q; only sha256 is known", i, id)
		}
		pl.layers = append(pl.layers, planLayer{blob: fleet.Digest(id.String()), diffID: id.Hex,
			open: func(context.Context, func(int64)) (blob, error) {
				r, _, err := f.open(name)
				if err != nil {
					return nil, missing(err)
				}
				return &localBlob{r, func() { _ = r.Close() }}, nil
			}})
	}
	return pl, nil
}
