// Package slow is for calls of the kernel that take milliseconds, as those do
// that make and remove containers: they wait for every processor of the host
// (RCU), and for the locks of cgroups, mounts and the network.
package slow

import (
	"runtime"
	"sync/atomic"
	"time"
)

var (
	// last is when the last such call began, in ns since 1970.
	last atomic.Int64
	// stirred has a value when one came after a calm time.
	stirred = make(chan struct{}, 1)
)

// calm is for how long there must have been no such call until the spare
// threads go.
const calm = 5 * time.Second

// Ahead is called just before such a call. A goroutine that the network woke
// runs on the very thread that listened to the network; while that thread is
// in the kernel nobody listens, and requests wait until the runtime's monitor
// looks, after up to 10 ms. Something new to run makes the runtime wake another
// thread, which takes over listening. It costs some microseconds of another
// processor: too much for the path of a warm request, nothing for a life.
func Ahead() {
	now := time.Now().UnixNano()
	if now-last.Swap(now) > int64(calm) {
		select {
		case stirred <- struct{}{}:
		default:
		}
	}
	go func() {}()
}

// Spare lets Go run so many threads more than it does now while such calls are
// made and for a moment after: a thread in the kernel keeps its place. In calm
// times more threads than processors would only disturb each other: on one
// processor they cost a tenth of the warm requests.
func Spare(n int) {
	usual := runtime.GOMAXPROCS(0)
	go func() {
		for range stirred {
			runtime.GOMAXPROCS(usual + n)
			for quiet := time.Duration(0); quiet < calm; {
				time.Sleep(calm - quiet)
				quiet = time.Since(time.Unix(0, last.Load()))
			}
			runtime.GOMAXPROCS(usual)
		}
	}()
}
