#!/usr/bin/env bash
# Serves on this machine, deploys the example, shows a request that finds it
# asleep and one that finds it awake, and stays until Ctrl-C. Everything it
# makes is removed at the end.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "$(id -u)" != 0 ]; then
	echo "containers need root: continuing with sudo"
	exec sudo env "PATH=$PATH" "$0" "$@"
fi
command -v curl >/dev/null || { echo "curl is missing: apt-get install curl" >&2; exit 1; }

fc=$PWD/bin/fastcontainer
dir=$(mktemp -d /tmp/fcdemo.XXXX)
export FASTCONTAINER_SERVER=unix://$dir/run/api.sock
port=8080
while (exec 3<>/dev/tcp/127.0.0.1/$port) 2>/dev/null; do port=$((port + 1)); done

bold() { printf '\n\033[1m%s\033[0m\n' "$*"; }

daemon=
finish() {
	trap - EXIT INT TERM
	if [ -n "$daemon" ] && kill -0 "$daemon" 2>/dev/null; then
		"$fc" delete hello >/dev/null 2>&1 || true
		kill "$daemon" && wait "$daemon" 2>/dev/null || true
	fi
	ip netns delete fastcontainer-fcdemo 2>/dev/null || true
	for family in ip inet; do nft delete table $family fastcontainer-fcdemo 2>/dev/null || true; done
	rmdir /sys/fs/cgroup/fcdemo /sys/fs/cgroup/*/fcdemo 2>/dev/null || true
	rm -rf "$dir" examples/hello/rootfs
}
trap finish EXIT
trap 'echo; exit 0' INT TERM

mkdir -p examples/hello/rootfs
CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o examples/hello/rootfs/hello ./examples/hello

cat >"$dir/config.yaml" <<EOF
data: $dir/data
run: $dir/run
http: 127.0.0.1:$port
network: {interface: fcdemo, subnet: 10.88.0.0/20}
sandbox: {cgroup: /fcdemo}
EOF

bold "fastcontainer serve"
# In a session of its own: Ctrl-C is for this script, which asks it to end once.
setsid "$fc" serve --config "$dir/config.yaml" --server-timing 2>"$dir/log" &
daemon=$!
for _ in $(seq 100); do
	[ -S "$dir/run/api.sock" ] && break
	kill -0 $daemon 2>/dev/null || { cat "$dir/log" >&2; exit 1; }
	sleep 0.1
done
cat "$dir/log"

bold "fastcontainer deploy -f examples/hello/app.yaml"
"$fc" deploy -f examples/hello/app.yaml 2>/dev/null
"$fc" apps

ask() {
	curl -sS -o "$dir/body" -D "$dir/head" -w '%{time_total}' -H 'Host: hello.localhost' "http://127.0.0.1:$port/" >"$dir/time"
	printf '%s' "$(cat "$dir/body")"
	awk '{ printf "   (%.1f ms)\n", $1 * 1000 }' "$dir/time"
	grep -i '^server-timing' "$dir/head" || true
}
bold "the first request finds it asleep, and starts it"
ask
bold "the second finds it awake"
ask
bold "fastcontainer ps"
"$fc" ps
bold "fastcontainer events hello"
"$fc" events hello

bold "your turn, until Ctrl-C"
cat <<EOF
  curl http://hello.localhost:$port/          it sleeps again 5 s after the last request
  export FASTCONTAINER_SERVER=$FASTCONTAINER_SERVER
  bin/fastcontainer events -f
  bin/fastcontainer exec hello -- /hello
EOF
wait $daemon
