// Package slow is for calls of the kernel that take milliseconds, as those do
// that make and remove containers: they wait for every processor of the host
// (RCU), and for the locks of cgroups, mounts and the network.
package slow

// Ahead is called just before such a call. A goroutine that the network woke
// runs on the very thread that listened to the network; while that thread is
// in the kernel nobody listens, and requests wait until the runtime's monitor
// looks, after up to 10 ms. Something new to run makes the runtime wake another
// thread, which takes over listening. It costs some microseconds of another
// processor: too much for the path of a warm request, nothing for a life.
func Ahead() {
	go func() {}()
}
