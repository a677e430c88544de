package checkpoint

import (
	"encoding/json"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

func someManifest() manifest {
	return manifest{Format: manifestFormat, App: "blog", Key: key(1), Created: time.Unix(1e9, 5).UTC(), tree: tree{
		Files: []file{
			{Name: "images/core-1.img", Size: 5, MTime: 7, CRC: 9},
			{Name: "images/pages & 100%.img", Size: 0, MTime: -1},
			{Name: "x\xff\n\"\u202e", Size: 1},
		},
		Others: map[string]int{"directory": 1, "symlink": 2},
	}}
}

func TestManifest_ReadBack(t *testing.T) {
	want := someManifest()
	data, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	got, err := parseManifest(data, id{"blog", key(1)})
	if err != nil || !reflect.DeepEqual(*got, want) {
		t.Errorf("got %+v, %v from\n%s", got, err, data)
	}
}

func TestManifest_Refuses(t *testing.T) {
	base, err := json.Marshal(someManifest())
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ old, new string }{
		"a name above":           {"images/core-1.img", "../x"},
		"a name above, escaped":  {"images/core-1.img", "%2e%2e%2fx"},
		"a name above, within":   {"images/core-1.img", "a/../../x"},
		"a name from the root":   {"images/core-1.img", "/etc/passwd"},
		"a name of the top":      {"images/core-1.img", "."},
		"no name":                {"images/core-1.img", ""},
		"a name in another form": {"images/core-1.img", "a//b"},
		"a name with a zero":     {"images/core-1.img", "a%00b"},
		"a name twice":           {"images/core-1.img", "images/pages%20%26%20100%25.img"},
		"names out of order":     {"images/core-1.img", "z"},
		"a broken escape":        {"images/core-1.img", "a%2"},
		"a name that is none":    {`"images/core-1.img"`, "7"},
		"a negative size":        {`"size":5`, `"size":-5`},
		"sizes without end":      {`"size":5`, `"size":9223372036854775807`},
		"a checksum too large":   {`"crc32c":9`, `"crc32c":4294967296`},
		"an unknown type":        {"symlink", "door"},
		"a negative count":       {`"symlink":2`, `"symlink":-2`},
		"counts without end":     {`"symlink":2`, `"symlink":9223372036854775807`},
		"another format":         {`"format":1`, `"format":2`},
		"another app":            {"blog", "shop"},
		"another key":            {key(1), key(2)},
		"no time":                {`"created":"2001-09-09T01:46:40.000000005Z",`, ""},
		"an unknown field":       {`"format":1`, `"format":1,"more":1`},
		"nothing":                {string(base), ""},
		"half":                   {string(base[len(base)/2:]), ""},
		"two":                    {string(base), string(base) + string(base)},
		"zeros":                  {string(base), strings.Repeat("\x00", len(base))},
		"a list":                 {string(base), "[]"},
	} {
		data := strings.Replace(string(base), c.old, c.new, 1)
		if data == string(base) {
			t.Fatalf("%s: nothing was replaced in\n%s", name, base)
		}
		if m, err := parseManifest([]byte(data), id{"blog", key(1)}); err == nil {
			t.Errorf("%s: was taken: %+v", name, m)
		}
	}
}

func FuzzManifest(f *testing.F) {
	base, err := json.Marshal(someManifest())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(base)
	f.Add([]byte(strings.Replace(string(base), "images/core", "%2e%2e/core", 1)))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := parseManifest(data, id{"blog", key(1)})
		if err != nil {
			return
		}
		if m.size() < 0 {
			t.Errorf("its size is %d", m.size())
		}
		for _, file := range m.Files {
			if name := string(file.Name); !filepath.IsLocal(name) || filepath.Join("/top", name) != "/top/"+name {
				t.Errorf("it has the file %q", name)
			}
		}
		again, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parseManifest(again, id{"blog", key(1)}); err != nil {
			t.Errorf("%v, of what was written again:\n%s", err, again)
		}
	})
}
