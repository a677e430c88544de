package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/fastcontainer/fastcontainer/internal/events"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/image"
	"github.com/fastcontainer/fastcontainer/internal/sandbox"
)

// Backend is what the interface shows and does.
type Backend interface {
	Version() Version
	Node(ctx context.Context) Node

	Apps(ctx context.Context) ([]App, error)
	App(ctx context.Context, name fleet.AppName) (AppDetail, error)
	// Plan tells an app's service level; wanted is the share of requests that
	// should meet no start.
	Plan(name fleet.AppName, wanted float64) (Plan, error)
	// Deploy returns when requests reach the new revision.
	Deploy(ctx context.Context, spec fleet.Spec, p image.Progress) (fleet.Revision, error)
	Rollback(ctx context.Context, name fleet.AppName) (fleet.Revision, error)
	SetStopped(ctx context.Context, name fleet.AppName, stopped bool) error
	Delete(ctx context.Context, name fleet.AppName, volumes bool) error

	Instances(app fleet.AppName) ([]Instance, error)
	Logs(ctx context.Context, name string, lines int, follow bool, w io.Writer) error
	Exec(ctx context.Context, name string, p sandbox.Process) (int, error)
	// Run runs one program in a container of its own.
	Run(ctx context.Context, spec fleet.Spec, io sandbox.Stdio) (int, error)

	Images(ctx context.Context) ([]Image, error)
	Pull(ctx context.Context, ref string, p image.Progress) (Image, error)
	RemoveImage(ctx context.Context, ref string) error
	CollectImages(ctx context.Context) (GCResult, error)

	Follow(ctx context.Context, app fleet.AppName, from events.From, f func(fleet.Event) error) error
	LastEvents(app fleet.AppName, n int) []fleet.Event
}

const (
	// maxBody of a request.
	maxBody = 1 << 20
	// maxLines of a log at once.
	maxLines = 100_000
	// shutdown bounds the wait for calls under way.
	shutdown = 5 * time.Second
)

// Server serves the management interface.
type Server struct {
	b       Backend
	log     *slog.Logger
	http    http.Server
	closing chan struct{} // closed when streams are to end
}

// NewServer makes a server of a backend. metrics is shown at /metrics.
func NewServer(b Backend, metrics prometheus.Gatherer, log *slog.Logger) *Server {
	s := &Server{b: b, log: log, closing: make(chan struct{})}
	mux := http.NewServeMux()
	for pattern, h := range map[string]func(http.ResponseWriter, *http.Request) error{
		"GET /v1/version":              s.version,
		"GET /v1/node":                 s.node,
		"GET /v1/apps":                 s.apps,
		"POST /v1/apps":                s.deploy,
		"GET /v1/apps/{app}":           s.app,
		"GET /v1/apps/{app}/plan":      s.plan,
		"DELETE /v1/apps/{app}":        s.remove,
		"POST /v1/apps/{app}/stop":     s.stop,
		"POST /v1/apps/{app}/start":    s.start,
		"POST /v1/apps/{app}/rollback": s.rollback,
		"GET /v1/instances":            s.instances,
		"GET /v1/logs/{name}":          s.logs,
		"GET /v1/events":               s.events,
		"GET /v1/exec/{name}":          s.exec,
		"GET /v1/run":                  s.run,
		"GET /v1/images":               s.images,
		"POST /v1/images":              s.pull,
		"DELETE /v1/images":            s.removeImage,
		"POST /v1/images/gc":           s.collect,
		"/": func(_ http.ResponseWriter, r *http.Request) error {
			return &fleet.Error{Op: r.Method, Subject: r.URL.Path, Kind: fleet.ErrNotFound, Hint: "client and daemon may be of different versions: fastcontainer version shows both"}
		},
	} {
		mux.HandleFunc(pattern, s.handler(h))
	}
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok\n") })
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	s.http = http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug)}
	return s
}

// Listen opens the socket, which only its owner may use. A socket that a
// killed daemon left is replaced; one that somebody serves is a
// fleet.ErrConflict.
func Listen(path string) (net.Listener, error) {
	conn, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		_ = conn.Close()
		return nil, &fleet.Error{Op: "listen", Subject: path, Kind: fleet.ErrConflict, Err: errors.New("a daemon serves it already"), Hint: "stop that daemon, or choose another --run directory"}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, &fleet.Error{Op: "listen", Subject: path, Err: err}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, &fleet.Error{Op: "listen", Subject: path, Err: err, Hint: "a socket's path has at most 107 bytes"}
	}
	// Its directory is closed to others already.
	if err := os.Chmod(path, 0o600); err != nil {
		_ = l.Close()
		return nil, &fleet.Error{Op: "listen", Subject: path, Err: err}
	}
	return l, nil
}

