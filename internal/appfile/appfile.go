package appfile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// Bounds of a file.
const (
	maxFile     = 1 << 20
	maxLines    = 20_000
	maxDoc      = 128 << 10
	maxDocLines = 4096
	maxNodes    = 100_000 // values, those that aliases repeat counted again
	maxDepth    = 32      // brackets within brackets
)

// Load reads the app file of that name; "-" is standard input.
func Load(file string) ([]fleet.Spec, error) {
	f := os.Stdin
	if file != "-" {
		var err error
		if f, err = os.Open(file); err != nil {
			kind := fleet.ErrInvalid
			if errors.Is(err, os.ErrNotExist) {
				kind = fleet.ErrNotFound
			}
			return nil, &fleet.Error{Op: "read app file", Kind: kind, Err: err}
		}
		defer f.Close()
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, &fleet.Error{Op: "read app file", Subject: file, Err: err}
	}
	return Parse(file, data)
}

// Parse reads the apps of one file, one in each YAML document. name is the
// file's: problems name it, and relative paths in it are relative to its
// directory. The error is a *fleet.Error of kind fleet.ErrInvalid around
// Problems.
func Parse(name string, data []byte) ([]fleet.Spec, error) {
	specs, problems := parse(name, data)
	if len(problems) > 0 {
		return nil, &fleet.Error{Op: "read app file", Kind: fleet.ErrInvalid, Err: problems,
			Hint: "docs/app-file.md lists every key"}
	}
	return specs, nil
}

func parse(name string, data []byte) ([]fleet.Spec, Problems) {
	whole := func(line, column int, format string, args ...any) Problems {
		return Problems{{File: name, Line: line, Column: column, Text: fmt.Sprintf(format, args...)}}
	}
	if len(data) > maxFile {
		return nil, whole(1, 1, "the file is too large; at most %s", fleet.Bytes(maxFile))
	}
	dir, err := filepath.Abs(filepath.Dir(name))
	if err != nil {
		return nil, whole(1, 1, "its directory cannot be found: %v", err)
	}
	if n := bytes.Count(data, []byte("\n")); n > maxLines {
		return nil, whole(maxLines+1, 1, "the file is too long; at most %d lines", maxLines)
	}
	data = bytes.TrimPrefix(data, []byte("\uFEFF"))
	for i, line := range bytes.Split(data, []byte("\n")) {
		if !utf8.Valid(line) || bytes.ContainsRune(line, 0) {
			return nil, whole(i+1, 1, "the line is not text; app files are UTF-8")
		}
	}
	docs, err := documents(data)
	if err != nil {
		if e, ok := errors.AsType[*yaml.SyntaxError](err); ok && e.Token != nil {
			return nil, whole(e.Token.Position.Line, e.Token.Position.Column, "not YAML: %s", e.Message)
		}
		return nil, whole(1, 1, "not YAML: %v", err)
	}
	var specs []fleet.Spec
	var problems Problems
	names, hosts := map[fleet.AppName]bool{}, map[string]fleet.AppName{}
	r := &reader{file: name}
	for _, doc := range docs {
		if doc.Body == nil || doc.Body.Type() == ast.NullType || doc.Body.Type() == ast.CommentType || doc.Body.Type() == ast.CommentGroupType {
			continue
		}
		s := r.document(doc.Body)
		absolute(&s, dir)
		Complete(&s)
		check(&s, r.problem)
		if s.Name != "" && names[s.Name] {
			r.problem("name", "%q is the name of another app of this file; names are unique", s.Name)
		}
		names[s.Name] = true
		for i, h := range s.Hosts {
			if other, taken := hosts[h]; taken && other != s.Name {
				r.problem(fmt.Sprintf("hosts[%d]", i), "%q belongs to app %s of this file; a host has one app", h, other)
			}
			hosts[h] = s.Name
		}
		slices.SortStableFunc(r.problems, byPlace)
		problems = append(problems, r.problems...)
		specs = append(specs, s)
		if len(problems) > maxProblems {
			break
		}
	}
	if len(specs) == 0 {
		return nil, whole(1, 1, "the file describes no app; give at least name and image")
	}
	return specs, problems
}

