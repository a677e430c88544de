package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

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

// debian is the root filesystem of a Debian with everything that the apps
// below need, made once for all of them and kept under .cache.
func debian(t *testing.T) string {
	t.Helper()
	packages := "nginx-light,apache2,libapache2-mod-php,python3-flask,nodejs"
	dir, err := filepath.Abs("../../.cache/rootfs")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, packages+".tar")
	if _, err := os.Stat(file); err == nil {
		return "tar:" + file
	}
	cmd := exec.Command("mmdebstrap", "--variant=minbase", "--include="+packages, "bookworm", file+".tmp.tar")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make a Debian root filesystem: %v\n%s", err, out)
	}
	if err := os.Rename(file+".tmp.tar", file); err != nil {
		t.Fatal(err)
	}
	return "tar:" + file
}

// Real apps as they are, from Debian's packages and from npm, with their own
// files in volumes: woken by a request, answering, entered, retired and woken
// again.
func TestApps_FromDebian(t *testing.T) {
	d := newDaemon(t, "")
	img := debian(t)
	site := t.TempDir()
	for name, text := range map[string]string{
		"php/index.php":    `<?php echo "hello php ", 6 * 7, " on ", php_sapi_name();`,
		"ports.conf":       "Listen 8080\n",
		"apache.conf":      "ServerName localhost\n<VirtualHost *:8080>\nDocumentRoot /var/www/html\nErrorLog /dev/stderr\nCustomLog /dev/stdout combined\n</VirtualHost>\n",
		"nginx.conf":       "server { listen 8080; root /srv; access_log /dev/stdout; }\n",
		"nginx/index.html": "hello nginx",
		"flask/app.py":     "from flask import Flask\napp = Flask(__name__)\n@app.route('/')\ndef hello():\n    return 'hello flask'\n",
		"node/server.js": `
const app = require('express')()
app.get('/', (req, res) => res.json({hello: 'express'}))
app.listen(process.env.PORT, '0.0.0.0')
process.on('SIGTERM', () => process.exit(0))
`,
	} {
		write(t, filepath.Join(site, name), text)
	}
	if out, err := exec.Command("npm", "install", "--no-audit", "--no-fund", "--prefix", site+"/node", "express@4").CombinedOutput(); err != nil {
		t.Fatalf("npm install: %v\n%s", err, out)
	}
	for _, a := range []struct {
		name, want, command, volumes string
	}{
		{"nginx", "hello nginx", `[nginx, -g, "daemon off; error_log stderr;"]`, "{bind: nginx.conf, mount: /etc/nginx/sites-enabled/default, readonly: true}, {bind: nginx, mount: /srv, readonly: true}"},
		{"php", "hello php 42 on apache2handler", `[sh, -c, "mkdir -p /run/apache2 /run/lock && . /etc/apache2/envvars && exec apache2 -DFOREGROUND"]`,
			"{bind: ports.conf, mount: /etc/apache2/ports.conf}, {bind: apache.conf, mount: /etc/apache2/sites-enabled/000-default.conf}, {bind: php, mount: /var/www/html}"},
		{"flask", "hello flask", `[sh, -c, "trap 'exit 0' TERM; flask --app /srv/app.py run --host 0.0.0.0 --port 8080 & wait"]`, "{bind: flask, mount: /srv, readonly: true}"},
		{"express", `{"hello":"express"}`, `[node, /srv/server.js]`, "{bind: node, mount: /srv, readonly: true}"},
	} {
		t.Run(a.name, func(t *testing.T) {
			file := filepath.Join(site, a.name+".yaml")
			write(t, file, fmt.Sprintf("name: %s\nimage: %s\nport: 8080\ncommand: %s\nvolumes: [%s]\nresources: {memory: {rest: 512Mi}}\n", a.name, img, a.command, a.volumes))
			d.must("deploy", "-f", file)
			d.expect(a.name+".localhost", "/", a.want)
			if out := d.must("exec", a.name, "--", "sh", "-c", "id -u; hostname"); out != "0\n"+a.name+"\n" {
				t.Errorf("exec: %q", out)
			}
			d.must("stop", a.name)
			d.must("start", a.name)
			d.expect(a.name+".localhost", "/", a.want)
			if n := len(d.events(fleet.AppName(a.name), fleet.EventStart)); n != 2 {
				t.Errorf("%d starts", n)
			}
			for _, e := range d.events(fleet.AppName(a.name), fleet.EventStop) {
				if e.Detail != "" {
					t.Errorf("it did not stop by itself: %s", e.Detail)
				}
			}
		})
	}
}
