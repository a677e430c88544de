package image

import (
	"slices"
	"strconv"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// Image is one whole image on this node's disk.
type Image struct {
	// Digest is what references mean: of the manifest, or of the index if the
	// reference names one; for archives without a manifest, of the config.
	Digest fleet.Digest `json:"digest"`
	// Refs are the references that meant this image when they were last pulled.
	Refs []string `json:"refs,omitempty"`
	// Layers are the absolute directories of the unpacked layers, topmost
	// first, as overlayfs wants them. There is at least one, and none twice.
	Layers []string `json:"layers"`
	Config Config   `json:"config"`
	// Size of all layers unpacked; some of it may be shared with other images.
	Size         fleet.Bytes `json:"size"`
	PulledAt     time.Time   `json:"pulled_at"`
	Architecture string      `json:"architecture"`
	OS           string      `json:"os"`
}

// Config is what an image says about how to run it.
type Config struct {
	Entrypoint []string `json:"entrypoint,omitempty"`
	Cmd        []string `json:"cmd,omitempty"`
	Env        []string `json:"env,omitempty"`
	User       string   `json:"user,omitempty"`
	WorkingDir string   `json:"working_dir,omitempty"`
	StopSignal string   `json:"stop_signal,omitempty"`
	// Ports are the exposed TCP ports, ascending.
	Ports []int `json:"ports,omitempty"`
	// Volumes are paths whose content is meant to outlive a container.
	Volumes []string          `json:"volumes,omitempty"`
	Labels  map[string]string `json:"labels,omitempty"`
}

func configOf(c v1.Config) Config {
	out := Config{
		Entrypoint: c.Entrypoint, Cmd: c.Cmd, Env: c.Env, User: c.User,
		WorkingDir: c.WorkingDir, StopSignal: c.StopSignal, Labels: c.Labels,
	}
	for p := range c.ExposedPorts {
		num, proto, _ := strings.Cut(p, "/")
		n, err := strconv.Atoi(num)
		if err == nil && n > 0 && n < 1<<16 && (proto == "" || strings.EqualFold(proto, "tcp")) {
			out.Ports = append(out.Ports, n)
		}
	}
	slices.Sort(out.Ports)
	out.Ports = slices.Compact(out.Ports)
	for v := range c.Volumes {
		out.Volumes = append(out.Volumes, v)
	}
	slices.Sort(out.Volumes)
	return out
}

// Phase of one layer on its way, or of the whole pull.
type Phase string

// The phases, in their order.
const (
	PhaseResolving   Phase = "resolving"
	PhaseWaiting     Phase = "waiting"
	PhaseDownloading Phase = "downloading"
	PhaseUnpacking   Phase = "unpacking"
	PhaseDone        Phase = "done"
	PhasePresent     Phase = "present" // was on disk already
	PhaseFailed      Phase = "failed"
)

// Step is the newest state of one layer of a pull, or, without a Layer, of the
// pull itself.
type Step struct {
	Ref string `json:"ref"`
	// Layer is the digest of the layer's blob.
	Layer fleet.Digest `json:"layer,omitempty"`
	// Index of the layer, 0 is the lowest, and number of Layers.
	Index  int   `json:"index"`
	Layers int   `json:"layers"`
	Phase  Phase `json:"phase"`
	// Done of Total bytes of this phase; Total is 0 where it is not known.
	Done  fleet.Bytes `json:"done"`
	Total fleet.Bytes `json:"total"`
}

// Progress is told how a pull goes on. Step is called from the goroutine that
// called Pull, never concurrently; a slow one misses steps in between, but
// always gets the last of each layer.
type Progress interface{ Step(Step) }

// ProgressFunc is a function as a Progress.
type ProgressFunc func(Step)

// Step calls f.
func (f ProgressFunc) Step(s Step) { f(s) }
