#!/bin/sh
# Makes the three apps out of the packages, inside the root filesystem, so that
# an instance only has to start. This directory is /srv.
set -eu
export HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8

# Rails: what its generator makes, with one model, two controllers and a view.
# It boots once, so that its caches are filled. They know a file by its time, and
# mmdebstrap sets the times that are later than its own start.
cd /srv
rails new blog --minimal --skip-sprockets --skip-javascript --skip-test --skip-git --skip-bundle --quiet
cp -R rails/. blog
rm -r rails
cd blog
bundle config set --local without development:test
bundle install --local --quiet
find . -exec touch -r /etc/debian_version {} +
export RAILS_ENV=production SECRET_KEY_BASE=setup
rails db:migrate db:seed
rails runner Post.count
rm -f log/*

# The JVM: its compiler is a module of it.
cd /srv/jvm
java -m jdk.compiler/com.sun.tools.javac.Main @classpath Main.java

# MariaDB runs beside the sandbox. It gets a tree of its own, with little more
# than the server, which the tests unpack and start alone.
db=/srv/mariadb
mkdir -p $db/etc $db/tmp $db/run/mysqld $db/usr/sbin $db/usr/share/mysql $db/var/lib/mysql
mv $db/my.cnf $db/etc/my.cnf
echo root:x:0:0:root:/:/bin/false >$db/etc/passwd
cp /usr/sbin/mariadbd $db/usr/sbin
cp -R /usr/share/mysql/english /usr/share/mysql/charsets $db/usr/share/mysql
ldd /usr/sbin/mariadbd | grep -o '/[^ ]*' | while read -r lib; do
	mkdir -p "$db${lib%/*}"
	cp -L "$lib" "$db$lib"
done
mariadb-install-db --defaults-file=$db/etc/my.cnf --datadir=$db/var/lib/mysql --auth-root-authentication-method=normal --skip-test-db --force >/dev/null
ln -sfn $db/run/mysqld /run/mysqld
chroot $db mariadbd 2>/tmp/mariadbd.log &
pid=$!
trap 'cat /tmp/mariadbd.log; kill $pid' EXIT
for _ in $(seq 300); do
	[ ! -S /run/mysqld/mysqld.sock ] || break
	sleep 0.1
done

# WordPress, and its blog in the database. The network stays outside: the
# installer asks its own site over HTTP whether links may be pretty.
cp /srv/wordpress/config-default.php /etc/wordpress
cp /srv/wordpress/site.conf /etc/apache2/sites-available/000-default.conf
cp /srv/wordpress/php.ini "$(echo /etc/php/*/apache2/conf.d)/99-image.ini"
echo 'Listen 8080' >/etc/apache2/ports.conf
unshare --net php /srv/wordpress/install.php
trap - EXIT
kill $pid
wait $pid
rm /run/mysqld /tmp/mariadbd.log
mkdir /run/mysqld
dpkg --purge mariadb-server-core >/dev/null
