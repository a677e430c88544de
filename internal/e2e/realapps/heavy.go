package realapps

import (
	"context"
	"crypto/sha256"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// heavyPackages of the root filesystem of Rails, WordPress, the JVM, and the
// database of WordPress.
const heavyPackages = "ruby-rails,puma,ruby-bootsnap,ruby-sqlite3," +
	"wordpress,wordpress-theme-twentytwentyone,apache2,libapache2-mod-php,php-mysql,mariadb-server-core," +
	"openjdk-17-jre-headless,libjetty9-java"

// heavyExcluded are files of packages that no app needs, after which come
// those of them that something needs after all.
var heavyExcluded = []string{
	"path-exclude=/usr/share/doc/*", "path-exclude=/usr/share/man/*", "path-exclude=/usr/share/info/*", "path-exclude=/usr/share/locale/*",
	// Every client of MariaDB has the whole library in it.
	"path-exclude=/usr/bin/mariadb*", "path-include=/usr/bin/mariadb-install-db",
	"path-exclude=/usr/lib/jvm/*/lib/server/classes_nocoops.jsa",
}

// heavyFiles are the sources of the apps, and the script that makes them.
//
//go:embed heavy
var heavyFiles embed.FS

// Heavy is a tarball of a root filesystem with Rails, WordPress and the JVM, as
// Debian does for the light apps. To make it takes some minutes.
func Heavy(ctx context.Context, cache string) (string, error) {
	files, err := fs.Sub(heavyFiles, "heavy")
	if err != nil {
		return "", err
	}
	hash := sha256.New()
	fmt.Fprintln(hash, heavyPackages, heavyExcluded)
	err = fs.WalkDir(files, ".", func(name string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		text, err := fs.ReadFile(files, name)
		fmt.Fprintf(hash, "%s %q\n", name, text)
		return err
	})
	if err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp("", "heavy")
	if err != nil {
		return "", err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	if err := errors.Join(os.Chmod(dir, 0o755), os.CopyFS(filepath.Join(dir, "srv"), files)); err != nil {
		return "", err
	}
	args := []string{
		// The installation of the JVM puts a link there, whose target is excluded.
		`--setup-hook=mkdir -p "$1/usr/share/man/man1"`,
		"--customize-hook=copy-in " + dir + "/srv /",
		`--customize-hook=chroot "$1" sh /srv/setup.sh`,
	}
	for _, e := range heavyExcluded {
		args = append(args, "--dpkgopt="+e)
	}
	return debian(ctx, cache, fmt.Sprintf("heavy-%x", hash.Sum(nil)[:8]), heavyPackages, args...)
}

// Rails is a blog with its posts in SQLite, in production mode: one process,
// with what it is made of loaded at its start.
func Rails() App {
	return App{
		Name: "rails", Want: "<h1>hello rails</h1>",
		Command: []string{"sh", "-c", "cd /srv/blog && RAILS_ENV=production RAILS_LOG_TO_STDOUT=1 SECRET_KEY_BASE=" + strings.Repeat("5", 64) + " exec puma"},
	}
}

// JVM is an embedded Jetty.
func JVM() App {
	return App{
		Name: "jvm", Want: "<h1>hello jvm</h1>",
		Command: []string{"java", "-Xmx128m", "-XX:+UseSerialGC", "-Djava.net.preferIPv4Stack=true", "@/srv/jvm/classpath", "Main"},
	}
}

// WordPress on Apache, with its pages in a database outside.
func WordPress(db *MariaDB) App {
	return App{
		Name: "wordpress", Want: "<title>hello wordpress</title>", Command: apache,
		Volumes: []fleet.Volume{{Bind: filepath.Dir(db.Socket()), Mount: "/run/mysqld", Readonly: true}},
	}
}
