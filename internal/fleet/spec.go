package fleet

// Spec is what a user asks for: the content of an app file after defaults
// were filled in and everything was checked (package appfile). It is the
// immutable part of a revision.
//
// The field comments are the reference: docs/app-file.md is generated from
// them.
type Spec struct {
	// Name of the app: a DNS label, unique on the node or cluster. Required.
	Name AppName `yaml:"name" json:"name"`
	// Image to run: a registry reference ("docker.io/library/nginx:1"), or
	// oci:DIR (OCI layout), tar:FILE (docker or OCI archive, or a root
	// filesystem tarball), dir:ROOTFS (a plain directory). Required.
	Image string `yaml:"image" json:"image"`
	// Hosts are the host names whose requests belong to this app. Default:
	// NAME.localhost. "*.example.com" matches one label.
	Hosts []string `yaml:"hosts" json:"hosts"`
	// Port where the app listens inside its container, 1 to 65535; given to it
	// as $PORT too. Default: the image's only exposed TCP port, else 8080.
	Port int `yaml:"port" json:"port"`
	// Entrypoint replaces the image's entrypoint; the image's command is then
	// dropped, as OCI says. Default: the image's.
	Entrypoint []string `yaml:"entrypoint,omitempty" json:"entrypoint,omitempty"`
	// Command replaces the image's command. Default: the image's.
	Command []string `yaml:"command,omitempty" json:"command,omitempty"`
	// Env is added to the image's environment and wins over it.
	Env map[string]string `yaml:"env,omitempty" json:"env,omitempty"`
	// Workdir replaces the image's working directory.
	Workdir string `yaml:"workdir,omitempty" json:"workdir,omitempty"`
	// User replaces the image's user: name, uid, name:group or uid:gid.
	User string `yaml:"user,omitempty" json:"user,omitempty"`
	// StopSignal replaces the image's stop signal. Default: the image's, else SIGTERM.
	StopSignal string `yaml:"stop_signal,omitempty" json:"stop_signal,omitempty"`
	// Ready says when an instance may be given requests.
	Ready Ready `yaml:"ready" json:"ready"`
	// Lifetime of an instance after it became ready; siblings get up to a
	// tenth less, by chance, so that they do not die together. "0": for ever.
	// Default 20m.
	Lifetime Duration `yaml:"lifetime" json:"lifetime"`
	// Idle: freeze or retire an instance this long after the end of its last
	// response, see start. "0": only its lifetime ends it. Default 5m.
	Idle Duration `yaml:"idle" json:"idle"`
	// Drain: how long a retiring instance may finish what is in flight, and
	// again how long it may take to obey its stop signal. Default 30s.
	Drain Duration `yaml:"drain" json:"drain"`
	// Concurrency: most requests in flight per instance, hard. 0: no cap.
	Concurrency int `yaml:"concurrency" json:"concurrency"`
	// Scale bounds the number of instances.
	Scale Scale `yaml:"scale" json:"scale"`
	// Resources of one instance.
	Resources Resources `yaml:"resources" json:"resources"`
	// Priority decides who is digested first under starvation: low first.
	// 0 to 100, default 50.
	Priority int `yaml:"priority" json:"priority"`
	// Start prefers a kind of start. auto: the quickest of those that were
	// measured: an idle instance is frozen instead of retired where a thaw saves
	// time and somebody may come, and, with restored_signal, processes that are slow
	// to start are saved as they listen and restored from then on (docs/checkpoint.md); standby: the same,
	// and one is always kept frozen, within the node's capacity.standby; checkpoint:
	// idle instances end, and starts restore; cold: none of it. Default auto.
	Start StartPolicy `yaml:"start" json:"start"`
	// Warm is a path that is asked once before the processes are saved, so that
	// what the first request loads and compiles is saved, too. Default: none, they
	// are saved as they begin to listen.
	Warm string `yaml:"warm,omitempty" json:"warm,omitempty"`
	// RestoredSignal is sent to the first process of an instance whose processes
	// were restored, so that it can renew what must not be the same in two of them.
	// Default: none.
	RestoredSignal string `yaml:"restored_signal,omitempty" json:"restored_signal,omitempty"`
	// Volumes are directories that outlive instances.
	Volumes []Volume `yaml:"volumes,omitempty" json:"volumes,omitempty"`
	// Isolation of the container from its host.
	Isolation Isolation `yaml:"isolation" json:"isolation"`
}

