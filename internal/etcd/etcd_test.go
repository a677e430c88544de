package etcd

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/store"
	"github.com/fastcontainer/fastcontainer/internal/store/storetest"
)

// The test binary is also the programs that the tests run in processes of
// their own, to kill them.
func TestMain(m *testing.M) {
	role := os.Getenv("ETCD_TEST_ROLE")
	if role != "" {
		go func() { // ends with the test, however that ends
			_, _ = io.Copy(io.Discard, os.Stdin)
			os.Exit(1)
		}()
	}
	switch role {
	case "member":
		member()
	case "writer":
		writer()
	case "filler":
		filler()
	default:
		os.Exit(m.Run())
	}
}

// member is one etcd server of a cluster.
func member() {
	c := embed.NewConfig()
	c.Name, c.Dir, c.InitialCluster = os.Getenv("NAME"), os.Getenv("DIR"), os.Getenv("CLUSTER")
	c.LogLevel = "error"
	c.BcryptCost = 4 // the least: it is only a test
	c.TickMs, c.ElectionMs = 50, 500
	peer, _ := url.Parse(os.Getenv("PEER"))
	client, _ := url.Parse(os.Getenv("CLIENT"))
	c.ListenPeerUrls, c.AdvertisePeerUrls = []url.URL{*peer}, []url.URL{*peer}
	c.ListenClientUrls, c.AdvertiseClientUrls = []url.URL{*client}, []url.URL{*client}
	if cert := os.Getenv("CERT"); cert != "" {
		c.ClientTLSInfo = transport.TLSInfo{CertFile: cert, KeyFile: os.Getenv("KEY"), TrustedCAFile: cert, ClientCertAuth: true}
	}
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

// filler writes large values past the check for room until etcd dies of it,
// and says whether it itself outlives that.
func filler() {
	ctx := context.Background()
	s, err := OpenEmbedded(ctx, os.Getenv("DIR"), slog.New(slog.DiscardHandler))
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	value := strings.Repeat("x", store.MaxValue/2)
	for i := 0; s.server.died() == nil; i++ {
		bounded, cancel := context.WithTimeout(ctx, time.Second)
		_, err := s.client.Put(bounded, fmt.Sprintf("/fastcontainer/n/%06d", i), value)
		cancel()
		if err == nil {
			fmt.Println(i)
		}
	}
	err = s.Ping(ctx)
	fmt.Println("away", errors.Is(err, store.ErrAway) && fleet.Hint(err) != "", s.Close())
}

// role starts this binary in another role.
func role(t *testing.T, env ...string) (*exec.Cmd, *bufio.Reader) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), env...)
	cmd.Stderr = t.Output()
	if _, err := cmd.StdinPipe(); err != nil { // open as long as the test lives
		t.Fatal(err)
	}
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

func put(t *testing.T, s *Store, key, value string) store.Rev {
	t.Helper()
	rev, err := s.Commit(t.Context(), store.Op{Key: key, Value: []byte(value), If: store.AnyRev})
	if err != nil {
		t.Fatal(err)
	}
	return rev
}

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
		part := newStore(s.client, fmt.Sprintf("/part%d", n), "the test", quiet(), nil)
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

