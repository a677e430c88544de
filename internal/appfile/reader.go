package appfile

import (
	"encoding"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/token"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// reader turns one document after the other into specs and collects what is
// wrong with them.
type reader struct {
	file     string
	problems Problems
	places   map[string]*token.Position // of every key that was seen
	anchors  map[string]ast.Node
	nodes    int
}

// field reads the value n of a key into the place that it was made for.
type field func(key string, n ast.Node)

func (r *reader) document(body ast.Node) fleet.Spec {
	r.problems, r.places, r.anchors = nil, map[string]*token.Position{"": place(body)}, map[string]ast.Node{}
	s := Default("")
	r.mapping(r.spec(&s))("", body)
	return s
}

// spec is the form of an app file.
func (r *reader) spec(s *fleet.Spec) map[string]field {
	cpu, memory, caps := &s.Resources.CPU, &s.Resources.Memory, &s.Isolation.Capabilities
	return map[string]field{
		"name":            text(r, &s.Name),
		"image":           text(r, &s.Image),
		"hosts":           list(r, &s.Hosts, r.text),
		"port":            whole(r, &s.Port, true),
		"entrypoint":      list(r, &s.Entrypoint, r.text),
		"command":         list(r, &s.Command, r.text),
		"env":             r.env(s),
		"workdir":         text(r, &s.Workdir),
		"user":            text(r, &s.User),
		"stop_signal":     text(r, &s.StopSignal),
		"restored_signal": text(r, &s.RestoredSignal),
		"warm":            text(r, &s.Warm),
		"ready": r.mapping(map[string]field{
			"http":    text(r, &s.Ready.HTTP),
			"timeout": unit(r, &s.Ready.Timeout, true),
		}),
		"lifetime":    unit(r, &s.Lifetime, false),
		"idle":        unit(r, &s.Idle, false),
		"drain":       unit(r, &s.Drain, false),
		"concurrency": whole(r, &s.Concurrency, false),
		"scale": r.mapping(map[string]field{
			"min": whole(r, &s.Scale.Min, false),
			"max": whole(r, &s.Scale.Max, true),
		}),
		"resources": r.mapping(map[string]field{
			"cpu":    r.mapping(map[string]field{"rest": r.cores(&cpu.Rest), "peak": r.cores(&cpu.Peak)}),
			"memory": r.mapping(map[string]field{"rest": unit(r, &memory.Rest, true), "peak": unit(r, &memory.Peak, true)}),
			"disk":   unit(r, &s.Resources.Disk, true),
			"pids":   whole(r, &s.Resources.PIDs, true),
		}),
		"priority": whole(r, &s.Priority, false),
		"start":    text(r, &s.Start),
		"volumes":  list(r, &s.Volumes, r.volume),
		"isolation": r.mapping(map[string]field{
			"runtime":  text(r, &s.Isolation.Runtime),
			"userns":   r.boolean(&s.Isolation.UserNS),
			"readonly": r.boolean(&s.Isolation.Readonly),
			"seccomp":  text(r, &s.Isolation.Seccomp),
			"capabilities": r.mapping(map[string]field{
				"add":  list(r, &caps.Add, r.text),
				"drop": list(r, &caps.Drop, r.text),
			}),
		}),
	}
}

// elsewhere is what people who come from other tools write.
var elsewhere = map[string]string{
	"environment": "env", "ports": "port", "cmd": "command", "args": "command", "host": "hosts", "domains": "hosts",
	"domain": "hosts", "replicas": "scale", "instances": "scale", "limits": "resources", "working_dir": "workdir",
	"cwd": "workdir", "healthcheck": "ready", "health": "ready", "cpu": "resources.cpu", "cpus": "resources.cpu",
	"memory": "resources.memory", "mem": "resources.memory", "pids": "resources.pids", "disk": "resources.disk",
	"timeout": "ready.timeout or drain", "runtime": "isolation.runtime", "userns": "isolation.userns",
	"seccomp": "isolation.seccomp", "capabilities": "isolation.capabilities", "min": "rest", "max": "peak",
	"request": "rest", "limit": "peak", "source": "bind", "target": "mount", "path": "mount", "read_only": "readonly",
}

// problem notes that the value at key is wrong; key was read before, or is
// missing and then the nearest key around it is the place.
func (r *reader) problem(key, format string, args ...any) {
	at, near := r.places[key], key
	for at == nil && near != "" {
		near = near[:max(0, strings.LastIndexAny(near, ".["))]
		at = r.places[near]
	}
	r.problemAt(at, key, format, args...)
}

func (r *reader) problemAt(at *token.Position, key, format string, args ...any) {
	// What was refused as it was read is not refused again for its value.
	for _, p := range r.problems {
		if p.Key == key && at != nil && p.Line == at.Line && p.Column == at.Column {
			return
		}
	}
	p := Problem{File: r.file, Line: 1, Column: 1, Key: key, Text: fmt.Sprintf(format, args...)}
	if at != nil {
		p.Line, p.Column = at.Line, at.Column
	}
	if len(r.problems) <= maxProblems {
		r.problems = append(r.problems, p)
	}
}

// value looks through anchors and aliases. It gives nil after a problem.
func (r *reader) value(key string, n ast.Node) ast.Node {
	if r.nodes++; r.nodes > maxNodes {
		r.problemAt(place(n), "", "too many values; at most %d, those that aliases repeat counted again", maxNodes)
		return nil
	}
	for range 4 {
		switch v := n.(type) {
		case *ast.AnchorNode:
			r.anchors[v.Name.GetToken().Value] = v.Value
			n = v.Value
		case *ast.AliasNode:
			name := v.Value.GetToken().Value
			if n = r.anchors[name]; n == nil {
				r.problemAt(place(v), key, "there is no anchor &%s before this; write the value itself", name)
				return nil
			}
		case *ast.TagNode:
			r.problemAt(place(v), key, "has a tag (%s); tags are not used here", v.Start.Value)
			return nil
		case nil, *ast.NullNode:
			r.problem(key, "has no value; give one or leave the key out")
			return nil
		default:
			return n
		}
	}
	r.problem(key, "is an alias of an alias; write the value itself")
	return nil
}

func (r *reader) see(key string, k, v ast.Node) {
	switch v.(type) {
	case *ast.StringNode, *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.AliasNode, *ast.InfinityNode, *ast.NanNode:
		r.places[key] = place(v)
	default:
		r.places[key] = place(k)
	}
}

// pairs reads a mapping and calls each with every key once.
func (r *reader) pairs(key string, n ast.Node, each func(name string, k, v ast.Node)) {
	var values []*ast.MappingValueNode
	switch n := r.value(key, n).(type) {
	case nil:
		return
	case *ast.MappingNode:
		values = n.Values
	case *ast.MappingValueNode:
		values = []*ast.MappingValueNode{n}
	default:
		r.problem(key, "is %s; it takes keys with values", kind(n))
		return
	}
	seen := map[string]*token.Position{}
	for _, kv := range values {
		k, ok := scalar(kv.Key)
		switch {
		case kv.Key.IsMergeKey():
			r.problemAt(place(kv.Key), key, "merge keys (<<) are not used here; write the keys themselves")
		case !ok:
			r.problemAt(place(kv.Key), key, "a key is %s; keys are words", kind(kv.Key))
		case seen[k] != nil:
			r.problemAt(place(kv.Key), join(key, k), "is given twice, first in line %d; give it once", seen[k].Line)
		default:
			seen[k] = place(kv.Key)
			r.see(join(key, k), kv.Key, kv.Value)
			each(k, kv.Key, kv.Value)
		}
	}
}

func (r *reader) mapping(fields map[string]field) field {
	return func(key string, n ast.Node) {
		r.pairs(key, n, func(name string, k, v ast.Node) {
			if f := fields[name]; f != nil {
				f(join(key, name), v)
				return
			}
			known := slices.Sorted(maps.Keys(fields))
			meant := suggest(name, known)
			if other := elsewhere[name]; meant == "" && (key == "") == isTop(other) {
				meant = other
			}
			if meant != "" {
				meant = fmt.Sprintf("did you mean %s? ", meant)
			}
			r.problemAt(place(k), join(key, name), "unknown key; %sallowed: %s", meant, strings.Join(known, ", "))
		})
	}
}

// isTop tells where in elsewhere a word belongs: to the app itself or to a
// mapping within it.
func isTop(word string) bool {
	return word != "" && !slices.Contains([]string{"rest", "peak", "bind", "mount", "readonly"}, word)
}

func text[T ~string](r *reader, p *T) field {
	return func(key string, n ast.Node) {
		var s string
		r.text(key, n, &s)
		*p = T(s)
	}
}

// text takes numbers and booleans as they are written: YAML sees a number in
// a version, and people see a word.
func (r *reader) text(key string, n ast.Node, p *string) {
	v := r.value(key, n)
	if v == nil {
		return
	}
	s, ok := scalar(v)
	if !ok {
		r.problem(key, "is %s; it takes one text", kind(v))
		return
	}
	*p = s
}

func list[T any](r *reader, p *[]T, item func(key string, n ast.Node, p *T)) field {
	return func(key string, n ast.Node) {
		v := r.value(key, n)
		if v == nil {
			return
		}
		seq, ok := v.(*ast.SequenceNode)
		if !ok {
			r.problem(key, "is %s; it takes a list, as in [a, b]", kind(v))
			return
		}
		if *p = nil; len(seq.Values) > 0 {
			*p = make([]T, len(seq.Values))
		}
		for i, n := range seq.Values {
			k := fmt.Sprintf("%s[%d]", key, i)
			r.places[k] = place(n)
			if pairs, ok := n.(*ast.MappingNode); ok && !pairs.IsFlowStyle && len(pairs.Values) > 0 {
				r.places[k] = place(pairs.Values[0].Key)
			}
			item(k, n, &(*p)[i])
		}
	}
}

func (r *reader) volume(key string, n ast.Node, v *fleet.Volume) {
	r.mapping(map[string]field{
		"name": text(r, &v.Name), "bind": text(r, &v.Bind), "mount": text(r, &v.Mount), "readonly": r.boolean(&v.Readonly),
	})(key, n)
}

func (r *reader) env(s *fleet.Spec) field {
	return func(key string, n ast.Node) {
		s.Env = map[string]string{}
		r.pairs(key, n, func(name string, _, v ast.Node) {
			var value string
			r.text(join(key, name), v, &value)
			s.Env[name] = value
		})
	}
}

func (r *reader) boolean(p *bool) field {
	return func(key string, n ast.Node) {
		switch v := r.value(key, n).(type) {
		case nil:
		case *ast.BoolNode:
			*p = v.Value
		default:
			r.problem(key, "is %s; it takes true or false", kind(v))
		}
	}
}

func whole[T ~int | ~int64](r *reader, p *T, positive bool) field {
	return func(key string, n ast.Node) {
		v := r.value(key, n)
		if v == nil {
			return
		}
		if _, ok := v.(*ast.IntegerNode); !ok {
			r.problem(key, "is %s; it takes a whole number", kind(v))
			return
		}
		s := v.GetToken().Value
		i, err := strconv.ParseInt(s, 10, 64)
		switch {
		case err != nil || i < math.MinInt32 || i > math.MaxInt32 || strconv.FormatInt(i, 10) != s:
			r.problem(key, "%s is not a plain whole number; write it in decimal, without leading zeros", s)
		case positive && i == 0:
			r.problem(key, "is 0; leave the key out for the default")
		default:
			*p = T(i)
		}
	}
}

func (r *reader) cores(p *float64) field {
	return func(key string, n ast.Node) {
		v := r.value(key, n)
		if v == nil {
			return
		}
		switch v.(type) {
		case *ast.IntegerNode, *ast.FloatNode:
		default:
			r.problem(key, "is %s; it takes a number of cores such as 0.5 or 2", kind(v))
			return
		}
		s := v.GetToken().Value
		f, err := strconv.ParseFloat(s, 64)
		switch {
		case err != nil || strings.ContainsAny(s, "_xXpP"):
			r.problem(key, "%s is not a number of cores; write it as 0.5 or 2", s)
		case f == 0:
			r.problem(key, "is 0; leave the key out for the default")
		default:
			*p = f
		}
	}
}

// unit reads durations and amounts of bytes.
func unit[T ~int64, P interface {
	*T
	encoding.TextUnmarshaler
}](r *reader, p P, positive bool) field {
	return func(key string, n ast.Node) {
		v := r.value(key, n)
		if v == nil {
			return
		}
		s, ok := scalar(v)
		if !ok || v.Type() == ast.BoolType {
			r.problem(key, "is %s; it takes a number with its unit", kind(v))
			return
		}
		var x T
		if err := P(&x).UnmarshalText([]byte(s)); err != nil {
			r.problem(key, "%v", err)
			return
		}
		if positive && x == 0 {
			r.problem(key, "is 0; leave the key out for the default")
			return
		}
		*p = x
	}
}

// scalar is the text of a value as it is written, without quotes.
func scalar(n ast.Node) (string, bool) {
	switch n := n.(type) {
	case *ast.StringNode:
		return n.Value, true
	case *ast.LiteralNode:
		return n.Value.Value, true
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.InfinityNode, *ast.NanNode:
		return n.GetToken().Value, true
	}
	return "", false
}

// kind names what a value is, for people.
func kind(n ast.Node) string {
	switch n.(type) {
	case *ast.StringNode, *ast.LiteralNode:
		return "a text"
	case *ast.IntegerNode, *ast.FloatNode, *ast.InfinityNode, *ast.NanNode:
		return "a number"
	case *ast.BoolNode:
		return "true or false"
	case *ast.SequenceNode:
		return "a list"
	case *ast.MappingNode, *ast.MappingValueNode:
		return "a mapping"
	case nil, *ast.NullNode:
		return "nothing"
	}
	return "something else"
}

func place(n ast.Node) *token.Position {
	switch v := n.(type) {
	case nil:
		return nil
	case *ast.MappingNode:
		if !v.IsFlowStyle && len(v.Values) > 0 {
			return place(v.Values[0].Key)
		}
	case *ast.MappingValueNode:
		return place(v.Key)
	}
	if t := n.GetToken(); t != nil {
		return t.Position
	}
	return nil
}

func join(key, name string) string {
	if len(name) > 64 {
		name = clip(name)
	}
	if key == "" {
		return name
	}
	return key + "." + name
}
