package criu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"github.com/checkpoint-restore/go-criu/v8/rpc"
	"golang.org/x/sys/unix"
)

// Pipe makes the socket pair of one order: ours, and the one that CRIU is to
// inherit. CRIU reads the process that made the pair from it, and opens
// ImagesDirFd in that process's table.
func Pipe() (ours *net.UnixConn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make socket: %w", err)
	}
	f := os.NewFile(uintptr(fds[0]), "criu")
	theirs = os.NewFile(uintptr(fds[1]), "criu")
	defer func() { _ = f.Close() }()
	c, err := net.FileConn(f)
	if err != nil {
		_ = theirs.Close()
		return nil, nil, fmt.Errorf("make socket: %w", err)
	}
	return c.(*net.UnixConn), theirs, nil //nolint:forcetypeassert // it is one
}

// answerMax is more than an answer takes.
const answerMax = 64 << 10

// Order sends a request and waits for its answer. notify, if the request asks
// for notifications, is called at each stage of it with the first process's pid, as CRIU
// sees it; an error ends the order. The error of a request that CRIU could not
// fulfill says what its log tells first. ErrRefused: CRIU can never fulfill it.
// Any other is of this moment, also where CRIU said no for want of something: with
// the kernel's error then (unix.ENOMEM and others).
func Order(ctx context.Context, conn *net.UnixConn, opts *rpc.CriuOpts, kind rpc.CriuReqType, notify func(stage string, pid int) error, log func() string) (*rpc.CriuResp, error) {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := send(conn, &rpc.CriuReq{Type: &kind, Opts: opts}); err != nil {
		return nil, err
	}
	buf := make([]byte, answerMax)
	for {
		n, err := conn.Read(buf)
		switch {
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case err != nil || n == 0:
			return nil, fmt.Errorf("CRIU ended without an answer%s", because(log())) // it was killed
		}
		resp := &rpc.CriuResp{}
		if err := resp.UnmarshalVT(buf[:n]); err != nil {
			return nil, fmt.Errorf("read CRIU's answer: %w", err)
		}
		switch {
		case resp.GetType() == rpc.CriuReqType_NOTIFY:
			if err := notify(resp.GetNotify().GetScript(), int(resp.GetNotify().GetPid())); err != nil {
				return nil, err
			}
			if err := send(conn, &rpc.CriuReq{Type: new(rpc.CriuReqType_NOTIFY), NotifySuccess: new(true)}); err != nil {
				return nil, err
			}
		case !resp.GetSuccess():
			return nil, failed(log())
		default:
			return resp, nil
		}
	}
}

func send(conn *net.UnixConn, req *rpc.CriuReq) error {
	msg, err := req.MarshalVT()
	if err == nil {
		_, err = conn.Write(msg)
	}
	if err != nil {
		return fmt.Errorf("order CRIU: %w", err)
	}
	return nil
}

// ErrRefused is CRIU's own no.
var ErrRefused = errors.New("CRIU failed")

// wants are errors that say nothing about the processes: something is used up
// at the moment.
var wants = []unix.Errno{unix.ENOMEM, unix.EMFILE, unix.ENFILE, unix.EAGAIN, unix.EINTR, unix.ENOSPC, unix.EDQUOT}

// failed is the error of an order that CRIU could not fulfill.
func failed(log string) error {
	for line := range strings.Lines(strings.ToLower(log)) {
		for _, errno := range wants {
			if strings.Contains(line, "error (") && strings.Contains(line, errno.Error()) {
				return fmt.Errorf("CRIU failed%s: %w", because(log), errno)
			}
		}
	}
	return fmt.Errorf("%w%s", ErrRefused, because(log))
}

// harmless is said by every CRIU without CAP_SYS_RESOURCE where fs.nr_open is
// above the hard limit of descriptors; it goes on with what it has.
const harmless = "Can't setup RLIMIT_NOFILE for self"

// because finds what went wrong first in CRIU's log.
func because(log string) string {
	for line := range strings.Lines(log) {
		if _, message, ok := strings.Cut(line, "Error ("); ok && !strings.Contains(line, harmless) {
			if _, rest, ok := strings.Cut(message, "): "); ok {
				message = rest
			}
			return ": " + strings.TrimSpace(message)
		}
	}
	return ""
}
