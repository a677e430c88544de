package etcd

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"strings"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// Config of an existing cluster.
type Config struct {
	// Endpoints as URLs; at least one.
	Endpoints []string
	// CA, Cert and Key are PEM files for TLS.
	CA, Cert, Key string
	// User and PasswordFile for etcd's authentication.
	User, PasswordFile string
	// Prefix of all keys. Default /fastcontainer.
	Prefix string
	Logger *slog.Logger
}

// OpenExternal uses an existing cluster. It fails if the cluster cannot be
// reached now: a daemon that starts knows nothing yet.
func OpenExternal(ctx context.Context, c Config) (*Store, error) {
	where := strings.Join(c.Endpoints, ",")
	if len(c.Endpoints) == 0 {
		return nil, &fleet.Error{Op: "open store", Kind: fleet.ErrInvalid, Err: errors.New("no etcd endpoint is given")}
	}
	if c.Prefix == "" {
		c.Prefix = "/fastcontainer"
	}
	cfg := clientv3.Config{
		Endpoints: c.Endpoints, DialTimeout: opTimeout, DialKeepAliveTime: 5 * time.Second, DialKeepAliveTimeout: opTimeout,
		PermitWithoutStream: true, AutoSyncInterval: 5 * time.Minute, Username: c.User,
		MaxCallRecvMsgSize: 64 << 20, Logger: zap.New(&bridge{log: c.Logger}),
	}
	if c.PasswordFile != "" {
		b, err := os.ReadFile(c.PasswordFile)
		if err != nil {
			return nil, &fleet.Error{Op: "open store", Subject: where, Kind: fleet.ErrInvalid, Err: err, Hint: "check etcd.password_file"}
		}
		cfg.Password = strings.TrimRight(string(b), "\r\n")
	}
	if c.CA+c.Cert+c.Key != "" {
		t, err := transport.TLSInfo{TrustedCAFile: c.CA, CertFile: c.Cert, KeyFile: c.Key}.ClientConfig()
		if err != nil {
			return nil, &fleet.Error{Op: "open store", Subject: where, Kind: fleet.ErrInvalid, Err: err, Hint: "check etcd.ca, etcd.cert and etcd.key"}
		}
		cfg.TLS = t
	}
	client, err := clientv3.New(cfg)
	if err != nil {
		return nil, &fleet.Error{Op: "open store", Subject: where, Kind: fleet.ErrUnavailable, Err: err, Hint: "check --etcd and that the cluster runs"}
	}
	s := newStore(client, c.Prefix, c.Logger, nil)
	if err := s.Ping(ctx); err != nil {
		_ = s.Close()
		return nil, &fleet.Error{Op: "open store", Subject: where, Kind: fleet.ErrUnavailable, Err: err, Hint: "check --etcd and that the cluster runs"}
	}
	return s, nil
}
