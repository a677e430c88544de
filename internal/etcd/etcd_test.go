package etcd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/store"
	"github.com/fastcontainer/fastcontainer/internal/store/storetest"
)

// The test binary is also the programs that the tests run in processes of
// their own, to kill them.
func TestMain(m *testing.M) {
	switch os.Getenv("ETCD_TEST_ROLE") {
	case "member":
		member()
	case "writer":
		writer()
	default:
		os.Exit(m.Run())
	}
}

// member is one etcd server of a cluster.
func member() {
	c := embed.NewConfig()
	c.Name, c.Dir, c.InitialCluster = os.Getenv("NAME"), os.Getenv("DIR"), os.Getenv("CLUSTER")
	c.LogLevel = "error"
	peer, _ := url.Parse(os.Getenv("PEER"))
	client, _ := url.Parse(os.Getenv("CLIENT"))
	c.ListenPeerUrls, c.AdvertisePeerUrls = []url.URL{*peer}, []url.URL{*peer}
	c.ListenClientUrls, c.AdvertiseClientUrls = []url.URL{*client}, []url.URL{*client}
	e, err := embed.StartEtcd(c)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	<-e.Server.ReadyNotify()
	fmt.Println("ready")
	select {}
}

// writer writes numbers to an embedded store, and says which were acknowledged.
func writer() {
	s, err := OpenEmbedded(context.Background(), os.Getenv("DIR"), slog.New(slog.DiscardHandler))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	for i := 0; ; i++ {
		if _, err := s.Commit(context.Background(), store.Op{Key: fmt.Sprintf("/n/%06d", i), Value: []byte("x")}); err != nil {
			os.Exit(1)
		}
		fmt.Println(i)
	}
}

// role starts this binary in another role.
func role(t *testing.T, env ...string) (*exec.Cmd, *bufio.Reader) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), env...)
	cmd.Stderr = t.Output()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return cmd, bufio.NewReader(out)
}

// shortDir is a directory whose name leaves room for a socket's.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "etcd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func openEmbedded(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := OpenEmbedded(t.Context(), dir, quiet())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func TestEmbedded_Conformance(t *testing.T) {
	s := openEmbedded(t, shortDir(t))
	n := 0
	storetest.Run(t, func(t *testing.T) store.Store {
		n++ // each part has keys of its own in the one server
		part := newStore(s.client, fmt.Sprintf("/part%d", n), quiet(), nil)
		t.Cleanup(part.cancel)
		return part
	})
}

func TestEmbedded_OneProcessOnly(t *testing.T) {
	dir := shortDir(t)
	s := openEmbedded(t, dir)
	if _, err := OpenEmbedded(t.Context(), dir, quiet()); !errors.Is(err, fleet.ErrConflict) || fleet.Hint(err) == "" {
		t.Errorf("got %v", err)
	}
	if st, err := os.Stat(filepath.Join(dir, "client.sock")); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", st, err)
	}
	if _, err := s.Commit(t.Context(), store.Op{Key: "/k", Value: []byte("v")}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Ping(t.Context()); err == nil {
		t.Error("a closed store answers")
	}
	again := openEmbedded(t, dir)
	if e, err := again.Get(t.Context(), "/k"); err != nil || string(e.Value) != "v" {
		t.Errorf("after a restart: %+v, %v", e, err)
	}
}

