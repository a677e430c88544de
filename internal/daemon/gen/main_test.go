package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/fastcontainer/fastcontainer/internal/daemon"
)

func generated(t *testing.T) []byte {
	t.Helper()
	p, err := generate("../config.go")
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func load(t *testing.T, text string) daemon.Config {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := daemon.Load(file)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestPage_IsUpToDate(t *testing.T) {
	got, err := os.ReadFile("../../../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, generated(t)) {
		t.Error("docs/configuration.md does not say what the comments of daemon.Config say: run go generate ./internal/daemon")
	}
}

// Every key is in the page once, with the default that the code has.
func TestPage_KnowsEveryDefault(t *testing.T) {
	words := map[string]string{ // what is not a plain value
		"node": "the first label of the host name", "etcd.endpoints": "none, etcd runs inside the daemon", "network.dns": "the host's",
	}
	p := generated(t)
	n := 0
	each("", reflect.ValueOf(daemon.Default()), func(key string, v reflect.Value) {
		n++
		want := fmt.Sprint(v)
		if v.IsZero() && (v.Kind() == reflect.String || v.Kind() == reflect.Slice) {
			want = "none"
		}
		if words[key] != "" {
			want = words[key]
		}
		rows := regexp.MustCompile("(?m)^\\| `"+regexp.QuoteMeta(key)+"` \\| [^|]+ \\| ([^|]*) \\| [^|]+ \\|$").FindAllSubmatch(p, -1)
		if len(rows) != 1 || string(rows[0][1]) != want {
			t.Errorf("%s: the page says %q, want %q", key, rows, want)
		}
	})
	if n < 30 {
		t.Errorf("only %d keys were found", n)
	}
}

func TestExample_IsWholeAndValid(t *testing.T) {
	c := load(t, example)
	if err := c.Validate(); err != nil {
		t.Errorf("the example is refused: %v", err)
	}
	each("", reflect.ValueOf(c), func(key string, v reflect.Value) {
		if v.IsZero() {
			t.Errorf("the example does not set %s", key)
		}
		name := key[strings.LastIndex(key, ".")+1:]
		if !regexp.MustCompile(`(?m)^\s*(\S.*[{ ])?` + name + `:`).MatchString(example) {
			t.Errorf("the example does not show %s", key)
		}
	})
}

func TestComplaint_IsWhatIsSaid(t *testing.T) {
	c := load(t, slip)
	if err := c.Validate(); err == nil || err.Error() != complaint {
		t.Errorf("the slip gives\n%v\nthe page says\n%s", err, complaint)
	}
}

// each calls f with every key that holds a value, in the order of the types.
func each(prefix string, v reflect.Value, f func(string, reflect.Value)) {
	for field, value := range v.Fields() {
		key := prefix + field.Tag.Get("yaml")
		if value.Kind() == reflect.Struct {
			each(key+".", value, f)
			continue
		}
		f(key, value)
	}
}

func TestGenerate_Refuses(t *testing.T) {
	for name, body := range map[string]string{
		"no comment":        "type Config struct {\n\tNode string `yaml:\"node\"`\n}",
		"no default":        "type Config struct {\n\t// Node is a name.\n\tNode string `yaml:\"node\"`\n}",
		"two in one":        "type Config struct {\n\t// A and B are. Default 1.\n\tA, B string\n}",
		"an unknown kind":   "type Config struct {\n\t// Node is a name. Default 1.\n\tNode complex128 `yaml:\"node\"`\n}",
		"only the Go name":  "type Config struct {\n\t// Node names it. Default 1.\n\tNode string `yaml:\"node\"`\n}",
		"no type Config":    "type Other struct{}",
		"not the Go syntax": "type",
	} {
		file := filepath.Join(t.TempDir(), "config.go")
		if err := os.WriteFile(file, []byte("package x\n\n"+body+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if p, err := generate(file); err == nil {
			t.Errorf("%s: it is accepted:\n%s", name, p)
		}
	}
}

func TestSplit(t *testing.T) {
	for doc, want := range map[string][2]string{
		"Node is a name. Default: the first label of the host name.": {"Node is a name.", "the first label of the host name"},
		"HTTP is an address; empty for none. Default :8080.":         {"HTTP is an address; empty for none.", ":8080"},
		"Cert is a file. Required.":                                  {"Cert is a file.", "required"},
		"Defaults are elsewhere.":                                    {"Defaults are elsewhere.", ""},
	} {
		if m, d := split(doc); m != want[0] || d != want[1] {
			t.Errorf("%q: %q, %q", doc, m, d)
		}
	}
}
