package api

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/coder/websocket"

	"github.com/fastcontainer/fastcontainer/internal/events"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/image"
	"github.com/fastcontainer/fastcontainer/internal/sandbox"
)

// DefaultServer is where the daemon listens unless it is told otherwise.
const DefaultServer = "unix:///run/fastcontainer/api.sock"

// Client speaks to a daemon. Errors have the kinds and hints of package fleet.
type Client struct {
	server string
	http   *http.Client
}

// NewClient makes a client of unix:///PATH.
func NewClient(server string) (*Client, error) {
	path, ok := strings.CutPrefix(server, "unix://")
	if !ok || !strings.HasPrefix(path, "/") {
		return nil, &fleet.Error{Op: "connect to", Subject: server, Kind: fleet.ErrInvalid, Err: errors.New("it is not of the form unix:///PATH")}
	}
	d := net.Dialer{Timeout: 5 * time.Second}
	return &Client{server: server, http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return d.DialContext(ctx, "unix", path) },
	}}}, nil
}

const base = "http://fastcontainer"

func (c *Client) do(ctx context.Context, method, path string, body any) (*http.Response, error) {
	var r io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		r = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, base+path, r)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.unreachable(ctx, err)
	}
	if resp.StatusCode < 300 {
		return resp, nil
	}
	return nil, failure(resp)
}

// failure reads the error of an answer.
func failure(resp *http.Response) error {
	defer func() { _ = resp.Body.Close() }()
	var e Error
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxBody)).Decode(&e); err != nil || e.Message == "" {
		e = Error{Message: "the daemon answered " + resp.Status}
	}
	return fromWire(&e)
}

// unreachable says why there was no answer.
func (c *Client) unreachable(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if u, ok := errors.AsType[*url.Error](err); ok {
		err = u.Err
	}
	e := &fleet.Error{Op: "connect to", Subject: c.server, Kind: fleet.ErrUnavailable, Err: err}
	switch {
	case errors.Is(err, syscall.EACCES):
		e.Hint = "only root may use this socket: try sudo"
	case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.ECONNREFUSED):
		e.Hint = "no daemon runs there: start one with fastcontainer serve, or name its socket with --server"
	}
	return e
}

func get[T any](ctx context.Context, c *Client, method, path string) (T, error) {
	var v T
	resp, err := c.do(ctx, method, path, nil)
	if err != nil {
		return v, err
	}
	defer func() { _ = resp.Body.Close() }()
	if err := json.NewDecoder(resp.Body).Decode(&v); err != nil {
		return v, fmt.Errorf("read answer of %s: %w", c.server, err)
	}
	return v, nil
}

func (c *Client) call(ctx context.Context, method, path string) error {
	resp, err := c.do(ctx, method, path, nil)
	if err == nil {
		_ = resp.Body.Close()
	}
	return err
}

