package fleet

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// RevisionID names one version of an app: APP@N, N counting from 1.
type RevisionID string

// MakeRevisionID is the name of the n-th revision of app.
func MakeRevisionID(app AppName, n int) RevisionID {
	return RevisionID(string(app) + "@" + strconv.Itoa(n))
}

// Split gives the parts of a revision's name.
func (r RevisionID) Split() (AppName, int, error) {
	app, num, ok := strings.Cut(string(r), "@")
	n, err := strconv.Atoi(num)
	if !ok || err != nil || n < 1 {
		return "", 0, fmt.Errorf("%q is not a revision: write it as APP@N", string(r))
	}
	return AppName(app), n, nil
}

// App is what a user deployed. Durable: the store keeps it.
type App struct {
	Name AppName `json:"name"`
	// Current is the revision that new instances are made from.
	Current RevisionID `json:"current"`
	// Previous is where a rollback goes; empty before the second deploy.
	Previous RevisionID `json:"previous,omitempty"`
	// Latest is the highest revision number ever given out.
	Latest    int       `json:"latest"`
	CreatedAt time.Time `json:"created_at"`
	UpdatedAt time.Time `json:"updated_at"`
	// Stopped apps answer 503 and start nothing until the next deploy or start.
	Stopped bool `json:"stopped,omitempty"`
}

// Revision is one immutable version of an app: a spec and the image it meant
// at that moment. A deploy makes one; so does a tag that moved.
type Revision struct {
	ID        RevisionID `json:"id"`
	App       AppName    `json:"app"`
	Spec      Spec       `json:"spec"`
	Image     Digest     `json:"image"`
	CreatedAt time.Time  `json:"created_at"`
	// Cause: "deploy", "rollback" or "image changed".
	Cause string `json:"cause"`
}

// Node is one machine that runs instances, as it describes itself in the store.
type Node struct {
	Name      NodeName  `json:"name"`
	Address   string    `json:"address,omitempty"`
	CPUs      float64   `json:"cpus"`
	Memory    Bytes     `json:"memory"`
	Version   string    `json:"version"`
	StartedAt time.Time `json:"started_at"`
}

// Instance is one container of a revision on one node. Soft state: the node
// that runs it is the only truth about it.
type Instance struct {
	ID       InstanceID     `json:"instance"`
	App      AppName        `json:"app"`
	Revision RevisionID     `json:"revision"`
	Image    Digest         `json:"image"`
	Node     NodeName       `json:"node"`
	State    State          `json:"state"`
	Kind     StartKind      `json:"kind"`
	PID      int            `json:"pid"`
	Address  netip.AddrPort `json:"address"`
	// StartedAt is when the start was decided.
	StartedAt time.Time `json:"started_at"`
	// ReadyAt is zero until it is ready.
	ReadyAt time.Time `json:"ready_at"`
	// ExpiresAt is the end of its lifetime; zero: never.
	ExpiresAt time.Time `json:"expires_at"`
}
