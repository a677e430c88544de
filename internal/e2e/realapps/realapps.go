// Package realapps makes the real programs that tests and benchmarks run: as
// Debian and npm have them, each with a page of its own. The light ones share
// one root filesystem, the heavy ones another. All but nginx tell at /who, as
// JSON, what distinguishes an instance: its pid and hostname, and a number of
// the runtime's generator as well as bytes of its secure one.
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

// packages of the root filesystem that all the light ones share.
const packages = "nginx-light,apache2,libapache2-mod-php,python3-flask,nodejs"

// Debian is a tarball of a root filesystem with what the light apps need, made
// once and kept in a directory.
func Debian(ctx context.Context, cache string) (string, error) {
	return debian(ctx, cache, packages, packages)
}

// debian makes the tarball of that name, if it is not there.
func debian(ctx context.Context, cache, name, packages string, args ...string) (string, error) {
	dir, err := filepath.Abs(cache)
	if err != nil {
		return "", err
	}
	file := filepath.Join(dir, name+".tar")
	if _, err := os.Stat(file); err == nil {
		return file, nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // a cache
		return "", err
	}
	args = append([]string{"--variant=minbase", "--include=" + packages}, args...)
	cmd := exec.CommandContext(ctx, "mmdebstrap", append(args, "bookworm", file+".tmp.tar")...) //nolint:gosec // ours
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("make a Debian root filesystem: %w\n%s", err, out)
	}
	return file, os.Rename(file+".tmp.tar", file)
}

// apache in the foreground, as Debian has it.
var apache = []string{"sh", "-c", "mkdir -p /run/apache2 /run/lock && . /etc/apache2/envvars && exec apache2 -DFOREGROUND"}

// App is one of them.
type App struct {
	Name    string
	Want    string // the body of its page, or a part of it
	Command []string
	Volumes []fleet.Volume
}

// Make writes the light apps' own files into a directory, which other users can
// read, and gives the apps.
func Make(ctx context.Context, dir string) ([]App, error) {
	files := map[string]string{
		"php/index.php":    `<?php echo "hello php ", 6 * 7, " on ", php_sapi_name();`,
		"php/who.php":      `<?php echo json_encode(['pid' => getmypid(), 'hostname' => gethostname(), 'random' => mt_rand(), 'secure' => bin2hex(random_bytes(16))]);`,
		"ports.conf":       "Listen 8080\n",
		"apache.conf":      "ServerName localhost\n<VirtualHost *:8080>\nDocumentRoot /var/www/html\nAlias /who /var/www/html/who.php\nErrorLog /dev/stderr\nCustomLog /dev/stdout combined\n</VirtualHost>\n",
		"nginx.conf":       "server { listen 8080; root /srv; access_log /dev/stdout; }\n",
		"nginx/index.html": "hello nginx",
		"flask/app.py": `
import os, random, secrets, socket
from flask import Flask
app = Flask(__name__)

@app.route('/')
def hello():
    return 'hello flask'

@app.route('/who')
def who():
    return {'pid': os.getpid(), 'hostname': socket.gethostname(), 'random': random.random(), 'secure': secrets.token_hex(16)}
`,
		"node/server.js": `
const crypto = require('crypto'), os = require('os')
const app = require('express')()
app.get('/', (req, res) => res.json({hello: 'express'}))
app.get('/who', (req, res) => res.json({pid: process.pid, hostname: os.hostname(), random: Math.random(), secure: crypto.randomBytes(16).toString('hex')}))
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
			Command: apache,
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
