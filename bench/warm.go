package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// flow is what wrk measured.
type flow struct {
	rate     float64
	p50, p99 time.Duration
	cpu      time.Duration // of the proxy, for a request
}

var (
	wrkRate = regexp.MustCompile(`Requests/sec:\s+([0-9.]+)`)
	wrk50   = regexp.MustCompile(`50%\s+([0-9.]+[a-z]+)`)
	wrk99   = regexp.MustCompile(`99%\s+([0-9.]+[a-z]+)`)
	wrkBad  = regexp.MustCompile(`Non-2xx or 3xx responses: (\d+)`)
)

// wrk loads an address from the second processor.
func (b *bench) wrk(addr, host string, connections int, span time.Duration) (flow, error) {
	out, err := exec.CommandContext(b.ctx, "taskset", "-c", "1", "wrk", "--latency", "-t1", "-c"+strconv.Itoa(connections), "-d"+strconv.Itoa(int(span.Seconds()))+"s", "-H", "Host: "+host, "http://"+addr+"/").CombinedOutput() //nolint:gosec // a benchmark
	if err != nil {
		return flow{}, fmt.Errorf("wrk: %w: %s", err, out)
	}
	if wrkBad.Match(out) {
		return flow{}, fmt.Errorf("wrk: %s", out)
	}
	var f flow
	for re, put := range map[*regexp.Regexp]func(string) error{
		wrkRate: func(s string) (err error) { f.rate, err = strconv.ParseFloat(s, 64); return err },
		wrk50:   func(s string) (err error) { f.p50, err = time.ParseDuration(s); return err },
		wrk99:   func(s string) (err error) { f.p99, err = time.ParseDuration(s); return err },
	} {
		m := re.FindSubmatch(out)
		if m == nil {
			return f, fmt.Errorf("wrk says: %s", out)
		}
		if err := put(string(m[1])); err != nil {
			return f, err
		}
	}
	return f, nil
}

// busy is the processor time that a process and those children of it that run
// the same program have used.
func busy(pid int) time.Duration {
	stat := func(pid string) (comm string, ppid, ticks int) {
		raw, _ := os.ReadFile("/proc/" + pid + "/stat") //nolint:gosec // of /proc
		head, tail, _ := strings.Cut(string(raw), ") ")
		_, comm, _ = strings.Cut(head, "(")
		if f := strings.Fields(tail); len(f) > 12 {
			ppid, _ = strconv.Atoi(f[1])
			user, _ := strconv.Atoi(f[11])
			system, _ := strconv.Atoi(f[12])
			ticks = user + system
		}
		return comm, ppid, ticks
	}
	program, _, sum := stat(strconv.Itoa(pid))
	all, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range all {
		if comm, ppid, ticks := stat(filepath.Base(dir)); ppid == pid && comm == program {
			sum += ticks
		}
	}
	return time.Duration(sum) * (time.Second / 100) // USER_HZ
}

// proxy runs a peer on the first processor until stop.
func (b *bench) proxy(name, config string, args ...string) (pid int, stop func(), err error) {
	file := filepath.Join(b.dir, name+".conf")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return 0, nil, err
	}
	cmd := exec.CommandContext(b.ctx, "taskset", append([]string{"-c", "0", name}, append(args, file)...)...) //nolint:gosec // a benchmark
	cmd.Env = append(os.Environ(), "HOME="+b.dir)
	cmd.Dir = b.dir
	if err := cmd.Start(); err != nil {
		return 0, nil, err
	}
	return cmd.Process.Pid, func() { _ = cmd.Process.Signal(syscall.SIGTERM); _ = cmd.Wait() }, nil
}

// ip runs a line of ip(8).
func (b *bench) ip(line string) error {
	out, err := exec.CommandContext(b.ctx, "ip", strings.Fields(line)...).CombinedOutput() //nolint:gosec // a benchmark
	if err != nil {
		return fmt.Errorf("ip %s: %w: %s", line, err, out)
	}
	return nil
}

// Where the peers' backend is: another container's network, as it is usual.
const (
	peerSpace  = "fcbench-peer"
	peerBridge = "fcbpeer"
	peerRange  = "10.72.0."
)

// beside runs a server on the second processor for the peers: its namespace
// hangs at a bridge of the host. Through the front door's fabric they would go
// a longer way than ours, which is not what they are compared for.
func (b *bench) beside() (addr string, end func(), err error) {
	sweep := func() {
		_ = b.ip("netns delete " + peerSpace)
		_ = b.ip("link delete " + peerBridge)
	}
	sweep() // of a run that was cut off
	for _, line := range []string{
		"netns add " + peerSpace,
		"link add " + peerBridge + " type bridge", "addr add " + peerRange + "1/24 dev " + peerBridge, "link set " + peerBridge + " up",
		"link add " + peerBridge + "0 type veth peer name eth0 netns " + peerSpace, "link set " + peerBridge + "0 master " + peerBridge + " up",
		"-n " + peerSpace + " addr add " + peerRange + "2/24 dev eth0", "-n " + peerSpace + " link set eth0 up",
	} {
		if err := b.ip(line); err != nil {
			sweep()
			return "", nil, err
		}
	}
	cmd := exec.CommandContext(b.ctx, "ip", "netns", "exec", peerSpace, "taskset", "-c", "1", filepath.Join(b.root, "server")) //nolint:gosec // a benchmark
	cmd.Env = append(os.Environ(), "PORT=8080")
	if err := cmd.Start(); err != nil {
		sweep()
		return "", nil, err
	}
	return peerRange + "2:8080", func() { _ = cmd.Process.Kill(); _ = cmd.Wait(); sweep() }, nil
}

