package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/fastcontainer/fastcontainer/internal/events"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/image"
	"github.com/fastcontainer/fastcontainer/internal/sandbox"
)

// fake is a backend whose every call fails with err, or does the least.
type fake struct {
	Backend
	err  error
	spec fleet.Spec
}

func (f *fake) Version() Version                    { return Version{Version: "v"} }
func (f *fake) Apps(context.Context) ([]App, error) { return nil, f.err }
func (f *fake) App(context.Context, fleet.AppName) (AppDetail, error) {
	return AppDetail{}, f.err
}

func (f *fake) Deploy(_ context.Context, s fleet.Spec, p image.Progress) (fleet.Revision, error) {
	f.spec = s
	for n := range 3 {
		p.Step(image.Step{Ref: s.Image, Done: fleet.Bytes(n)})
	}
	return fleet.Revision{ID: "a@1", Spec: s}, f.err
}

func (f *fake) Exec(ctx context.Context, _ string, p sandbox.Process) (int, error) {
	if f.err != nil {
		return 0, f.err
	}
	_, _ = fmt.Fprint(p.Stdio.Stderr, strings.Join(p.Args, "|"))
	_, err := io.Copy(p.Stdio.Stdout, p.Stdio.Stdin)
	if ctx.Err() != nil {
		return 0, ctx.Err()
	}
	return 7, err
}

func (f *fake) Follow(ctx context.Context, _ fleet.AppName, _ events.From, g func(fleet.Event) error) error {
	if err := g(fleet.Event{Type: fleet.EventStart}); err != nil {
		return err
	}
	<-ctx.Done()
	return ctx.Err()
}

func (f *fake) Logs(_ context.Context, _ string, _ int, _ bool, w io.Writer) error {
	if f.err == nil {
		_, _ = io.WriteString(w, "line\n")
	}
	return f.err
}

func serve(t *testing.T, f *fake) (*Client, string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "api")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "api.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	s := NewServer(f, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	done := make(chan error)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
		_ = os.RemoveAll(dir)
	})
	c, err := NewClient("unix://" + path)
	if err != nil {
		t.Fatal(err)
	}
	return c, path
}

// An error keeps its kind, its sentence and its hint over the wire.
func TestErrors_ComeAcross(t *testing.T) {
	f := &fake{}
	c, _ := serve(t, f)
	for _, k := range kinds {
		f.err = &fleet.Error{Op: "do", Subject: "it", Kind: k.err, Err: errors.New("why"), Hint: "try"}
		_, err := c.App(t.Context(), "a")
		if !errors.Is(err, k.err) || err.Error() != "do it: why" || fleet.Hint(err) != "try" {
			t.Errorf("%v: got %v, hint %q", k.err, err, fleet.Hint(err))
		}
		if _, err = c.Deploy(t.Context(), fleet.Spec{}, nil); !errors.Is(err, k.err) || fleet.Hint(err) != "try" {
			t.Errorf("%v in a stream: got %v", k.err, err)
		}
		if _, err = c.Exec(t.Context(), "a", ExecRequest{Args: []string{"x"}}, sandbox.Stdio{}); !errors.Is(err, k.err) {
			t.Errorf("%v in a session: got %v", k.err, err)
		}
		if err = c.Logs(t.Context(), "a", 1, false, io.Discard); !errors.Is(err, k.err) {
			t.Errorf("%v of logs: got %v", k.err, err)
		}
	}
	f.err = errors.New("odd")
	if _, err := c.App(t.Context(), "a"); err == nil || err.Error() != "odd" {
		t.Errorf("got %v", err)
	}
}