func TestEmbedded_DamagedContent(t *testing.T) {
	for _, damaged := range []string{"data/member/snap/db", "data/member/wal/0000000000000000-0000000000000000.wal"} {
		t.Run(filepath.Base(damaged), func(t *testing.T) {
			dir := shortDir(t)
			s := openEmbedded(t, dir)
			put(t, s, "/k", "v")
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			f, err := os.OpenFile(filepath.Join(dir, damaged), os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt(bytes.Repeat([]byte("damage! "), 4096), 0); err != nil {
				t.Fatal(err)
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
			if _, err := OpenEmbedded(t.Context(), dir, quiet()); err == nil || fleet.Hint(err) == "" {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestEmbedded_LeadsBeforeItsClockHasTicked(t *testing.T) {
	dir := shortDir(t)
	for _, when := range []string{"at first", "with a log to read", "with more of it"} {
		ctx, cancel := context.WithTimeout(t.Context(), rest)
		s, err := OpenEmbedded(ctx, dir, quiet())
		cancel()
		if err != nil {
			t.Fatalf("%s: %v", when, err)
		}
		put(t, s, "/k", when)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestEmbedded_RestsWhileNobodyAsks(t *testing.T) {
	s := openEmbedded(t, shortDir(t))
	put(t, s, "/k", "v")
	time.Sleep(2 * batch) // what is left of the start
	switches := func() int64 {
		var u unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
			t.Fatal(err)
		}
		return u.Nvcsw
	}
	before := switches()
	time.Sleep(time.Second)
	// With etcd's own intervals, and a tick that elects quickly, it is above 500.
	if got := switches() - before; got > 250 {
		t.Errorf("its threads went to sleep %d times in a second", got)
	}
}

func TestEmbedded_ListensOnNoPort(t *testing.T) {
	before := listeners(t)
	openEmbedded(t, shortDir(t))
	if after := listeners(t); len(after) > len(before) {
		t.Errorf("listens on %v, before on %v", after, before)
	}
}

// listeners gives the TCP ports on which this process listens.
func listeners(t *testing.T) []string {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	own := map[string]bool{}
	for _, fd := range fds {
		if link, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil {
			own[link] = true
		}
	}
	var ports []string
	for _, table := range []string{"/proc/self/net/tcp", "/proc/self/net/tcp6"} {
		b, err := os.ReadFile(table)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			const address, state, inode, listening = 1, 3, 9, "0A"
			if f := strings.Fields(line); len(f) > inode && f[state] == listening && own["socket:["+f[inode]+"]"] {
				ports = append(ports, f[address])
			}
		}
	}
	return ports
}

// disk is a small one of its own, mounted for the test.
func disk(t *testing.T, size string) string {
	t.Helper()
	dir := shortDir(t)
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// fill takes space on the disk of dir but for so much, and gives it back.
func fill(t *testing.T, dir string, leave int64) (free func()) {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(dir, "fill"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fallocate(int(f.Fd()), 0, 0, int64(st.Bavail)*st.Bsize-leave); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.Remove(f.Name()); err != nil {
			t.Error(err)
		}
	}
}

func TestEmbedded_FullDiskRefusesWritesAndReadsGoOn(t *testing.T) {
	dir := disk(t, "320m")
	s := openEmbedded(t, dir)
	at := put(t, s, "/k", "v")
	free := fill(t, dir, 100<<20)
	write := store.Op{Key: "/k", Value: []byte("w"), If: at}
	if _, err := s.Commit(t.Context(), write); !errors.Is(err, store.ErrAway) || fleet.Hint(err) == "" {
		t.Errorf("write: %v", err)
	}
	if e, err := s.Get(t.Context(), "/k"); err != nil || string(e.Value) != "v" {
		t.Errorf("read: %+v, %v", e, err)
	}
	free()
	if _, err := s.Commit(t.Context(), write); err != nil {
		t.Errorf("with room again: %v", err)
	}
}

// Room can go so fast that etcd meets the end of it: the process outlives
// that, and the next one finds everything that was acknowledged.
func TestEmbedded_ProcessOutlivesItsEtcd(t *testing.T) {
	t.Parallel()
	dir := disk(t, "320m")
	openEmbedded(t, dir).Close() // it takes what it needs in advance
	free := fill(t, dir, 80<<20)
	cmd, out := role(t, "ETCD_TEST_ROLE=filler", "DIR="+dir)
	acknowledged := 0
	for {
		line, err := out.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		if line == "away true <nil>\n" {
			break
		}
		if _, err := fmt.Sscan(line, &acknowledged); err != nil {
			t.Fatalf("it says %q", line)
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	free()
	list, _, err := openEmbedded(t, dir).List(t.Context(), "/n/")
	if err != nil || len(list) <= acknowledged {
		t.Errorf("%d entries, %d were acknowledged; %v", len(list), acknowledged+1, err)
	}
}

// broken is a watcher whose first stream breaks after one batch of a watch
// that still catches up.
type broken struct {
	clientv3.Watcher
	from chan int64
}

func (b *broken) Watch(_ context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	b.from <- clientv3.OpGet(key, opts...).Rev()
	stream := make(chan clientv3.WatchResponse, 1)
	stream <- clientv3.WatchResponse{
		Header: &etcdserverpb.ResponseHeader{Revision: 5000},
		Events: []*clientv3.Event{{Kv: &mvccpb.KeyValue{Key: []byte("/fastcontainer/k"), ModRevision: 1000}}},
	}
	close(stream)
	return stream
}

func TestWatch_ResumesAfterWhatItWasTold(t *testing.T) {
	s := openEmbedded(t, shortDir(t))
	b := &broken{s.client.Watcher, make(chan int64, 3)}
	s.client.Watcher = b
	ctx, cancel := context.WithCancel(t.Context())
	seen := 0
	err := s.Watch(ctx, "/", 41, func(store.Change) error {
		if seen++; seen == 2 {
			cancel()
		}
		return nil
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if first, second := <-b.from, <-b.from; first != 42 || second != 1001 {
		t.Errorf("watched from %d, then from %d", first, second)
	}
}

func TestWatch_OfCompactedHistory(t *testing.T) {
	s := openEmbedded(t, shortDir(t))
	var last store.Rev
	for range 5 {
		last = put(t, s, "/k", "v")
	}
	if _, err := s.client.Compact(t.Context(), int64(last)); err != nil {
		t.Fatal(err)
	}
	if err := s.Watch(t.Context(), "/", last-3, func(store.Change) error { return nil }); !errors.Is(err, store.ErrCompacted) {
		t.Errorf("got %v", err)
	}
}

// between does something after each page of a list.
type between struct {
	clientv3.KV
	do func()
}

func (b *between) Get(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	r, err := b.KV.Get(ctx, key, opts...)
	b.do()
	return r, err
}

func TestList_PagesAreOfOneRevision(t *testing.T) {
	s := openEmbedded(t, shortDir(t))
	const keys = 2*page + 100
	key := func(i int) string { return fmt.Sprintf("/l/%06d", i) }
	var rev store.Rev
	for i := 0; i < keys; i += store.MaxOps {
		var ops []store.Op
		for n := i; n < min(i+store.MaxOps, keys); n++ {
			ops = append(ops, store.Op{Key: key(n), Value: []byte("old")})
		}
		var err error
		if rev, err = s.Commit(t.Context(), ops...); err != nil {
			t.Fatal(err)
		}
	}
	kv := s.client.KV
	s.client.KV = &between{kv, func() { put(t, s, key(keys-1), "new") }}
	list, at, err := s.List(t.Context(), "/l/")
	if err != nil || len(list) != keys || at != rev {
		t.Fatalf("%d entries at %d, want %d at %d; %v", len(list), at, keys, rev, err)
	}
	for i, e := range list {
		if e.Key != key(i) || string(e.Value) != "old" {
			t.Fatalf("entry %d is %s=%s", i, e.Key, e.Value)
		}
	}
}

func TestSession_IsRenewedAfterItsLoss(t *testing.T) {
	t.Parallel()
	s := openEmbedded(t, shortDir(t))
	op, err := store.PutNode(fleet.Node{Name: "n"})
	if err != nil {
		t.Fatal(err)
	}
	rev, err := s.Commit(t.Context(), op)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.client.Revoke(t.Context(), s.lease); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var deleted bool
	errBack := errors.New("back")
	err = s.Watch(ctx, store.NodesPrefix, rev, func(c store.Change) error {
		if c.Deleted {
			deleted = true
			return nil
		}
		return errBack
	})
	if !errors.Is(err, errBack) || !deleted {
		t.Errorf("deleted: %v, then %v", deleted, err)
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
	c.choosePorts()
	var outs []*bufio.Reader
	for i := range c.members {
		outs = append(outs, c.launch(i))
	}
	for _, out := range outs {
		c.ready(out)
	}
	return c
}

// choosePorts finds free ones.
func (c *cluster) choosePorts() {
	c.t.Helper()
	var held []net.Listener
	defer func() {
		for _, l := range held {
			_ = l.Close()
		}
	}()
	port := func() string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			c.t.Fatal(err)
		}
		held = append(held, l) // so that no port comes twice
		return "http://" + l.Addr().String()
	}
	for range c.members {
		c.endpoints, c.peers = append(c.endpoints, port()), append(c.peers, port())
	}
}

func (c *cluster) launch(i int, env ...string) *bufio.Reader {
	var all []string
	for n, p := range c.peers {
		all = append(all, fmt.Sprintf("m%d=%s", n, p))
	}
	cmd, out := role(c.t, append(env, "ETCD_TEST_ROLE=member", fmt.Sprintf("NAME=m%d", i), fmt.Sprintf("DIR=%s/m%d", c.dir, i),
		"PEER="+c.peers[i], "CLIENT="+c.endpoints[i], "CLUSTER="+strings.Join(all, ","))...)
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
	t.Parallel()
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
	t.Run("a list heavier than one answer", func(t *testing.T) {
		s := open(t)
		value := strings.Repeat("x", store.MaxValue)
		const keys = maxAnswer/store.MaxValue + 4
		for i := range keys {
			put(t, s, fmt.Sprintf("/heavy/%d", i), value)
		}
		list, _, err := s.List(t.Context(), "/heavy/")
		if err != nil || len(list) != keys {
			t.Errorf("%d of %d entries, %v", len(list), keys, err)
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
	t.Parallel()
	for name, c := range map[string]Config{
		"no endpoint":   {},
		"no server":     {Endpoints: []string{"http://127.0.0.1:1"}},
		"no such CA":    {Endpoints: []string{"https://127.0.0.1:1"}, CA: "/no/such/file"},
		"not encrypted": {Endpoints: []string{"http://127.0.0.1:1"}, CA: "/no/such/file"},
		"no such file":  {Endpoints: []string{"http://127.0.0.1:1"}, User: "x", PasswordFile: "/no/such/file"},
	} {
		c.Logger = quiet()
		_, err := OpenExternal(t.Context(), c)
		want := fleet.ErrInvalid
		if name == "no server" {
			want = store.ErrAway
		}
		if !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
	}
}

// certificate makes one that is its own authority, for servers and clients.
func certificate(t *testing.T) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, kind string, b []byte) string {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	return write("cert.pem", "CERTIFICATE", der), write("key.pem", "PRIVATE KEY", pkcs)
}

func TestExternal_EncryptedAndWithPassword(t *testing.T) {
	t.Parallel()
	cert, key := certificate(t)
	c := &cluster{t: t, dir: shortDir(t), members: make([]*exec.Cmd, 1)}
	c.choosePorts()
	c.endpoints[0] = strings.Replace(c.endpoints[0], "http:", "https:", 1)
	c.ready(c.launch(0, "CERT="+cert, "KEY="+key))

	config := Config{Endpoints: c.endpoints, CA: cert, Cert: cert, Key: key, Prefix: "/ours/", Logger: quiet()}
	brief, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := OpenExternal(brief, Config{Endpoints: c.endpoints, Logger: quiet()}); !errors.Is(err, store.ErrAway) {
		t.Errorf("without its authority: %v", err)
	}
	admin, err := OpenExternal(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close()
	protect(t, admin.client)

	config.User, config.PasswordFile = "ours", filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(config.PasswordFile, []byte("wrong\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenExternal(t.Context(), config); !errors.Is(err, fleet.ErrDenied) || fleet.Hint(err) == "" {
		t.Errorf("with a wrong password: %v", err)
	}
	if err := os.WriteFile(config.PasswordFile, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := OpenExternal(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	at := put(t, s, "/k", "v")
	errSeen := errors.New("seen")
	seen := func(store.Change) error { return errSeen }
	if err := s.Watch(t.Context(), "/", at-1, seen); !errors.Is(err, errSeen) {
		t.Errorf("watch: %v", err)
	}
	config.Prefix = "/theirs"
	if _, err := OpenExternal(t.Context(), config); !errors.Is(err, fleet.ErrDenied) {
		t.Errorf("where it may not: %v", err)
	}
	s.prefix = "/theirs"
	if err := s.Watch(t.Context(), "/", at-1, seen); !errors.Is(err, fleet.ErrDenied) {
		t.Errorf("watch where it may not: %v", err)
	}
}

// protect lets the user ours do everything under /ours, and nothing else.
func protect(t *testing.T, admin *clientv3.Client) {
	t.Helper()
	ctx := t.Context()
	for _, do := range []func() error{
		func() error { _, err := admin.RoleAdd(ctx, "root"); return err },
		func() error { _, err := admin.UserAdd(ctx, "root", "root"); return err },
		func() error { _, err := admin.UserGrantRole(ctx, "root", "root"); return err },
		func() error { _, err := admin.RoleAdd(ctx, "ours"); return err },
		func() error {
			_, err := admin.RoleGrantPermission(ctx, "ours", "/ours/", clientv3.GetPrefixRangeEnd("/ours/"), clientv3.PermissionType(clientv3.PermReadWrite))
			return err
		},
		func() error { _, err := admin.UserAdd(ctx, "ours", "secret"); return err },
		func() error { _, err := admin.UserGrantRole(ctx, "ours", "ours"); return err },
		func() error { _, err := admin.AuthEnable(ctx); return err },
	} {
		if err := do(); err != nil {
			t.Fatal(err)
		}
	}
}
