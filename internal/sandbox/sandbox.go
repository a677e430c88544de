package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/netip"
	"os"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/sandbox/cgroup"
)

// Spec is everything a body needs to start one container.
type Spec struct {
	ID  fleet.InstanceID
	App fleet.AppName
	// Layers are the directories of the root filesystem, topmost first. They
	// are shared by content and never written.
	Layers []string
	// Hostname inside; also written to /etc/hosts.
	Hostname string

	// Args, Env, Dir and User are what the image and the spec say after
	// merging. User is a name, uid, name:group or uid:gid; it is resolved
	// inside the root filesystem. Empty: root (of the container).
	Args []string
	Env  []string
	Dir  string
	User string

	// UserNS: run in a user namespace with a uid range of the app's own.
	UserNS bool
	// ReadonlyRoot: no writable layer.
	ReadonlyRoot bool
	// Disk bounds the writable layer, which lives in memory. 0: 64 MiB.
	Disk fleet.Bytes
	// Seccomp is "default" or "unconfined".
	Seccomp string
	// CapAdd and CapDrop change the default capability set.
	CapAdd, CapDrop []string
	Mounts          []Mount
	Limits          Limits

	// Log is the file that stdout and stderr are appended to; it is made with
	// mode 0600 and given to the container's user. Ignored with Stdio.
	Log string
	// LogMax bounds the log file's size; the newest part is kept. 0: 16 MiB.
	LogMax fleet.Bytes
	// Stdio, where set, is used instead of Log and /dev/null.
	Stdio *Stdio
}

// Stdio connects a program to its caller. With TTY the program gets a
// pseudo-terminal of the container's own, and Stderr is unused.
type Stdio struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	TTY            bool
	// Resize delivers the size of the caller's terminal; may be nil.
	Resize <-chan WindowSize
}

// WindowSize of a terminal in characters.
type WindowSize struct{ Rows, Cols uint16 }

// Mount puts a host directory or file into the container. Ownership is
// mapped: uid 0 inside is uid 0 on disk, also in a user namespace.
type Mount struct {
	Source   string // absolute, on the host
	Target   string // absolute, inside
	Readonly bool
}

// Limits of one container; each can be changed while it runs. Zero: no limit.
type Limits struct {
	// CPU in cores (cgroup quota).
	CPU float64 `json:"cpu"`
	// CPUWeight relative to other containers, 2 to 10000, 100 is usual; or
	// IdleWeight.
	CPUWeight uint64 `json:"cpu_weight"`
	// Memory including page cache and writable layer; swap is not added.
	Memory fleet.Bytes `json:"memory"`
	PIDs   int64       `json:"pids"`
}

// IdleWeight is the CPUWeight of who gets only what no other container wants.
const IdleWeight = cgroup.IdleWeight

// Cgroup is the limits as a control group takes them.
func (l Limits) Cgroup() cgroup.Limits {
	return cgroup.Limits{CPU: l.CPU, CPUWeight: l.CPUWeight, Memory: int64(l.Memory), PIDs: l.PIDs}
}

// Over lays limits over others: a zero leaves a number as it is.
func (l Limits) Over(base Limits) Limits {
	if l.CPU > 0 {
		base.CPU = l.CPU
	}
	if l.CPUWeight > 0 {
		base.CPUWeight = l.CPUWeight
	}
	if l.Memory > 0 {
		base.Memory = l.Memory
	}
	if l.PIDs > 0 {
		base.PIDs = l.PIDs
	}
	return base
}

// Stats of one container, read at once from its cgroup.
type Stats struct {
	CPUTime       time.Duration `json:"cpu_time"`
	Throttled     time.Duration `json:"throttled"`
	Periods       uint64        `json:"periods"`
	ThrottledPers uint64        `json:"throttled_periods"`
	Memory        fleet.Bytes   `json:"memory"`
	MemoryPeak    fleet.Bytes   `json:"memory_peak"`
	PIDs          int64         `json:"pids"`
	OOMKills      uint64        `json:"oom_kills"`
}

// Timings of a start inside the sandbox; each follows the one before.
type Timings struct {
	Claim, Rootfs, Network, Exec time.Duration
}

// Exit says how the first process of a container ended.
type Exit struct {
	// Code is the exit code, or 128+signal. -1: not known (it ended while no
	// daemon was its parent).
	Code   int
	Signal string // "SIGKILL", "SIGTERM"... or ""
	OOM    bool   // the kernel killed something in it for lack of memory
	At     time.Time
}

