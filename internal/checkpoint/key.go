package checkpoint

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// keyFormat changes when checkpoints of earlier programs are not to be used.
const keyFormat = 3

// identity is what the processes of a checkpoint depend on. An empty list is
// none, as in the store's JSON: a key is the same before and after a restart.
type identity struct {
	Format     int               `json:"format"`
	Host       string            `json:"host"`
	Image      fleet.Digest      `json:"image"`
	Revision   fleet.RevisionID  `json:"revision"`
	Entrypoint []string          `json:"entrypoint,omitempty"`
	Command    []string          `json:"command,omitempty"`
	Env        map[string]string `json:"env,omitempty"`
	Workdir    string            `json:"workdir"`
	User       string            `json:"user"`
	Port       int               `json:"port"`
	Volumes    []fleet.Volume    `json:"volumes,omitempty"`
	Isolation  fleet.Isolation   `json:"isolation"`
	Disk       int64             `json:"disk"`
}

// Key names the checkpoint of a revision on a host: another one where anything
// differs that its processes have seen. host says what they depend on beside
// the spec: kernel, processor. Limits, lifetimes and hosts of the app do not
// matter: a restored instance is given its own.
func Key(host string, image fleet.Digest, rev fleet.RevisionID, spec fleet.Spec) string {
	text, _ := json.Marshal(identity{ // cannot fail: strings, numbers, and a map by strings, which is sorted
		Format: keyFormat, Host: host, Image: image, Revision: rev,
		Entrypoint: spec.Entrypoint, Command: spec.Command, Env: spec.Env, Workdir: spec.Workdir, User: spec.User,
		Port: spec.Port, Volumes: spec.Volumes, Isolation: spec.Isolation, Disk: int64(spec.Resources.Disk),
	})
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}
