#!/usr/bin/env bash
# Runs tests on cgroup v2: in a virtual machine with Debian's kernel, because a
# host has either v1 or v2 and some have v1. Emulated (tcg), so it needs no
# rights on /dev/kvm and works in containers. Nothing is written but to .cache.
#
#   hack/v2/run.sh [-r REGEXP] [-c COUNT] [-v] [PACKAGE...]
#   -r: only these tests   -c: so many times   -v: their whole output
#
# The exit status is that of the tests. What cannot run there is in skips below.
set -euo pipefail
cd "$(dirname "$0")/../.."

limit=${V2_LIMIT:-20m} # of all of it, after which it has failed
each=${V2_EACH:-10m}   # of one package, after which it shows where it hangs
memory=${V2_MEMORY:-2G}
release=${V2_RELEASE:-} # a suite whose kernel to take, as in bookworm-backports; empty: apt's choice
packages=(./internal/sandbox ./internal/sandbox/cgroup ./internal/sandbox/oci ./internal/node)
run=. count=1 verbose=

# A test that is skipped here has its reason beside it.
skips=(
	'^Benchmark'               # figures of an emulated machine say nothing
	# CRIU takes seconds for each restore there, and ten at once have hung once.
	'^TestCheckpoint_(SiblingsAreTheirOwn|OfEveryShape|WhatCannotBeSavedLeavesNothing|ImagesAreRootsAlone)$' '^TestRestore_'
	'^TestConformance_Runsc$'  # gVisor emulated within an emulated machine: minutes for one container
)

while getopts r:c:v option; do
	case $option in
	r) run=$OPTARG ;;
	c) count=$OPTARG ;;
	v) verbose=1 ;;
	*) exit 2 ;;
	esac
