// Package realapps makes the real programs that tests and benchmarks run: as
// Debian and npm have them, each with a page of its own.
package realapps

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// packages of the root filesystem that all of them share.
const packages = "nginx-light,apache2,libapache2-mod-php,python3-flask,nodejs"

// Debian is a tarball of a root filesystem with what the apps need, made once
// and kept in a directory.
func Debian(ctx context.Context, cache string) (string, error) {
	dir, err := filepath.Abs(cache)
	if err != nil {
		return "", err
	}
	file := filepath.Join(dir, packages+".tar")
	if _, err := os.Stat(file); err == nil {
		return file, nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // a cache
		return "", err
	}
	cmd := exec.CommandContext(ctx, "mmdebstrap", "--variant=minbase", "--include="+packages, "bookworm", file+".tmp.tar") //nolint:gosec // ours
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("make a Debian root filesystem: %w\n%s", err, out)
	}
	return file, os.Rename(file+".tmp.tar", file)
}

// App is one of them.
type App struct {
	Name    string
	Want    string // the body of its page, or a part of it
	Command []string
	Volumes []fleet.Volume
}

// Make writes the apps' own files into a directory, which other users can
// read, and gives the apps.
func Make(ctx context.Context, dir string) ([]App, error) {
	files := map[string]string{
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
	}
	errs := []error{os.Chmod(dir, 0o755)} //nolint:gosec // users of the containers read it
	for name, text := range files {
		name = filepath.Join(dir, name)
		errs = append(errs, os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(text), 0o644)) //nolint:gosec // the same
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	npm := exec.CommandContext(ctx, "npm", "install", "--no-audit", "--no-fund", "--prefix", dir+"/node", "express@4") //nolint:gosec // ours
	if out, err := npm.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("npm install: %w\n%s", err, out)
	}
	bind := func(name, mount string) fleet.Volume {
		return fleet.Volume{Bind: filepath.Join(dir, name), Mount: mount, Readonly: true}
	}
	return []App{
		{
			Name: "nginx", Want: "hello nginx", Command: []string{"nginx", "-g", "daemon off; error_log stderr;"},
			Volumes: []fleet.Volume{bind("nginx.conf", "/etc/nginx/sites-enabled/default"), bind("nginx", "/srv")},
		},
		{
			Name: "php", Want: "hello php 42 on apache2handler",
			Command: []string{"sh", "-c", "mkdir -p /run/apache2 /run/lock && . /etc/apache2/envvars && exec apache2 -DFOREGROUND"},
			Volumes: []fleet.Volume{bind("ports.conf", "/etc/apache2/ports.conf"), bind("apache.conf", "/etc/apache2/sites-enabled/000-default.conf"), bind("php", "/var/www/html")},
		},
		{
			Name: "flask", Want: "hello flask",
			Command: []string{"sh", "-c", "trap 'exit 0' TERM; flask --app /srv/app.py run --host 0.0.0.0 --port 8080 & wait"},
			Volumes: []fleet.Volume{bind("flask", "/srv")},
		},
		{
			Name: "express", Want: `{"hello":"express"}`, Command: []string{"node", "/srv/server.js"},
			Volumes: []fleet.Volume{bind("node", "/srv")},
		},
	}, nil
}
