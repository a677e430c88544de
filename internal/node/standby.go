package node

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/sandbox"
)

// Freeze makes a ready instance a standby: it stands still and keeps its
// memory until Thaw or Stop. If ctx ends before it stands still the error is
// that of ctx, and the next call must be one of these. If it cannot be frozen
// it goes on as it was.
//
// What the state file says is what the next daemon makes true, so it is
// written first.
func (n *Node) Freeze(ctx context.Context, i *Instance, cause string, inputs map[string]float64) error {
	i.sizing.Lock()
	defer i.sizing.Unlock()
	f, ok := i.box.(sandbox.Freezer)
	if !ok {
		return fmt.Errorf("freeze %s: its runtime cannot", i.info.ID)
	}
	if err := i.move(fleet.StateStandby); err != nil {
		return err
	}
	err := n.save(i)
	if err == nil {
		err = f.Freeze(ctx)
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		_ = i.move(fleet.StateReady)
		return errors.Join(err, f.Thaw(), n.save(i))
	}
	i.quiet()
	if err := f.Reclaim(); err != nil {
		n.cfg.Logger.Warn("move a standby's memory to swap", "instance", i.info.ID, "error", err)
	}
	e := n.newEvent(i, fleet.EventFreeze, cause)
	e.Inputs = inputs
	n.cfg.Events(e)
	return nil
}

// Thaw lets a standby go on. The caller makes the thaw event of the stages.
func (n *Node) Thaw(i *Instance, stages *fleet.Stages) error {
	began := time.Now()
	i.sizing.Lock()
	defer i.sizing.Unlock()
	select {
	case <-i.box.Done():
		return fmt.Errorf("thaw %s: %w", i.info.ID, sandbox.ErrGone)
	default:
	}
	if i.Info().State == fleet.StateReady {
		return nil // it was not frozen yet
	}
	f, ok := i.box.(sandbox.Freezer)
	if !ok {
		return fmt.Errorf("thaw %s: its runtime cannot", i.info.ID)
	}
	if err := f.Thaw(); err != nil {
		n.metrics.started(err, stages, fleet.StandbyStart)
		return err
	}
	if err := i.move(fleet.StateReady); err != nil {
		return err
	}
	stages.Claim = time.Since(began).Microseconds()
	n.metrics.started(nil, stages, fleet.StandbyStart)
	n.note(i)
	return nil
}
