// Package daemon is the whole service in one process: it reads the
// configuration, builds every part in order, joins them, and stops them in
// reverse. It decides nothing itself.
package daemon

import (
	"context"
	"errors"
	"log/slog"
)

// Serve runs a node until ctx ends.
func Serve(ctx context.Context, c Config, log *slog.Logger) error {
	return errors.New("daemon is being put together")
}