// lines calls f for each object of a stream.
func lines[T any](r io.Reader, f func(T) error) error {
	in := bufio.NewReader(r)
	for {
		line, err := in.ReadBytes('\n')
		if len(line) > 0 && err == nil {
			var v T
			if err := json.Unmarshal(line, &v); err != nil {
				return fmt.Errorf("read answer: %w", err)
			}
			if err := f(v); err != nil {
				return err
			}
			continue
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		return err
	}
}

func appPath(name fleet.AppName, more string) string {
	return "/v1/apps/" + url.PathEscape(string(name)) + more
}

// Version of the daemon.
func (c *Client) Version(ctx context.Context) (Version, error) {
	return get[Version](ctx, c, http.MethodGet, "/v1/version")
}

// Node that the daemon runs on.
func (c *Client) Node(ctx context.Context) (Node, error) {
	return get[Node](ctx, c, http.MethodGet, "/v1/node")
}

// Apps that are deployed.
func (c *Client) Apps(ctx context.Context) ([]App, error) {
	return get[[]App](ctx, c, http.MethodGet, "/v1/apps")
}

// App in detail.
func (c *Client) App(ctx context.Context, name fleet.AppName) (AppDetail, error) {
	return get[AppDetail](ctx, c, http.MethodGet, appPath(name, ""))
}

// Plan tells an app's service level; wanted is the share of the requests, 0 to
// 1, that should meet no start.
func (c *Client) Plan(ctx context.Context, name fleet.AppName, wanted float64) (Plan, error) {
	return get[Plan](ctx, c, http.MethodGet, appPath(name, "/plan?wanted="+strconv.FormatFloat(wanted, 'g', -1, 64)))
}

// steps reads a stream of a deploy or a pull to its end.
func (c *Client) steps(ctx context.Context, path string, body any, p image.Progress) (DeployStep, error) {
	var last DeployStep
	resp, err := c.do(ctx, http.MethodPost, path, body)
	if err != nil {
		return last, err
	}
	defer func() { _ = resp.Body.Close() }()
	err = lines(resp.Body, func(s DeployStep) error {
		if s.Progress != nil && p != nil {
			p.Step(*s.Progress)
		}
		last = s
		return nil
	})
	if err == nil && last.Error != nil {
		err = fromWire(last.Error)
	}
	if err == nil && last.Revision == nil && last.Image == nil {
		err = &fleet.Error{Op: "deploy", Kind: fleet.ErrUnavailable, Err: errors.New("the daemon ended before it had finished"), Hint: "try again"}
	}
	return last, err
}

// Deploy makes a revision; it returns when requests reach it.
func (c *Client) Deploy(ctx context.Context, spec fleet.Spec, p image.Progress) (fleet.Revision, error) {
	s, err := c.steps(ctx, "/v1/apps", spec, p)
	if err != nil {
		return fleet.Revision{}, err
	}
	return *s.Revision, nil
}

// Rollback makes the previous revision current.
func (c *Client) Rollback(ctx context.Context, name fleet.AppName) (fleet.Revision, error) {
	return get[fleet.Revision](ctx, c, http.MethodPost, appPath(name, "/rollback"))
}

// SetStopped stops or starts an app.
func (c *Client) SetStopped(ctx context.Context, name fleet.AppName, stopped bool) error {
	if stopped {
		return c.call(ctx, http.MethodPost, appPath(name, "/stop"))
	}
	return c.call(ctx, http.MethodPost, appPath(name, "/start"))
}

// Delete removes an app, and its volumes if asked.
func (c *Client) Delete(ctx context.Context, name fleet.AppName, volumes bool) error {
	return c.call(ctx, http.MethodDelete, appPath(name, "?volumes="+strconv.FormatBool(volumes)))
}

// Instances of an app, or of all.
func (c *Client) Instances(ctx context.Context, app fleet.AppName) ([]Instance, error) {
	return get[[]Instance](ctx, c, http.MethodGet, "/v1/instances?app="+url.QueryEscape(string(app)))
}

// Logs writes the last lines of an app or instance, and what follows them.
func (c *Client) Logs(ctx context.Context, name string, n int, follow bool, w io.Writer) error {
	resp, err := c.do(ctx, http.MethodGet, fmt.Sprintf("/v1/logs/%s?lines=%d&follow=%t", url.PathEscape(name), n, follow), nil)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	_, err = io.Copy(w, resp.Body)
	return err
}

// Events calls f for the last events of an app, or of all, and for what
// follows them.
func (c *Client) Events(ctx context.Context, app fleet.AppName, from events.From, follow bool, f func(fleet.Event) error) error {
	resp, err := c.do(ctx, http.MethodGet, fmt.Sprintf("/v1/events?app=%s&last=%d&after=%d&follow=%t", url.QueryEscape(string(app)), from.Last, from.After, follow), nil)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	return lines(resp.Body, f)
}

// Images on the node.
func (c *Client) Images(ctx context.Context) ([]Image, error) {
	return get[[]Image](ctx, c, http.MethodGet, "/v1/images")
}

// Pull fetches or imports an image.
func (c *Client) Pull(ctx context.Context, ref string, p image.Progress) (Image, error) {
	s, err := c.steps(ctx, "/v1/images", PullRequest{Ref: ref}, p)
	if err != nil {
		return Image{}, err
	}
	return *s.Image, nil
}

// RemoveImage removes an image by reference or digest.
func (c *Client) RemoveImage(ctx context.Context, ref string) error {
	return c.call(ctx, http.MethodDelete, "/v1/images?ref="+url.QueryEscape(ref))
}

// CollectImages frees what nothing uses.
func (c *Client) CollectImages(ctx context.Context) (GCResult, error) {
	return get[GCResult](ctx, c, http.MethodPost, "/v1/images/gc")
}

// Exec runs a program inside an instance, and gives its exit code.
func (c *Client) Exec(ctx context.Context, name string, req ExecRequest, streams sandbox.Stdio) (int, error) {
	return c.session(ctx, "/v1/exec/"+url.PathEscape(name), req, streams)
}

// Run runs a program in a container of its own, and gives its exit code.
func (c *Client) Run(ctx context.Context, req RunRequest, streams sandbox.Stdio) (int, error) {
	return c.session(ctx, "/v1/run", req, streams)
}

func (c *Client) session(ctx context.Context, path string, req any, streams sandbox.Stdio) (int, error) {
	b, err := json.Marshal(req)
	if err != nil {
		return 0, err
	}
	//nolint:bodyclose // the library says that it never needs to be closed
	conn, resp, err := websocket.Dial(ctx, base+path, &websocket.DialOptions{HTTPClient: c.http, HTTPHeader: http.Header{"X-Spec": {string(b)}}})
	if err != nil {
		if resp != nil && resp.StatusCode >= 300 {
			return 0, failure(resp)
		}
		return 0, c.unreachable(ctx, err)
	}
	defer func() { _ = conn.CloseNow() }()
	conn.SetReadLimit(maxBody)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var sending sync.WaitGroup
	if streams.Resize != nil {
		sending.Go(func() { sendSizes(ctx, conn, streams.Resize) })
	}
	go func() { // a terminal that is read from cannot be interrupted
		if streams.Stdin != nil {
			_, _ = io.Copy(&channel{ctx, conn, msgStdin}, streams.Stdin)
		}
		_ = conn.Write(ctx, websocket.MessageBinary, []byte{msgEOF})
	}()
	code, err := output(ctx, conn, streams)
	cancel()
	sending.Wait()
	return code, err
}

func sendSizes(ctx context.Context, conn *websocket.Conn, sizes <-chan sandbox.WindowSize) {
	for {
		select {
		case <-ctx.Done():
			return
		case size, ok := <-sizes:
			if !ok {
				return
			}
			if b, err := json.Marshal(size); err == nil {
				_ = conn.Write(ctx, websocket.MessageBinary, append([]byte{msgSize}, b...))
			}
		}
	}
}

// output copies what the program says until its result comes.
func output(ctx context.Context, conn *websocket.Conn, streams sandbox.Stdio) (int, error) {
	for {
		kind, b, err := conn.Read(ctx)
		if err != nil {
			if ctx.Err() != nil {
				return 0, context.Cause(ctx)
			}
			return 0, &fleet.Error{Op: "exec", Kind: fleet.ErrUnavailable, Err: errors.New("the daemon ended the session"), Hint: "it may have been restarted"}
		}
		if kind == websocket.MessageText {
			var res Result
			if err := json.Unmarshal(b, &res); err != nil {
				return 0, fmt.Errorf("read result: %w", err)
			}
			if res.Error != nil {
				return res.ExitCode, fromWire(res.Error)
			}
			return res.ExitCode, nil
		}
		if len(b) == 0 {
			continue
		}
		w := streams.Stdout
		if b[0] == msgStderr {
			w = streams.Stderr
		}
		if w != nil {
			if _, err := w.Write(b[1:]); err != nil {
				return 0, err
			}
		}
	}
}