done
shift $((OPTIND - 1))
[ $# = 0 ] || packages=("$@")

for tool in qemu-system-x86_64 cpio go gcc busybox mkfs.ext4 dpkg-deb apt-get; do
	command -v $tool >/dev/null || { echo "$tool is missing: run hack/prereqs.sh" >&2; exit 1; }
done

cache=$PWD/.cache/v2
mkdir -p "$cache"
exec 9>"$cache/lock" # two runs at once would build in the same place
flock 9
work=$(mktemp -d "$cache/run.XXXXXX")
trap 'rm -rf "$work"' EXIT

# The kernel, once for each version.
package=$(apt-cache depends ${release:+-t "$release"} linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-.*-cloud-amd64\)$/\1/p' | head -1)
[ -n "$package" ] || { echo "apt knows no linux-image-cloud-amd64: run apt-get update" >&2; exit 1; }
kernel=$cache/$package
if [ ! -e "$kernel/done" ]; then
	echo "v2: fetching $package"
	rm -rf "$kernel"
	mkdir -p "$kernel"
	(cd "$work" && apt-get -o APT::Sandbox::User=root -qq download "$package")
	dpkg-deb -x "$work/$package"_*.deb "$kernel"
	rm "$work"/*.deb
	touch "$kernel/done"
fi
version=${package#linux-image-}

# The root of the machine.
root=$work/root
mkdir -p "$root"/{bin,dev,etc,mnt,proc,root,run,sys,tmp,usr/{bin,sbin},var/lib,var/log,lib/modules/"$version"/kernel}
ln -s bin "$root/sbin"
for applet in $(busybox --list); do
	ln -sf busybox "$root/bin/$applet"
done
cp --remove-destination "$(command -v busybox)" "$root/bin/busybox"
modules=$kernel/lib/modules/$version
[ -d "$modules" ] || modules=$kernel/usr/lib/modules/$version
for part in net/{802,ipv4,ipv6,llc,netfilter,netlink,packet,unix,xfrm} fs/overlayfs lib/libcrc32c.ko lib/crc32c_generic.ko crypto/crc32c_generic.ko arch/x86/crypto/crc32c-intel.ko \
	drivers/net/{veth,dummy,tun,macvlan}.ko drivers/block/loop.ko fs/fuse; do
	for file in "$modules/kernel/$part"*; do
		[ -e "$file" ] || continue
		mkdir -p "$root/lib/modules/$version/kernel/$(dirname "$part")"
		cp -r "$file" "$root/lib/modules/$version/kernel/$(dirname "$part")/"
	done
done
find "$root/lib/modules" -name '*.ko.xz' -exec xz -d {} +
cp "$modules"/modules.{builtin,order} "$root/lib/modules/$version/"
busybox depmod -b "$root" "$version"

# add copies a program and the libraries that it loads.
add() {
	local file
	file=$(command -v "$1") || return 0
	for file in "$file" $(ldd "$file" 2>/dev/null | grep -o '/[^ ]*'); do
		mkdir -p "$root$(dirname "$file")"
		cp -L "$file" "$root$file"
	done
}
add nft
add mkfs.ext4
add crun
add runc
criu=/usr/local/lib/fastcontainer/criu # hack/criu.sh put it there
[ ! -d $criu ] || { mkdir -p "$root$(dirname $criu)" && cp -a $criu "$root$criu"; }
printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n' >"$root/etc/passwd"
printf 'root:x:0:\nnogroup:x:65534:\n' >"$root/etc/group"
printf 'root:100000:1000000000\n' | tee "$root/etc/subuid" >"$root/etc/subgid"
printf '127.0.0.1 localhost\n::1 localhost\n' >"$root/etc/hosts"
printf 'v2\n' >"$root/etc/hostname"
cp hack/v2/init.sh "$root/init"
chmod 755 "$root/init"

# The tests.
failed=()
mkdir -p "$root/tests"
for p in "${packages[@]}"; do
	dir=${p#./}
	if ! CGO_ENABLED=0 go test -c -trimpath -ldflags '-s -w' -o "$root/tests/$dir/test" "$p" >"$work/build" 2>&1; then
		cat "$work/build" >&2
		failed+=("$p (does not compile)")
	elif [ -e "$root/tests/$dir/test" ]; then
		[ ! -d "$dir/testdata" ] || cp -r "$dir/testdata" "$root/tests/$dir/"
		for source in "$dir"/testdata/*.c; do # there is no compiler in the machine
			[ ! -e "$source" ] || gcc -static -O2 -w -o "$root/tests/${source%.c}" "$source"
		done
		echo "$dir" >>"$root/tests/list"
	else
		echo "v2: $p has no tests"
	fi
done
[ -s "$root/tests/list" ] || { echo "v2: nothing to run; ${failed[*]}" >&2; exit 1; }
IFS='|'
printf '%s\n' "$run" >"$root/tests/run"
printf '%s\n' "$each" >"$root/tests/timeout"
printf '%s\n' "$count" >"$root/tests/count"
printf '%s\n' "${skips[*]}" >"$root/tests/skip"
unset IFS
(cd "$root" && find . -print0 | cpio --null --quiet -o -H newc -R 0:0) | gzip -1 >"$work/initrd"
rm -rf "$root"

# The machine. It says on its console how each package ended, and then "v2: over".
echo "v2: linux $version, $(stat -c %s "$work/initrd" | awk '{printf "%d", $1 / 1048576}') MiB"
filter() {
	if [ "$verbose" ]; then cat; else grep -Ev --line-buffered '^ *(=== |--- PASS|PASS$)'; fi
}
# machine boots it once. One thread emulates its processors in turns: with a
# thread for each they sometimes hang while they come up, and it is no faster.
# What has not said its first word after 40 s is stopped, and told by 1.
machine() {
	: >"$cache/console"
	timeout -k 10 "$limit" qemu-system-x86_64 \
		-M microvm,rtc=on -accel tcg,thread=single -cpu max -smp 2 -m "$memory" \
		-nodefaults -no-user-config -display none -no-reboot -serial stdio -pidfile "$work/pid" \
		-kernel "$kernel/boot/vmlinuz-$version" -initrd "$work/initrd" \
		-append "console=ttyS0 reboot=t panic=-1 quiet loglevel=3 cgroup_no_v1=all" </dev/null |
		sed -u 's/\r$//' | tee "$cache/console" | filter &
	for _ in $(seq 40); do
		sleep 1
		[ ! -s "$cache/console" ] || break
	done
	if [ ! -s "$cache/console" ]; then
		echo "v2: the machine hangs while it boots: once more"
		kill "$(cat "$work/pid")"
		wait || true
		return 1
	fi
	wait || true
}
machine || machine || machine || true

while read -r dir; do
	case $(sed -n "s|^v2: $dir: exit ||p" "$cache/console") in
	0) ;;
	'') failed+=("$dir (did not end)") ;;
	*) failed+=("$dir") ;;
	esac
done < <(sed -n 's/^v2: will run //p' "$cache/console")
grep -q '^v2: over' "$cache/console" || failed+=("the machine did not end within $limit")
if [ ${#failed[@]} -gt 0 ]; then
	printf 'v2: FAIL: %s\n' "${failed[@]}"
	echo "v2: the whole console is in .cache/v2/console"
	exit 1
fi
echo "v2: ok"
