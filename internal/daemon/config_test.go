package daemon

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

func write(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestLoad_LaysTheFileOverTheDefaults(t *testing.T) {
	with := func(change func(*Config)) Config {
		c := Default()
		change(&c)
		return c
	}
	for name, tt := range map[string]struct {
		text string
		want Config
	}{
		"empty":         {"", Default()},
		"only comments": {"# nothing yet\n", Default()},
		"null":          {"---\n~\n", Default()},
		"no keys":       {"{}", Default()},
		"an empty part": {"log:\n", Default()},
		"one key":       {"http: 127.0.0.1:80\n", with(func(c *Config) { c.HTTP = "127.0.0.1:80" })},
		"a part's keys": {"holds: {total: 7, timeout: 1m30s}\n", with(func(c *Config) {
			c.Holds.Total, c.Holds.Timeout = 7, fleet.Duration(90*time.Second)
		})},
		"bytes and lists": {"door:\n  max_body: 64Mi\n  trusted_proxies: [10.0.0.0/8]\n", with(func(c *Config) {
			c.Door.MaxBody, c.Door.TrustedProxies = 64<<20, []string{"10.0.0.0/8"}
		})},
	} {
		got, err := Load(write(t, tt.text))
		if err != nil || !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: got %+v, %v", name, got, err)
		}
	}
}

