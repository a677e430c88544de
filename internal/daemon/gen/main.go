// Command gen writes docs/configuration.md from the comments of daemon.Config.
//
//	gen CONFIG.GO CONFIGURATION.MD
package main

import (
	"bytes"
	_ "embed"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"reflect"
	"regexp"
	"strings"
)

//go:embed example.yaml
var example string

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "gen:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("usage: gen CONFIG.GO CONFIGURATION.MD")
	}
	page, err := generate(args[0])
	if err != nil {
		return err
	}
	return os.WriteFile(args[1], page, 0o644) //nolint:gosec // a page of documentation
}

const intro = `# Configuration

<!-- Made from internal/daemon/config.go by go generate ./internal/daemon; do not edit. -->

~fastcontainer serve~ runs without a configuration file: every key has a default. ~--config FILE~ names one, in YAML, and these flags win over
it: ~--data~, ~--run~, ~--http~, ~--https~, ~--metrics~, ~--etcd~, ~--node~, ~--server-timing~, ~--log-level~, ~--log-format~. The daemon reads
the file when it starts; a restart leaves the containers alone.

Most machines need a line or two:

~~~yaml
http: ":80"
~~~

This one has every key, for a larger machine:

~~~yaml
%s~~~

The file is read strictly. A key that does not exist or a value of the wrong kind is refused, with its line and column where the mistake
is in the YAML itself. Values that make no sense are all told at once:

~~~
%s
~~~

A file has at most 1 MiB and one document. Relative paths are relative to the daemon's working directory; ~data~ and ~run~ must be absolute.

| kind of value | how it is written |
|---|---|
| text | ~fc0~, ~":80"~ |
| duration | ~500ms~, ~30s~, ~20m~, ~1h30m~; ~0~ for none; other numbers need their unit |
| bytes | ~64Mi~, ~1.5Gi~ (binary), ~500M~ (decimal), ~4096~ |
| number | ~20000~, or ~0.01~ for a share |

Sockets that systemd holds replace ~http~ and ~https~: see [packaging](../packaging/README.md).

Credentials of registries come from Docker's configuration file (~$DOCKER_CONFIG/config.json~, ~~/.docker/config.json~). A registry on
loopback may do without TLS.

`

// complaint is what Validate says about a slip; a test holds it to that.
const (
	slip      = "data: var/fastcontainer\nhttps: \":443\"\nholds: {timeout: 0}\nlog: {level: loud}\n"
	complaint = `check configuration: data: "var/fastcontainer" is not an absolute path
tls.certificates: https needs at least one certificate
holds.timeout: it must be more than 0
log.level: "loud": use debug, info, warn or error`
)

// generate is the whole page.
func generate(file string) ([]byte, error) {
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ParseComments)
	if err != nil {
		return nil, err
	}
	p := page{structs: map[string]*ast.StructType{}, docs: map[string]string{}}
	for _, d := range f.Decls {
		g, ok := d.(*ast.GenDecl)
		if !ok || g.Tok != token.TYPE {
			continue
		}
		for _, s := range g.Specs {
			t := s.(*ast.TypeSpec) //nolint:forcetypeassert // TYPE declarations have nothing else
			if st, ok := t.Type.(*ast.StructType); ok {
				p.structs[t.Name.Name], p.docs[t.Name.Name] = st, flat(g.Doc.Text())
			}
		}
	}
	if p.structs["Config"] == nil {
		return nil, fmt.Errorf("%s has no type Config", file)
	}
	// A tilde stands for a backtick, which a raw string cannot hold.
	text := strings.NewReplacer("~~/", "`~/", "~", "`").Replace(intro)
	fmt.Fprintf(&p.out, text, example, complaint)
	if err := p.section("", "Config"); err != nil {
		return nil, err
	}
	return append(bytes.TrimRight(p.out.Bytes(), "\n"), '\n'), nil
}

type page struct {
	out     bytes.Buffer
	structs map[string]*ast.StructType
	docs    map[string]string
}

