package e2e

import (
	"fmt"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/fastcontainer/fastcontainer/internal/appfile"
	"github.com/fastcontainer/fastcontainer/internal/e2e/realapps"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/image/imagetest"
)

// greeter is a static Go server that tells its version.
func greeter(t *testing.T, version string) v1.Image {
	t.Helper()
	return imagetest.GoSource(t, fmt.Sprintf(`package main

import (
	"fmt"
	"net/http"
	"os"
)

func main() {
	http.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "version %s") })
	fmt.Println("listening on", os.Getenv("PORT"))
	http.ListenAndServe(":"+os.Getenv("PORT"), nil)
}
`, version), v1.Config{})
}

// A static Go server as a real OCI image, in every form that an image has.
func TestApp_StaticGo(t *testing.T) {
	d := newDaemon(t, "images: {refresh: 300ms}")
	img := greeter(t, "one")
	for name, ref := range map[string]string{
		"layout": "oci:" + imagetest.Layout(t, img), "docker": "tar:" + imagetest.DockerArchive(t, img), "archive": "tar:" + imagetest.OCIArchive(t, img),
	} {
		d.deploy(name, ref)
		d.expect(name+".localhost", "/", "version one")
	}
	// And from a registry: by tag and by digest.
	reg := imagetest.StartRegistry(t)
	tag := imagetest.Push(t, reg.Host, "team/greeter:stable", img)
	d.deploy("tagged", tag, "--lifetime", "1s")
	pinned := reg.Host + "/team/greeter@" + imagetest.Digest(t, img)
	d.deploy("pinned", pinned)
	for _, n := range []string{"tagged", "pinned"} {
		d.expect(n+".localhost", "/", "version one")
	}
	if out := d.must("logs", "tagged"); !strings.Contains(out, "listening on 8080") {
		t.Errorf("logs: %q", out)
	}
	// The tag moves: nobody deploys, and the next instance is the newer one.
	imagetest.Push(t, reg.Host, "team/greeter:stable", greeter(t, "two"))
	d.await("tagged", fleet.EventDeploy, func(e fleet.Event) bool { return e.Cause == "image changed" })
	d.until("the newer image answers", func() bool { _, body := d.get("tagged.localhost", "/"); return body == "version two" })
	d.expect("pinned.localhost", "/", "version one")
	// The registry goes away; what is here goes on, and a deploy says why not.
	reg.Kill()
	d.expect("tagged.localhost", "/", "version two")
	if out, code := d.cli("deploy", "other", "--image", reg.Host+"/team/other:1"); code != 1 || !strings.Contains(out, "hint:") {
		t.Errorf("deploy without a registry: %d %q", code, out)
	}
}

// Real apps as they are, from Debian's packages and from npm, with their own
// files in volumes: woken by a request, answering, entered, retired and woken
// again.
func TestApps_FromDebian(t *testing.T) {
	d := newDaemon(t, "")
	tar, err := realapps.Debian(t.Context(), "../../.cache/rootfs")
	if err != nil {
		t.Fatal(err)
	}
	site := t.TempDir()
	apps, err := realapps.Make(t.Context(), site)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range apps {
		t.Run(a.Name, func(t *testing.T) {
			s := appfile.Default(a.Name)
			s.Image, s.Port, s.Command, s.Volumes, s.Start = "tar:"+tar, 8080, a.Command, a.Volumes, fleet.StartCold
			s.Resources.Memory.Rest = 512 << 20
			appfile.Complete(&s)
			if _, err := d.client.Deploy(t.Context(), s, nil); err != nil {
				t.Fatal(err)
			}
			d.expect(a.Name+".localhost", "/", a.Want)
			if out := d.must("exec", a.Name, "--", "sh", "-c", "id -u; hostname"); out != "0\n"+a.Name+"\n" {
				t.Errorf("exec: %q", out)
			}
			d.must("stop", a.Name)
			d.must("start", a.Name)
			d.expect(a.Name+".localhost", "/", a.Want)
			if n := len(d.events(fleet.AppName(a.Name), fleet.EventStart)); n != 2 {
				t.Errorf("%d starts", n)
			}
			for _, e := range d.events(fleet.AppName(a.Name), fleet.EventStop) {
				if e.Detail != "" {
					t.Errorf("it did not stop by itself: %s", e.Detail)
				}
			}
		})
	}
}