func TestLoad_Refuses(t *testing.T) {
	for name, tt := range map[string]struct{ text, want string }{
		"an unknown key":           {"node: web-1\nnodes: x\n", `[2:1] unknown field "nodes"`},
		"an unknown key of a part": {"log:\n  level: info\n  levels: debug\n", `[3:3] unknown field "levels"`},
		"a key twice":              {"node: a\nnode: b\n", `[2:1] mapping key "node" already defined`},
		"text for a number":        {"holds:\n  per_app: many\n", "[2:12] "},
		"a list for text":          {"http: [a]\n", "[1:7] "},
		"text for true or false":   {"server_timing: often\n", "[1:16] "},
		"a negative number of ids": {"sandbox: {uid_base: -1}\n", "[1:21] "},
		"a duration without unit":  {"holds: {timeout: 5}\n", `"5" is not a duration`},
		"negative bytes":           {"door: {max_body: -1}\n", `"-1" is negative`},
		"no mapping":               {"- a\n", "[1:1] "},
		"no YAML":                  {"http: [\n", "[1:7] "},
		"two documents":            {"node: a\n---\nnode: b\n", "several documents"},
		"too large":                {"# " + strings.Repeat("y", maxConfig), "larger than 1Mi"},
	} {
		file := write(t, tt.text)
		_, err := Load(file)
		if !errors.Is(err, fleet.ErrInvalid) || fleet.Hint(err) == "" {
			t.Errorf("%s: got %v, hint %q", name, err, fleet.Hint(err))
			continue
		}
		if got := err.Error(); !strings.Contains(got, tt.want) || !strings.Contains(got, file) {
			t.Errorf("%s: got %s\nwant %s", name, got, tt.want)
		}
	}
	if _, err := Load(filepath.Join(t.TempDir(), "none")); !errors.Is(err, fleet.ErrInvalid) || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

// Every rule alone says its sentence, and all together say theirs in one order.
func TestValidate(t *testing.T) {
	if c := Default(); c.Validate() != nil {
		t.Errorf("the defaults: %v", c.Validate())
	}
	// In the order in which they are told.
	rules := []struct {
		want   string
		change func(*Config)
	}{
		{"node: ", func(c *Config) { c.Node = "No Label" }},
		{`data: "relative" is not an absolute path`, func(c *Config) { c.Data = "relative" }},
		{`run: "" is not an absolute path`, func(c *Config) { c.Run = "" }},
		{"tls.certificates: https needs at least one certificate", func(c *Config) { c.HTTPS = ":443" }},
		{`network.subnet: "10.0.0.0/30" is not`, func(c *Config) { c.Network.Subnet = "10.0.0.0/30" }},
		{`network.interface: "much-too-long-a-name" is not`, func(c *Config) { c.Network.Interface = "much-too-long-a-name" }},
		{"etcd.cert: it needs etcd.key", func(c *Config) { c.Etcd.Cert = "/cert" }},
		{"etcd.user: it needs etcd.password_file", func(c *Config) { c.Etcd.User = "me" }},
		{"network.dns: ", func(c *Config) { c.Network.DNS = []string{"dns.example"} }},
		{"door.trusted_proxies: ", func(c *Config) { c.Door.TrustedProxies = []string{"10.0.0.1"} }},
		{"door.max_conns: 0: at least 1 is needed", func(c *Config) { c.Door.MaxConns = 0 }},
		{"door.max_conns_per_ip: -1: at least 1 is needed", func(c *Config) { c.Door.MaxConnsPerIP = -1 }},
		{"holds.per_app: 0: at least 1 is needed", func(c *Config) { c.Holds.PerApp = 0 }},
		{"holds.total: 0: at least 1 is needed", func(c *Config) { c.Holds.Total = 0 }},
		{"holds.timeout: it must be more than 0", func(c *Config) { c.Holds.Timeout = 0 }},
		{"door.response_timeout: it must be more than 0", func(c *Config) { c.Door.ResponseTimeout = 0 }},
		{"log.access: 2 is not between 0 and 1", func(c *Config) { c.Log.Access = 2 }},
		{`sandbox.cgroup: "/" is not`, func(c *Config) { c.Sandbox.Cgroup = "/" }},
		{"sandbox.uid_base: uid_base 0 and uid_count 16384: 65536 to 4294967294", func(c *Config) { c.Sandbox.UIDBase = 0 }},
		{"sandbox.pool: 0 is not between 1 and 64", func(c *Config) { c.Sandbox.Pool = 0 }},
		{`log.level: "loud": use`, func(c *Config) { c.Log.Level = "loud" }},
		{`log.format: "xml": use`, func(c *Config) { c.Log.Format = "xml" }},
	}
	all := Default()
	for _, r := range rules {
		c := Default()
		r.change(&c)
		err := c.Validate()
		if !errors.Is(err, fleet.ErrInvalid) || fleet.Hint(err) == "" || !strings.HasPrefix(err.Error(), "check configuration: "+r.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("got %v\nwant %s", err, r.want)
		}
		r.change(&all)
	}
	err := all.Validate()
	if err == nil {
		t.Fatal("all of them at once are accepted")
	}
	told := strings.Split(strings.TrimPrefix(err.Error(), "check configuration: "), "\n")
	if len(told) != len(rules) {
		t.Fatalf("%d problems are told, want %d:\n%v", len(told), len(rules), err)
	}
	for i, r := range rules {
		if !strings.HasPrefix(told[i], r.want) {
			t.Errorf("problem %d is %q, want %q", i, told[i], r.want)
		}
	}
}

// The borders of the rules, and the rules that exclude one another.
func TestValidate_Borders(t *testing.T) {
	ids := func(base, count uint32) func(*Config) {
		return func(c *Config) { c.Sandbox.UIDBase, c.Sandbox.UIDCount = base, count }
	}
	for name, tt := range map[string]struct {
		change func(*Config)
		want   string // "": it is accepted
	}{
		"no door":                  {func(c *Config) { c.HTTP = "" }, "http: neither"},
		"half a certificate":       {func(c *Config) { c.TLS.Certificates = []Certificate{{Cert: "/c"}} }, "tls.certificates[0]: both"},
		"HTTPS alone":              {func(c *Config) { c.HTTP, c.HTTPS, c.TLS.Certificates = "", ":443", []Certificate{{"/c", "/k"}} }, ""},
		"an IPv6 subnet":           {func(c *Config) { c.Network.Subnet = "fd00::/16" }, "network.subnet:"},
		"a large subnet":           {func(c *Config) { c.Network.Subnet = "10.0.0.0/7" }, "network.subnet:"},
		"no subnet":                {func(c *Config) { c.Network.Subnet = "" }, "network.subnet:"},
		"the largest subnet":       {func(c *Config) { c.Network.Subnet = "10.0.0.0/8" }, ""},
		"the smallest subnet":      {func(c *Config) { c.Network.Subnet = "10.0.0.0/28" }, ""},
		"no interface":             {func(c *Config) { c.Network.Interface = "" }, "network.interface:"},
		"one with a slash":         {func(c *Config) { c.Network.Interface = "a/b" }, "network.interface:"},
		"fifteen characters":       {func(c *Config) { c.Network.Interface = "abcdefghijklmno" }, ""},
		"an IPv6 server":           {func(c *Config) { c.Network.DNS = []string{"2620:fe::fe"} }, ""},
		"a key alone":              {func(c *Config) { c.Etcd.Key = "/k" }, "etcd.key: it needs etcd.cert"},
		"a password alone":         {func(c *Config) { c.Etcd.PasswordFile = "/p" }, "etcd.password_file: it needs etcd.user"},
		"no bound of bodies":       {func(c *Config) { c.Door.MaxBody = 0 }, ""},
		"a negative share":         {func(c *Config) { c.Log.Access = -0.1 }, "log.access:"},
		"every request":            {func(c *Config) { c.Log.Access = 1 }, ""},
		"a relative group":         {func(c *Config) { c.Sandbox.Cgroup = "apps" }, "sandbox.cgroup:"},
		"a group above":            {func(c *Config) { c.Sandbox.Cgroup = "/a/../b" }, "sandbox.cgroup:"},
		"a group below":            {func(c *Config) { c.Sandbox.Cgroup = "/a/b" }, ""},
		"no ids":                   {ids(1<<20, 0), "sandbox.uid_base:"},
		"ids of the host":          {ids(65535, 1), "sandbox.uid_base:"},
		"the first ids":            {ids(65536, 1), ""},
		"ids below the OCI ones":   {ids(ociUIDs-65536, 1), ""},
		"ids among the OCI ones":   {ids(ociUIDs-65536, 2), "sandbox.uid_base:"},
		"ids within the OCI ones":  {ids(ociEnd-65536, 1), "sandbox.uid_base:"},
		"ids above the OCI ones":   {ids(ociEnd, 1), ""},
		"ids up to the last":       {ids(1<<32-2*65536, 1), ""},
		"the id that means none":   {ids(1<<32-65536, 1), "sandbox.uid_base:"},
		"ids beyond the last":      {ids(1<<32-65536, 2), "sandbox.uid_base:"},
		"the largest pool":         {func(c *Config) { c.Sandbox.Pool = 64 }, ""},
		"more than the pool takes": {func(c *Config) { c.Sandbox.Pool = 65 }, "sandbox.pool:"},
	} {
		c := Default()
		tt.change(&c)
		err := c.Validate()
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: got %v, want %q", name, err, tt.want)
		}
	}
}
