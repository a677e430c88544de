package daemon

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"

	"github.com/fastcontainer/fastcontainer/internal/dispatch"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

//go:generate go run ./gen config.go ../../docs/configuration.md

// Config is the configuration of one node: what serve reads from --config,
// with flags laid over it. Begin with Default.
//
// docs/configuration.md is made from these comments: the last sentence that
// begins with "Default" says in words what Default returns, or what that means.
type Config struct {
	// Node is this machine's name in the fleet, a DNS label. Default: the first label of the host name.
	Node string `yaml:"node"`
	// Data is the directory of what must be kept: apps, images, volumes, logs, events. Default /var/lib/fastcontainer.
	Data string `yaml:"data"`
	// Run is the directory of what a reboot may lose: the management socket and what is needed to adopt instances. Default /run/fastcontainer.
	Run string `yaml:"run"`
	// HTTP is the front door's address; empty for none. Default :8080.
	HTTP string `yaml:"http"`
	// HTTPS is its address for TLS, which needs tls.certificates. Default: none.
	HTTPS string `yaml:"https"`
	// Metrics is the address of a listener for Prometheus; the management socket always has /metrics. Default: none.
	Metrics string `yaml:"metrics"`
	// ServerTiming: tell clients the stages of a start that they waited for, in a Server-Timing header; the ready event has them anyway. Default false.
	ServerTiming bool `yaml:"server_timing"`

	Log     LogConfig     `yaml:"log"`
	TLS     TLSConfig     `yaml:"tls"`
	Door    DoorConfig    `yaml:"door"`
	Etcd    EtcdConfig    `yaml:"etcd"`
	Network NetworkConfig `yaml:"network"`
	Sandbox SandboxConfig `yaml:"sandbox"`
	Images  ImagesConfig  `yaml:"images"`
	Holds   HoldsConfig   `yaml:"holds"`

	Capacity   CapacityConfig   `yaml:"capacity"`
	Checkpoint CheckpointConfig `yaml:"checkpoint"`
}

// CheckpointConfig is about processes that are saved as they begin to listen,
// and restored instead of started.
type CheckpointConfig struct {
	// CRIU is the program that does it, 4.2 or newer, as a path or a name; empty for none. Default criu.
	CRIU string `yaml:"criu"`
	// Budget is what saved processes may take of the disk together: beyond it those go that were not used for longest; 0 for none. Default 4Gi.
	Budget fleet.Bytes `yaml:"budget"`
}

// CapacityConfig is what the instances of all apps may have together. They
// reserve their resources at rest; what they really use decides when the
// machine starves and digests its idle parts.
type CapacityConfig struct {
	// CPU is the number of cores that instances may use; 0 for all. Default 0.
	CPU float64 `yaml:"cpu"`
	// Memory is what they may use; 0 for the machine's. Default 0.
	Memory fleet.Bytes `yaml:"memory"`
	// CPUOvercommit is how many times cpu may be reserved: instances at rest seldom use theirs at once. Default 256.
	CPUOvercommit float64 `yaml:"cpu_overcommit"`
	// MemoryOvercommit is how many times memory may be reserved. Default 16.
	MemoryOvercommit float64 `yaml:"memory_overcommit"`
	// Standby is the share of memory that frozen instances may hold together: beyond it those end that are worth least for theirs; 0 for none. Default 0.25.
	Standby float64 `yaml:"standby"`
	// Starts is the most starts under way at once; 0 for 16 for each processor. Default 0.
	Starts int `yaml:"starts"`
}

// cores and bytes that instances may really use.
func (c CapacityConfig) cores() float64 {
	if c.CPU > 0 {
		return c.CPU
	}
	return cpus()
}

func (c CapacityConfig) bytes() fleet.Bytes {
	if c.Memory > 0 {
		return c.Memory
	}
	return memory()
}

// LogConfig is what the daemon says about itself, on standard error.
type LogConfig struct {
	// Level is one of debug, info, warn and error. Default info.
	Level string `yaml:"level"`
	// Format is text or json. Default text.
	Format string `yaml:"format"`
	// Access is the share of the requests that are logged, 0 to 1. Default 0.
	Access float64 `yaml:"access"`
}

// TLSConfig is what the HTTPS listener shows to clients.
type TLSConfig struct {
	// Certificates are chosen by the name that a client asks for; the first one is for all other names. Default: none.
	Certificates []Certificate `yaml:"certificates"`
}

