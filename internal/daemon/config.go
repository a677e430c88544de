package daemon

import (
	"bytes"
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

	"github.com/fastcontainer/fastcontainer/internal/dispatch"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// Config is the configuration of one node: what serve reads from --config,
// with flags laid over it. Begin with Default.
type Config struct {
	// Node is this machine's name in the fleet, a DNS label. Default: the
	// first label of the host name.
	Node string `yaml:"node"`
	// Data is the directory of everything durable. Default /var/lib/fastcontainer.
	Data string `yaml:"data"`
	// Run is the directory of what a reboot may lose: the API's socket, the
	// running instances. Default /run/fastcontainer.
	Run string `yaml:"run"`
	// HTTP and HTTPS are the front door's addresses, "" for none. Defaults :8080 and none.
	HTTP  string `yaml:"http"`
	HTTPS string `yaml:"https"`
	// Metrics is the address of a Prometheus listener, "" for none; the run
	// socket always has /metrics. Default none.
	Metrics string `yaml:"metrics"`
	// ServerTiming adds the stages of a start to the responses that waited for
	// it. Default false: the stages are in the ready event anyway.
	ServerTiming bool `yaml:"server_timing"`

	Log     LogConfig     `yaml:"log"`
	TLS     TLSConfig     `yaml:"tls"`
	Door    DoorConfig    `yaml:"door"`
	Etcd    EtcdConfig    `yaml:"etcd"`
	Network NetworkConfig `yaml:"network"`
	Sandbox SandboxConfig `yaml:"sandbox"`
	Images  ImagesConfig  `yaml:"images"`
	Holds   HoldsConfig   `yaml:"holds"`
}

// LogConfig says what the daemon logs about itself, on standard error.
type LogConfig struct {
	// Level: debug, info, warn or error. Default info.
	Level string `yaml:"level"`
	// Format: text or json. Default text.
	Format string `yaml:"format"`
	// Access is the share of requests that are logged, 0 to 1. Default 0.
	Access float64 `yaml:"access"`
}

// TLSConfig holds the certificates of the HTTPS listener.
type TLSConfig struct {
	Certificates []Certificate `yaml:"certificates"`
}

// Certificate is a pair of PEM files, read again when they change.
type Certificate struct {
	Cert string `yaml:"cert"`
	Key  string `yaml:"key"`
}

// DoorConfig bounds what clients may do.
type DoorConfig struct {
	// TrustedProxies are the prefixes of proxies whose X-Forwarded-* and
	// Forwarded are believed. Default none.
	TrustedProxies []string `yaml:"trusted_proxies"`
	// MaxBody of a request. 0: no bound. Default 1Gi.
	MaxBody fleet.Bytes `yaml:"max_body"`
	// MaxConns and MaxConnsPerIP bound client connections. Defaults 20000 and 1024.
	MaxConns      int `yaml:"max_conns"`
	MaxConnsPerIP int `yaml:"max_conns_per_ip"`
	// ResponseTimeout: longest silence of an instance that owes an answer. Default 5m.
	ResponseTimeout fleet.Duration `yaml:"response_timeout"`
}

// EtcdConfig says where apps and revisions are kept.
type EtcdConfig struct {
	// Endpoints of an existing cluster. Default none: etcd runs inside the
	// daemon, on a unix socket in the data directory.
	Endpoints []string `yaml:"endpoints"`
	// CA, Cert and Key for TLS to the cluster; User and PasswordFile for its
	// authentication.
	CA           string `yaml:"ca"`
	Cert         string `yaml:"cert"`
	Key          string `yaml:"key"`
	User         string `yaml:"user"`
	PasswordFile string `yaml:"password_file"`
}

// NetworkConfig says how containers are connected.
type NetworkConfig struct {
	// Bridge is the interface's name. Default fc0.
	Bridge string `yaml:"bridge"`
	// Subnet of the containers' addresses. Default 10.89.0.0/16.
	Subnet string `yaml:"subnet"`
	// DNS servers given to containers. Default: the host's.
	DNS []string `yaml:"dns"`
}

// SandboxConfig says how containers are kept on this host.
type SandboxConfig struct {
	// Cgroup is the path of the parent group. Default /fastcontainer.
	Cgroup string `yaml:"cgroup"`
	// UIDBase and UIDCount: container i has the host ids from
	// UIDBase+65536*i. Defaults 536870912 and 16384.
	UIDBase  uint32 `yaml:"uid_base"`
	UIDCount uint32 `yaml:"uid_count"`
	// Pool is the least number of sandboxes prepared ahead. Default 4.
	Pool int `yaml:"pool"`
}

// ImagesConfig says how images are kept.
type ImagesConfig struct {
	// Refresh: how often a tag is looked up again. "0": never. Default 5m.
	Refresh fleet.Duration `yaml:"refresh"`
	// MaxSize of one image, unpacked. Default 20Gi.
	MaxSize fleet.Bytes `yaml:"max_size"`
}

// HoldsConfig bounds how requests wait for an instance.
type HoldsConfig struct {
	// PerApp and Total bound their number. Defaults 1000 and 10000.
	PerApp int `yaml:"per_app"`
	Total  int `yaml:"total"`
	// Timeout of one. Default 30s.
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
		Network: NetworkConfig{Bridge: "fc0", Subnet: "10.89.0.0/16"},
		Sandbox: SandboxConfig{Cgroup: "/fastcontainer", UIDBase: 536870912, UIDCount: 16384, Pool: 4},
		Images:  ImagesConfig{Refresh: fleet.Duration(5 * time.Minute), MaxSize: 20 << 30},
		Holds:   HoldsConfig{PerApp: 1000, Total: 10000, Timeout: fleet.Duration(30 * time.Second)},
	}
}

