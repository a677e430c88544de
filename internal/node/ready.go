package node

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/sandbox"
)

// dialer connects to instances.
func (n *Node) dialer(timeout time.Duration) *net.Dialer {
	return &net.Dialer{Timeout: timeout, Control: n.cfg.Control}
}

// errNotReady is the cause of a start that took longer than ready.timeout.
var errNotReady = errors.New("not ready in time")

var errNobodyListens = errors.New("nobody listens")

// awaitReady waits until the instance's port accepts connections, and its HTTP
// check answers if it has one. To ask a sandbox who listens in it costs some
// microseconds; where that is not possible a connection is tried, at the cost of some
// tens of them. So the first second is probed several times each millisecond;
// the pace falls as the start gets long, and when many start at once: what
// they probe they take from each other.
func (i *Instance) awaitReady(ctx context.Context) error {
	i.node.probing.Add(1)
	defer i.node.probing.Add(-1)
	began := time.Now()
	addr := i.Info().Address.String()
	timer := time.NewTimer(0)
	defer timer.Stop()
	<-timer.C
	var last error
	asker, ask := i.box.(sandbox.Asker)
	for {
		if ask {
			listens, err := asker.Listens(i.rev.Spec.Port)
			if ask = err == nil; ask && !listens {
				last = errNobodyListens
				if err := i.pause(ctx, timer, began, last); err != nil {
					return err
				}
				continue
			}
		}
		// The kernel answers for a listening program, so no answer means that the
		// packet was lost on an interface that is just coming up. TCP itself
		// would wait a second before it sends another.
		dialer := i.node.dialer(min(max(10*time.Millisecond, time.Since(began)), time.Second))
		conn, err := dialer.DialContext(ctx, "tcp", addr)
		if err == nil {
			if i.rev.Spec.Ready.HTTP == "" {
				i.offer(conn)
				return nil
			}
			err = i.check(ctx, conn)
			_ = conn.Close()
			if err == nil {
				return nil
			}
		}
		// A dial that the end of the wait cut off says nothing about the app.
		if _, late := errors.AsType[net.Error](err); ctx.Err() == nil && (!late || last == nil) {
			last = err
		}
		if err := i.pause(ctx, timer, began, last); err != nil {
			return err
		}
	}
}

// dialedFor is how long the connection that found an instance ready is kept for
// its first request. An app that serves one connection at a time waits on it.
const dialedFor = time.Second

func (i *Instance) offer(c net.Conn) {
	i.dialed.Store(&c)
	time.AfterFunc(dialedFor, i.hangUp)
}

// Dialed gives away a connection to the instance that nothing has been sent on
// yet, if there is one: a request that a start was for need not make its own.
func (i *Instance) Dialed() net.Conn {
	if c := i.dialed.Swap(nil); c != nil {
		return *c
	}
	return nil
}

func (i *Instance) hangUp() {
	if c := i.Dialed(); c != nil {
		_ = c.Close()
	}
}

// pause waits for the next probe, or tells why there is none.
func (i *Instance) pause(ctx context.Context, timer *time.Timer, began time.Time, last error) error {
	timer.Reset(pace(time.Since(began), i.node.probing.Load()))
	select {
	case <-i.box.Done():
		return &fleet.Error{Op: "start", Subject: string(i.rev.App), Kind: fleet.ErrFailing, Err: exitError(i.box.Exit()), Hint: "its last lines are in this event; fastcontainer logs " + string(i.rev.App) + " shows more"}
	case <-ctx.Done():
		return i.explain(ctx, last)
	case <-timer.C:
		return nil
	}
}

// pace between two probes of a start when so many start at once.
func pace(since time.Duration, many int64) time.Duration {
	share := time.Duration(min(max(many/int64(runtime.NumCPU()), 1), 16))
	switch {
	case since < 100*time.Millisecond:
		return share * 300 * time.Microsecond
	case since < time.Second:
		return share * time.Millisecond
	case since < 10*time.Second:
		return 5 * time.Millisecond
	default:
		return 25 * time.Millisecond
	}
}

// check asks the app's own readiness path over a fresh connection.
func (i *Instance) check(ctx context.Context, conn net.Conn) error {
	_ = conn.SetDeadline(time.Now().Add(2 * time.Second))
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+firstHost(i.rev.Spec)+i.rev.Spec.Ready.HTTP, nil)
	if err != nil {
		return err
	}
	req.Header.Set("User-Agent", "fastcontainer-ready")
	req.Close = true
	if err := req.Write(conn); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReaderSize(conn, 4096), req)
	if err != nil {
		return err
	}
	_ = resp.Body.Close()
	if resp.StatusCode < 200 || resp.StatusCode > 399 {
		return fmt.Errorf("GET %s answered %s", i.rev.Spec.Ready.HTTP, resp.Status)
	}
	return nil
}

func firstHost(s fleet.Spec) string {
	for _, h := range s.Hosts {
		if !strings.HasPrefix(h, "*") {
			return h
		}
	}
	return "localhost"
}

// explain says why a start was given up: what the app does listen on tells
// more than "timed out".
func (i *Instance) explain(ctx context.Context, last error) error {
	if !errors.Is(context.Cause(ctx), errNotReady) {
		return context.Cause(ctx)
	}
	port := i.rev.Spec.Port
	e := &fleet.Error{Op: "start", Subject: string(i.rev.App), Kind: fleet.ErrTimeout}
	local, all := listening(i.box.PID())
	switch {
	case slices.Contains(local, port):
		e.Err = fmt.Errorf("after %s port %d listens on 127.0.0.1 only", i.rev.Spec.Ready.Timeout, port)
		e.Hint = "make the app listen on 0.0.0.0"
	case slices.Contains(all, port):
		e.Err = fmt.Errorf("after %s port %d is open, but the check fails: %w", i.rev.Spec.Ready.Timeout, port, last)
		e.Hint = "look at ready.http in the app file and at the app's log"
	case len(all)+len(local) > 0:
		e.Err = fmt.Errorf("after %s port %d is not open, but %v", i.rev.Spec.Ready.Timeout, port, slices.Concat(all, local))
		e.Hint = "set port in the app file, or make the app listen on $PORT"
	default:
		e.Err = fmt.Errorf("after %s port %d is not open", i.rev.Spec.Ready.Timeout, port)
		e.Hint = "the app must listen on $PORT; if it only needs longer, raise ready.timeout"
	}
	return e
}

// listening lists the TCP ports that are open in a process's network
// namespace: on the loopback address alone, and on others.
func listening(pid int) (local, all []int) {
	for _, name := range []string{"tcp", "tcp6"} {
		f, err := os.Open("/proc/" + strconv.Itoa(pid) + "/net/" + name)
		if err != nil {
			continue
		}
		lines := bufio.NewScanner(f)
		for n := 0; n < 10000 && lines.Scan(); n++ {
			fields := strings.Fields(lines.Text())
			const listen = "0A"
			if len(fields) < 4 || fields[3] != listen {
				continue
			}
			addr, hex, _ := strings.Cut(fields[1], ":")
			port, err := strconv.ParseInt(hex, 16, 32)
			if err != nil {
				continue
			}
			// 127.0.0.1 and ::1 in the kernel's byte order.
			if addr == "0100007F" || addr == "00000000000000000000000001000000" {
				local = append(local, int(port))
			} else {
				all = append(all, int(port))
			}
		}
		_ = f.Close()
	}
	return local, all
}
