package etcd

import (
	"context"
	"errors"
	"fmt"
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
	// Endpoints as URLs; at least one. With TLS files they must be https.
	Endpoints []string
	// CA, Cert and Key are PEM files for TLS.
	CA, Cert, Key string
	// User and PasswordFile for etcd's authentication.
	User, PasswordFile string
	// Prefix of all keys. Default /fastcontainer.
	Prefix string
	Logger *slog.Logger
}

// OpenExternal uses an existing cluster, at the given endpoints and no others.
// It fails if the cluster cannot be reached now: a daemon that starts knows
// nothing yet.
func OpenExternal(ctx context.Context, c Config) (*Store, error) {
	where := strings.Join(c.Endpoints, ",")
	cfg, err := c.client()
	if err != nil {
		return nil, &fleet.Error{Op: "open store", Subject: where, Kind: fleet.ErrInvalid, Err: err}
	}
	prefix := "/fastcontainer"
	if c.Prefix != "" {
		prefix = strings.TrimRight(c.Prefix, "/")
	}
	s := newStore(nil, prefix, where, c.Logger, nil)
	if s.client, err = clientv3.New(cfg); err != nil { // it logs in
		s.cancel()
		return nil, s.explain(ctx, "open store", "", err)
	}
	if err := s.Ping(ctx); err != nil {
		_ = s.Close()
		return nil, fmt.Errorf("open store: %w", err)
	}
	return s, nil
}

// client is the configuration for etcd's own client. That one logs nothing:
// what it would say comes back as errors.
func (c *Config) client() (clientv3.Config, error) {
	cfg := clientv3.Config{
		Endpoints: c.Endpoints, DialTimeout: opTimeout, DialKeepAliveTime: 5 * time.Second, DialKeepAliveTimeout: opTimeout,
		PermitWithoutStream: true, Username: c.User, MaxCallRecvMsgSize: maxAnswer, Logger: zap.NewNop(),
	}
	if len(c.Endpoints) == 0 {
		return cfg, errors.New("no etcd endpoint is given")
	}
	if c.PasswordFile != "" {
		b, err := os.ReadFile(c.PasswordFile)
		if err != nil {
			return cfg, fmt.Errorf("etcd.password_file: %w", err)
		}
		cfg.Password = strings.TrimRight(string(b), "\r\n")
	}
	if c.CA+c.Cert+c.Key == "" {
		return cfg, nil
	}
	for _, e := range c.Endpoints {
		if strings.HasPrefix(e, "http://") {
			return cfg, fmt.Errorf("%s would not be encrypted, although there are TLS files: write https://", e)
		}
	}
	t, err := transport.TLSInfo{TrustedCAFile: c.CA, CertFile: c.Cert, KeyFile: c.Key}.ClientConfig()
	if err != nil {
		return cfg, fmt.Errorf("etcd.ca, etcd.cert or etcd.key: %w", err)
	}
	cfg.TLS = t
	return cfg, nil
}