// Certificate is a pair of PEM files, read again when they change.
type Certificate struct {
	// Cert is the file of the certificate, with its chain. Required.
	Cert string `yaml:"cert"`
	// Key is the file of its private key. Required.
	Key string `yaml:"key"`
}

// DoorConfig bounds what clients may do.
type DoorConfig struct {
	// TrustedProxies are the prefixes of proxies whose X-Forwarded-*, Forwarded and X-Request-Id are kept; max_conns_per_ip is not for them. Default: none.
	TrustedProxies []string `yaml:"trusted_proxies"`
	// MaxBody is the largest body of a request; 0 for no bound. Default 1Gi.
	MaxBody fleet.Bytes `yaml:"max_body"`
	// MaxConns is the most connections of all clients together. Default 20000.
	MaxConns int `yaml:"max_conns"`
	// MaxConnsPerIP is the most of one IPv4 address or one IPv6 /64. Default 1024.
	MaxConnsPerIP int `yaml:"max_conns_per_ip"`
	// ResponseTimeout is the longest silence of an instance that owes an answer. Default 5m.
	ResponseTimeout fleet.Duration `yaml:"response_timeout"`
}

// EtcdConfig is where apps and revisions are kept.
type EtcdConfig struct {
	// Endpoints are the URLs of an existing cluster. Default: none, etcd runs inside the daemon.
	Endpoints []string `yaml:"endpoints"`
	// CA is the PEM file of who signed the cluster's certificates. Default: none.
	CA string `yaml:"ca"`
	// Cert is the PEM file of the daemon's own certificate for it. Default: none.
	Cert string `yaml:"cert"`
	// Key is the file of that one's private key. Default: none.
	Key string `yaml:"key"`
	// User is who the daemon is in the cluster's authentication. Default: none.
	User string `yaml:"user"`
	// PasswordFile is a file with that user's password. Default: none.
	PasswordFile string `yaml:"password_file"`
}

// NetworkConfig is how containers are connected. Two daemons on one machine
// need two interfaces, subnets, cgroups and ranges of user ids.
type NetworkConfig struct {
	// Interface is the name of the host's interface to them, at most 15 characters. Default fc0.
	Interface string `yaml:"interface"`
	// Subnet is the IPv4 prefix of the containers' addresses, /8 to /28. Default 10.89.0.0/16.
	Subnet string `yaml:"subnet"`
	// DNS are the servers given to containers. Default: the host's.
	DNS []string `yaml:"dns"`
}

// SandboxConfig is how containers are kept on this machine.
type SandboxConfig struct {
	// Cgroup is the path of the group above theirs. Default /fastcontainer.
	Cgroup string `yaml:"cgroup"`
	// UIDBase is the first user id on the host that containers may have: container i has 65536 of them from uid_base + 65536 i. Default 536870912.
	UIDBase uint32 `yaml:"uid_base"`
	// UIDCount is how many such ranges there are. Default 16384.
	UIDCount uint32 `yaml:"uid_count"`
	// Pool is the least number of sandboxes prepared ahead, 1 to 64. Default 4.
	Pool int `yaml:"pool"`
}

// ImagesConfig is how images are kept.
type ImagesConfig struct {
	// Refresh is how often a tag is looked up again; 0 for never. Default 5m.
	Refresh fleet.Duration `yaml:"refresh"`
	// MaxSize is the most that one image may take, unpacked. Default 20Gi.
	MaxSize fleet.Bytes `yaml:"max_size"`
}

// HoldsConfig bounds how requests wait for an instance.
type HoldsConfig struct {
	// PerApp is the most that wait for one app. Default 1000.
	PerApp int `yaml:"per_app"`
	// Total is the most that wait for any. Default 10000.
	Total int `yaml:"total"`
	// Timeout is the longest wait. Default 30s.
	Timeout fleet.Duration `yaml:"timeout"`
}