func TestDeploy_StreamsProgressAndHidesVariables(t *testing.T) {
	f := &fake{}
	c, _ := serve(t, f)
	steps := 0
	rev, err := c.Deploy(t.Context(), fleet.Spec{Name: "a", Image: "i", Env: map[string]string{"KEY": "secret"}}, image.ProgressFunc(func(image.Step) { steps++ }))
	if err != nil || rev.ID != "a@1" || steps != 3 {
		t.Errorf("got %+v, %d steps, %v", rev, steps, err)
	}
	if rev.Spec.Env["KEY"] == "secret" || f.spec.Env["KEY"] != "secret" {
		t.Errorf("the client got %v, the backend %v", rev.Spec.Env, f.spec.Env)
	}
}

func TestExec_Streams(t *testing.T) {
	c, _ := serve(t, &fake{})
	var out, errs strings.Builder
	in := strings.Repeat("0123456789", 20_000) // many messages
	code, err := c.Exec(t.Context(), "a", ExecRequest{Args: []string{"x", "y"}}, sandbox.Stdio{Stdin: strings.NewReader(in), Stdout: &out, Stderr: &errs})
	if err != nil || code != 7 || out.String() != in || errs.String() != "x|y" {
		t.Errorf("code %d, %d bytes, %q, %v", code, out.Len(), errs.String(), err)
	}
	if _, err := c.Exec(t.Context(), "a", ExecRequest{}, sandbox.Stdio{}); !errors.Is(err, fleet.ErrInvalid) {
		t.Errorf("no program: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	r, w := io.Pipe()
	defer func() { _ = w.Close() }()
	go cancel()
	if _, err := c.Exec(ctx, "a", ExecRequest{Args: []string{"x"}}, sandbox.Stdio{Stdin: r}); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
}

// Followers end when the server does: see the cleanup of serve.
func TestEvents_EndWithTheServer(t *testing.T) {
	c, _ := serve(t, &fake{})
	got := make(chan struct{})
	go func() {
		_ = c.Events(context.Background(), "", events.From{}, true, func(fleet.Event) error { close(got); return nil })
	}()
	<-got
}

func TestHostileRequests(t *testing.T) {
	c, path := serve(t, &fake{})
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", st.Mode(), err)
	}
	if _, err := Listen(path); !errors.Is(err, fleet.ErrConflict) || fleet.Hint(err) == "" {
		t.Errorf("a second server: %v", err)
	}
	for name, r := range map[string]struct {
		method, path, body string
		want               error
	}{
		"no such path":   {http.MethodGet, "/v2/apps", "", fleet.ErrNotFound},
		"no JSON":        {http.MethodPost, "/v1/apps", "{", fleet.ErrInvalid},
		"unknown key":    {http.MethodPost, "/v1/apps", `{"nam":"x"}`, fleet.ErrInvalid},
		"too large":      {http.MethodPost, "/v1/apps", `{"name":"` + strings.Repeat("x", maxBody) + `"}`, fleet.ErrInvalid},
		"wrong number":   {http.MethodGet, "/v1/logs/a?lines=-1", "", fleet.ErrInvalid},
		"too many lines": {http.MethodGet, "/v1/events?last=99999999", "", fleet.ErrInvalid},
		"no spec":        {http.MethodGet, "/v1/exec/a", "", fleet.ErrInvalid},
	} {
		req, err := http.NewRequestWithContext(t.Context(), r.method, base+r.path, strings.NewReader(r.body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.http.Do(req)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if resp.StatusCode < 400 {
			t.Errorf("%s: %s", name, resp.Status)
		}
		if err := failure(resp); !errors.Is(err, r.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestClient_NobodyThere(t *testing.T) {
	c, err := NewClient("unix:///no/such/socket")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Apps(t.Context()); !errors.Is(err, fleet.ErrUnavailable) || !strings.Contains(fleet.Hint(err), "fastcontainer serve") {
		t.Errorf("got %v, hint %q", err, fleet.Hint(err))
	}
	for _, s := range []string{"", "tcp://x", "unix://relative", "http://x"} {
		if _, err := NewClient(s); !errors.Is(err, fleet.ErrInvalid) {
			t.Errorf("%q: %v", s, err)
		}
	}
}
