package etcd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.uber.org/zap"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

const (
	// quota bounds the database; etcd refuses writes beyond.
	quota = 2 << 30
	// startTimeout is generous: a large log is replayed first.
	startTimeout = time.Minute
	// longestSocket is what sockaddr_un holds.
	longestSocket = 107
)

// OpenEmbedded runs etcd inside this process with its data in dir. It listens
// on a unix socket there (client.sock, for etcdctl) and on no port.
// fleet.ErrConflict: another process has the directory open.
func OpenEmbedded(ctx context.Context, dir string, log *slog.Logger) (*Store, error) {
	fail := func(err error) error {
		return &fleet.Error{Op: "open store", Subject: dir, Err: err, Hint: "the directory must belong to this daemon alone; if its content is damaged, restore a copy of it"}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fail(err)
	}
	unlock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	socket := filepath.Join(dir, "client.sock")
	if len(socket) > longestSocket {
		unlock()
		return nil, &fleet.Error{Op: "open store", Subject: dir, Kind: fleet.ErrInvalid, Err: fmt.Errorf("the socket's path is longer than %d bytes", longestSocket), Hint: "choose a shorter data directory"}
	}
	_ = os.Remove(socket) // of a daemon that was killed
	server, err := startEmbedded(ctx, dir, socket, log)
	if err != nil {
		unlock()
		return nil, fail(err)
	}
	return newStore(v3client.New(server.Server), "/fastcontainer", log, func() error {
		server.Close()
		unlock()
		return nil
	}), nil
}

func startEmbedded(ctx context.Context, dir, socket string, log *slog.Logger) (*embed.Etcd, error) {
	c := embed.NewConfig()
	c.Name = "node"
	c.Dir = filepath.Join(dir, "data")
	c.ListenClientUrls = []url.URL{{Scheme: "unix", Path: socket}}
	c.AdvertiseClientUrls = c.ListenClientUrls
	// It has no peers, so nobody listens for them; the name is only a name.
	self := url.URL{Scheme: "http", Host: "localhost:2380"}
	c.ListenPeerUrls = []url.URL{}
	c.AdvertisePeerUrls = []url.URL{self}
	c.InitialCluster = c.Name + "=" + self.String()
	c.QuotaBackendBytes = quota
	c.AutoCompactionMode, c.AutoCompactionRetention = "periodic", "1h"
	c.TickMs, c.ElectionMs = 10, 100 // one member elects itself: do not make it wait
	c.SnapshotCount = 10_000
	c.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.New(&bridge{log: log}))
	server, err := embed.StartEtcd(c)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	select {
	case <-server.Server.ReadyNotify():
		if err := os.Chmod(socket, 0o600); err != nil {
			server.Close()
			return nil, err
		}
		return server, nil
	case err = <-server.Err():
	case <-server.Server.StopNotify():
		err = errors.New("etcd stopped while it started")
	case <-ctx.Done():
		err = fmt.Errorf("etcd is not ready: %w", context.Cause(ctx))
	}
	server.Close()
	return nil, err
}
