// Package dispatch is the front door: it accepts connections, names the app
// of each request, gets a slot on one of its instances, forwards the request
// and the response, and gives the slot back.
//
// What it promises:
//
//   - A request whose meaning is in doubt (framing, host, header syntax) is
//     refused and its connection closed; nothing ambiguous reaches an app.
//   - What a client says about where a request came from (Forwarded,
//     X-Forwarded-*, X-Request-Id) reaches an app only if the client is a
//     trusted proxy.
//   - Every buffer, count and wait is bounded by the Config.
//   - A request that never reached an instance goes to another one. A request
//     that may have reached one is repeated only if that is harmless.
//   - On the warm path no lock is shared between connections of different
//     apps or instances, and no goroutine is started.
//   - What a client is told about a failure never contains what an app or the
//     platform wrote.
//
// It owns the listeners, the client connections and the connections to
// instances. It never decides how many instances there are, waits for none
// itself, and never reads the store: Target.Acquire does all of that.
//
// Start reading at Server.ServeHTTP, then exchange.forward; connections from
// clients are in client.go, those to instances in upstream.go.
package dispatch