// warm: the same server behind each proxy.
func (b *bench) warm() error {
	span, rounds := 5*time.Second, 3
	if b.quick {
		span, rounds = 2*time.Second, 1
	}
	n, err := b.start("0", "")
	if err != nil {
		return err
	}
	defer n.end()
	if err := b.awake(n, "warm"); err != nil {
		return err
	}
	backend, end, err := b.beside()
	if err != nil {
		return err
	}
	defer end()
	addrs := map[string]string{"fastcontainer": n.http, "no proxy": backend}
	for _, name := range []string{"nginx", "caddy"} {
		if addrs[name], err = free(); err != nil {
			return err
		}
	}
	pids := map[string]int{"fastcontainer": n.cmd.Process.Pid}
	var stop func()
	pids["nginx"], stop, err = b.proxy("nginx", fmt.Sprintf("daemon off; worker_processes 1; error_log %[1]s/nginx.log; pid %[1]s/nginx.pid;\nevents { worker_connections 1024; }\nhttp { access_log off; keepalive_requests 1000000; client_body_temp_path %[1]s/nginx; proxy_temp_path %[1]s/nginx; fastcgi_temp_path %[1]s/nginx; uwsgi_temp_path %[1]s/nginx; scgi_temp_path %[1]s/nginx;\nupstream app { server %[2]s; keepalive 128; keepalive_requests 1000000; }\nserver { listen %[3]s; location / { proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection ''; proxy_set_header Host $host; proxy_set_header X-Forwarded-For $remote_addr; } } }\n", b.dir, backend, addrs["nginx"]), "-c")
	if err != nil {
		return err
	}
	defer stop()
	_, port, _ := net.SplitHostPort(addrs["caddy"])
	if pids["caddy"], stop, err = b.proxy("caddy", fmt.Sprintf("{\n admin off\n auto_https off\n}\nhttp://:%s {\n reverse_proxy %s\n}\n", port, backend), "run", "--adapter", "caddyfile", "--config"); err != nil {
		return err
	}
	defer stop()
	for _, a := range addrs {
		if err := waitFor(a); err != nil {
			return err
		}
	}
	best, one := map[string]flow{}, map[string]flow{}
	order := []string{"no proxy", "nginx", "fastcontainer", "caddy"}
	for range rounds {
		for _, who := range order {
			before := busy(pids[who])
			f, err := b.wrk(addrs[who], "warm.localhost", 32, span)
			if err != nil {
				return fmt.Errorf("%s: %w", who, err)
			}
			f.cpu = time.Duration(float64(busy(pids[who])-before) / (f.rate * span.Seconds()))
			if f.rate > best[who].rate {
				best[who] = f
			}
			if f, err = b.wrk(addrs[who], "warm.localhost", 1, 2*time.Second); err != nil {
				return fmt.Errorf("%s: %w", who, err)
			}
			if f.rate > one[who].rate {
				one[who] = f
			}
		}
	}
	b.say("## A warm request\n")
	b.say("The proxy alone on one processor; wrk and the backend on the other. Ours asks an instance, the peers the same server in a network namespace at a bridge of")
	b.say("the host. 32 connections for the rate; 1 connection for the added latency: what a request takes longer than from wrk to that server. The best of %d rounds", rounds)
	b.say("of %s, in turn.\n", span)
	b.say("| | requests/s | beside Caddy | p50 of 32 | p99 of 32 | added p50 µs | added p99 µs | proxy's CPU µs a request | beside nginx |\n|---|---|---|---|---|---|---|---|---|")
	direct := one["no proxy"]
	for _, who := range order {
		f := best[who]
		cpu, beside := "", ""
		if pids[who] != 0 {
			cpu, beside = fmt.Sprintf("%.1f", float64(f.cpu)/1000), fmt.Sprintf("%.2f", float64(f.cpu)/float64(best["nginx"].cpu))
		}
		b.say("| %s | %.0f | %.2f | %s | %s | %d | %d | %s | %s |", who, f.rate, f.rate/best["caddy"].rate, f.p50, f.p99, (one[who].p50 - direct.p50).Microseconds(), (one[who].p99 - direct.p99).Microseconds(), cpu, beside)
	}
	b.say("\nAimed at: at least Caddy's rate (%s).\n", verdict(best["fastcontainer"].rate >= best["caddy"].rate))
	b.say("The load generator and the backend share a processor and are at its end with the faster proxies (see *no proxy*), so the rates flatter the slower of")
	b.say("those; the processor time that each proxy used for a request does not. What would lower ours: fewer allocations and fewer wake-ups for a request.\n")
	return nil
}

// awake deploys an app that stays, wakes it, and moves its instance to the
// second processor.
func (b *bench) awake(n *node, name string) error {
	if err := n.deploy(b.ctx, name, func(s *fleet.Spec) { s.Idle, s.Lifetime = 0, 0 }); err != nil {
		return err
	}
	if _, err := get(n.http, name+".localhost"); err != nil {
		return err
	}
	list, err := n.client.Instances(b.ctx, fleet.AppName(name))
	if err != nil || len(list) != 1 {
		return fmt.Errorf("%d instances of %s: %w", len(list), name, err)
	}
	if out, err := exec.CommandContext(b.ctx, "taskset", "-a", "-c", "-p", "1", strconv.Itoa(list[0].PID)).CombinedOutput(); err != nil { //nolint:gosec // a benchmark
		return fmt.Errorf("taskset: %w: %s", err, out)
	}
	return nil
}

// waitFor waits until somebody answers.
func waitFor(addr string) error {
	var err error
	for range 200 {
		if _, err = get(addr, "warm.localhost"); err == nil {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return fmt.Errorf("%s: %w", addr, err)
}
