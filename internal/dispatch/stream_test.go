package dispatch

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

func echoSocket(w http.ResponseWriter, r *http.Request) {
	c, err := websocket.Accept(w, r, &websocket.AcceptOptions{InsecureSkipVerify: true, Subprotocols: []string{"chat"}})
	if err != nil {
		return
	}
	defer func() { _ = c.CloseNow() }()
	c.SetReadLimit(1 << 20)
	for {
		kind, b, err := c.Read(r.Context())
		if err != nil {
			return
		}
		if c.Write(r.Context(), kind, b) != nil {
			return
		}
	}
}

func (f *front) socket(t *testing.T, kind string) *websocket.Conn {
	t.Helper()
	c, _, err := websocket.Dial(t.Context(), strings.Replace(f.url(kind, "/ws"), "http", "ws", 1),
		&websocket.DialOptions{HTTPClient: f.client(kind), Subprotocols: []string{"chat"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.CloseNow() })
	c.SetReadLimit(1 << 20)
	return c
}

func TestWebSocket_Echo(t *testing.T) {
	f := newFront(t, nil)
	f.serve(echoSocket)
	for _, kind := range []string{"h1", "h1s"} {
		t.Run(kind, func(t *testing.T) {
			c := f.socket(t, kind)
			if c.Subprotocol() != "chat" {
				t.Errorf("subprotocol %q", c.Subprotocol())
			}
			for _, n := range []int{0, 1, 125, 126, 65535, 65536, 500_000} {
				msg := strings.Repeat("m", n)
				if err := c.Write(t.Context(), websocket.MessageText, []byte(msg)); err != nil {
					t.Fatal(err)
				}
				_, got, err := c.Read(t.Context())
				if err != nil || string(got) != msg {
					t.Fatalf("%d bytes came back as %d, %v", n, len(got), err)
				}
			}
			if err := c.Close(websocket.StatusNormalClosure, "bye"); err != nil {
				t.Error(err)
			}
		})
	}
	eventually(t, "leases are given back", func() bool { return f.app.released.Load() == 2 })
	if n := f.srv.metrics.tunnels.Load(); n != 0 {
		t.Errorf("%d tunnels counted", n)
	}
}

func TestWebSocket_AppRefusesUpgrade(t *testing.T) {
	f := newFront(t, nil)
	f.serve(func(w http.ResponseWriter, r *http.Request) { http.Error(w, "no sockets", http.StatusForbidden) })
	_, res, err := websocket.Dial(t.Context(), "ws://app.test/ws", &websocket.DialOptions{HTTPClient: f.client("h1")})
	if err == nil || res == nil || res.StatusCode != 403 {
		t.Fatalf("got %v, %v", res, err)
	}
}

// The instance wants to be rid of its sockets: both sides get 1001.
func TestWebSocket_ClosingSendsGoingAway(t *testing.T) {
	f := newFront(t, nil)
	appSaw := make(chan websocket.StatusCode, 1)
	in := f.serve(func(w http.ResponseWriter, r *http.Request) {
		c, err := websocket.Accept(w, r, nil)
		if err != nil {
			return
		}
		_, _, err = c.Read(r.Context())
		appSaw <- websocket.CloseStatus(err)
	})
	c := f.socket(t, "h1")
	close(in.closing)
	_, _, err := c.Read(t.Context())
	if got := websocket.CloseStatus(err); got != websocket.StatusGoingAway {
		t.Errorf("client saw %v, %v", got, err)
	}
	if got := <-appSaw; got != websocket.StatusGoingAway {
		t.Errorf("app saw %v", got)
	}
	eventually(t, "the lease is given back", func() bool { return f.app.released.Load() == 1 })
}

func TestWebSocket_ShutdownSendsGoingAway(t *testing.T) {
	f := newFront(t, nil)
	f.serve(echoSocket)
	c := f.socket(t, "h1s")
	var wg sync.WaitGroup
	wg.Go(f.stop)
	_, _, err := c.Read(t.Context())
	if got := websocket.CloseStatus(err); got != websocket.StatusGoingAway {
		t.Errorf("got %v, %v", got, err)
	}
	wg.Wait()
}

// A close frame never lands inside another frame; a stuck one is cut.
func TestWebSocket_ClosingWithinFrame(t *testing.T) {
	f := newFront(t, func(c *Config) { c.CloseGrace = 100 * time.Millisecond })
	more := make(chan struct{})
	in := f.raw(func(c net.Conn) {
		r := newRawConn(t, c)
		for r.line() != "" {
		}
		r.send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n\x82\x04ab")
		<-more
		r.send("cd\x82\x02no")
		_, _ = io.Copy(io.Discard, c)
	})
	c := dial(t, f.http)
	c.send("GET /ws HTTP/1.1\r\nHost: app.test\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\r\n")
	for c.line() != "" {
	}
	half := make([]byte, 4)
	if _, err := io.ReadFull(c.r, half); err != nil || string(half) != "\x82\x04ab" {
		t.Fatalf("got %q, %v", half, err)
	}
	close(in.closing)
	eventually(t, "the tunnel knows", func() bool {
		f.srv.tmu.Lock()
		defer f.srv.tmu.Unlock()
		for tn := range f.srv.open {
			tn.down.mu.Lock()
			defer tn.down.mu.Unlock()
			return tn.down.closing
		}
		return false
	})
	close(more)
	if got := c.ended(); got != "cd\x88\x02\x03\xe9" {
		t.Errorf("got %q", got)
	}
}

// Any other protocol may be upgraded to; each direction ends by itself.
func TestUpgrade_OtherProtocolHalfClose(t *testing.T) {
	f := newFront(t, nil)
	f.raw(func(c net.Conn) {
		r := newRawConn(t, c)
		for r.line() != "" {
		}
		r.send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: rot/1\r\nX-Extra: 1\r\n\r\nhello ")
		all, _ := io.ReadAll(r.r) // until the client's half is closed
		r.send(strings.ToUpper(string(all)))
	})
	c := dial(t, f.http)
	c.send("GET / HTTP/1.1\r\nHost: app.test\r\nConnection: Upgrade\r\nUpgrade: rot/1\r\n\r\n")
	head := ""
	for l := c.line(); l != ""; l = c.line() {
		head += l + "\n"
	}
	if !strings.HasPrefix(head, "HTTP/1.1 101") || !strings.Contains(head, "X-Extra: 1\n") || !strings.Contains(head, "Upgrade: rot/1\n") {
		t.Fatalf("got %q", head)
	}
	c.send("some bytes\nbare lines\n")
	_ = c.Conn.(*net.TCPConn).CloseWrite()
	if got := c.ended(); got != "hello SOME BYTES\nBARE LINES\n" {
		t.Errorf("got %q", got)
	}
}

// Without 101 the connection ends: its framing is not followed any more.
func TestUpgrade_NotTakenClosesConnection(t *testing.T) {
	f := newFront(t, nil)
	f.serve(func(w http.ResponseWriter, r *http.Request) {
		_, _ = fmt.Fprintf(w, "upgrade=%q settings=%q", r.Header.Get("Upgrade"), r.Header.Get("Http2-Settings"))
	})
	c := dial(t, f.http)
	c.send("GET / HTTP/1.1\r\nHost: app.test\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n")
	if _, body := c.response("GET"); body != `upgrade="" settings=""` {
		t.Errorf("app saw %s", body)
	}
	if rest := c.ended(); rest != "" {
		t.Errorf("then %q", rest)
	}
}

func TestEvents_FlushedAtOnceAndEndedCleanly(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			f := newFront(t, nil)
			next := make(chan string)
			in := f.serve(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", "text/event-stream")
				w.(http.Flusher).Flush()
				for {
					select {
					case s := <-next:
						_, _ = fmt.Fprintf(w, "data: %s\n\n", s)
						w.(http.Flusher).Flush()
					case <-r.Context().Done():
						return
					}
				}
			})
			res, err := f.client(kind).Get(f.url(kind, "/events"))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = res.Body.Close() }()
			r := bufio.NewReader(res.Body)
			for i := range 3 {
				next <- fmt.Sprint(i)
				if l, err := r.ReadString('\n'); err != nil || l != fmt.Sprintf("data: %d\n", i) {
					t.Fatalf("got %q, %v", l, err)
				}
				_, _ = r.ReadString('\n')
			}
			close(in.closing)
			if rest, err := io.ReadAll(r); err != nil || len(rest) != 0 {
				t.Errorf("the stream ended with %q, %v", rest, err)
			}
			eventually(t, "the lease is given back", func() bool { return f.app.released.Load() == 1 })
			if f.app.failed.Load() != 0 {
				t.Error("the instance was blamed")
			}
		})
	}
}