// Serve answers until Close.
func (s *Server) Serve(l net.Listener) error {
	if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// Close ends streams and waits a moment for other calls.
func (s *Server) Close() {
	close(s.closing)
	ctx, cancel := context.WithTimeout(context.Background(), shutdown)
	defer cancel()
	if s.http.Shutdown(ctx) != nil {
		_ = s.http.Close()
	}
}

func (s *Server) handler(h func(http.ResponseWriter, *http.Request) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithCancel(r.Context())
		defer cancel()
		go func() {
			select {
			case <-s.closing:
				cancel()
			case <-ctx.Done():
			}
		}()
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		if err := h(w, r.WithContext(ctx)); err != nil {
			status, e := toWire(err)
			if status == http.StatusInternalServerError {
				s.log.Error("management call failed", "method", r.Method, "path", r.URL.Path, "error", err)
			}
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(status)
			_ = json.NewEncoder(w).Encode(e)
		}
	}
}

func reply(w http.ResponseWriter, v any) error {
	w.Header().Set("Content-Type", "application/json")
	return json.NewEncoder(w).Encode(v)
}

func decode(r *http.Request, v any) error {
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return &fleet.Error{Op: "read request", Kind: fleet.ErrInvalid, Err: err}
	}
	return nil
}

func number(r *http.Request, key string, otherwise, most int) (int, error) {
	v := r.URL.Query().Get(key)
	if v == "" {
		return otherwise, nil
	}
	n, err := strconv.Atoi(v)
	if err != nil || n < 0 || n > most {
		return 0, &fleet.Error{Op: "read request", Subject: key, Kind: fleet.ErrInvalid, Err: fmt.Errorf("%q is not a number from 0 to %d", v, most)}
	}
	return n, nil
}

// stream writes one object a line, at once.
type stream struct {
	enc *json.Encoder
	out *http.ResponseController
}

func newStream(w http.ResponseWriter) *stream {
	w.Header().Set("Content-Type", "application/x-ndjson")
	return &stream{enc: json.NewEncoder(w), out: http.NewResponseController(w)}
}

func (s *stream) send(v any) error {
	if err := s.enc.Encode(v); err != nil {
		return err
	}
	return s.out.Flush()
}

// finish sends the error of a stream, whose status is on its way already.
func (s *stream) finish(err error) error {
	if err != nil {
		_, e := toWire(err)
		_ = s.send(DeployStep{Error: e})
	}
	return nil
}

func (s *Server) version(w http.ResponseWriter, _ *http.Request) error {
	return reply(w, s.b.Version())
}

func (s *Server) node(w http.ResponseWriter, r *http.Request) error {
	return reply(w, s.b.Node(r.Context()))
}

func (s *Server) apps(w http.ResponseWriter, r *http.Request) error {
	list, err := s.b.Apps(r.Context())
	if err != nil {
		return err
	}
	return reply(w, notNil(list))
}

// notNil makes an empty list of none: programs read [] more easily than null.
func notNil[T any](l []T) []T {
	if l == nil {
		return []T{}
	}
	return l
}

func appName(r *http.Request) fleet.AppName { return fleet.AppName(r.PathValue("app")) }

func (s *Server) app(w http.ResponseWriter, r *http.Request) error {
	d, err := s.b.App(r.Context(), appName(r))
	if err != nil {
		return err
	}
	return reply(w, d)
}

func (s *Server) plan(w http.ResponseWriter, r *http.Request) error {
	wanted := 0.99
	if v := r.URL.Query().Get("wanted"); v != "" {
		var err error
		if wanted, err = strconv.ParseFloat(v, 64); err != nil || !(wanted > 0 && wanted < 1) { //nolint:staticcheck // NaN is refused too
			return &fleet.Error{Op: "plan", Subject: r.PathValue("app"), Kind: fleet.ErrInvalid, Err: fmt.Errorf("%q is no share between 0 and 1", v)}
		}
	}
	p, err := s.b.Plan(appName(r), wanted)
	if err != nil {
		return err
	}
	return reply(w, p)
}