// maxConfig bounds the size of a configuration file.
const maxConfig = 1 << 20

// Load reads a configuration file over the defaults. Unknown keys are refused
// with their place.
func Load(name string) (Config, error) {
	c := Default()
	f, err := os.Open(name) //nolint:gosec // the operator names it
	if err != nil {
		return c, &fleet.Error{Op: "read configuration", Subject: name, Kind: fleet.ErrInvalid, Err: err}
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err == nil && len(b) > maxConfig {
		err = fmt.Errorf("it is larger than %s", fleet.Bytes(maxConfig))
	}
	if err == nil {
		err = yaml.NewDecoder(bytes.NewReader(b), yaml.DisallowUnknownField()).Decode(&c)
		if errors.Is(err, io.EOF) { // an empty file
			err = nil
		}
	}
	if err != nil {
		return c, &fleet.Error{Op: "read configuration", Subject: name, Kind: fleet.ErrInvalid, Err: err, Hint: "docs/configuration.md lists every key"}
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
	if n := len(c.Network.Bridge); n == 0 || n > 15 || strings.ContainsAny(c.Network.Bridge, "/ \t\n") {
		bad("network.bridge", "%q is not an interface name of 1 to 15 characters", c.Network.Bridge)
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
	if c.Holds.Timeout <= 0 {
		bad("holds.timeout", "it must be more than 0")
	}
	if c.Log.Access < 0 || c.Log.Access > 1 {
		bad("log.access", "%g is not between 0 and 1", c.Log.Access)
	}
	if !strings.HasPrefix(c.Sandbox.Cgroup, "/") || strings.Contains(c.Sandbox.Cgroup, "..") || c.Sandbox.Cgroup == "/" {
		bad("sandbox.cgroup", "%q is not a path such as /fastcontainer", c.Sandbox.Cgroup)
	}
	if uint64(c.Sandbox.UIDBase)+uint64(c.Sandbox.UIDCount)*65536 > 1<<32 || c.Sandbox.UIDCount < 1 || c.Sandbox.UIDBase < 65536 {
		bad("sandbox.uid_base", "uid_base %d and uid_count %d: 65536 to 4294967295 must hold them all", c.Sandbox.UIDBase, c.Sandbox.UIDCount)
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

// cpus of this machine, as the fleet is told.
func cpus() float64 { return float64(runtime.NumCPU()) }
