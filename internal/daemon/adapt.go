package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/control"
	"github.com/fastcontainer/fastcontainer/internal/dispatch"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/homeostat"
	"github.com/fastcontainer/fastcontainer/internal/network"
	"github.com/fastcontainer/fastcontainer/internal/node"
	"github.com/fastcontainer/fastcontainer/internal/sandbox"
)

// The interfaces of two packages that do not know each other, joined.

// router is control as the front door sees it.
type router struct{ k *control.Control }

func (r router) Route(host string) (dispatch.Target, bool) {
	a, ok := r.k.Route(host)
	if !ok {
		return nil, false
	}
	return target{a}, true
}

type target struct{ a *control.App }

func (t target) App() fleet.AppName { return t.a.Name() }

func (t target) Acquire(ctx context.Context, arrived time.Time) (dispatch.Lease, error) {
	l, err := t.a.Acquire(ctx, arrived)
	if err != nil {
		return nil, err
	}
	return l, nil
}

// machine is the node as control sees it.
type machine struct{ n *node.Node }

func (m machine) Start(ctx context.Context, o control.Order) (control.Instance, error) {
	i, err := m.n.Start(ctx, node.Order(o))
	if err != nil {
		return nil, err
	}
	return i, nil
}

func (m machine) Resize(i control.Instance, l sandbox.Limits, cause string, inputs map[string]float64) error {
	inst, ok := i.(*node.Instance)
	if !ok {
		return fmt.Errorf("resize: %T is no instance of this node", i)
	}
	return m.n.Resize(inst, l, cause, inputs)
}

func (m machine) Freeze(ctx context.Context, i control.Instance, cause string, inputs map[string]float64) error {
	inst, ok := i.(*node.Instance)
	if !ok {
		return fmt.Errorf("freeze: %T is no instance of this node", i)
	}
	return m.n.Freeze(ctx, inst, cause, inputs)
}

func (m machine) Thaw(i control.Instance, stages *fleet.Stages) error {
	inst, ok := i.(*node.Instance)
	if !ok {
		return fmt.Errorf("thaw: %T is no instance of this node", i)
	}
	return m.n.Thaw(inst, stages)
}

func (m machine) Save(ctx context.Context, rev fleet.Revision, cause string, inputs map[string]float64, room func() (func(), bool)) int64 {
	return int64(m.n.Save(ctx, rev, cause, inputs, room))
}

func (m machine) Vitals() homeostat.Vitals { return m.n.Vitals() }

func (m machine) Stop(ctx context.Context, i control.Instance, cause string) error {
	inst, ok := i.(*node.Instance)
	if !ok {
		return fmt.Errorf("stop: %T is no instance of this node", i)
	}
	return m.n.Stop(ctx, inst, cause)
}

// wires is the network as the runtimes see it, which share it: none of them
// cleans away what another one uses.
type wires struct {
	*network.Network
	mu   sync.Mutex
	used map[string]bool
}

func newWires(n *network.Network) *wires { return &wires{Network: n, used: map[string]bool{}} }

func (w *wires) mark(name string, used bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if used {
		w.used[name] = true
	} else {
		delete(w.used, name)
	}
}

func (w *wires) Attach(ctx context.Context, name string, netns int) (sandbox.Link, error) {
	w.mark(name, true)
	l, err := w.Network.Attach(ctx, name, netns)
	if err != nil {
		w.mark(name, false)
		return sandbox.Link{}, err
	}
	state, err := json.Marshal(l)
	return sandbox.Link{Name: name, Address: l.Address, State: state}, err
}

func lease(l sandbox.Link) (network.Lease, error) {
	var n network.Lease
	if err := json.Unmarshal(l.State, &n); err != nil {
		return n, fmt.Errorf("read state of link %s: %w", l.Name, err)
	}
	return n, nil
}

func (w *wires) Detach(ctx context.Context, l sandbox.Link) error {
	n, err := lease(l)
	if err == nil {
		err = w.Network.Detach(ctx, n)
	}
	if err == nil {
		w.mark(l.Name, false)
	}
	return err
}

func (w *wires) Adopt(l sandbox.Link) error {
	n, err := lease(l)
	if err == nil {
		err = w.Network.Adopt(n)
	}
	if err == nil {
		w.mark(l.Name, true)
	}
	return err
}

func (w *wires) Clean(ctx context.Context, keep []string) ([]string, error) {
	w.mu.Lock()
	for name := range w.used {
		keep = append(keep, name)
	}
	w.mu.Unlock()
	return w.Network.Clean(ctx, keep)
}

// lazy is a runtime that is opened when it is first needed: most nodes never
// need more than the native one.
type lazy struct {
	open func() (sandbox.Runtime, error)
	dir  string // exists once it was used

	mu sync.Mutex
	rt sandbox.Runtime
}

func (l *lazy) get() (sandbox.Runtime, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.rt != nil {
		return l.rt, nil
	}
	rt, err := l.open()
	if err != nil {
		return nil, err
	}
	l.rt = rt
	return rt, nil
}

func (l *lazy) Start(ctx context.Context, s sandbox.Spec) (sandbox.Sandbox, error) {
	rt, err := l.get()
	if err != nil {
		return nil, err
	}
	return rt.Start(ctx, s)
}

func (l *lazy) Adopt(ctx context.Context, state json.RawMessage) (sandbox.Sandbox, error) {
	rt, err := l.get()
	if err != nil {
		return nil, err
	}
	return rt.Adopt(ctx, state)
}

func (l *lazy) Clean(ctx context.Context, keep []fleet.InstanceID) ([]string, error) {
	if _, err := os.Stat(l.dir); errors.Is(err, os.ErrNotExist) {
		return nil, nil // never used
	}
	rt, err := l.get()
	if err != nil {
		return nil, err
	}
	return rt.Clean(ctx, keep)
}

func (l *lazy) Check() error {
	rt, err := l.get()
	if err != nil {
		return err
	}
	return rt.Check()
}

// Memory of its containers; 0 if there are none.
func (l *lazy) Memory() (fleet.Bytes, error) {
	l.mu.Lock()
	rt := l.rt
	l.mu.Unlock()
	if m, ok := rt.(measured); ok {
		return m.Memory()
	}
	return 0, nil
}

// measured is a runtime that knows what its containers use.
type measured interface {
	Memory() (fleet.Bytes, error)
}

func (l *lazy) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.rt == nil {
		return nil
	}
	return l.rt.Close()
}