// Streams that are not events are cut, and do not look complete.
func TestStream_CutOnClosing(t *testing.T) {
	for _, kind := range []string{"h1", "h2"} {
		t.Run(kind, func(t *testing.T) {
			f := newFront(t, nil)
			in := f.serve(func(w http.ResponseWriter, r *http.Request) {
				for r.Context().Err() == nil {
					_, _ = io.WriteString(w, "x")
					w.(http.Flusher).Flush()
				}
			})
			res, err := f.client(kind).Get(f.url(kind, "/"))
			if err != nil {
				t.Fatal(err)
			}
			_, _ = io.ReadFull(res.Body, make([]byte, 100))
			close(in.closing)
			if _, err := io.Copy(io.Discard, res.Body); err == nil {
				t.Error("a cut stream looked complete")
			}
			_ = res.Body.Close()
		})
	}
}

func TestShutdown_LetsRequestsFinish(t *testing.T) {
	f := newFront(t, nil)
	in, out := make(chan struct{}), make(chan struct{})
	f.serve(func(w http.ResponseWriter, r *http.Request) {
		close(in)
		<-out
		_, _ = io.WriteString(w, "done")
	})
	got := make(chan string, 1)
	go func() {
		res, err := f.client("h1").Get("http://app.test/")
		if err != nil {
			got <- err.Error()
			return
		}
		b, _ := io.ReadAll(res.Body)
		_ = res.Body.Close()
		got <- string(b)
	}()
	<-in
	var wg sync.WaitGroup
	wg.Go(f.stop)
	eventually(t, "not ready, and nobody new gets in", func() bool {
		c, err := net.Dial("tcp", f.http)
		if err == nil {
			_ = c.Close()
		}
		return err != nil && !f.srv.Ready()
	})
	close(out)
	if s := <-got; s != "done" {
		t.Errorf("got %q", s)
	}
	wg.Wait()
}

