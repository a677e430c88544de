// Package load asks a web server many times and remembers every answer. An
// open loop sends at its rate whatever comes back, and counts the time from
// when a request should have been sent, so that a server which stalls cannot
// hide the requests that it kept from being sent.
package load

import (
	"context"
	"errors"
	"io"
	"math"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"
)

// Target of requests.
type Target struct {
	Addr string // host:port that is connected to
	Host string // that is asked for
	Path string
}

// Shot is one request.
type Shot struct {
	At   time.Duration // when it should have been sent, since the run began
	Took time.Duration // from then to the last byte
	Code int           // 0: no answer
	Err  string
}

// OK tells whether it was answered well.
func (s Shot) OK() bool { return s.Code >= 200 && s.Code < 400 }

// Run is all of them, in the order of their times.
type Run struct {
	Began time.Time
	Shots []Shot
}

// timeout of one request.
const timeout = 60 * time.Second

type gun struct {
	client *http.Client
	target Target
	began  time.Time

	mu    sync.Mutex
	shots []Shot
}

func newGun(t Target) *gun {
	dialer := net.Dialer{Timeout: timeout}
	return &gun{target: t, began: time.Now(), client: &http.Client{Timeout: timeout, Transport: &http.Transport{
		MaxIdleConns: 100000, MaxIdleConnsPerHost: 100000, DisableCompression: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "tcp", t.Addr)
		},
	}}}
}

func (g *gun) shoot(ctx context.Context, at time.Duration) {
	s := Shot{At: at}
	s.Code, s.Err = g.ask(ctx)
	s.Took = time.Since(g.began) - at
	if ctx.Err() != nil && s.Code == 0 {
		return // the run is over: nobody waits for it
	}
	g.mu.Lock()
	g.shots = append(g.shots, s)
	g.mu.Unlock()
}

func (g *gun) ask(ctx context.Context) (int, string) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+g.target.Host+g.target.Path, nil)
	if err != nil {
		return 0, err.Error()
	}
	resp, err := g.client.Do(req)
	if err != nil {
		return 0, kind(err)
	}
	_, err = io.Copy(io.Discard, resp.Body)
	_ = resp.Body.Close()
	if err != nil {
		return 0, "in the middle of the response: " + kind(err)
	}
	return resp.StatusCode, ""
}

// kind is what went wrong without what differs from request to request: the
// URL and the addresses.
func kind(err error) string {
	if op := (*net.OpError)(nil); errors.As(err, &op) {
		return op.Op + ": " + op.Err.Error()
	}
	if u := errors.Unwrap(err); u != nil {
		err = u
	}
	return err.Error()
}

func (g *gun) run() *Run {
	g.client.CloseIdleConnections()
	g.mu.Lock()
	defer g.mu.Unlock()
	slices.SortFunc(g.shots, func(a, b Shot) int { return int(a.At - b.At) })
	return &Run{Began: g.began, Shots: g.shots}
}

// Closed has so many clients ask one request after another for a time, or
// until there were most requests (0: no bound).
func Closed(ctx context.Context, t Target, clients int, span time.Duration, most int) *Run {
	g := newGun(t)
	ctx, cancel := context.WithTimeout(ctx, span)
	defer cancel()
	var wg sync.WaitGroup
	left := make(chan struct{}, max(most, 1))
	for range most {
		left <- struct{}{}
	}
	close(left)
	for range clients {
		wg.Go(func() {
			for ctx.Err() == nil {
				if most > 0 {
					if _, ok := <-left; !ok {
						return
					}
				}
				g.shoot(ctx, time.Since(g.began))
			}
		})
	}
	wg.Wait()
	return g.run()
}

// Open sends rate requests a second for a time, evenly, and waits for all of
// the answers.
func Open(ctx context.Context, t Target, rate float64, span time.Duration) *Run {
	g := newGun(t)
	var wg sync.WaitGroup
	for i := 0; ; i++ {
		at := time.Duration(float64(i) / rate * float64(time.Second))
		if at >= span || ctx.Err() != nil {
			break
		}
		if d := at - time.Since(g.began); d > 0 {
			time.Sleep(d)
		}
		wg.Go(func() { g.shoot(ctx, at) })
	}
	wg.Wait()
	return g.run()
}

// Failed counts the requests that were not answered well, by what came.
func (r *Run) Failed() map[string]int {
	n := map[string]int{}
	for _, s := range r.Shots {
		switch {
		case s.Err != "":
			n[s.Err]++
		case !s.OK():
			n[http.StatusText(s.Code)]++
		}
	}
	return n
}

// Between gives the requests of a part of the run.
func (r *Run) Between(from, to time.Duration) *Run {
	part := &Run{Began: r.Began}
	for _, s := range r.Shots {
		if s.At >= from && s.At < to {
			part.Shots = append(part.Shots, s)
		}
	}
	return part
}

// Quantile of the times of the good answers; 0 without any.
func (r *Run) Quantile(q float64) time.Duration {
	took := make([]time.Duration, 0, len(r.Shots))
	for _, s := range r.Shots {
		if s.OK() {
			took = append(took, s.Took)
		}
	}
	return Quantile(took, q)
}

// Quantile of some durations: the smallest that at least q of them do not
// exceed.
func Quantile(d []time.Duration, q float64) time.Duration {
	if len(d) == 0 {
		return 0
	}
	s := slices.Clone(d)
	slices.Sort(s)
	i := int(math.Ceil(q*float64(len(s)))) - 1
	return s[min(max(i, 0), len(s)-1)]
}

// Bucket is what happened in a piece of time: answers by when they came, and
// their times.
type Bucket struct {
	At            time.Duration // its middle
	Rate          float64       // good answers a second
	P50, P95, P99 time.Duration
	Failed        int
}

// Buckets of so much time each.
func (r *Run) Buckets(width time.Duration) []Bucket {
	var took [][]time.Duration
	var failed []int
	for _, s := range r.Shots {
		i := int((s.At + s.Took) / width)
		for len(took) <= i {
			took, failed = append(took, nil), append(failed, 0)
		}
		if s.OK() {
			took[i] = append(took[i], s.Took)
		} else {
			failed[i]++
		}
	}
	out := make([]Bucket, len(took))
	for i, t := range took {
		out[i] = Bucket{
			At: time.Duration(i)*width + width/2, Rate: float64(len(t)) / width.Seconds(),
			P50: Quantile(t, .5), P95: Quantile(t, .95), P99: Quantile(t, .99), Failed: failed[i],
		}
	}
	return out
}
