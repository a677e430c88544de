package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/api"
	"github.com/fastcontainer/fastcontainer/internal/appfile"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// node is a daemon under test.
type node struct {
	b      *bench
	cmd    *exec.Cmd
	name   string // of its interface and cgroup
	http   string
	client *api.Client
	log    *os.File
}

// start runs a daemon; pin, where not empty, is the processor that it may use,
// more is added to its configuration.
func (b *bench) start(pin, more string) (*node, error) {
	dir, err := os.MkdirTemp(b.dir, "n")
	if err != nil {
		return nil, err
	}
	addr, err := free()
	if err != nil {
		return nil, err
	}
	config := filepath.Join(dir, "config.yaml")
	b.nodes++
	name := fmt.Sprintf("fcbench%d", b.nodes)
	text := fmt.Sprintf("data: %[1]s/data\nrun: /run/%[3]s\nhttp: %[2]s\nnetwork: {interface: %[3]s, subnet: 10.%[4]d.0.0/16}\nsandbox: {cgroup: /%[3]s, uid_base: %[5]d, uid_count: 1024}\ndoor: {max_conns_per_ip: 10000}\n",
		dir, addr, name, 70+b.nodes, 1<<29+b.nodes<<26) + more
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	n := &node{b: b, name: name, http: addr}
	if n.log, err = os.Create(filepath.Join(dir, "log")); err != nil { //nolint:gosec // our own directory
		return nil, err
	}
	args := []string{"bin/fastcontainer", "serve", "--config", config}
	if pin != "" {
		args = append([]string{"taskset", "-c", pin}, args...)
	}
	n.cmd = exec.CommandContext(b.ctx, args[0], args[1:]...) //nolint:gosec // ours
	n.cmd.Stderr = n.log
	if err := n.cmd.Start(); err != nil {
		return nil, err
	}
	if n.client, err = api.NewClient("unix:///run/" + name + "/api.sock"); err != nil {
		return nil, err
	}
	for range 500 {
		if _, err = n.client.Version(b.ctx); err == nil {
			return n, nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return nil, fmt.Errorf("the daemon does not come: %w", err)
}

// end removes the daemon and everything of it.
func (n *node) end() {
	if apps, err := n.client.Apps(n.b.ctx); err == nil {
		gate := make(chan struct{}, 16)
		for _, a := range apps {
			gate <- struct{}{}
			go func() {
				_ = n.client.Delete(n.b.ctx, a.Name, true)
				<-gate
			}()
		}
		for range cap(gate) {
			gate <- struct{}{}
		}
	}
	_ = n.cmd.Process.Signal(syscall.SIGTERM)
	_ = n.cmd.Wait()
	_ = exec.Command("ip", "netns", "delete", "fastcontainer-"+n.name).Run() //nolint:gosec,noctx // ours
	for _, family := range []string{"ip", "inet"} {
		_ = exec.Command("nft", "delete", "table", family, "fastcontainer-"+n.name).Run() //nolint:gosec,noctx // ours
	}
	groups, _ := filepath.Glob("/sys/fs/cgroup/*/" + n.name)
	for _, g := range append(groups, "/sys/fs/cgroup/"+n.name) {
		_ = os.Remove(g)
	}
	_ = n.log.Close()
}

// deploy makes an app of the static server.
func (n *node) deploy(ctx context.Context, name string, change func(*fleet.Spec)) error {
	s := appfile.Default(name)
	s.Image, s.Port, s.Command = "dir:"+n.b.root, 8080, []string{"/server"}
	if change != nil {
		change(&s)
	}
	appfile.Complete(&s)
	_, err := n.client.Deploy(ctx, s, nil)
	return err
}

// hello is the page of the static server.
const hello = "hello\n"

// get asks an app of the static server.
func get(addr, host string) (time.Duration, error) { return ask(addr, host, hello) }

// ask asks an app for its page over a connection of its own, and tells how long
// it took from before the connection to the last byte. want is the page, or a
// part of it.
func ask(addr, host, want string) (time.Duration, error) {
	began := time.Now()
	c, err := net.DialTimeout("tcp", addr, time.Second)
	if err != nil {
		return 0, err
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(began.Add(30 * time.Second))
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: "+host+"\r\nConnection: close\r\n\r\n"); err != nil {
		return 0, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return 0, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	took := time.Since(began)
	if err != nil {
		return 0, err
	}
	if resp.StatusCode != http.StatusOK || !strings.Contains(string(body), want) {
		return 0, fmt.Errorf("%s: %.200q", resp.Status, body)
	}
	return took, nil
}

// answer asks until there is an answer, as a probe does.
func answer(addr, want string) error {
	for deadline := time.Now().Add(10 * time.Second); ; {
		_, err := ask(addr, "localhost", want)
		if err == nil {
			return nil
		}
		if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) || time.Now().After(deadline) {
			return err
		}
		time.Sleep(100 * time.Microsecond)
	}
}

func free() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String(), nil
}

// times are measured durations.
type times []time.Duration

func (t times) at(share float64) time.Duration {
	if len(t) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(t))
	return s[min(int(share*float64(len(s))), len(s)-1)]
}

func ms(d time.Duration) string { return fmt.Sprintf("%.1f", float64(d.Microseconds())/1000) }

// field reads a number of a file of lines "name: number ...".
func field(file, name string) float64 {
	b, err := os.ReadFile(file) //nolint:gosec // of /proc
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) >= 2 && strings.TrimSuffix(f[0], ":") == name {
			v, _ := strconv.ParseFloat(f[1], 64)
			return v
		}
	}
	return 0
}
