// Package etcd is the store on etcd: inside the daemon's own process, with its
// data in a directory, or on an existing cluster when one machine is outgrown.
// Both are the same code from the client on.
package etcd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
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
	// page is how many entries List asks for at once.
	page = 1000
	// maxAnswer bounds what one answer of a cluster may weigh.
	maxAnswer = 8 << 20
)

// Store is a store.Store on etcd.
type Store struct {
	client *clientv3.Client
	prefix string
	where  string // for people: the endpoints or the directory
	log    *slog.Logger
	server *server // nil if etcd is elsewhere

	ctx    context.Context //nolint:containedctx // the life of the session
	cancel context.CancelFunc
	work   sync.WaitGroup
	once   sync.Once // of Close

	mu      sync.Mutex
	lease   clientv3.LeaseID
	session map[string][]byte // what belongs to it, to be written again
}

func newStore(client *clientv3.Client, prefix, where string, log *slog.Logger, server *server) *Store {
	s := &Store{client: client, prefix: prefix, where: where, log: log, server: server, session: map[string][]byte{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

var errClosed = errors.New("the store is closed")

// call makes one request within its time, and turns what goes wrong into an
// error of the store.
func (s *Store) call(ctx context.Context, op, subject string, f func(context.Context) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if s.ctx.Err() != nil {
		return s.away(op, subject, errClosed, "")
	}
	if err := s.server.died(); err != nil {
		return s.away(op, subject, err, hintDied)
	}
	bounded, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	return s.explain(ctx, op, subject, f(bounded))
}

const (
	hintDied    = "look at the disk: is it full or failing? Then restart the daemon; instances survive that"
	hintAway    = "check that most members of the etcd cluster run and can be reached from here"
	hintSlow    = "look at the disk: is it full, failing or very slow? The daemon's log has what etcd says of it"
	hintAuth    = "check etcd.user, etcd.password_file, and what that user may do"
	hintNoSpace = "etcd's database has reached its quota: compact and defragment it, then run etcdctl alarm disarm"
)

// explain turns an error of etcd into one of the store; ctx is the caller's.
func (s *Store) explain(ctx context.Context, op, subject string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(ctx.Err(), context.Canceled):
		return ctx.Err()
	case errors.Is(err, rpctypes.ErrNoSpace):
		return s.away(op, subject, err, hintNoSpace)
	case errors.Is(err, rpctypes.ErrPermissionDenied), errors.Is(err, rpctypes.ErrAuthFailed), errors.Is(err, rpctypes.ErrUserEmpty):
		return &fleet.Error{Op: op, Subject: subject, Kind: fleet.ErrDenied, Err: err, Hint: hintAuth}
	case code(err) == codes.InvalidArgument:
		return &fleet.Error{Op: op, Subject: subject, Kind: fleet.ErrInvalid, Err: err}
	}
	hint := hintAway
	if s.server != nil {
		hint = hintSlow
		if died := s.server.died(); died != nil {
			err, hint = died, hintDied
		}
	}
	return s.away(op, subject, err, hint)
}

func (s *Store) away(op, subject string, err error, hint string) error {
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("no answer in time: %w", err)
	}
	return &fleet.Error{Op: op, Subject: subject, Kind: store.ErrAway, Err: fmt.Errorf("etcd at %s: %w", s.where, err), Hint: hint}
}

// code of an error, as the server or the transport gave it.
func code(err error) codes.Code {
	if e, ok := errors.AsType[rpctypes.EtcdError](err); ok {
		return e.Code()
	}
	return status.Code(err)
}

func (s *Store) entry(kv *mvccpb.KeyValue) store.Entry {
	return store.Entry{Key: string(kv.Key)[len(s.prefix):], Value: kv.Value, Rev: store.Rev(kv.ModRevision)}
}

// Get implements store.Store.
func (s *Store) Get(ctx context.Context, key string) (store.Entry, error) {
	var e store.Entry
	err := s.call(ctx, "read", key, func(ctx context.Context) error {
		r, err := s.client.Get(ctx, s.prefix+key)
		switch {
		case err != nil:
			return err
		case len(r.Kvs) > 0:
			e = s.entry(r.Kvs[0])
		}
		return nil
	})
	if err == nil && e.Rev == 0 {
		err = fmt.Errorf("key %s: %w", key, fleet.ErrNotFound)
	}
	return e, err
}

// List implements store.Store. It reads in pages of one and the same revision.
func (s *Store) List(ctx context.Context, prefix string) ([]store.Entry, store.Rev, error) {
	var list []store.Entry
	from, end := s.prefix+prefix, clientv3.GetPrefixRangeEnd(s.prefix+prefix)
	at, limit := int64(0), int64(page)
	for {
		var r *clientv3.GetResponse
		err := s.call(ctx, "list", prefix, func(ctx context.Context) (err error) {
			r, err = s.client.Get(ctx, from, clientv3.WithRange(end), clientv3.WithLimit(limit), clientv3.WithRev(at))
			return err
		})
		switch {
		case code(err) == codes.ResourceExhausted && limit > 1:
			limit /= 2 // an answer was too heavy
			continue
		case err != nil:
			return nil, 0, err
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
	subject, puts, session := "", false, false
	if len(ops) > 0 {
		subject = ops[0].Key
	}
	for _, o := range ops {
		puts = puts || o.Value != nil
		session = session || o.Session && o.Value != nil
	}
	if puts {
		if err := s.server.full(); err != nil {
			return 0, s.away("write", subject, err, "free some space on the disk of "+s.where)
		}
	}
	var lease clientv3.LeaseID
	if session {
		err := s.call(ctx, "begin session for", subject, func(ctx context.Context) (err error) {
			lease, err = s.leaseID(ctx)
			return err
		})
		if err != nil {
			return 0, err
		}
	}
	ifs, thens := s.translate(ops, lease)
	var r *clientv3.TxnResponse
	err := s.call(ctx, "write", subject, func(ctx context.Context) (err error) {
		r, err = s.client.Txn(ctx).If(ifs...).Then(thens...).Commit()
		return err
	})
	if err != nil {
		return 0, err
	}
	if !r.Succeeded {
		return 0, store.ErrConflict
	}
	if now := s.remember(ops); session && now != lease {
		// The session was renewed meanwhile, before it knew of these.
		for _, o := range ops {
			if o.Session && o.Value != nil {
				if err := s.call(ctx, "write", o.Key, func(ctx context.Context) error { return s.bind(ctx, now, s.prefix+o.Key, o.Value) }); err != nil {
					return 0, err
				}
			}
		}
	}
	return store.Rev(r.Header.Revision), nil
}

// translate gives the conditions and the writes in etcd's words.
func (s *Store) translate(ops []store.Op, lease clientv3.LeaseID) (ifs []clientv3.Cmp, thens []clientv3.Op) {
	for _, o := range ops {
		key := s.prefix + o.Key
		if o.If != store.AnyRev {
			ifs = append(ifs, clientv3.Compare(clientv3.ModRevision(key), "=", int64(o.If)))
		}
		switch {
		case o.Value == nil:
			thens = append(thens, clientv3.OpDelete(key))
		case o.Session:
			thens = append(thens, clientv3.OpPut(key, string(o.Value), clientv3.WithLease(lease)))
		default:
			thens = append(thens, clientv3.OpPut(key, string(o.Value)))
		}
	}
	return ifs, thens
}

// remember keeps what belongs to the session, and says which lease is now its.
func (s *Store) remember(ops []store.Op) clientv3.LeaseID {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, o := range ops {
		if o.Session && o.Value != nil {
			s.session[s.prefix+o.Key] = slices.Clone(o.Value)
		} else {
			delete(s.session, s.prefix+o.Key)
		}
	}
	return s.lease
}

// leaseID of the session, which the first to ask begins.
func (s *Store) leaseID(ctx context.Context) (clientv3.LeaseID, error) {
	s.mu.Lock()
	id := s.lease
	s.mu.Unlock()
	if id != 0 {
		return id, nil
	}
	g, err := s.client.Grant(ctx, sessionTTL)
	if err != nil {
		return 0, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.ctx.Err() != nil: // this lease lapses by itself
		return 0, errClosed
	case s.lease == 0: // else another was first, and this one lapses
		s.lease = g.ID
		s.work.Go(func() { s.keepAlive(g.ID) })
	}
	return s.lease, nil
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
		s.log.Warn("session with etcd was interrupted", "error", err)
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
		s.log.Info("session with etcd was renewed")
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
	kept := make(map[string][]byte, len(s.session))
	for key, value := range s.session {
		kept[key] = value
	}
	s.mu.Unlock()
	for key, value := range kept {
		if err := s.bind(ctx, g.ID, key, value); err != nil {
			return 0, err
		}
	}
	return g.ID, nil
}

// bind writes what belongs to the session under its new lease, unless somebody
// has written it so already.
func (s *Store) bind(ctx context.Context, lease clientv3.LeaseID, key string, value []byte) error {
	_, err := s.client.Txn(ctx).
		If(clientv3.Compare(clientv3.LeaseValue(key), "!=", lease)).
		Then(clientv3.OpPut(key, string(value), clientv3.WithLease(lease))).
		Commit()
	return err
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
		// A watch that is not allowed just ends: a read says why.
		err = s.call(ctx, "watch", prefix, func(ctx context.Context) error {
			_, err := s.client.Get(ctx, s.prefix+prefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
			return err
		})
		if errors.Is(err, fleet.ErrDenied) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.ctx.Done():
			return s.away("watch", prefix, errClosed, "")
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// watch follows until the stream breaks; then it says up to where it came.
func (s *Store) watch(ctx context.Context, prefix string, after store.Rev, f func(store.Change) error) (store.Rev, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream := s.client.Watch(ctx, s.prefix+prefix, clientv3.WithPrefix(), clientv3.WithRev(int64(after)+1), clientv3.WithProgressNotify())
	for {
		select {
		case <-s.ctx.Done():
			return after, s.away("watch", prefix, errClosed, "")
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
			// The header of events names the revision of the server, which is
			// ahead of a watch that still catches up; that of a sign of progress
			// tells up to where there was nothing.
			switch {
			case r.IsProgressNotify():
				after = max(after, store.Rev(r.Header.Revision))
			case len(r.Events) > 0:
				after = store.Rev(r.Events[len(r.Events)-1].Kv.ModRevision)
			}
		}
	}
}

// Ping implements store.Store.
func (s *Store) Ping(ctx context.Context) error {
	return s.call(ctx, "reach the store", "", func(ctx context.Context) error {
		_, err := s.client.Get(ctx, s.prefix+"/ping", clientv3.WithCountOnly())
		return err
	})
}

// Close implements store.Store: the session ends, and with it what belongs to it.
func (s *Store) Close() error {
	var err error
	s.once.Do(func() { err = s.close() })
	return err
}

func (s *Store) close() error {
	s.mu.Lock()
	s.cancel() // under the lock: no session begins after it
	lease := s.lease
	s.mu.Unlock()
	s.work.Wait()
	if lease != 0 && s.server.died() == nil {
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
	return errors.Join(err, s.server.close())
}
