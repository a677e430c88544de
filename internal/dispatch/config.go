package dispatch

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"syscall"
	"time"
)

// Config says how the front door treats its clients and the instances behind
// it. Begin with DefaultConfig: there every limit is set.
type Config struct {
	// Certificates for listeners with TLS; the first is used when a client
	// names no host or one that none of them is for. They are read again when
	// their files change.
	Certificates []Certificate
	// GetCertificate, where set, is asked first; a nil certificate without an
	// error leaves the choice to Certificates.
	GetCertificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	// TrustedProxies may say on whose behalf they ask: what they send in
	// X-Forwarded-*, Forwarded and X-Request-Id is kept. They are exempt from
	// MaxConnsPerIP.
	TrustedProxies []netip.Prefix

	// MaxConns bounds the client connections; one more is closed at once.
	MaxConns int
	// MaxConnsPerIP bounds them for one client: an IPv4 address or an IPv6 /64.
	MaxConnsPerIP int
	// MaxStreams bounds the requests at a time on one HTTP/2 connection.
	MaxStreams int
	// MaxHeaderBytes bounds request line and header, and the header of a response.
	MaxHeaderBytes int
	// MaxHeaders bounds the header lines of a request or a response.
	MaxHeaders int
	// MaxBody bounds a request body in bytes (413 beyond). 0: no bound.
	MaxBody int64

	// HeaderTimeout: from the first byte of a request (or the accept of its
	// connection, TLS handshake included) until its header is complete.
	HeaderTimeout time.Duration
	// IdleTimeout of a client connection between requests.
	IdleTimeout time.Duration
	// BodyTimeout: longest silence within a request body.
	BodyTimeout time.Duration
	// MinBodyRate in bytes a second is what a request body must bring on
	// average once BodyTimeout has passed since its begin. 0: only silence counts.
	MinBodyRate int64
	// WriteTimeout: longest time for a client to take one piece of a response
	// (32 KiB at most).
	WriteTimeout time.Duration
	// Control, if any, is that of the net.Dialer for connections to instances.
	Control func(network, address string, c syscall.RawConn) error
	// ConnectTimeout of a connection to an instance.
	ConnectTimeout time.Duration
	// ResponseTimeout: from the end of a forwarded request (or the last part
	// of its response) until the instance says something (504 beyond).
	// Server-sent events, gRPC and upgraded connections may be silent for
	// TunnelTimeout.
	ResponseTimeout time.Duration
	// ContinueTimeout: how long a client that expects 100-continue waits for an
	// instance that does not say it.
	ContinueTimeout time.Duration
	// TunnelTimeout: longest silence of both sides of an upgraded connection
	// or an event stream.
	TunnelTimeout time.Duration
	// CloseGrace: how long an upgraded connection may take to say goodbye
	// after it was told to close.
	CloseGrace time.Duration
	// DrainTimeout: how long Serve lets requests in flight finish at the end.
	DrainTimeout time.Duration

	// MaxIdlePerInstance bounds the unused connections kept to one instance.
	MaxIdlePerInstance int
	// InstanceIdleTimeout of a connection to an instance: it is not used again
	// after it was unused for so long.
	InstanceIdleTimeout time.Duration

	// ServerTiming adds the stages of a start to the responses that waited for it.
	ServerTiming bool
	// AccessLog, where set, gets one line for each request; AccessSample of
	// them, from 0 to 1, chosen by chance. Answers of 500 and above made here
	// are always logged.
	AccessLog    *slog.Logger
	AccessSample float64
}

// Certificate is a pair of PEM files; the first may hold a chain.
type Certificate struct {
	CertFile string
	KeyFile  string
}

// DefaultConfig has a sound value for every limit.
func DefaultConfig() Config {
	return Config{
		MaxConns:            20000,
		MaxConnsPerIP:       1024,
		MaxStreams:          250,
		MaxHeaderBytes:      64 << 10,
		MaxHeaders:          128,
		MaxBody:             1 << 30,
		HeaderTimeout:       10 * time.Second,
		IdleTimeout:         75 * time.Second,
		BodyTimeout:         30 * time.Second,
		MinBodyRate:         256,
		WriteTimeout:        60 * time.Second,
		ConnectTimeout:      3 * time.Second,
		ResponseTimeout:     5 * time.Minute,
		ContinueTimeout:     time.Second,
		TunnelTimeout:       time.Hour,
		CloseGrace:          5 * time.Second,
		DrainTimeout:        30 * time.Second,
		MaxIdlePerInstance:  128,
		InstanceIdleTimeout: 60 * time.Second,
		AccessSample:        1,
	}
}

// Validate names everything that is wrong with c at once.
func (c *Config) Validate() error {
	var errs []error
	bad := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	for _, n := range []struct {
		name string
		v    int
		min  int
	}{
		{"MaxConns", c.MaxConns, 1},
		{"MaxConnsPerIP", c.MaxConnsPerIP, 1},
		{"MaxStreams", c.MaxStreams, 1},
		{"MaxHeaderBytes", c.MaxHeaderBytes, 1024},
		{"MaxHeaders", c.MaxHeaders, 8},
		{"MaxIdlePerInstance", c.MaxIdlePerInstance, 0},
	} {
		bad(n.v >= n.min, "%s is %d: at least %d is needed", n.name, n.v, n.min)
	}
	for _, d := range []struct {
		name string
		v    time.Duration
	}{
		{"HeaderTimeout", c.HeaderTimeout}, {"IdleTimeout", c.IdleTimeout}, {"BodyTimeout", c.BodyTimeout},
		{"WriteTimeout", c.WriteTimeout}, {"ConnectTimeout", c.ConnectTimeout}, {"ResponseTimeout", c.ResponseTimeout},
		{"ContinueTimeout", c.ContinueTimeout}, {"TunnelTimeout", c.TunnelTimeout}, {"CloseGrace", c.CloseGrace},
		{"DrainTimeout", c.DrainTimeout}, {"InstanceIdleTimeout", c.InstanceIdleTimeout},
	} {
		bad(d.v > 0, "%s is %v: it must be more than 0", d.name, d.v)
	}
	bad(c.MaxBody >= 0, "MaxBody is %d: write 0 for no bound", c.MaxBody)
	bad(c.MinBodyRate >= 0, "MinBodyRate is %d: write 0 for no bound", c.MinBodyRate)
	bad(c.AccessSample >= 0 && c.AccessSample <= 1, "AccessSample is %v: it is a share from 0 to 1", c.AccessSample)
	for i, p := range c.TrustedProxies {
		bad(p.IsValid(), "TrustedProxies[%d] is no address range", i)
	}
	for i, p := range c.Certificates {
		bad(p.CertFile != "" && p.KeyFile != "", "Certificates[%d] needs both a certificate file and a key file", i)
	}
	return errors.Join(errs...)
}