// documents parses YAML without meaning. Its parser recurses, so nesting is
// bounded before; it has had faults on hostile input, so a panic of it is an
// error here.
func documents(data []byte) (docs []*ast.DocumentNode, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("the text cannot be understood (%v)", p)
		}
	}()
	if err := shallow(data); err != nil {
		return nil, err
	}
	first := 0
	for lines := range split(data) {
		doc, err := document(lines, first)
		if err != nil {
			return nil, err
		}
		docs, first = append(docs, doc...), first+len(lines)
	}
	return docs, nil
}

// split gives the lines of one document after the other. A line that begins
// with --- or ... ends one wherever it stands, even within quotes (YAML 1.2,
// section 9.1.2).
func split(data []byte) iter.Seq[[]string] {
	return func(yield func([]string) bool) {
		lines := strings.SplitAfter(string(data), "\n")
		start := 0
		for i, line := range lines {
			if i > start && isMark(line) {
				if !yield(lines[start:i]) {
					return
				}
				start = i
			}
		}
		yield(lines[start:])
	}
}

func isMark(line string) bool {
	if !strings.HasPrefix(line, "---") && !strings.HasPrefix(line, "...") {
		return false
	}
	return len(line) == 3 || strings.ContainsRune(" \t\r\n", rune(line[3]))
}

// document parses one document; first is how many lines are before it. The
// parser loses what follows a document of comments only, so it gets each by
// itself and without comments. Its time grows with the square of the lines,
// so these are bounded.
func document(lines []string, first int) ([]*ast.DocumentNode, error) {
	text := strings.Join(lines, "")
	if len(lines) > maxDocLines || len(text) > maxDoc {
		t := &token.Token{Position: &token.Position{Line: first + 1, Column: 1}}
		return nil, &yaml.SyntaxError{Token: t, Message: fmt.Sprintf("the document is too large; at most %d lines and %s", maxDocLines, fleet.Bytes(maxDoc))}
	}
	var tokens token.Tokens
	for _, t := range lexer.Tokenize(text) {
		t.Position.Line += first
		switch t.Type {
		case token.CommentType, token.DocumentHeaderType, token.DocumentEndType:
		default:
			t.Prev, t.Next = nil, nil
			tokens.Add(t)
		}
	}
	if len(tokens) == 0 {
		return nil, nil
	}
	f, err := parser.Parse(tokens, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		return nil, err
	}
	return f.Docs, nil
}

// shallow refuses a text that could nest deeper than maxDepth: by brackets,
// by indicators that stand together on one line, or by indentation. It does
// not understand quotes; no app comes near the bound by accident.
func shallow(data []byte) error {
	open := 0
	for i, line := range strings.Split(string(data), "\n") {
		refuse := func(column int) error {
			t := &token.Token{Position: &token.Position{Line: i + 1, Column: column + 1}}
			return &yaml.SyntaxError{Token: t, Message: fmt.Sprintf("nested too deep; at most %d levels", maxDepth)}
		}
		text := strings.TrimLeft(line, " ")
		if len(line)-len(text) > 8*maxDepth && strings.ContainsAny(text[:min(1, len(text))], "-?&!") {
			return refuse(len(line) - len(text))
		}
		marks := 0
		for j, c := range []byte(line) {
			switch c {
			case '[', '{':
				if open++; open > maxDepth {
					return refuse(j)
				}
			case ']', '}':
				open = max(0, open-1)
			case '-', '?', '&', '!', ':':
				if j+1 == len(line) || line[j+1] == ' ' || line[j+1] == '\t' || c == '&' || c == '!' {
					marks++
				}
			case ' ', '\t':
			default:
				marks = 0
			}
			if marks > maxDepth {
				return refuse(j)
			}
		}
	}
	return nil
}

// absolute makes the paths of s that a file may give relative to itself whole.
func absolute(s *fleet.Spec, dir string) {
	if scheme, path, ok := strings.Cut(s.Image, ":"); ok && path != "" && !filepath.IsAbs(path) && localImage(scheme) {
		s.Image = scheme + ":" + filepath.Join(dir, path)
	}
	for i, v := range s.Volumes {
		if v.Bind != "" && !filepath.IsAbs(v.Bind) {
			s.Volumes[i].Bind = filepath.Join(dir, v.Bind)
		}
	}
}

func localImage(scheme string) bool {
	return scheme == "oci" || scheme == "tar" || scheme == "dir"
}
