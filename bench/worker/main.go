// Worker is a web server whose requests cost what they are told to: what the
// experiments put under load. EAT in its environment is the mebibytes that it
// takes when it starts.
package main

import (
	"io"
	"log"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// kept is memory in use.
var kept [][]byte

func main() {
	eat, _ := strconv.Atoi(os.Getenv("EAT"))
	for range eat {
		b := make([]byte, 1<<20)
		for i := 0; i < len(b); i += 1024 {
			b[i] = 1
		}
		kept = append(kept, b)
	}
	number := func(r *http.Request) time.Duration {
		n, _ := strconv.ParseFloat(r.FormValue("ms"), 64)
		return time.Duration(n * float64(time.Millisecond))
	}
	http.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello\n") })
	http.HandleFunc("/sleep", func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(number(r))
		_, _ = io.WriteString(w, "slept\n")
	})
	http.HandleFunc("/burn", func(w http.ResponseWriter, r *http.Request) {
		burn(number(r))
		_, _ = io.WriteString(w, "burnt\n")
	})
	log.Fatal(http.ListenAndServe(":"+os.Getenv("PORT"), nil)) //nolint:gosec // for experiments
}

// burn so much processor time, of this thread alone.
func burn(d time.Duration) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	now := func() time.Duration {
		var t unix.Timespec
		_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t)
		return time.Duration(t.Nano())
	}
	for end := now() + d; now() < end; {
		for i := 0; i < 2000; i++ { //nolint:revive // that is the work
			_ = i
		}
	}
}