// Runtime is a body that runs containers. All methods may be called from any
// goroutine.
type Runtime interface {
	// Start makes a container and returns when its program has been
	// executed; it does not wait for the program to listen. On error nothing
	// is left. Errors of the user's making (no such program, unknown user)
	// are fleet.ErrInvalid with a hint.
	Start(ctx context.Context, spec Spec) (Sandbox, error)
	// Adopt takes over a container that an earlier process started, from what
	// its State gave. ErrGone: it has ended meanwhile, and its remains were
	// removed.
	Adopt(ctx context.Context, state json.RawMessage) (Sandbox, error)
	// Clean removes everything of this runtime on the host that belongs to no
	// container in keep: what a crashed daemon left. It returns the names of
	// what it removed.
	Clean(ctx context.Context, keep []fleet.InstanceID) ([]string, error)
	// Check reports why this body cannot work on this host, with hints; nil if it can.
	Check() error
	// Close stops prepared parts and background work, but no container.
	Close() error
}

// Sandbox is one running container.
type Sandbox interface {
	ID() fleet.InstanceID
	// PID of its first process, as the host sees it.
	PID() int
	// Address where it is reached from the host.
	Address() netip.Addr
	// State is what Adopt needs, to be kept by the caller. It holds no secrets.
	State() json.RawMessage
	// Timings of its start; zero after Adopt.
	Timings() Timings
	// Signal sends a signal to its first process.
	Signal(sig os.Signal) error
	// Kill ends all of its processes at once.
	Kill() error
	// Done is closed when its first process has ended, noticed by event.
	Done() <-chan struct{}
	// Exit tells how it ended; valid once Done is closed.
	Exit() Exit
	// Resize changes its limits while it runs.
	Resize(Limits) error
	// Stats reads its cgroup. An unreadable number stays 0 and is named in
	// the error, the others are good.
	Stats() (Stats, error)
	// CPU reads only what it says about the processor, which costs a tenth.
	CPU() (Stats, error)
	// Alarm calls f when its memory goes above at, until stop is called or the
	// container ends. f may be called more often, and looks for itself.
	Alarm(at fleet.Bytes, f func()) (stop func(), err error)
	// Exec runs a further program inside it and returns when that has ended,
	// with its exit code. Canceling ctx kills that program.
	Exec(ctx context.Context, p Process) (int, error)
	// Destroy kills what still runs and removes every trace. It may be
	// repeated.
	Destroy(ctx context.Context) error
}

// Process is a further program inside a container.
type Process struct {
	Args  []string
	Env   []string // nil: the container's own
	Dir   string   // "": the container's own
	User  string   // "": the container's own
	Stdio Stdio
}

// Freezer is implemented by sandboxes that can be frozen: no CPU, no timers,
// memory kept.
type Freezer interface {
	// Freeze returns when every process stands still, or when ctx ends; then
	// some may.
	Freeze(ctx context.Context) error
	Thaw() error
	// Reclaim has the kernel move what it can of a frozen container's memory
	// to swap, if the host has some.
	Reclaim() error
}

// Asker is implemented by sandboxes that can be asked what listens in them.
type Asker interface {
	// Listens tells whether somebody would take a connection to their address. An
	// error says that it cannot be asked, or not any more.
	Listens(port int) (bool, error)
}

// Checkpointer is implemented by runtimes that can save the processes of a
// container, and make containers from them.
type Checkpointer interface {
	// Checkpoint starts a container of the spec for nobody and saves its
	// processes and what they wrote below dir, which exists and is empty, as they are about
	// to listen on o.Port. Nothing else is left of it, and on error nothing in dir is of use.
	Checkpoint(ctx context.Context, spec Spec, o Capture, dir string) error
	// Restore makes a container from what Checkpoint saved of the same spec,
	// but for its ID, Log and Limits. It returns when its processes run.
	// ErrUnrestorable: it never will. Any other error is of this moment.
	Restore(ctx context.Context, spec Spec, dir string) (Sandbox, error)
	// CheckpointHost names what a checkpoint depends on beside its spec: the
	// kernel, the processor, CRIU. An error (fleet.ErrUnavailable) says with a
	// hint why this host makes none. After Open it waits for a moment, until CRIU
	// was looked at or ctx ends.
	CheckpointHost(ctx context.Context) (string, error)
}

// ErrUnrestorable is returned by Restore for what was saved and is of no use: CRIU
// says so, or it is damaged.
var ErrUnrestorable = errors.New("what was saved is of no use")

// Capture says when to save a container's processes.
type Capture struct {
	// Port that it listens on.
	Port int
	// Ready returns nil when it answers there; then its processes are saved even if
	// no listen(2) was seen.
	Ready func(ctx context.Context, address netip.Addr) error
	// Warm is called when it answers, and its processes are saved after that
	// instead of as they begin to listen. nil: they are not warmed.
	Warm func(ctx context.Context, address netip.Addr) error
	// Rest is how long processes that were warmed are left alone before they are
	// saved, and up to three times as long if they are busy still.
	Rest time.Duration
}

// RestoredFile is where a restored program finds what is new about it, a JSON
// object with the keys time, seed (32 random bytes in hex), instance and
// address. It does not exist in other containers.
const RestoredFile = "/etc/fastcontainer/restored"

// ErrGone is returned by Adopt for a container that has ended.
var ErrGone = errors.New("container is gone")
