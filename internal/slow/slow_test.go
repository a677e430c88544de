package slow

import (
	"runtime"
	"testing"
	"time"
)

func TestSpare_OnlyWhileThereAreSlowCalls(t *testing.T) {
	usual := runtime.GOMAXPROCS(0)
	defer runtime.GOMAXPROCS(usual)
	Spare(3)
	until := func(want int) {
		t.Helper()
		for deadline := time.Now().Add(3 * calm); runtime.GOMAXPROCS(0) != want; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("GOMAXPROCS is %d, want %d", runtime.GOMAXPROCS(0), want)
			}
		}
	}
	until(usual)
	Ahead()
	until(usual + 3)
	until(usual)
	Ahead()
	until(usual + 3)
}
