package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// The file in docs/configuration.md is the defaults, every key of them.
func TestDocument_IsTheDefaults(t *testing.T) {
	b, err := os.ReadFile("../../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "```yaml\n")
	text, _, ok := strings.Cut(rest, "```\n")
	if !ok {
		t.Fatal("there is no example")
	}
	want := Default()
	text = strings.Replace(text, "node: HOSTNAME", "node: "+want.Node, 1)
	file := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := Load(file)
	if err != nil {
		t.Fatal(err)
	}
	// Empty lists and none are the same.
	a, _ := yaml.Marshal(got)
	d, _ := yaml.Marshal(want)
	norm := func(b []byte) string { return strings.ReplaceAll(string(b), "null", "[]") }
	if norm(a) != norm(d) {
		t.Errorf("the document says\n%s\nthe code says\n%s", a, d)
	}
	for _, key := range keys(reflect.TypeFor[Config]()) {
		if !strings.Contains(text, key+":") {
			t.Errorf("the document does not know %s", key)
		}
	}
}

func keys(t reflect.Type) []string {
	var all []string
	for f := range t.Fields() {
		name := f.Tag.Get("yaml")
		all = append(all, name)
		if f.Type.Kind() == reflect.Struct {
			all = append(all, keys(f.Type)...)
		}
	}
	return all
}

func TestLoad_Refuses(t *testing.T) {
	for text, want := range map[string]string{
		"nodes: x":                             "nodes",
		"log: {levle: debug}":                  "levle",
		"holds: {timeout: 5 minutes}":          "minutes",
		"http: [":                              "",
		"x: " + strings.Repeat("y", maxConfig): "larger",
	} {
		file := filepath.Join(t.TempDir(), "c.yaml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(file); !errors.Is(err, fleet.ErrInvalid) || !strings.Contains(err.Error(), want) || fleet.Hint(err) == "" {
			t.Errorf("%.30q: %v", text, err)
		}
	}
	if _, err := Load("/no/such/file"); !errors.Is(err, fleet.ErrInvalid) {
		t.Errorf("got %v", err)
	}
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(empty); err != nil {
		t.Errorf("an empty file: %v", err)
	}
}

func TestValidate(t *testing.T) {
	if c := Default(); c.Validate() != nil {
		t.Errorf("the defaults: %v", c.Validate())
	}
	all := Default()
	for want, change := range map[string]func(*Config){
		"node:":                   func(c *Config) { c.Node = "No Label" },
		"data:":                   func(c *Config) { c.Data = "relative" },
		"run:":                    func(c *Config) { c.Run = "" },
		"tls.certificates: https": func(c *Config) { c.HTTPS = ":443" },
		"network.subnet:":         func(c *Config) { c.Network.Subnet = "fd00::/8" },
		"network.bridge:":         func(c *Config) { c.Network.Bridge = "much-too-long-a-name" },
		"network.dns:":            func(c *Config) { c.Network.DNS = []string{"dns.example"} },
		"door.trusted_proxies:":   func(c *Config) { c.Door.TrustedProxies = []string{"10.0.0.1"} },
		"door.max_conns:":         func(c *Config) { c.Door.MaxConns = 0 },
		"holds.per_app:":          func(c *Config) { c.Holds.PerApp = 0 },
		"holds.timeout:":          func(c *Config) { c.Holds.Timeout = 0 },
		"log.access:":             func(c *Config) { c.Log.Access = 2 },
		"log.level:":              func(c *Config) { c.Log.Level = "loud" },
		"log.format:":             func(c *Config) { c.Log.Format = "xml" },
		"sandbox.cgroup:":         func(c *Config) { c.Sandbox.Cgroup = "/" },
		"sandbox.uid_base:":       func(c *Config) { c.Sandbox.UIDBase = 0 },
	} {
		c := Default()
		change(&c)
		if err := c.Validate(); !errors.Is(err, fleet.ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
		change(&all)
	}
	// All at once, and always in the same order.
	first := all.Validate().Error()
	if n := strings.Count(first, "\n") + 1; n < 16 {
		t.Errorf("%d problems are told: %s", n, first)
	}
	for range 20 {
		if again := all.Validate().Error(); again != first {
			t.Fatalf("the order changes:\n%s\n%s", first, again)
		}
	}
}
