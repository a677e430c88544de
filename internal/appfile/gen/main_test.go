package main

import (
	"bytes"
	"errors"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/fastcontainer/fastcontainer/internal/appfile"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

func TestPage_IsUpToDate(t *testing.T) {
	want, err := generate("../../fleet/spec.go")
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile("../../../docs/app-file.md")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("docs/app-file.md does not say what the comments of fleet.Spec say: run go generate ./internal/appfile")
	}
}

func TestPage_TellsTheTruth(t *testing.T) {
	page, err := generate("../../fleet/spec.go")
	if err != nil {
		t.Fatal(err)
	}
	specs, err := appfile.Parse("/srv/blog/blog.yaml", []byte(example))
	if err != nil {
		t.Fatalf("the example is refused: %v", err)
	}
	if got := specs[0].Volumes[1].Bind; got != "/srv/blog/themes" {
		t.Errorf("bind is %q", got)
	}
	_, err = appfile.Parse("blog.yaml", []byte(slip))
	if !errors.Is(err, fleet.ErrInvalid) {
		t.Fatalf("the slip gives %v", err)
	}
	short := regexp.MustCompile(`(allowed: command, concurrency, ).*`).ReplaceAllString(err.Error(), "${1}…")
	if short != complaint {
		t.Errorf("the slip gives\n%s\nthe page says\n%s", short, complaint)
	}
	// Every key of the page is a key of the file, and the defaults that are
	// plain values are those of the code.
	d := appfile.Default("NAME")
	appfile.Complete(&d)
	for key, want := range map[string]string{
		"hosts": "NAME.localhost", "ready.timeout": d.Ready.Timeout.String(), "lifetime": d.Lifetime.String(),
		"idle": d.Idle.String(), "drain": d.Drain.String(), "priority": "50", "start": string(d.Start),
		"scale.min": "0", "scale.max": "10", "resources.cpu.rest": "1", "resources.memory.rest": d.Resources.Memory.Rest.String(),
		"resources.pids": "1024", "isolation.runtime": string(d.Isolation.Runtime), "isolation.userns": "true",
		"isolation.readonly": "false", "isolation.seccomp": `"` + d.Isolation.Seccomp + `"`, "name": "required", "image": "required",
		"volumes[].mount": "required", "resources.cpu.peak": "rest",
	} {
		row := regexp.MustCompile("(?m)^\\| `" + regexp.QuoteMeta(key) + "` \\| [^|]* \\| ([^|]*) \\|").FindSubmatch(page)
		if row == nil || string(row[1]) != want {
			t.Errorf("%s: the page says %q, want %q", key, row, want)
		}
	}
	for _, line := range strings.Split(string(page), "\n") {
		if strings.HasPrefix(line, "| `") && strings.HasSuffix(line, "|  |") {
			t.Errorf("no meaning: %s", line)
		}
	}
}

func TestSplit(t *testing.T) {
	for doc, want := range map[string][2]string{
		"Image to run. Required.":                                  {"Image to run.", "required"},
		"Seccomp: default or unconfined. Default \"default\".":     {"Seccomp: default or unconfined.", `"default"`},
		"Priority, 0 to 100, default 50.":                          {"Priority, 0 to 100.", "50"},
		"Rest: default 1.":                                         {"Rest.", "1"},
		"Hosts are. Default: NAME.localhost. Stars match a label.": {"Hosts are. Stars match a label.", "NAME.localhost"},
		"Add to the default set.":                                  {"Add to the default set.", ""},
	} {
		if m, d := split(doc); m != want[0] || d != want[1] {
			t.Errorf("%q: %q, %q", doc, m, d)
		}
	}
}
