// Package api is the management interface: JSON over HTTP on a unix socket,
// its server, its wire types and its Go client. The command line speaks only
// through it.
//
//	GET    /v1/version                      Version
//	GET    /v1/apps                         []App
//	POST   /v1/apps                         fleet.Spec → stream of DeployStep
//	GET    /v1/apps/{app}                   AppDetail
//	DELETE /v1/apps/{app}?volumes=true
//	POST   /v1/apps/{app}/stop|start
//	POST   /v1/apps/{app}/rollback          fleet.Revision
//	GET    /v1/instances?app=               []Instance
//	GET    /v1/logs/{name}?lines=&follow=   text
//	GET    /v1/events?app=&last=&after=&follow=    stream of fleet.Event
//	GET    /v1/exec/{name}                  WebSocket: see Exec
//	GET    /v1/run                          WebSocket: see Run
//	GET    /v1/images                       []Image
//	POST   /v1/images                       PullRequest → stream of DeployStep
//	DELETE /v1/images?ref=
//	POST   /v1/images/gc                    GCResult
//	GET    /v1/node                         Node
//	GET    /metrics, /debug/pprof/, /healthz
//
// A failure is answered with its status and an Error. A stream is one JSON
// object a line; a failure within it is its last object.
package api

import (
	"errors"
	"net/http"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/image"
)

// Version of the daemon.
type Version struct {
	Version string `json:"version"`
	Go      string `json:"go"`
}

// App in a list.
type App struct {
	Name      fleet.AppName    `json:"app"`
	Revision  fleet.RevisionID `json:"revision"`
	Image     string           `json:"image"`
	Hosts     []string         `json:"hosts"`
	State     string           `json:"state"` // asleep, standby, starting, running, failing or stopped
	Instances int              `json:"instances"`
	Standbys  int              `json:"standbys"`
	Waiting   int              `json:"waiting"`
	InFlight  int              `json:"in_flight"`
	UpdatedAt time.Time        `json:"updated_at"`
	LastError string           `json:"last_error,omitempty"`
}

// AppDetail is everything about one app. Values of variables are left out:
// they may be secrets.
type AppDetail struct {
	App
	Previous  fleet.RevisionID `json:"previous,omitempty"`
	Spec      fleet.Spec       `json:"spec"`
	Digest    fleet.Digest     `json:"digest"`
	Revisions []RevisionInfo   `json:"revisions"`
	// Starts are what was measured on this node, by kind.
	Starts  []Start       `json:"starts"`
	Running []Instance    `json:"running"`
	Events  []fleet.Event `json:"events"`
}

// Start is what was measured of one kind of start.
type Start struct {
	Kind fleet.StartKind `json:"kind"`
	// Count of them since the daemon began, UsualUS and LongestUS of the last
	// ones, from decided to ready, in microseconds.
	Count     int   `json:"count"`
	UsualUS   int64 `json:"usual_us"`
	LongestUS int64 `json:"longest_us"`
	// Memory that an instance of this kind held, Disk what the saved processes
	// take, in bytes. 0: not known.
	Memory int64 `json:"memory"`
	Disk   int64 `json:"disk"`
	// Next: it is what the next start is to be.
	Next bool `json:"next"`
}

// RevisionInfo is one line of an app's history.
type RevisionInfo struct {
	ID        fleet.RevisionID `json:"revision"`
	Image     string           `json:"image"`
	Digest    fleet.Digest     `json:"digest"`
	Cause     string           `json:"cause"`
	CreatedAt time.Time        `json:"created_at"`
}

// Usage is a limit and what is used of it.
type Usage[T any] struct {
	Limit T `json:"limit"`
	Used  T `json:"used"`
}

// Instance is one line of ps.
type Instance struct {
	App       fleet.AppName    `json:"app"`
	Revision  fleet.RevisionID `json:"revision"`
	ID        fleet.InstanceID `json:"instance"`
	Node      fleet.NodeName   `json:"node"`
	State     fleet.State      `json:"state"`
	Kind      fleet.StartKind  `json:"kind"`
	PID       int              `json:"pid"`
	Address   string           `json:"address"`
	ReadyAt   *time.Time       `json:"ready_at"`
	ExpiresAt *time.Time       `json:"expires_at"`
	InFlight  int              `json:"in_flight"`
	// CPU in cores: the limit, and what was used on average since it started.
	CPU Usage[float64] `json:"cpu"`
	// CPUSeconds used so far; two readings give the present use.
	CPUSeconds float64 `json:"cpu_seconds"`
	// Memory in bytes.
	Memory Usage[int64] `json:"memory"`
}