// section is one table, and those of the keys that have keys of their own.
func (p *page) section(key, typ string) error {
	prefix := ""
	if key == "" {
		fmt.Fprint(&p.out, "## The node\n\n")
	} else {
		prefix = key + "."
		fmt.Fprintf(&p.out, "## %s\n\n%s\n\n", key, introduce(typ, p.docs[typ]))
	}
	fmt.Fprint(&p.out, "| key | kind | default | meaning |\n|---|---|---|---|\n")
	var subs [][2]string
	for _, f := range p.structs[typ].Fields.List {
		if len(f.Names) != 1 {
			return fmt.Errorf("%s: each key needs a field and a comment of its own", typ)
		}
		own := prefix + keyOf(f)
		kind, inner := p.kind(f.Type)
		switch {
		case kind == "":
			return fmt.Errorf("%s: a kind without a name for people", own)
		case inner != "":
			if kind == "list" {
				subs = append(subs, [2]string{own + "[]", inner})
			} else {
				subs = append(subs, [2]string{own, inner})
			}
			kind = fmt.Sprintf("[%s](#%s)", kind, anchor(subs[len(subs)-1][0]))
		}
		doc := flat(f.Doc.Text())
		if doc == "" && inner != "" { // its type says what it is
			doc = introduce(inner, p.docs[inner])
		}
		name := f.Names[0].Name
		meaning, def := split(doc)
		meaning = introduce(name, meaning)
		if meaning == "" || strings.HasPrefix(meaning, name+" ") {
			return fmt.Errorf("%s: it needs a comment such as %q", own, name+" is the ...")
		}
		if def == "" && inner == "" {
			return fmt.Errorf("%s: its comment must end with a default, or with Required", own)
		}
		fmt.Fprintf(&p.out, "| `%s` | %s | %s | %s |\n", own, kind, cell(def), cell(meaning))
	}
	fmt.Fprintln(&p.out)
	for _, s := range subs {
		if err := p.section(s[0], s[1]); err != nil {
			return err
		}
	}
	return nil
}

// kind names a type for people; inner is the struct behind it, if any.
func (p *page) kind(e ast.Expr) (name, inner string) {
	switch e := e.(type) {
	case *ast.Ident:
		if p.structs[e.Name] != nil {
			return "keys", e.Name
		}
		return map[string]string{
			"string": "text", "bool": "true or false", "int": "number", "uint32": "number", "float64": "number",
		}[e.Name], ""
	case *ast.SelectorExpr:
		return map[string]string{"Duration": "duration", "Bytes": "bytes"}[e.Sel.Name], ""
	case *ast.ArrayType:
		if name, inner = p.kind(e.Elt); inner != "" {
			return "list", inner
		}
		return "list of " + name, ""
	}
	return "", ""
}

func keyOf(f *ast.Field) string {
	key, _, _ := strings.Cut(reflect.StructTag(strings.Trim(f.Tag.Value, "`")).Get("yaml"), ",")
	return key
}

var defaultSentence = regexp.MustCompile(` (?:Default:? (\S.*)|(Required))\.$`)

// split takes the default off the end of a comment.
func split(doc string) (meaning, def string) {
	m := defaultSentence.FindStringSubmatchIndex(doc)
	switch {
	case m == nil:
		return doc, ""
	case m[4] >= 0:
		return doc[:m[0]], "required"
	}
	return doc[:m[0]], doc[m[2]:m[3]]
}

// introduce takes the Go name off the begin of a comment: "Node is this
// machine's name" becomes "This machine's name".
func introduce(name, doc string) string {
	for _, link := range []string{" is ", " are ", ": "} {
		if rest, ok := strings.CutPrefix(doc, name+link); ok {
			return strings.ToUpper(rest[:1]) + rest[1:]
		}
	}
	if rest, ok := strings.CutPrefix(doc, name+" "); ok && strings.HasSuffix(name, "Config") {
		return strings.ToUpper(rest[:1]) + rest[1:] // a type that bounds something
	}
	return doc
}

func flat(s string) string { return strings.Join(strings.Fields(s), " ") }

func cell(s string) string { return strings.ReplaceAll(s, "|", `\|`) }

func anchor(key string) string { return strings.NewReplacer(".", "", "[", "", "]", "").Replace(key) }