// Default is the configuration of a node that was told nothing.
func Default() Config {
	d := dispatch.DefaultConfig()
	name, _ := os.Hostname()
	name, _, _ = strings.Cut(strings.ToLower(name), ".")
	if fleet.ValidName(name) != nil {
		name = "node"
	}
	return Config{
		Node: name, Data: "/var/lib/fastcontainer", Run: "/run/fastcontainer", HTTP: ":8080",
		Log: LogConfig{Level: "info", Format: "text"},
		Door: DoorConfig{
			MaxBody: fleet.Bytes(d.MaxBody), MaxConns: d.MaxConns, MaxConnsPerIP: d.MaxConnsPerIP,
			ResponseTimeout: fleet.Duration(d.ResponseTimeout),
		},
		Network:    NetworkConfig{Interface: "fc0", Subnet: "10.89.0.0/16"},
		Sandbox:    SandboxConfig{Cgroup: "/fastcontainer", UIDBase: 536870912, UIDCount: 16384, Pool: 4},
		Images:     ImagesConfig{Refresh: fleet.Duration(5 * time.Minute), MaxSize: 20 << 30},
		Holds:      HoldsConfig{PerApp: 1000, Total: 10000, Timeout: fleet.Duration(30 * time.Second)},
		Capacity:   CapacityConfig{CPUOvercommit: 256, MemoryOvercommit: 16, Standby: 0.25},
		Checkpoint: CheckpointConfig{CRIU: "criu", Budget: 4 << 30},
	}
}

// maxConfig bounds the size of a configuration file.
const maxConfig = 1 << 20

