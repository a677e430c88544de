package api

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"sync"

	"github.com/coder/websocket"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/sandbox"
)

// Exec and run are WebSockets. A binary message's first byte says what the
// rest is: standard input (client to daemon), standard output or standard
// error (daemon to client), the end of input (empty), or the size of the
// client's terminal (JSON of sandbox.WindowSize). The daemon's last message is
// text: a Result.
const (
	msgStdin byte = iota
	msgStdout
	msgStderr
	msgEOF
	msgSize
)

// Result is how a program in a session ended.
type Result struct {
	ExitCode int    `json:"exit_code"`
	Error    *Error `json:"error,omitempty"`
}

// maxMessage bounds one message; longer writes are cut into several.
const maxMessage = 32 << 10

// channel sends one stream as messages.
type channel struct {
	ctx  context.Context //nolint:containedctx // of one session
	conn *websocket.Conn
	kind byte
}

func (c *channel) Write(p []byte) (int, error) {
	n := 0
	for len(p) > 0 {
		part := p[:min(len(p), maxMessage)]
		if err := c.conn.Write(c.ctx, websocket.MessageBinary, append([]byte{c.kind}, part...)); err != nil {
			return n, err
		}
		n += len(part)
		p = p[len(part):]
	}
	return n, nil
}

// session runs f with the streams of a WebSocket, and tells its result.
func (s *Server) session(w http.ResponseWriter, r *http.Request, tty bool, f func(ctx context.Context, io sandbox.Stdio) (int, error)) error {
	conn, err := websocket.Accept(w, r, &websocket.AcceptOptions{CompressionMode: websocket.CompressionDisabled})
	if err != nil {
		return nil // answered already
	}
	defer func() { _ = conn.CloseNow() }()
	conn.SetReadLimit(maxMessage + 1)
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	stdin, feed := io.Pipe()
	sizes := make(chan sandbox.WindowSize, 1)
	var reading sync.WaitGroup
	reading.Go(func() {
		defer cancel() // a client that leaves ends its program
		receive(ctx, conn, feed, sizes)
	})
	streams := sandbox.Stdio{Stdin: stdin, Stdout: &channel{ctx, conn, msgStdout}, Stderr: &channel{ctx, conn, msgStderr}, TTY: tty, Resize: sizes}
	res := Result{}
	code, err := f(ctx, streams)
	res.ExitCode = code
	if err != nil {
		_, res.Error = toWire(err)
	}
	_ = stdin.Close()
	b, err := json.Marshal(res)
	if err == nil {
		_ = conn.Write(ctx, websocket.MessageText, b)
	}
	_ = conn.Close(websocket.StatusNormalClosure, "")
	cancel()
	reading.Wait()
	return nil
}

// receive takes the client's messages.
func receive(ctx context.Context, conn *websocket.Conn, stdin *io.PipeWriter, sizes chan sandbox.WindowSize) {
	defer func() { _ = stdin.Close() }()
	for {
		_, b, err := conn.Read(ctx)
		if err != nil {
			return
		}
		if len(b) == 0 {
			continue
		}
		switch b[0] {
		case msgStdin:
			_, _ = stdin.Write(b[1:]) // the program may have stopped reading: its right
		case msgEOF:
			_ = stdin.Close()
		case msgSize:
			var size sandbox.WindowSize
			if json.Unmarshal(b[1:], &size) != nil {
				continue
			}
			select { // only the newest size matters
			case <-sizes:
			default:
			}
			select {
			case sizes <- size:
			default:
			}
		}
	}
}

func spec[T any](r *http.Request) (T, error) {
	var v T
	if err := json.Unmarshal([]byte(r.Header.Get("X-Spec")), &v); err != nil {
		return v, &fleet.Error{Op: "read request", Kind: fleet.ErrInvalid, Err: err}
	}
	return v, nil
}

func (s *Server) exec(w http.ResponseWriter, r *http.Request) error {
	req, err := spec[ExecRequest](r)
	if err != nil {
		return err
	}
	if len(req.Args) == 0 {
		return &fleet.Error{Op: "exec", Kind: fleet.ErrInvalid, Err: errors.New("no program is given")}
	}
	return s.session(w, r, req.TTY, func(ctx context.Context, streams sandbox.Stdio) (int, error) {
		return s.b.Exec(ctx, r.PathValue("name"), sandbox.Process{Args: req.Args, Env: req.Env, Dir: req.Dir, User: req.User, Stdio: streams})
	})
}

func (s *Server) run(w http.ResponseWriter, r *http.Request) error {
	req, err := spec[RunRequest](r)
	if err != nil {
		return err
	}
	return s.session(w, r, req.TTY, func(ctx context.Context, streams sandbox.Stdio) (int, error) {
		return s.b.Run(ctx, req.Spec, streams)
	})
}
