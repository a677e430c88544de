package house

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"strings"
	"testing"
)

// floors, from the ground up: a package imports only packages of lower floors,
// of its own floor where sameFloor says so, and its own children.
var floors = [][]string{
	{"internal/fleet", "internal/slow"},
	{"internal/homeostat", "internal/store", "internal/etcd", "internal/image", "internal/sandbox", "internal/network", "internal/appfile", "internal/events", "internal/plot",
		"internal/checkpoint"}, // directories by app and key: it knows neither CRIU nor sandboxes, node and daemon join them
	{"internal/dispatch", "internal/control", "internal/node", "internal/release", "internal/simulate"},
	{"internal/api"},
	{"internal/daemon"},
	{"cmd/fastcontainer", "bench", "examples/hello"},
}

// sameFloor are the imports between neighbours, each with its reason.
var sameFloor = map[string]string{
	"internal/etcd → internal/store": "etcd is a body of the store's contract",
}

// apart are packages of tests, which may use everything.
var apart = []string{"internal/e2e", "internal/e2e/realapps", "internal/house", "internal/appfile/gen", "internal/daemon/gen"}

const module = "github.com/fastcontainer/fastcontainer/"

func floorOf(pkg string) (floor int, room string) {
	for i, rooms := range floors {
		for _, r := range rooms {
			if pkg == r || strings.HasPrefix(pkg, r+"/") {
				return i, r
			}
		}
	}
	return -1, ""
}

func TestFloors(t *testing.T) {
	for pkg, imports := range packages(t) {
		floor, room := floorOf(pkg)
		if floor < 0 {
			t.Errorf("%s stands on no floor: add it to the list above, and to docs/architecture.md", pkg)
			continue
		}
		for _, imp := range imports {
			below, other := floorOf(imp)
			switch {
			case room == other || below < floor:
			case below > floor:
				t.Errorf("%s (floor %d) imports %s (floor %d): imports go downwards only, so that a part can be understood, tested and replaced with what is below it. Declare an interface here, and let daemon join the two", pkg, floor, imp, below)
			case sameFloor[room+" → "+other] == "":
				t.Errorf("%s imports its neighbour %s: packages of one floor do not know each other. Declare an interface here, and let daemon join the two; or give the reason in sameFloor", pkg, imp)
			}
		}
	}
}

// packages of this module and what they import of it, without their tests.
func packages(t *testing.T) map[string][]string {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports", "../../...")
	cmd.Stderr = t.Output()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	all := map[string][]string{}
	for dec := json.NewDecoder(out); ; {
		var p struct {
			ImportPath string
			Imports    []string
		}
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimPrefix(p.ImportPath, module)
		var own []string
		for _, imp := range p.Imports {
			if rest, ok := strings.CutPrefix(imp, module); ok {
				own = append(own, rest)
			}
		}
		if !isApart(name) {
			all[name] = own
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if len(all) < 15 {
		t.Fatalf("only %d packages were found: the list is wrong", len(all))
	}
	return all
}

func isApart(name string) bool {
	for _, a := range apart {
		if name == a {
			return true
		}
	}
	return false
}
