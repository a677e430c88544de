package etcd

import (
	"context"
	"errors"
	"expvar"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

const (
	// quota bounds the database; etcd refuses writes beyond.
	quota = 2 << 30
	// minRoom is what must be free on the disk for a write: etcd cannot go on
	// once a write has failed, and its log grows by 64 MiB at a time.
	minRoom = 128 << 20
	// startTimeout is generous: a large log is replayed first.
	startTimeout = time.Minute
	// longestSocket is what sockaddr_un holds.
	longestSocket = 107
	// rest is the tick of Raft's clock, which a member alone has no use for but
	// to be elected, and that it is told (elect). etcd's own default would be 50
	// times as many wakes of an idle machine, and what it derives from it
	// (elections, streams without a leader, leases of a few seconds) matters
	// between members.
	rest = time.Second
	// batch is how long a write may stay out of the database's file. It is in
	// the log, on the disk, before it is acknowledged, and replayed from there.
	batch = time.Second
)

// OpenEmbedded runs etcd inside this process with its data in dir, which
// becomes private. It listens on a unix socket there (client.sock, for
// etcdctl) and on no port. fleet.ErrConflict: another process has the
// directory open.
func OpenEmbedded(ctx context.Context, dir string, log *slog.Logger) (*Store, error) {
	fail := func(err error) error {
		return &fleet.Error{Op: "open store", Subject: dir, Err: err, Hint: "the directory must belong to this daemon alone, on a disk with room; if its content is damaged, restore a copy of it"}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fail(err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, fail(err)
	}
	socket := filepath.Join(dir, "client.sock")
	if len(socket) > longestSocket {
		return nil, &fleet.Error{Op: "open store", Subject: dir, Kind: fleet.ErrInvalid, Err: fmt.Errorf("the socket's path is longer than %d bytes", longestSocket), Hint: "choose a shorter data directory"}
	}
	unlock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	s := &server{dir: dir, unlock: unlock}
	_ = os.Remove(socket) // of a daemon that was killed
	if err := s.start(ctx, socket, log); err != nil {
		_ = s.close()
		return nil, fail(err)
	}
	return newStore(v3client.New(s.etcd.Server), "/fastcontainer", dir, log, s), nil
}

// server is etcd inside this process. A nil one is etcd elsewhere, of whose
// health nothing is known.
type server struct {
	dir    string
	unlock func()
	etcd   *embed.Etcd // nil until it has started
	fatal  fatal
}

// died says why etcd cannot go on, or nil.
func (s *server) died() error {
	if s == nil {
		return nil
	}
	return s.fatal.why()
}

// full says why nothing may be written, or nil.
func (s *server) full() error {
	if s == nil {
		return nil
	}
	var st unix.Statfs_t
	if err := unix.Statfs(s.dir, &st); err != nil {
		return fmt.Errorf("look for free space: %w", err)
	}
	if free := int64(st.Bavail) * st.Bsize; free < minRoom {
		return fmt.Errorf("the disk is full: %v are free, %v are needed", fleet.Bytes(free), fleet.Bytes(minRoom))
	}
	return nil
}

// close stops etcd. If it has died, its parts would wait for each other: they
// stay as they are until the process ends.
func (s *server) close() error {
	if s == nil {
		return nil
	}
	defer s.unlock()
	if s.etcd != nil && s.died() == nil {
		s.etcd.Close()
	}
	return nil
}

func (s *server) start(ctx context.Context, socket string, log *slog.Logger) error {
	c := embed.NewConfig()
	c.Name = "node"
	c.Dir = filepath.Join(s.dir, "data")
	c.ListenClientUrls = []url.URL{{Scheme: "unix", Path: socket}}
	c.AdvertiseClientUrls = c.ListenClientUrls
	// It has no peers, so nobody listens for them; the name is only a name.
	self := url.URL{Scheme: "http", Host: "localhost:2380"}
	c.ListenPeerUrls = []url.URL{}
	c.AdvertisePeerUrls = []url.URL{self}
	c.InitialCluster = c.Name + "=" + self.String()
	c.QuotaBackendBytes = quota
	c.AutoCompactionMode, c.AutoCompactionRetention = "periodic", "1h"
	c.TickMs, c.ElectionMs = uint(rest.Milliseconds()), uint(5*rest.Milliseconds()) // five is the least
	c.BackendBatchInterval = batch
	c.SnapshotCount = 10_000
	c.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.New(&bridge{log: log}, zap.WithFatalHook(&s.fatal), zap.WithPanicHook(&s.fatal)))
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := s.launch(ctx, c); err != nil {
		return err
	}
	etcd := s.etcd
	var election sync.WaitGroup // not waited for: if etcd dies now, it hangs as the rest of etcd does
	election.Go(func() { elect(ctx, etcd.Server) })
	select {
	case <-etcd.Server.ReadyNotify():
		return os.Chmod(socket, 0o600)
	case err := <-etcd.Err():
		return err
	case <-etcd.Server.StopNotify():
		return errors.New("etcd stopped while it started")
	case <-s.fatal.done():
		return s.died()
	case <-ctx.Done():
		return fmt.Errorf("etcd is not ready: %w", context.Cause(ctx))
	}
}

// elect has the only member stand for election as soon as it may, as if a
// leader had handed over to it, instead of after some ticks without one. It may
// once Raft knows that all of the log that was committed is applied; to ask
// earlier would make it look into a part of the log that etcd has compacted
// meanwhile, which it takes for damage. Only the variable that etcd publishes
// tells that. Without it the ticks elect.
func elect(ctx context.Context, server *etcdserver.EtcdServer) {
	published, _ := expvar.Get("raft.status").(expvar.Func)
	if published == nil {
		return
	}
	again := time.NewTicker(time.Millisecond)
	defer again.Stop()
	self := uint64(server.MemberID())
	for {
		status, _ := published.Value().(raft.Status)
		if commit := status.GetCommit(); status.ID == self && commit > 0 && status.Applied >= commit {
			_ = server.Process(ctx, &raftpb.Message{Type: raftpb.MsgTimeoutNow.Enum(), From: &self, To: &self})
			return
		}
		select {
		case <-again.C:
		case <-server.StopNotify():
			return
		case <-ctx.Done():
			return
		}
	}
}

// launch starts etcd's parts. They are left alone if one of them dies, which
// etcd itself would never notice.
func (s *server) launch(ctx context.Context, c *embed.Config) error {
	started, failed := make(chan *embed.Etcd, 1), make(chan error, 1)
	var starting sync.WaitGroup
	starting.Go(func() {
		defer func() {
			if p := recover(); p != nil {
				failed <- fmt.Errorf("etcd: %v", p)
			}
		}()
		etcd, err := embed.StartEtcd(c)
		if err != nil {
			failed <- err
			return
		}
		started <- etcd
	})
	select {
	case s.etcd = <-started:
		return s.died()
	case err := <-failed:
		return err
	case <-s.fatal.done():
		return s.died()
	case <-ctx.Done():
		// What comes later is stopped.
		starting.Go(func() {
			select {
			case etcd := <-started:
				etcd.Close()
			case <-failed: //nolint:errcheck // whoever waited has left
			case <-s.fatal.done():
			}
		})
		return fmt.Errorf("etcd is not ready: %w", context.Cause(ctx))
	}
}