// Ready says when an instance may be given requests: its port accepts
// connections, and its HTTP check answers if it has one.
type Ready struct {
	// HTTP path that must answer 200 to 399. Default: none, the open port is enough.
	HTTP string `yaml:"http,omitempty" json:"http,omitempty"`
	// Timeout of a start: past it the start has failed. Default 30s.
	Timeout Duration `yaml:"timeout" json:"timeout"`
}

// Scale bounds the number of instances of an app.
type Scale struct {
	// Min instances are kept even without requests. Default 0.
	Min int `yaml:"min" json:"min"`
	// Max instances. Default 10.
	Max int `yaml:"max" json:"max"`
}

// Resources of one instance.
type Resources struct {
	// CPU in cores: what it has when calm, and the most it may be given.
	CPU CPU `yaml:"cpu" json:"cpu"`
	// Memory: what it has when calm, and the most it may be given.
	Memory Memory `yaml:"memory" json:"memory"`
	// Disk: size of the writable layer, which is kept in memory and is gone
	// with the instance. Default: half of the memory peak.
	Disk Bytes `yaml:"disk" json:"disk"`
	// PIDs: most processes and threads. Default 1024.
	PIDs int64 `yaml:"pids" json:"pids"`
}

// CPU limits in cores; 0.3 is 30 % of one core.
type CPU struct {
	// Rest: default 1.
	Rest float64 `yaml:"rest" json:"rest"`
	// Peak: default: rest.
	Peak float64 `yaml:"peak" json:"peak"`
}

// Memory limits.
type Memory struct {
	// Rest: default 256Mi.
	Rest Bytes `yaml:"rest" json:"rest"`
	// Peak: default: rest.
	Peak Bytes `yaml:"peak" json:"peak"`
}

// Volume is a directory that outlives instances: either named (kept by the
// node under its data directory) or a bind of a host directory.
type Volume struct {
	// Name of a volume kept by the node, one per app and name. A DNS label.
	Name string `yaml:"name,omitempty" json:"name,omitempty"`
	// Bind is an absolute directory or file of the host, instead of a name.
	Bind string `yaml:"bind,omitempty" json:"bind,omitempty"`
	// Mount is the absolute path inside the container. Required.
	Mount string `yaml:"mount" json:"mount"`
	// Readonly: default false.
	Readonly bool `yaml:"readonly,omitempty" json:"readonly,omitempty"`
}

// Isolation of a container from its host.
type Isolation struct {
	// Runtime: native, crun, runc or runsc. Default native.
	Runtime Runtime `yaml:"runtime" json:"runtime"`
	// UserNS: run in a user namespace with a uid range of the app's own. Default true.
	UserNS bool `yaml:"userns" json:"userns"`
	// Readonly root filesystem: no writable layer. Default false.
	Readonly bool `yaml:"readonly" json:"readonly"`
	// Seccomp: default or unconfined. Default "default".
	Seccomp string `yaml:"seccomp" json:"seccomp"`
	// Capabilities beyond or below the default set.
	Capabilities Capabilities `yaml:"capabilities" json:"capabilities"`
}

// Capabilities are names such as NET_BIND_SERVICE, with or without "CAP_".
type Capabilities struct {
	// Add to the default set.
	Add []string `yaml:"add,omitempty" json:"add,omitempty"`
	// Drop from the default set; ALL drops every one.
	Drop []string `yaml:"drop,omitempty" json:"drop,omitempty"`
}

// Runtime is the body that runs a container.
type Runtime string

// The runtimes.
const (
	RuntimeNative Runtime = "native"
	RuntimeCrun   Runtime = "crun"
	RuntimeRunc   Runtime = "runc"
	RuntimeRunsc  Runtime = "runsc"
)

// StartPolicy is a wish about the kind of start.
type StartPolicy string

// The start policies.
const (
	StartAuto       StartPolicy = "auto"
	StartCold       StartPolicy = "cold"
	StartStandby    StartPolicy = "standby"
	StartCheckpoint StartPolicy = "checkpoint"
)