// Load reads a configuration file over the defaults: what it does not say
// stays as Default has it. Unknown keys are refused with their place.
func Load(name string) (Config, error) {
	c := Default()
	refuse := func(err error) (Config, error) {
		return Config{}, &fleet.Error{Op: "read configuration", Subject: name, Kind: fleet.ErrInvalid, Err: err, Hint: "docs/configuration.md lists every key"}
	}
	f, err := os.Open(name) //nolint:gosec // the operator names it
	if err != nil {
		return refuse(err)
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err != nil {
		return refuse(err)
	}
	if len(b) > maxConfig {
		return refuse(fmt.Errorf("it is larger than %s", fleet.Bytes(maxConfig)))
	}
	file, err := parser.ParseBytes(b, 0)
	if err != nil {
		return refuse(err)
	}
	// Comments alone are no document, or one that is null: it must not null the
	// defaults. A second document would be read by nobody.
	if len(file.Docs) > 1 {
		return refuse(errors.New("it has several documents: write one, without ---"))
	}
	if len(file.Docs) == 0 || file.Docs[0].Body == nil {
		return c, nil
	}
	switch file.Docs[0].Body.Type() {
	case ast.NullType, ast.CommentType:
		return c, nil
	}
	if err := yaml.NodeToValue(file.Docs[0].Body, &c, yaml.DisallowUnknownField()); err != nil {
		return refuse(err)
	}
	return c, nil
}

// Validate names everything that is wrong with c, at once.
func (c *Config) Validate() error {
	var errs []error
	bad := func(key, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s: %s", key, fmt.Sprintf(format, args...)))
	}
	if err := fleet.ValidName(c.Node); err != nil {
		bad("node", "%v", err)
	}
	for _, d := range [][2]string{{"data", c.Data}, {"run", c.Run}} {
		if !filepath.IsAbs(d[1]) {
			bad(d[0], "%q is not an absolute path", d[1])
		}
	}
	if c.HTTP == "" && c.HTTPS == "" {
		bad("http", "neither http nor https is set: nobody could come in")
	}
	if c.HTTPS != "" && len(c.TLS.Certificates) == 0 {
		bad("tls.certificates", "https needs at least one certificate")
	}
	for i, cert := range c.TLS.Certificates {
		if cert.Cert == "" || cert.Key == "" {
			bad(fmt.Sprintf("tls.certificates[%d]", i), "both cert and key are needed")
		}
	}
	if p, err := netip.ParsePrefix(c.Network.Subnet); err != nil || !p.Addr().Is4() || p.Bits() < 8 || p.Bits() > 28 {
		bad("network.subnet", "%q is not an IPv4 prefix between /8 and /28", c.Network.Subnet)
	}
	if n := len(c.Network.Interface); n == 0 || n > 15 || strings.ContainsAny(c.Network.Interface, "/ \t\n") {
		bad("network.interface", "%q is not an interface name of 1 to 15 characters", c.Network.Interface)
	}
	for _, pair := range []struct{ key, value, other, needs string }{
		{"etcd.cert", c.Etcd.Cert, "etcd.key", c.Etcd.Key}, {"etcd.key", c.Etcd.Key, "etcd.cert", c.Etcd.Cert},
		{"etcd.user", c.Etcd.User, "etcd.password_file", c.Etcd.PasswordFile}, {"etcd.password_file", c.Etcd.PasswordFile, "etcd.user", c.Etcd.User},
	} {
		if pair.value != "" && pair.needs == "" {
			bad(pair.key, "it needs %s", pair.other)
		}
	}
	for _, s := range c.Network.DNS {
		if _, err := netip.ParseAddr(s); err != nil {
			bad("network.dns", "%v", err)
		}
	}
	for _, s := range c.Door.TrustedProxies {
		if _, err := netip.ParsePrefix(s); err != nil {
			bad("door.trusted_proxies", "%v", err)
		}
	}
	for _, l := range []struct {
		key string
		n   int
	}{
		{"door.max_conns", c.Door.MaxConns}, {"door.max_conns_per_ip", c.Door.MaxConnsPerIP},
		{"holds.per_app", c.Holds.PerApp}, {"holds.total", c.Holds.Total},
	} {
		if l.n < 1 {
			bad(l.key, "%d: at least 1 is needed", l.n)
		}
	}
	if k := c.Capacity; k.CPU < 0 || k.CPU > cpus() {
		bad("capacity.cpu", "%g is not between 0 and the %g of this machine", k.CPU, cpus())
	} else if k.Memory < 0 || k.Memory > memory() {
		bad("capacity.memory", "%s is not between 0 and the %s of this machine", k.Memory, memory())
	}
	if k := c.Capacity; k.CPUOvercommit < 1 || k.MemoryOvercommit < 1 {
		bad("capacity", "an overcommit below 1 would leave a part unused: at least 1")
	}
	if s := c.Capacity.Standby; s < 0 || s > 1 {
		bad("capacity.standby", "%g is not between 0 and 1", s)
	}
	if c.Checkpoint.Budget < 0 {
		bad("checkpoint.budget", "%d is negative", c.Checkpoint.Budget)
	}
	if c.Capacity.Starts < 0 {
		bad("capacity.starts", "%d is negative", c.Capacity.Starts)
	}
	if c.Holds.Timeout <= 0 {
		bad("holds.timeout", "it must be more than 0")
	}
	if c.Door.ResponseTimeout <= 0 {
		bad("door.response_timeout", "it must be more than 0")
	}
	if c.Log.Access < 0 || c.Log.Access > 1 {
		bad("log.access", "%g is not between 0 and 1", c.Log.Access)
	}
	if !strings.HasPrefix(c.Sandbox.Cgroup, "/") || strings.Contains(c.Sandbox.Cgroup, "..") || c.Sandbox.Cgroup == "/" {
		bad("sandbox.cgroup", "%q is not a path such as /fastcontainer", c.Sandbox.Cgroup)
	}
	// The last id of all means "none" to the kernel.
	base, end := uint64(c.Sandbox.UIDBase), uint64(c.Sandbox.UIDBase)+uint64(c.Sandbox.UIDCount)<<16
	if base < 1<<16 || c.Sandbox.UIDCount < 1 || end >= 1<<32 {
		bad("sandbox.uid_base", "uid_base %d and uid_count %d: 65536 to 4294967294 must hold them all", c.Sandbox.UIDBase, c.Sandbox.UIDCount)
	} else if base < ociEnd && end > ociUIDs {
		bad("sandbox.uid_base", "uid_base %d and uid_count %d: %d to %d are those of crun, runc and runsc", c.Sandbox.UIDBase, c.Sandbox.UIDCount, int64(ociUIDs), int64(ociEnd-1))
	}
	if c.Sandbox.Pool < 1 || c.Sandbox.Pool > 64 {
		bad("sandbox.pool", "%d is not between 1 and 64", c.Sandbox.Pool)
	}
	switch c.Log.Level {
	case "debug", "info", "warn", "error":
	default:
		bad("log.level", "%q: use debug, info, warn or error", c.Log.Level)
	}
	if c.Log.Format != "text" && c.Log.Format != "json" {
		bad("log.format", "%q: use text or json", c.Log.Format)
	}
	if len(errs) == 0 {
		return nil
	}
	return &fleet.Error{Op: "check configuration", Kind: fleet.ErrInvalid, Err: errors.Join(errs...), Hint: "docs/configuration.md lists every key"}
}

// ociEnd is the first user id after those of the OCI runtimes.
const ociEnd = ociUIDs + 3*ociUIDCount<<16

// cpus of this machine, as the fleet is told.
func cpus() float64 { return float64(runtime.NumCPU()) }