func TestShutdown_CutsWhatDoesNotEnd(t *testing.T) {
	f := newFront(t, func(c *Config) { c.DrainTimeout = 50 * time.Millisecond; c.CloseGrace = time.Hour })
	in := make(chan struct{}, 2)
	f.serve(func(w http.ResponseWriter, r *http.Request) {
		in <- struct{}{}
		if r.URL.Path == "/ws" {
			c, _, _ := w.(http.Hijacker).Hijack()
			_, _ = io.WriteString(c, "HTTP/1.1 101 x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
			_, _ = io.Copy(io.Discard, c)
			return
		}
		<-r.Context().Done()
	})
	a, b := dial(t, f.http), dial(t, f.http)
	a.send("GET /ws HTTP/1.1\r\nHost: app.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	b.send("GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
	<-in
	<-in
	for a.line() != "" {
	}
	f.stop()
	a.ended()
	b.ended()
	eventually(t, "leases are given back", func() bool { return f.app.released.Load() == 2 })
}

// A gRPC service without generated code: messages are StringValue.
var echoService = grpc.ServiceDesc{
	ServiceName: "test.Echo",
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{{MethodName: "Unary", Handler: func(_ any, ctx context.Context, dec func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		in := new(wrapperspb.StringValue)
		if err := dec(in); err != nil {
			return nil, err
		}
		md, _ := metadata.FromIncomingContext(ctx)
		if in.Value == "fail" {
			return nil, status.Error(codes.FailedPrecondition, "said no")
		}
		return wrapperspb.String(in.Value + " from " + strings.Join(md.Get("x-forwarded-for"), "|") + " key " + strings.Join(md.Get("key"), "|")), nil
	}}},
	Streams: []grpc.StreamDesc{{StreamName: "Bidi", ServerStreams: true, ClientStreams: true, Handler: func(_ any, s grpc.ServerStream) error {
		for {
			in := new(wrapperspb.StringValue)
			if err := s.RecvMsg(in); errors.Is(err, io.EOF) {
				s.SetTrailer(metadata.Pairs("count", "all"))
				return nil
			} else if err != nil {
				return err
			}
			if err := s.SendMsg(wrapperspb.String(strings.ToUpper(in.Value))); err != nil {
				return err
			}
		}
	}}},
}

func (f *front) grpcServer() *fakeInstance {
	srv := grpc.NewServer()
	srv.RegisterService(&echoService, nil)
	l := listen(f.t)
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(l) })
	f.t.Cleanup(func() { srv.Stop(); wg.Wait() })
	return f.instance(l.Addr().String())
}

