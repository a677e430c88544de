package imagetest_test

import (
	"os/exec"
	"path/filepath"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/fastcontainer/fastcontainer/internal/image"
	"github.com/fastcontainer/fastcontainer/internal/image/imagetest"
)

// What other packages' tests do: a Go program becomes an image, goes through a
// registry or an archive, and runs.
func TestGoSource_RunsAfterAPull(t *testing.T) {
	t.Parallel()
	img := imagetest.GoSource(t, `package main

import "fmt"

func main() { fmt.Print("hello") }
`, v1.Config{Env: []string{"A=1"}, ExposedPorts: map[string]struct{}{"8080/tcp": {}}})
	reg := imagetest.StartRegistry(t)
	s, err := image.Open(t.TempDir(), image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, ref := range []string{
		imagetest.Push(t, reg.Host, "hello:v1", img),
		"tar:" + imagetest.DockerArchive(t, img), "tar:" + imagetest.OCIArchive(t, img), "oci:" + imagetest.Layout(t, img),
	} {
		got, err := s.Pull(t.Context(), ref, nil)
		if err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command(filepath.Join(got.Layers[0], got.Config.Entrypoint[0])).Output()
		if err != nil || string(out) != "hello" || got.Config.Ports[0] != 8080 || got.Config.Env[0] != "A=1" {
			t.Errorf("%s: %q %v, config %+v", ref, out, err, got.Config)
		}
	}
}

func TestFiles_MakesParentsAndPrograms(t *testing.T) {
	t.Parallel()
	img := imagetest.Files(t, v1.Config{Entrypoint: []string{"/bin/deep/run"}}, map[string]string{
		"/bin/deep/run": "#!/bin/sh\necho ran\n", "/etc/x/conf": "c",
	})
	s, err := image.Open(t.TempDir(), image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	got, err := s.Pull(t.Context(), "oci:"+imagetest.Layout(t, img), nil)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(filepath.Join(got.Layers[0], "bin/deep/run")).Output(); err != nil || string(out) != "ran\n" {
		t.Errorf("%q %v", out, err)
	}
}