func TestEmbedded_KilledLosesNothingAcknowledged(t *testing.T) {
	dir := shortDir(t)
	cmd, out := role(t, "ETCD_TEST_ROLE=writer", "DIR="+dir)
	last := -1
	for range 200 {
		line, err := out.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fmt.Sscan(line, &last); err != nil {
			t.Fatal(err)
		}
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	s := openEmbedded(t, dir)
	list, _, err := s.List(t.Context(), "/n/")
	if err != nil || len(list) <= last {
		t.Fatalf("%d entries, %d were acknowledged; %v", len(list), last+1, err)
	}
}

func TestEmbedded_DamagedDirectory(t *testing.T) {
	dir := shortDir(t)
	if err := os.WriteFile(filepath.Join(dir, "data"), []byte("no directory"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenEmbedded(t.Context(), dir, quiet()); err == nil || fleet.Hint(err) == "" {
		t.Errorf("got %v", err)
	}
	long := filepath.Join(dir, strings.Repeat("x", 120))
	if _, err := OpenEmbedded(t.Context(), long, quiet()); !errors.Is(err, fleet.ErrInvalid) {
		t.Errorf("got %v", err)
	}
}

// cluster is three members in processes of their own.
type cluster struct {
	t         *testing.T
	dir       string
	endpoints []string
	peers     []string
	members   []*exec.Cmd
}

func newCluster(t *testing.T) *cluster {
	t.Helper()
	c := &cluster{t: t, dir: shortDir(t), members: make([]*exec.Cmd, 3)}
	var held []net.Listener
	port := func() string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, l)
		return "http://" + l.Addr().String()
	}
	for range c.members {
		c.endpoints, c.peers = append(c.endpoints, port()), append(c.peers, port())
	}
	for _, l := range held {
		_ = l.Close()
	}
	var outs []*bufio.Reader
	for i := range c.members {
		outs = append(outs, c.launch(i))
	}
	for _, out := range outs {
		c.ready(out)
	}
	return c
}

func (c *cluster) launch(i int) *bufio.Reader {
	var all []string
	for n, p := range c.peers {
		all = append(all, fmt.Sprintf("m%d=%s", n, p))
	}
	cmd, out := role(c.t, "ETCD_TEST_ROLE=member", fmt.Sprintf("NAME=m%d", i), fmt.Sprintf("DIR=%s/m%d", c.dir, i),
		"PEER="+c.peers[i], "CLIENT="+c.endpoints[i], "CLUSTER="+strings.Join(all, ","))
	c.members[i] = cmd
	return out
}

func (c *cluster) ready(out *bufio.Reader) {
	c.t.Helper()
	if line, err := out.ReadString('\n'); err != nil || line != "ready\n" {
		c.t.Fatalf("member: %q, %v", line, err)
	}
}

func (c *cluster) kill(i int) {
	_ = c.members[i].Process.Kill()
	_ = c.members[i].Wait()
}

func TestExternal(t *testing.T) {
	c := newCluster(t)
	n := 0
	open := func(t *testing.T) *Store {
		n++
		s, err := OpenExternal(t.Context(), Config{Endpoints: c.endpoints, Prefix: fmt.Sprintf("/part%d", n), Logger: quiet()})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = s.Close() })
		return s
	}
	t.Run("conformance", func(t *testing.T) {
		storetest.Run(t, func(t *testing.T) store.Store { return open(t) })
	})
	t.Run("a session's end", func(t *testing.T) {
		s := open(t)
		op, err := store.PutNode(fleet.Node{Name: "n"})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Commit(t.Context(), op); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		n--
		other := open(t) // the same prefix
		if _, err := other.Get(t.Context(), store.NodeKey("n")); !errors.Is(err, fleet.ErrNotFound) {
			t.Errorf("a record outlived its session: %v", err)
		}
	})
	t.Run("members are killed", func(t *testing.T) { killed(t, c, open(t)) })
}

// killed: with one of three members dead writes and watches go on; with two,
// the store is away within bounded time; with two again, all is well, and the
// watch has missed nothing.
func killed(t *testing.T, c *cluster, s *Store) {
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	_, from, err := s.List(ctx, "/k/")
	if err != nil {
		t.Fatal(err)
	}
	seen := make(chan string, 10000)
	var wg sync.WaitGroup
	wg.Go(func() {
		_ = s.Watch(ctx, "/k/", from, func(c store.Change) error { seen <- string(c.Value); return nil })
	})
	written := 0
	write := func() error {
		_, err := s.Commit(ctx, store.Op{Key: "/k/x", Value: []byte(fmt.Sprint(written)), If: store.AnyRev})
		if err == nil {
			written++
		}
		return err
	}
	// until tries as a caller would, for writing a number twice is harmless.
	until := func(what string, ok func(error) bool) {
		t.Helper()
		for !ok(write()) {
			if ctx.Err() != nil {
				t.Fatalf("never: %s", what)
			}
		}
	}
	good := func(err error) bool { return err == nil }
	for range 20 {
		until("a write", good)
	}
	c.kill(0)
	for range 20 {
		until("a write with two of three members", good)
	}
	c.kill(1)
	began := time.Now()
	until("away with one of three", func(err error) bool { return errors.Is(err, store.ErrAway) })
	if err := s.Ping(ctx); !errors.Is(err, store.ErrAway) {
		t.Errorf("ping: %v", err)
	}
	if d := time.Since(began); d > 30*time.Second {
		t.Errorf("it took %v to say so", d)
	}
	c.ready(c.launch(0))
	for range 20 {
		until("a write after a member came back", good)
	}
	last := fmt.Sprint(written - 1)
	next := 0
	for {
		select {
		case v := <-seen:
			// A write that was reported as failed may have happened, and was tried
			// again: a number may come twice in a row, but none may be left out.
			switch v {
			case fmt.Sprint(next):
				next++
			case fmt.Sprint(next - 1):
			default:
				t.Fatalf("saw %s, want %d", v, next)
			}
			if v == last {
				cancel()
				wg.Wait()
				return
			}
		case <-ctx.Done():
			t.Fatalf("the watch came to %d of %s", next, last)
		}
	}
}

func TestExternal_NobodyThere(t *testing.T) {
	for name, c := range map[string]Config{
		"no endpoint":  {},
		"no server":    {Endpoints: []string{"http://127.0.0.1:1"}},
		"no such CA":   {Endpoints: []string{"https://127.0.0.1:1"}, CA: "/no/such/file"},
		"no such file": {Endpoints: []string{"http://127.0.0.1:1"}, User: "x", PasswordFile: "/no/such/file"},
	} {
		c.Logger = quiet()
		if _, err := OpenExternal(t.Context(), c); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
