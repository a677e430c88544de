package load

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func target(t *testing.T, h http.HandlerFunc) Target {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return Target{Addr: strings.TrimPrefix(s.URL, "http://"), Host: "app.test", Path: "/"}
}

func TestOpen_CountsFromWhenARequestShouldHaveBeenSent(t *testing.T) {
	began := time.Now()
	to := target(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Host != "app.test" {
			w.WriteHeader(http.StatusNotFound)
		}
		// The server stalls for its first 300 ms.
		if d := 300*time.Millisecond - time.Since(began); d > 0 {
			time.Sleep(d)
		}
	})
	r := Open(t.Context(), to, 100, time.Second)
	if len(r.Shots) != 100 || len(r.Failed()) != 0 {
		t.Fatalf("%d requests, failed %v", len(r.Shots), r.Failed())
	}
	// Those of the stall waited for its end each, not only the first.
	slow := 0
	for _, s := range r.Shots {
		if s.Took > 50*time.Millisecond {
			slow++
		}
	}
	if slow < 15 {
		t.Errorf("%d of the 30 requests of the stall waited", slow)
	}
	if p := r.Between(500*time.Millisecond, time.Second); len(p.Shots) != 50 {
		t.Errorf("%d requests in the second half", len(p.Shots))
	}
}

func TestClosed_AsManyAsWanted(t *testing.T) {
	var now, most atomic.Int32
	to := target(t, func(http.ResponseWriter, *http.Request) {
		n := now.Add(1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		time.Sleep(5 * time.Millisecond)
		now.Add(-1)
	})
	r := Closed(t.Context(), to, 7, time.Minute, 100)
	if len(r.Shots) != 100 || most.Load() != 7 {
		t.Errorf("%d requests, at most %d at once", len(r.Shots), most.Load())
	}
	if r = Closed(t.Context(), to, 3, 100*time.Millisecond, 0); len(r.Shots) < 10 || len(r.Failed()) != 0 {
		t.Errorf("%d requests in a tenth of a second, failed %v", len(r.Shots), r.Failed())
	}
}

func TestFailed_ByWhatCame(t *testing.T) {
	var n atomic.Int32
	to := target(t, func(w http.ResponseWriter, _ *http.Request) {
		switch n.Add(1) % 3 {
		case 0:
			w.WriteHeader(http.StatusServiceUnavailable)
		case 1:
			w.Header().Set("Content-Length", "100")
			_, _ = w.Write([]byte("half"))
		}
	})
	r := Closed(t.Context(), to, 1, time.Minute, 30)
	f := r.Failed()
	if f["Service Unavailable"] != 10 || len(f) != 2 {
		t.Errorf("got %v", f)
	}
	refused := Closed(t.Context(), Target{Addr: "127.0.0.1:1", Host: "x"}, 1, time.Minute, 2)
	if len(refused.Failed()) != 1 || refused.Quantile(.5) != 0 {
		t.Errorf("got %v", refused.Failed())
	}
}

func TestQuantileAndBuckets(t *testing.T) {
	var d []time.Duration
	for i := 100; i > 0; i-- {
		d = append(d, time.Duration(i))
	}
	for q, want := range map[float64]time.Duration{0: 1, .5: 50, .95: 95, .99: 99, 1: 100} {
		if got := Quantile(d, q); got != want {
			t.Errorf("quantile %g: got %d, want %d", q, got, want)
		}
	}
	r := &Run{Shots: []Shot{{At: 0, Took: 50 * time.Millisecond, Code: 200}, {At: 60 * time.Millisecond, Took: 100 * time.Millisecond, Code: 200}, {At: 0, Took: 150 * time.Millisecond, Code: 503}}}
	b := r.Buckets(100 * time.Millisecond)
	if len(b) != 2 || b[0].Rate != 10 || b[1].Rate != 10 || b[1].P50 != 100*time.Millisecond || b[1].Failed != 1 || b[0].At != 50*time.Millisecond {
		t.Errorf("got %+v", b)
	}
}