func (s *Server) deploy(w http.ResponseWriter, r *http.Request) error {
	var spec fleet.Spec
	if err := decode(r, &spec); err != nil {
		return err
	}
	out := newStream(w)
	rev, err := s.b.Deploy(r.Context(), spec, image.ProgressFunc(func(st image.Step) { _ = out.send(DeployStep{Progress: &st}) }))
	if err != nil {
		return out.finish(err)
	}
	rev.Spec.Env = hide(rev.Spec.Env)
	return out.send(DeployStep{Revision: &rev})
}

// hide keeps names of variables, whose values may be secrets.
func hide(env map[string]string) map[string]string {
	out := make(map[string]string, len(env))
	for k := range env {
		out[k] = "(hidden)"
	}
	return out
}

func (s *Server) remove(w http.ResponseWriter, r *http.Request) error {
	if err := s.b.Delete(r.Context(), appName(r), r.URL.Query().Get("volumes") == "true"); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (s *Server) stop(w http.ResponseWriter, r *http.Request) error { return s.setStopped(w, r, true) }

func (s *Server) start(w http.ResponseWriter, r *http.Request) error {
	return s.setStopped(w, r, false)
}

func (s *Server) setStopped(w http.ResponseWriter, r *http.Request, stopped bool) error {
	if err := s.b.SetStopped(r.Context(), appName(r), stopped); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (s *Server) rollback(w http.ResponseWriter, r *http.Request) error {
	rev, err := s.b.Rollback(r.Context(), appName(r))
	if err != nil {
		return err
	}
	rev.Spec.Env = hide(rev.Spec.Env)
	return reply(w, rev)
}

func (s *Server) instances(w http.ResponseWriter, r *http.Request) error {
	list, err := s.b.Instances(fleet.AppName(r.URL.Query().Get("app")))
	if err != nil {
		return err
	}
	return reply(w, notNil(list))
}

func (s *Server) logs(w http.ResponseWriter, r *http.Request) error {
	lines, err := number(r, "lines", 100, maxLines)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	follow := r.URL.Query().Get("follow") == "true"
	out := &flushing{w: w, out: http.NewResponseController(w)}
	if follow {
		_ = out.out.Flush() // the client learns that it is connected
	}
	err = s.b.Logs(r.Context(), r.PathValue("name"), lines, follow, out)
	if out.wrote || r.Context().Err() != nil {
		err = nil // the answer has begun, or nobody waits for it
	}
	return err
}

type flushing struct {
	w     io.Writer
	out   *http.ResponseController
	wrote bool
}

func (f *flushing) Write(p []byte) (int, error) {
	f.wrote = true
	n, err := f.w.Write(p)
	if err == nil {
		err = f.out.Flush()
	}
	return n, err
}

func (s *Server) events(w http.ResponseWriter, r *http.Request) error {
	last, err := number(r, "last", 100, maxLines)
	if err != nil {
		return err
	}
	after, err := number(r, "after", 0, 1<<53)
	if err != nil {
		return err
	}
	app := fleet.AppName(r.URL.Query().Get("app"))
	out := newStream(w)
	if r.URL.Query().Get("follow") != "true" {
		for _, e := range s.b.LastEvents(app, last) {
			if e.Seq <= uint64(after) { //nolint:gosec // not negative
				continue
			}
			if err := out.send(e); err != nil {
				return nil //nolint:nilerr // the client has left
			}
		}
		return nil
	}
	_ = out.out.Flush()
	_ = s.b.Follow(r.Context(), app, events.From{After: uint64(after), Last: last}, func(e fleet.Event) error { return out.send(e) }) //nolint:gosec // not negative
	return nil
}

func (s *Server) images(w http.ResponseWriter, r *http.Request) error {
	list, err := s.b.Images(r.Context())
	if err != nil {
		return err
	}
	return reply(w, notNil(list))
}

func (s *Server) pull(w http.ResponseWriter, r *http.Request) error {
	var req PullRequest
	if err := decode(r, &req); err != nil {
		return err
	}
	out := newStream(w)
	img, err := s.b.Pull(r.Context(), req.Ref, image.ProgressFunc(func(st image.Step) { _ = out.send(DeployStep{Progress: &st}) }))
	if err != nil {
		return out.finish(err)
	}
	return out.send(DeployStep{Image: &img})
}

func (s *Server) removeImage(w http.ResponseWriter, r *http.Request) error {
	if err := s.b.RemoveImage(r.Context(), r.URL.Query().Get("ref")); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (s *Server) collect(w http.ResponseWriter, r *http.Request) error {
	res, err := s.b.CollectImages(r.Context())
	if err != nil {
		return err
	}
	return reply(w, res)
}
