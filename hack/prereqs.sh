#!/usr/bin/env bash
# Installs the Debian packages that the tests, the demo and the benchmarks use.
# Quiet when everything is there. Needs root.
set -euo pipefail

packages=(
	busybox-static cpio crun curl docker-registry e2fsprogs gcc iproute2 libc6-dev mmdebstrap nftables # tests
	patchelf qemu-system-x86 runc runsc xz-utils
	caddy nginx-light wrk # benchmarks
)
missing=()
for p in "${packages[@]}"; do
	dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing+=("$p")
done
command -v npm >/dev/null || missing+=(npm) # it may come with somebody else's nodejs
if [ ${#missing[@]} -gt 0 ]; then
	if [ "$(id -u)" != 0 ]; then
		echo "these packages are missing, and only root can install them: ${missing[*]}" >&2
		echo "type: sudo apt-get install ${missing[*]}" >&2
		exit 1
	fi
	echo "installing: ${missing[*]}"
	log=$(mktemp)
	# Servers that come with packages must not start: the tests start their own.
	policy=/usr/sbin/policy-rc.d
	made=
	if [ ! -e $policy ]; then
		printf '#!/bin/sh\nexit 101\n' >$policy
		chmod 755 $policy
		made=1
	fi
	trap '[ -z "$made" ] || rm -f $policy; rm -f "$log"' EXIT
	if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
		tail -30 "$log" >&2
		exit 1
	fi
fi
"$(dirname "$0")/criu.sh"
