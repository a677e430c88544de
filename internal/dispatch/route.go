package dispatch

import (
	"context"
	"io"
	"net"
	"net/netip"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// Router names the app that a host belongs to. It is asked for every request
// and takes no lock.
type Router interface {
	// Route finds the app of a host name (lower case, no port).
	Route(host string) (Target, bool)
}

// Target is one app as the front door sees it.
type Target interface {
	App() fleet.AppName
	// Acquire claims a slot for one request, on whichever instance fits. While
	// there is none it waits (a hold) until one is ready, ctx ends, or the hold
	// is refused. Any number of callers cause no more starts than are needed.
	// Errors are fleet.ErrOverloaded (too many or too long holds),
	// fleet.ErrFailing (cannot start at present, answered at once),
	// fleet.ErrTimeout (this start took too long), fleet.ErrUnavailable (app is
	// stopped), or ctx's own.
	Acquire(ctx context.Context, arrived time.Time) (Lease, error)
}

// Lease is a slot on one instance, held by one request. Exactly one of Release
// and Refused is called, once.
type Lease interface {
	Instance() fleet.InstanceID
	Address() netip.AddrPort
	// Upstream is what the front door attached to this instance (see Attach):
	// its connection pool.
	Upstream() io.Closer
	// Stages of the start that this request waited for, which are only read;
	// nil if it met a ready instance.
	Stages() *fleet.Stages
	// Answered tells, where there are Stages, how long the connection took and
	// from then on the first byte of the response.
	Answered(connect, firstByte time.Duration)
	// Streams tells that the exchange became a long-lived stream: it keeps its
	// slot, and its length says nothing about the load.
	Streams()
	// Closing is closed when the instance wants to be rid of long-lived streams
	// (WebSocket, server-sent events): its drain time is over.
	Closing() <-chan struct{}
	// Release gives the slot back after the response ended. failed tells that
	// the instance broke the exchange.
	Release(failed bool)
	// Refused gives the slot back and tells that the instance refused the
	// connection before a byte was sent: it gets no more requests, and the
	// caller may Acquire again.
	Refused()
}

// Attach makes what the front door keeps beside an instance while it may get
// requests; it is closed when the instance has left the route for good. dialed
// gives away a connection to the instance on which nothing has been sent, or nil.
type Attach func(id fleet.InstanceID, addr netip.AddrPort, dialed func() net.Conn) io.Closer
