package etcd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"strings"
	"sync"

	"go.uber.org/zap/zapcore"
)

// bridge hands what etcd logs to slog, from warnings on: its information is
// about itself.
type bridge struct {
	log    *slog.Logger
	fields []zapcore.Field
}

func (b *bridge) Enabled(l zapcore.Level) bool { return l >= zapcore.WarnLevel }

func (b *bridge) With(f []zapcore.Field) zapcore.Core {
	return &bridge{log: b.log, fields: append(b.fields[:len(b.fields):len(b.fields)], f...)}
}

func (b *bridge) Check(e zapcore.Entry, c *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if b.Enabled(e.Level) {
		return c.AddCore(e, b)
	}
	return c
}

// harmless is what every first start of a single member says.
var harmless = []string{
	"Running http and grpc server on single port. This is not recommended for production.",
	"simple token is not cryptographically signed",
	"Failed to detect schema version",
	"failed to update storage version",
}

func (b *bridge) Write(e zapcore.Entry, fields []zapcore.Field) error {
	if slices.Contains(harmless, e.Message) {
		return nil
	}
	enc := zapcore.NewMapObjectEncoder()
	for _, f := range append(b.fields[:len(b.fields):len(b.fields)], fields...) {
		f.AddTo(enc)
	}
	if text, ok := enc.Fields["error"].(string); ok {
		for _, end := range []string{"use of closed network connection", "erver closed", "server has been stopped"} {
			if strings.Contains(text, end) {
				return nil // that is how it stops
			}
		}
	}
	level := slog.LevelWarn
	if e.Level >= zapcore.ErrorLevel {
		level = slog.LevelError
	}
	args := make([]any, 0, 2*len(enc.Fields))
	for k, v := range enc.Fields {
		args = append(args, k, v)
	}
	b.log.Log(context.Background(), level, "etcd: "+e.Message, args...)
	return nil
}

func (b *bridge) Sync() error { return nil }

// fatal takes what etcd calls fatal or panics about. By itself etcd would end
// the process, and with it every request on its way; here only etcd's own
// goroutine ends, and the store is away.
type fatal struct {
	mu     sync.Mutex
	err    error
	closed chan struct{}
}

// OnWrite implements zapcore.CheckWriteHook: what follows the log entry never
// runs.
func (f *fatal) OnWrite(e *zapcore.CheckedEntry, fields []zapcore.Field) {
	f.record(e.Message, fields)
	runtime.Goexit()
}

// record keeps the first cause.
func (f *fatal) record(message string, fields []zapcore.Field) {
	err := errors.New(message)
	for _, field := range fields {
		if cause, ok := field.Interface.(error); ok {
			err = fmt.Errorf("%s: %w", message, cause)
		}
	}
	done := f.done()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil {
		f.err = err
		close(done)
	}
}

func (f *fatal) why() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

// done is closed with the first cause.
func (f *fatal) done() chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed == nil {
		f.closed = make(chan struct{})
	}
	return f.closed
}
