#!/usr/bin/env bash
# Puts CRIU 4.2 or newer into /usr/local/lib/fastcontainer/criu, for the tests
# and the benchmarks: Debian 12's is too old for today's kernels. The package is
# that of Debian's unstable suite; it is unpacked, not installed, with the
# libraries it was built for, and told where they are. It lies where everybody
# may execute it, because it runs with the rights of a container.
set -euo pipefail
dir=/usr/local/lib/fastcontainer/criu
[ -x "$dir/criu" ] && "$dir/criu" --version >/dev/null 2>&1 && exit
rm -rf "$dir"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{lists/partial,cache/archives/partial,root}
keys=/usr/share/keyrings/debian-archive-keyring.gpg
mirror=$(sed -n 's/^URIs: *\([^ ]*\/debian\)\/*$/\1/p' /etc/apt/sources.list.d/*.sources 2>/dev/null | head -1)
echo "deb [signed-by=$keys] ${mirror:-http://deb.debian.org/debian} sid main" >"$work/sources.list"
apt=(apt-get -q -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=/dev/null -o Dir::State::lists="$work/lists"
	-o Dir::Cache="$work/cache" -o Dir::State::status=/dev/null -o APT::Sandbox::User=root)
echo "fetching CRIU"
if ! { "${apt[@]}" update && "${apt[@]}" install -y --no-install-recommends --download-only criu; } >"$work/log" 2>&1; then
	tail -20 "$work/log" >&2
	exit 1
fi
for package in "$work"/cache/archives/*.deb; do
	dpkg-deb -x "$package" "$work/root"
done
mkdir -p "$dir"
cp -a "$work"/root/usr/lib/x86_64-linux-gnu/*.so* "$dir"
cp "$work/root/usr/sbin/criu" "$dir/criu.new"
loader=$(basename "$(readlink -f "$work/root/usr/lib64/ld-linux-x86-64.so.2")")
patchelf --force-rpath --set-rpath "$dir" --set-interpreter "$dir/$loader" "$dir/criu.new"
mv "$dir/criu.new" "$dir/criu"
"$dir/criu" --version | sed 's/^Version:/CRIU/;q'
