package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/url"

	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
	"github.com/fastcontainer/fastcontainer/internal/image/unpack"
)

// fault is an error whose kind and hint are known where it happens; what was
// tried on what is added at the store's edge.
type fault struct {
	kind error
	hint string
	err  error
}

func (f *fault) Error() string { return f.err.Error() }
func (f *fault) Unwrap() error { return f.err }

func invalid(hint, format string, args ...any) error {
	return &fault{kind: fleet.ErrInvalid, hint: hint, err: fmt.Errorf(format, args...)}
}

// explain makes the error that leaves the store: a kind for the program, a
// sentence and a hint for the person.
func (s *Store) explain(op, subject string, err error) error {
	if err == nil {
		return nil
	}
	out := &fleet.Error{Op: op, Subject: subject, Err: err}
	if fe, ok := errors.AsType[*fleet.Error](err); ok {
		out.Kind, out.Hint = fe.Kind, fe.Hint
		return out
	}
	if f, ok := errors.AsType[*fault](err); ok {
		out.Kind, out.Hint = f.kind, f.hint
		return out
	}
	te, isTransport := errors.AsType[*transport.Error](err)
	switch {
	case errors.Is(err, context.Canceled):
	case errors.Is(err, unpack.ErrTooLarge):
		out.Kind = fleet.ErrInvalid
		out.Hint = "if the image is trusted, raise the limits of image size and entries in the daemon's configuration"
	case errors.Is(err, unpack.ErrRefused):
		out.Kind = fleet.ErrInvalid
		out.Hint = "the image is damaged or hostile: build it again, or use another one"
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		out.Kind = fleet.ErrUnavailable
		out.Hint = fmt.Sprintf("the disk that holds %s is full (space or inodes): `fastcontainer image gc` frees what nothing uses, then try again", s.dir)
	case isTransport:
		out.Hint, out.Kind = explainStatus(te)
	case errors.Is(err, context.DeadlineExceeded):
		out.Kind = fleet.ErrTimeout
		out.Hint = "try again: a pull goes on where it stopped"
	case errors.Is(err, fs.ErrNotExist):
		out.Kind = fleet.ErrNotFound
		out.Hint = "check the path; it is read on the machine that runs the daemon"
	case errors.Is(err, fs.ErrPermission):
		out.Kind = fleet.ErrDenied
	case isNetwork(err):
		out.Kind = fleet.ErrUnavailable
		out.Hint = "check that the registry runs and can be reached from this node, then try again: a pull goes on where it stopped"
	}
	return out
}

func explainStatus(te *transport.Error) (hint string, kind error) {
	switch code := te.StatusCode; {
	case code == http.StatusUnauthorized, code == http.StatusForbidden:
		return "the image is private or does not exist: log in as the user that runs the daemon (`docker login`, or write ~/.docker/config.json, or set DOCKER_CONFIG)", fleet.ErrDenied
	case code == http.StatusNotFound:
		return "check the spelling of the name and of the tag", fleet.ErrNotFound
	case code == http.StatusTooManyRequests:
		return "the registry limits the rate of pulls: wait, or log in", fleet.ErrUnavailable
	case code >= 500:
		return "the registry has a fault of its own: try again, a pull goes on where it stopped", fleet.ErrUnavailable
	}
	return "", fleet.ErrInvalid
}

func isNetwork(err error) bool {
	if _, ok := errors.AsType[*url.Error](err); ok {
		return true
	}
	_, ok := errors.AsType[net.Error](err)
	return ok
}

// transient says whether trying again soon may help.
func transient(err error) bool {
	if _, ok := errors.AsType[*fault](err); ok || errors.Is(err, context.Canceled) {
		return false
	}
	if te, ok := errors.AsType[*transport.Error](err); ok {
		return te.StatusCode == http.StatusTooManyRequests || te.StatusCode == http.StatusRequestTimeout || te.StatusCode >= 500
	}
	return !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) && isNetwork(err)
}

func isFull(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }
