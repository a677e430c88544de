// Command gen writes docs/app-file.md from the comments of fleet.Spec.
//
//	gen SPEC.GO APP-FILE.MD
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
		return fmt.Errorf("usage: gen SPEC.GO APP-FILE.MD")
	}
	page, err := generate(args[0])
	if err != nil {
		return err
	}
	return os.WriteFile(args[1], page, 0o644) //nolint:gosec // a page of documentation
}

const intro = `# The app file

<!-- Made from internal/fleet/spec.go by go generate ./internal/appfile; do not edit. -->

An app file is YAML and says what an app is. ` + "`fastcontainer deploy -f FILE`" + ` deploys it. Two keys are enough:

` + "```yaml" + `
name: hello
image: docker.io/library/nginx:1
` + "```" + `

This one has every key:

` + "```yaml\n%s```" + `

The file is read strictly: a key that does not exist, a value of the wrong kind or a value that makes no sense is refused. All problems of
a file are told at once, each with its place:

` + "```" + `
%s
` + "```" + `

Several apps may stand in one file, each a YAML document of its own, with a line ` + "`---`" + ` between them. Anchors and aliases work; merge keys
and tags do not. A file has at most 1 MiB and 20,000 lines, a document 128 KiB and 4,096 lines.

Relative paths (of ` + "`oci:`, `tar:` and `dir:`" + ` images, and of ` + "`bind`" + `) are relative to the directory of the file.

| kind of value | how it is written |
|---|---|
| text | ` + "`blog`, `\"007\"`" + `; numbers and true or false are taken as they are written |
| duration | ` + "`500ms`, `30s`, `20m`, `1h30m`" + `; ` + "`0`" + ` for none; other numbers need their unit |
| bytes | ` + "`64Mi`, `1.5Gi`" + ` (binary), ` + "`500M`" + ` (decimal), ` + "`4096`" + ` |
| whole number | ` + "`8080`" + `, decimal, without quotes |
| cores | ` + "`0.3`, `2`" + ` |

`

// complaint is what the reader says about a slip; a test holds it to that.
const (
	slip      = "name: Blog\nimage: nginx\nhots: [blog.example.com]\nscale: {min: 3, max: 2}\nidle: 5\n"
	complaint = `read app file: 4 problems
  blog.yaml:1:7: name: "Blog" is not a DNS label; 1 to 63 of a-z, 0-9 and '-', starting and ending with a letter or digit
  blog.yaml:3:1: hots: unknown key; did you mean hosts? allowed: command, concurrency, …
  blog.yaml:4:22: scale.max: is 2, below scale.min (3); at least as much
  blog.yaml:5:7: idle: "5" is not a duration: write it as 500ms, 30s, 20m or 1h30m; 0 for none`
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
	if p.structs["Spec"] == nil {
		return nil, fmt.Errorf("%s has no type Spec", file)
	}
	fmt.Fprintf(&p.out, intro, example, complaint)
	p.section("", "The app", "Spec")
	return bytes.TrimRight(p.out.Bytes(), "\n"), nil
}

type page struct {
	out     bytes.Buffer
	structs map[string]*ast.StructType
	docs    map[string]string
}

// section is one table, and those of the keys in it that have keys of their own.
func (p *page) section(prefix, title, typ string) {
	fmt.Fprintf(&p.out, "## %s\n\n", title)
	if prefix != "" {
		fmt.Fprintf(&p.out, "%s\n\n", p.docs[typ])
	}
	fmt.Fprint(&p.out, "| key | kind | default | meaning |\n|---|---|---|---|\n")
	type sub struct{ prefix, typ string }
	var subs []sub
	for _, f := range p.structs[typ].Fields.List {
		key := prefix + keyOf(f)
		kind, inner := p.kind(f.Type)
		meaning, def := split(flat(f.Doc.Text()))
		meaning = plain(f.Names[0].Name, meaning)
		if inner != "" {
			subs = append(subs, sub{key, inner})
			kind = fmt.Sprintf("[%s](#%s)", kind, anchor(key))
		}
		fmt.Fprintf(&p.out, "| `%s` | %s | %s | %s |\n", key, kind, cell(def), cell(meaning))
	}
	fmt.Fprintln(&p.out)
	for _, s := range subs {
		dot := "."
		if s.typ == "Volume" {
			dot = "[]."
		}
		p.section(s.prefix+dot, s.prefix, s.typ)
	}
}

// kind names a type for people; inner is the struct behind it, if any.
func (p *page) kind(e ast.Expr) (name, inner string) {
	switch e := e.(type) {
	case *ast.Ident:
		if p.structs[e.Name] != nil {
			return "keys", e.Name
		}
		words := map[string]string{
			"string": "text", "AppName": "text", "Runtime": "word", "StartPolicy": "word", "bool": "true or false",
			"int": "whole number", "int64": "whole number", "float64": "cores", "Duration": "duration", "Bytes": "bytes",
		}
		if words[e.Name] == "" {
			return e.Name, ""
		}
		return words[e.Name], ""
	case *ast.ArrayType:
		if name, inner = p.kind(e.Elt); inner != "" {
			return "list", inner
		}
		return "list of " + name, ""
	case *ast.MapType:
		return "text by name", ""
	}
	return "", ""
}

func keyOf(f *ast.Field) string {
	key, _, _ := strings.Cut(reflect.StructTag(strings.Trim(f.Tag.Value, "`")).Get("yaml"), ",")
	return key
}

var (
	defaultSentence = regexp.MustCompile(`(?:^|[.,:] )[Dd]efault:? ("[^"]*"|[^ ].*?)\.(?: |$)`)
	required        = regexp.MustCompile(` ?Required\.$`)
)

// split takes the default out of a comment: its last sentence that begins
// with the word, or the end of a sentence after a comma or colon.
func split(doc string) (meaning, def string) {
	if required.MatchString(doc) {
		return required.ReplaceAllString(doc, ""), "required"
	}
	meaning = doc
	for at := 0; ; {
		// The last match counts: "Seccomp: default or unconfined. Default ...".
		m := defaultSentence.FindStringSubmatchIndex(doc[at:])
		if m == nil {
			return strings.TrimSpace(meaning), def
		}
		for i := range m {
			m[i] += at
		}
		before, after := doc[:m[0]], strings.TrimSpace(doc[m[1]:])
		if m[0] > 0 {
			before += "."
		}
		meaning, def = strings.TrimSpace(before+" "+after), doc[m[2]:m[3]]
		at = m[3]
	}
}

// terse comments say only a default; the page says what the word means.
var terse = map[string]string{
	"Rest": "What an instance has when it is calm.", "Peak": "The most that it may be given under load.",
	"Readonly": "The container cannot write to it.",
}

// plain takes the Go name off a comment that begins with "Name: ".
func plain(name, meaning string) string {
	if meaning == name+"." {
		return terse[name]
	}
	rest, ok := strings.CutPrefix(meaning, name+": ")
	if !ok {
		return meaning
	}
	return strings.ToUpper(rest[:1]) + rest[1:]
}

func flat(s string) string { return strings.Join(strings.Fields(s), " ") }

func cell(s string) string { return strings.ReplaceAll(s, "|", `\|`) }

func anchor(key string) string { return strings.NewReplacer(".", "", "[", "", "]", "").Replace(key) }