func (f *front) grpcClient(t *testing.T, secure bool) *grpc.ClientConn {
	t.Helper()
	creds, addr := insecure.NewCredentials(), f.http
	if secure {
		creds, addr = credentials.NewClientTLSFromCert(f.roots, "app.test"), f.https
	}
	c, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(creds), grpc.WithAuthority("app.test"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestGRPC(t *testing.T) {
	f := newFront(t, nil)
	f.grpcServer()
	for _, secure := range []bool{false, true} {
		t.Run(fmt.Sprintf("tls=%v", secure), func(t *testing.T) {
			c := f.grpcClient(t, secure)
			ctx := metadata.AppendToOutgoingContext(t.Context(), "key", "value")
			out := new(wrapperspb.StringValue)
			if err := c.Invoke(ctx, "/test.Echo/Unary", wrapperspb.String("hi"), out); err != nil || out.Value != "hi from 127.0.0.1 key value" {
				t.Fatalf("got %q, %v", out.Value, err)
			}
			if err := c.Invoke(ctx, "/test.Echo/Unary", wrapperspb.String("fail"), out); status.Code(err) != codes.FailedPrecondition || status.Convert(err).Message() != "said no" {
				t.Errorf("got %v", err)
			}
			s, err := c.NewStream(ctx, &echoService.Streams[0], "/test.Echo/Bidi")
			if err != nil {
				t.Fatal(err)
			}
			for i := range 20 {
				if err := s.SendMsg(wrapperspb.String(strings.Repeat("a", i*1000))); err != nil {
					t.Fatal(err)
				}
				if err := s.RecvMsg(out); err != nil || out.Value != strings.Repeat("A", i*1000) {
					t.Fatalf("message %d: %d bytes, %v", i, len(out.Value), err)
				}
			}
			_ = s.CloseSend()
			if err := s.RecvMsg(out); !errors.Is(err, io.EOF) || s.Trailer().Get("count")[0] != "all" {
				t.Errorf("end: %v, trailer %v", err, s.Trailer())
			}
		})
	}
}

func TestGRPC_Errors(t *testing.T) {
	f := newFront(t, nil)
	in := f.grpcServer()
	c := f.grpcClient(t, false)
	s, err := c.NewStream(t.Context(), &echoService.Streams[0], "/test.Echo/Bidi")
	if err != nil {
		t.Fatal(err)
	}
	out := new(wrapperspb.StringValue)
	_ = s.SendMsg(wrapperspb.String("a"))
	if err := s.RecvMsg(out); err != nil {
		t.Fatal(err)
	}
	close(in.closing)
	if err := s.RecvMsg(out); status.Code(err) != codes.Unavailable {
		t.Errorf("a stream on a leaving instance ended with %v", err)
	}
	f.app.mu.Lock()
	f.app.err = fleet.ErrOverloaded
	f.app.mu.Unlock()
	if err := c.Invoke(t.Context(), "/test.Echo/Unary", wrapperspb.String("hi"), out); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "request ") {
		t.Errorf("overloaded: %v", err)
	}
	f.app.mu.Lock()
	f.app.err = nil
	f.app.instances = nil
	f.app.mu.Unlock()
	l := listen(t)
	_ = l.Close()
	f.instance(l.Addr().String())
	g := f.grpcServer()
	_ = g
	if err := c.Invoke(t.Context(), "/test.Echo/Unary", wrapperspb.String("hi"), out); err != nil || f.app.refused.Load() != 1 {
		t.Errorf("refused connection: %v, refused %d times", err, f.app.refused.Load())
	}
}