// Plan is the service level that an app gets, from what its requests on this
// node were like since the daemon started, and what other policies would mean.
type Plan struct {
	App fleet.AppName `json:"app"`
	// Requests in Seconds, and how long its starts took.
	Requests uint64  `json:"requests"`
	Seconds  float64 `json:"seconds"`
	StartP50 float64 `json:"start_p50_ms"`
	StartP99 float64 `json:"start_p99_ms"`
	// Now is the policy that is in force, Others are some beside it.
	Now    PlanLevel   `json:"now"`
	Others []PlanLevel `json:"others"`
	// Wanted is the share of the requests that should meet no start, and
	// Reach the shortest idle time that gives it; empty: only scale.min 1.
	Wanted float64 `json:"wanted"`
	Reach  string  `json:"reach"`
}

// PlanLevel is what one policy gives.
type PlanLevel struct {
	Idle     string `json:"idle"`
	Lifetime string `json:"lifetime"`
	Min      int    `json:"min"`
	// Cold is the share of the requests that meet a start, waits in ms.
	Cold    float64 `json:"cold"`
	WaitP50 float64 `json:"wait_p50_ms"`
	WaitP99 float64 `json:"wait_p99_ms"`
	// Starts a day, and memory at rest × time, in byte seconds a day.
	Starts        float64 `json:"starts_a_day"`
	MemorySeconds float64 `json:"memory_byte_seconds_a_day"`
}

// Image in a list.
type Image struct {
	Digest   fleet.Digest `json:"digest"`
	Refs     []string     `json:"refs"`
	Size     int64        `json:"size"`
	Layers   int          `json:"layers"`
	PulledAt time.Time    `json:"pulled_at"`
}

// PullRequest asks for an image.
type PullRequest struct {
	Ref string `json:"ref"`
}

// GCResult tells what was removed.
type GCResult struct {
	Images []fleet.Digest `json:"images"`
	Layers int            `json:"layers"`
	Freed  int64          `json:"freed"`
}

// DeployStep is one line of the answer to a deploy or a pull: progress, and at
// the end what came of it.
type DeployStep struct {
	Progress *image.Step     `json:"progress,omitempty"`
	Revision *fleet.Revision `json:"revision,omitempty"`
	Image    *Image          `json:"image,omitempty"`
	Error    *Error          `json:"error,omitempty"`
}

// Node is this machine.
type Node struct {
	Name      fleet.NodeName `json:"node"`
	Version   string         `json:"version"`
	StartedAt time.Time      `json:"started_at"`
	CPUs      float64        `json:"cpus"`
	Memory    int64          `json:"memory"`
	Apps      int            `json:"apps"`
	Instances int            `json:"instances"`
	// Store says why the store is away; empty: it is not.
	Store string `json:"store,omitempty"`
}

// ExecRequest is the first message of an exec, as JSON in the query parameter
// "spec".
type ExecRequest struct {
	Args []string `json:"args"`
	Env  []string `json:"env,omitempty"`
	Dir  string   `json:"dir,omitempty"`
	User string   `json:"user,omitempty"`
	TTY  bool     `json:"tty,omitempty"`
}

// RunRequest asks for a container of its own for one program.
type RunRequest struct {
	Spec fleet.Spec `json:"spec"`
	TTY  bool       `json:"tty,omitempty"`
}

// Error is a failure on the wire.
type Error struct {
	// Kind is one of fleet's: "not found", "invalid"...
	Kind    string `json:"kind"`
	Message string `json:"message"`
	Hint    string `json:"hint,omitempty"`
}

// kinds in the order in which they are looked for, with their statuses.
var kinds = []struct {
	err    error
	status int
}{
	{fleet.ErrNotFound, http.StatusNotFound},
	{fleet.ErrInvalid, http.StatusBadRequest},
	{fleet.ErrConflict, http.StatusConflict},
	{fleet.ErrDenied, http.StatusForbidden},
	{fleet.ErrUnavailable, http.StatusServiceUnavailable},
	{fleet.ErrOverloaded, http.StatusServiceUnavailable},
	{fleet.ErrTimeout, http.StatusGatewayTimeout},
	{fleet.ErrFailing, http.StatusBadGateway},
}

// toWire turns an error into its status and wire form.
func toWire(err error) (int, *Error) {
	e := &Error{Kind: "failed", Message: err.Error(), Hint: fleet.Hint(err)}
	for _, k := range kinds {
		if errors.Is(err, k.err) {
			e.Kind = k.err.Error()
			return k.status, e
		}
	}
	return http.StatusInternalServerError, e
}

// remoteError is an error that came over the wire; it says exactly what the
// daemon said.
type remoteError struct {
	message string
	as      *fleet.Error
}

func (r *remoteError) Error() string { return r.message }

func (r *remoteError) Unwrap() error { return r.as }

// fromWire is the error that toWire was given, as far as it can be told.
func fromWire(e *Error) error {
	out := &remoteError{message: e.Message, as: &fleet.Error{Hint: e.Hint}}
	for _, k := range kinds {
		if k.err.Error() == e.Kind {
			out.as.Kind = k.err
		}
	}
	return out
}
