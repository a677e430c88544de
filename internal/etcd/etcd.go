// Package etcd is the store on etcd: inside the daemon's own process, with its
// data in a directory, or on an existing cluster when one machine is outgrown.
// Both are the same code from the client on.
package etcd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/store"
)

const (
	// opTimeout bounds one call: whoever waits for it is a person or a loop.
	opTimeout = 3 * time.Second
	// sessionTTL is how long after the last sign of life what belongs to a
	// session stays.
	sessionTTL = 15
	// page is how many entries one List call fetches.
	page = 1000
)

// Store is a store.Store on etcd.
type Store struct {
	client *clientv3.Client
	prefix string
	log    *slog.Logger
	stop   func() error // the embedded server

	ctx    context.Context //nolint:containedctx // the life of the session
	cancel context.CancelFunc
	work   sync.WaitGroup

	mu      sync.Mutex
	lease   clientv3.LeaseID
	session map[string][]byte // what belongs to it, to be written again
}

func newStore(client *clientv3.Client, prefix string, log *slog.Logger, stop func() error) *Store {
	s := &Store{client: client, prefix: prefix, log: log, stop: stop, session: map[string][]byte{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// failed turns an error of etcd into one of the store.
func failed(ctx context.Context, op string, err error) error {
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil && errors.Is(context.Cause(ctx), context.Canceled):
		return ctx.Err()
	case errors.Is(err, rpctypes.ErrNoSpace):
		return fmt.Errorf("%s: etcd has no space left: %w", op, store.ErrAway)
	case errors.Is(err, rpctypes.ErrPermissionDenied), errors.Is(err, rpctypes.ErrAuthFailed), errors.Is(err, rpctypes.ErrUserEmpty):
		return &fleet.Error{Op: op, Kind: fleet.ErrDenied, Err: err, Hint: "check etcd.user, etcd.password_file and the rights of that user"}
	}
	switch status.Code(err) {
	case codes.InvalidArgument:
		return &fleet.Error{Op: op, Kind: fleet.ErrInvalid, Err: err}
	case codes.Canceled:
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return fmt.Errorf("%s: %w (%w)", op, store.ErrAway, err)
}

func (s *Store) entry(kv *mvccpb.KeyValue) store.Entry {
	return store.Entry{Key: string(kv.Key)[len(s.prefix):], Value: kv.Value, Rev: store.Rev(kv.ModRevision)}
}

// Get implements store.Store.
func (s *Store) Get(ctx context.Context, key string) (store.Entry, error) {
	op, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	r, err := s.client.Get(op, s.prefix+key)
	if err != nil {
		return store.Entry{}, failed(ctx, "read "+key, err)
	}
	if len(r.Kvs) == 0 {
		return store.Entry{}, fmt.Errorf("key %s: %w", key, fleet.ErrNotFound)
	}
	return s.entry(r.Kvs[0]), nil
}

// List implements store.Store. It reads in pages of one and the same revision.
func (s *Store) List(ctx context.Context, prefix string) ([]store.Entry, store.Rev, error) {
	var list []store.Entry
	from, end := s.prefix+prefix, clientv3.GetPrefixRangeEnd(s.prefix+prefix)
	at := int64(0)
	for {
		op, cancel := context.WithTimeout(ctx, opTimeout)
		r, err := s.client.Get(op, from, clientv3.WithRange(end), clientv3.WithLimit(page), clientv3.WithRev(at))
		cancel()
		if err != nil {
			return nil, 0, failed(ctx, "list "+prefix, err)
		}
		if at == 0 {
			at = r.Header.Revision
		}
		for _, kv := range r.Kvs {
			list = append(list, s.entry(kv))
		}
		if !r.More {
			return list, store.Rev(at), nil
		}
		from = string(r.Kvs[len(r.Kvs)-1].Key) + "\x00"
	}
}

// Commit implements store.Store.
func (s *Store) Commit(ctx context.Context, ops ...store.Op) (store.Rev, error) {
	if err := store.Check(ops); err != nil {
		return 0, err
	}
	op, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	var ifs []clientv3.Cmp
	var thens []clientv3.Op
	for _, o := range ops {
		key := s.prefix + o.Key
		if o.If != store.AnyRev {
			ifs = append(ifs, clientv3.Compare(clientv3.ModRevision(key), "=", int64(o.If)))
		}
		if o.Value == nil {
			thens = append(thens, clientv3.OpDelete(key))
			continue
		}
		var opts []clientv3.OpOption
		if o.Session {
			lease, err := s.leaseID(op)
			if err != nil {
				return 0, failed(ctx, "begin session", err)
			}
			opts = append(opts, clientv3.WithLease(lease))
		}
		thens = append(thens, clientv3.OpPut(key, string(o.Value), opts...))
	}
	r, err := s.client.Txn(op).If(ifs...).Then(thens...).Commit()
	if err != nil {
		return 0, failed(ctx, "write", err)
	}
	if !r.Succeeded {
		return 0, store.ErrConflict
	}
	s.remember(ops)
	return store.Rev(r.Header.Revision), nil
}

// remember keeps what belongs to the session.
func (s *Store) remember(ops []store.Op) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, o := range ops {
		if o.Session && o.Value != nil {
			s.session[s.prefix+o.Key] = o.Value
		} else {
			delete(s.session, s.prefix+o.Key)
		}
	}
}

// leaseID of the session, which the first to ask begins.
func (s *Store) leaseID(ctx context.Context) (clientv3.LeaseID, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lease != 0 {
		return s.lease, nil
	}
	g, err := s.client.Grant(ctx, sessionTTL)
	if err != nil {
		return 0, err
	}
	s.lease = g.ID
	s.work.Go(func() { s.keepAlive(g.ID) })
	return g.ID, nil
}

// keepAlive shows that the session lives. A lease that was lost (the cluster
// was away for longer than its time) is replaced, and what belonged to it is
// written again.
func (s *Store) keepAlive(id clientv3.LeaseID) {
	for s.ctx.Err() == nil {
		alive, err := s.client.KeepAlive(s.ctx, id)
		if err == nil {
			for range alive { //nolint:revive // it only has to be read
			}
		}
		if s.ctx.Err() != nil {
			return
		}
		s.log.Warn("the session with etcd was interrupted", "error", err)
		for pause := 100 * time.Millisecond; ; pause = min(2*pause, 5*time.Second) {
			if id, err = s.renew(); err == nil {
				break
			}
			select {
			case <-s.ctx.Done():
				return
			case <-time.After(pause):
			}
		}
	}
}

// renew begins a new session with what belonged to the old one.
func (s *Store) renew() (clientv3.LeaseID, error) {
	ctx, cancel := context.WithTimeout(s.ctx, opTimeout)
	defer cancel()
	g, err := s.client.Grant(ctx, sessionTTL)
	if err != nil {
		return 0, err
	}
	s.mu.Lock()
	s.lease = g.ID
	var puts []clientv3.Op
	for key, value := range s.session {
		puts = append(puts, clientv3.OpPut(key, string(value), clientv3.WithLease(g.ID)))
	}
	s.mu.Unlock()
	if len(puts) > 0 {
		if _, err := s.client.Txn(ctx).Then(puts...).Commit(); err != nil {
			return 0, err
		}
	}
	return g.ID, nil
}

// Watch implements store.Store. The client resumes by itself when the
// connection or a member is lost.
func (s *Store) Watch(ctx context.Context, prefix string, after store.Rev, f func(store.Change) error) error {
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	for {
		next, err := s.watch(ctx, prefix, after, f)
		if err != nil {
			return err
		}
		after = next
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.ctx.Done():
			return store.ErrAway
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// watch follows until the stream breaks; then it says up to where it came.
func (s *Store) watch(ctx context.Context, prefix string, after store.Rev, f func(store.Change) error) (store.Rev, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream := s.client.Watch(ctx, s.prefix+prefix, clientv3.WithPrefix(), clientv3.WithRev(int64(after)+1))
	for {
		select {
		case <-s.ctx.Done():
			return after, store.ErrAway
		case r, ok := <-stream:
			switch {
			case ctx.Err() != nil:
				return after, ctx.Err()
			case !ok:
				return after, nil
			case r.CompactRevision != 0:
				return after, store.ErrCompacted
			case r.Err() != nil:
				s.log.Debug("watch of etcd was interrupted", "error", r.Err())
				return after, nil
			}
			for _, e := range r.Events {
				c := store.Change{Entry: s.entry(e.Kv)}
				if e.Type == mvccpb.Event_DELETE {
					c.Deleted, c.Value = true, nil
				}
				if err := f(c); err != nil {
					return after, err
				}
			}
			after = max(after, store.Rev(r.Header.Revision))
		}
	}
}

// Ping implements store.Store.
func (s *Store) Ping(ctx context.Context) error {
	op, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	_, err := s.client.Get(op, s.prefix+"/ping", clientv3.WithCountOnly())
	return failed(ctx, "reach the store", err)
}

// Close implements store.Store: the session ends, and with it what belongs to it.
func (s *Store) Close() error {
	if s.ctx.Err() != nil {
		return nil
	}
	s.cancel()
	s.work.Wait()
	s.mu.Lock()
	lease := s.lease
	s.mu.Unlock()
	if lease != 0 {
		ctx, cancel := context.WithTimeout(context.Background(), opTimeout)
		defer cancel()
		if _, err := s.client.Revoke(ctx, lease); err != nil {
			s.log.Warn("end the session with etcd", "error", err)
		}
	}
	err := s.client.Close()
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	if s.stop != nil {
		err = errors.Join(err, s.stop())
	}
	return err
}
