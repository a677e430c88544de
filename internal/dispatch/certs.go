package dispatch

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// certStore holds the certificates by host name. Their files are looked at
// during handshakes, at most once a second, so it needs no goroutine.
type certStore struct {
	files []Certificate
	log   *slog.Logger

	set    atomic.Pointer[certSet]
	looked atomic.Int64 // Unix ns
	mu     sync.Mutex   // held while reading
	failed string       // the last failure, logged once
}

type certSet struct {
	byName map[string]*tls.Certificate
	first  *tls.Certificate
	stamps []fileStamp
}

type fileStamp struct {
	mod  time.Time
	size int64
}

func newCertStore(files []Certificate, log *slog.Logger) (*certStore, error) {
	s := &certStore{files: files, log: log}
	set, err := s.load()
	if err != nil {
		return nil, err
	}
	s.set.Store(set)
	s.looked.Store(time.Now().UnixNano())
	return s, nil
}

func (s *certStore) load() (*certSet, error) {
	set := &certSet{byName: map[string]*tls.Certificate{}, stamps: s.stamps()}
	for _, f := range s.files {
		c, err := tls.LoadX509KeyPair(f.CertFile, f.KeyFile)
		if err != nil {
			return nil, &fleet.Error{Op: "read certificate", Subject: f.CertFile, Kind: fleet.ErrInvalid, Err: err,
				Hint: "give a PEM certificate (chain) and the PEM key that belongs to it"}
		}
		if c.Leaf == nil {
			return nil, &fleet.Error{Op: "read certificate", Subject: f.CertFile, Kind: fleet.ErrInvalid, Err: fmt.Errorf("it is empty")}
		}
		if set.first == nil {
			set.first = &c
		}
		for _, name := range names(c.Leaf) {
			if _, ok := set.byName[name]; !ok {
				set.byName[name] = &c
			}
		}
	}
	return set, nil
}

func names(leaf *x509.Certificate) []string {
	var all []string
	for _, n := range leaf.DNSNames {
		all = append(all, strings.ToLower(strings.TrimSuffix(n, ".")))
	}
	for _, ip := range leaf.IPAddresses {
		all = append(all, ip.String())
	}
	return all
}

func (s *certStore) stamps() []fileStamp {
	var all []fileStamp
	for _, f := range s.files {
		for _, name := range []string{f.CertFile, f.KeyFile} {
			var st fileStamp
			if fi, err := os.Stat(name); err == nil {
				st = fileStamp{fi.ModTime(), fi.Size()}
			}
			all = append(all, st)
		}
	}
	return all
}

// refresh reads the files again if they changed. A pair that is half written
// does not fit together: the old one stays until the next look.
func (s *certStore) refresh(now time.Time) {
	last := s.looked.Load()
	if now.UnixNano()-last < int64(time.Second) || !s.mu.TryLock() {
		return
	}
	defer s.mu.Unlock()
	s.looked.Store(now.UnixNano())
	stamps := s.stamps()
	same := true
	for i, st := range s.set.Load().stamps {
		same = same && st.size == stamps[i].size && st.mod.Equal(stamps[i].mod)
	}
	if same {
		return
	}
	set, err := s.load()
	if err != nil {
		if s.failed != err.Error() {
			s.failed = err.Error()
			s.log.Warn("certificates not reloaded", "error", err)
		}
		return
	}
	s.failed = ""
	s.set.Store(set)
	s.log.Info("certificates reloaded", "count", len(s.files))
}

// pick finds the certificate for a host name: its own, its wildcard, or the first.
func (s *certStore) pick(name string) *tls.Certificate {
	set := s.set.Load()
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	if c, ok := set.byName[name]; ok {
		return c
	}
	if _, rest, ok := strings.Cut(name, "."); ok {
		if c, ok := set.byName["*."+rest]; ok {
			return c
		}
	}
	return set.first
}

func (s *certStore) config(first func(*tls.ClientHelloInfo) (*tls.Certificate, error)) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		NextProtos: []string{"h2", "http/1.1"},
		GetCertificate: func(hi *tls.ClientHelloInfo) (*tls.Certificate, error) {
			if first != nil {
				if c, err := first(hi); c != nil || err != nil {
					return c, err
				}
			}
			s.refresh(time.Now())
			if c := s.pick(hi.ServerName); c != nil {
				return c, nil
			}
			return nil, fmt.Errorf("no certificate for %q", hi.ServerName)
		},
	}
}
