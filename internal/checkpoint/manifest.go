package checkpoint

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

const (
	manifestFormat = 1
	// maxManifest is more than the manifest of any tree takes, see maxNames: a
	// name has at most six characters for each byte.
	maxManifest = 128 << 20
)

// manifest is manifest.json: what a checkpoint is, and what is in it.
type manifest struct {
	Format  int           `json:"format"`
	App     fleet.AppName `json:"app"`
	Key     string        `json:"key"`
	Created time.Time     `json:"created"`
	tree
}

// filename is the name of a file below the content's directory. Apps choose
// names, and those need not be UTF-8 as JSON's texts are: it is written as in a
// URL.
type filename string

// MarshalText writes what is unusual as %XX.
func (f filename) MarshalText() ([]byte, error) {
	return []byte((&url.URL{Path: string(f)}).EscapedPath()), nil
}

// UnmarshalText refuses names that do not lie below the directory, or could be
// written in another way.
func (f *filename) UnmarshalText(text []byte) error {
	s, err := url.PathUnescape(string(text))
	if err != nil {
		return err
	}
	if s == "." || !filepath.IsLocal(s) || filepath.Clean(s) != s || strings.ContainsRune(s, 0) {
		return fmt.Errorf("%q is not the name of a file in it", s)
	}
	*f = filename(s)
	return nil
}

// parseManifest reads the manifest of that checkpoint, or says what is wrong
// with it.
func parseManifest(data []byte, id id) (*manifest, error) {
	m := &manifest{}
	if err := unmarshal(data, m); err != nil {
		return nil, err
	}
	switch {
	case m.Format != manifestFormat:
		return nil, fmt.Errorf("its format is %d, not %d", m.Format, manifestFormat)
	case m.App != id.app || m.Key != id.key:
		return nil, errors.New("it is another checkpoint's")
	case m.Created.IsZero():
		return nil, errors.New("it does not say when it was made")
	}
	return m, m.check()
}

// check says what no tree can be like. Sizes that add up to more than a number
// holds would make room where there is none.
func (t *tree) check() error {
	left := int64(1 << 60)
	for i, f := range t.Files {
		if f.Size < 0 || f.Size > left || footprint(f.Size) > left {
			return fmt.Errorf("the size of %q is %d", f.Name, f.Size)
		}
		left -= footprint(f.Size)
		if f.Name == "" || i > 0 && f.Name <= t.Files[i-1].Name {
			return fmt.Errorf("%q is not where it belongs", f.Name)
		}
	}
	known := slices.Collect(maps.Values(types))
	for kind, n := range t.Others {
		if !slices.Contains(known, kind) || n < 1 || int64(n) > left/block {
			return fmt.Errorf("it counts %d of %q", n, kind)
		}
		left -= int64(n) * block
	}
	return nil
}

// unmarshal reads one document that has no more than v knows.
func unmarshal(data []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something follows its end")
	}
	return nil
}
