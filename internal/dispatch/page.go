package dispatch

import (
	"encoding/json"
	"fmt"
	"html"
	"net/http"
	"strconv"
	"strings"
)

// retryAfter in seconds is advised with 503.
const retryAfter = 1

// explain says in one sentence what a client may know of a refusal.
func (r refusal) explain() string {
	switch r {
	case refusedRequest, refusedFraming:
		return "The request could not be understood."
	case refusedHeader:
		return "The request has too many or too long header fields."
	case refusedHost:
		return "There is no site with this name here."
	case refusedMisdirected:
		return "This connection was made for another site."
	case refusedMethod:
		return "This method is not allowed."
	case refusedBody:
		return "The request body is larger than this server accepts."
	case refusedSlow:
		return "The request body came too slowly."
	case refusedOverload:
		return "The site is getting more requests than it can take. Please try again in a moment."
	case refusedFailing:
		return "The site cannot start at present."
	case refusedTimeout, refusedSilent:
		return "The site did not answer in time."
	case refusedUnavailable:
		return "The site is not available at present."
	}
	return "The site did not give a proper answer."
}

// refuse answers with a page of our own. cause goes to the log, never to the
// client.
func (x *exchange) refuse(code int, why refusal, cause error) {
	x.why, x.cause = why, cause
	x.s.metrics.refuse(why)
	h := x.w.Header()
	for name := range h {
		if name != "Connection" {
			delete(h, name)
		}
	}
	id := x.id.String()
	h["X-Request-Id"] = []string{id}
	h["Cache-Control"] = []string{"no-store"}
	h["X-Content-Type-Options"] = []string{"nosniff"}
	if x.protocol == protoGRPC {
		x.refuseGRPC(code, why, id)
		return
	}
	switch code {
	case http.StatusServiceUnavailable:
		h["Retry-After"] = []string{strconv.Itoa(retryAfter)}
	case http.StatusMethodNotAllowed:
		h["Allow"] = []string{"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"}
	case http.StatusBadRequest, http.StatusRequestTimeout, http.StatusRequestEntityTooLarge:
		if x.r.ProtoMajor == 1 {
			h["Connection"] = []string{"close"}
		}
	}
	kind, body := page(x.r.Header["Accept"], code, why.explain(), id)
	h["Content-Type"] = []string{kind}
	h["Content-Length"] = []string{strconv.Itoa(len(body))}
	x.code = code
	x.w.WriteHeader(code)
	if x.r.Method != http.MethodHead {
		n, _ := x.w.Write(body)
		x.bytes += int64(n)
	}
}

// refuseGRPC tells a gRPC client in its own way: a response of trailers only.
func (x *exchange) refuseGRPC(code int, why refusal, id string) {
	status := 14 // unavailable
	switch code {
	case http.StatusNotFound:
		status = 12 // unimplemented
	case http.StatusGatewayTimeout:
		status = 4 // deadline exceeded
	case http.StatusRequestEntityTooLarge, http.StatusRequestHeaderFieldsTooLarge:
		status = 8 // resource exhausted
	case http.StatusBadRequest, http.StatusMethodNotAllowed:
		status = 3 // invalid argument
	}
	h := x.w.Header()
	h["Content-Type"] = []string{"application/grpc"}
	h["Grpc-Status"] = []string{strconv.Itoa(status)}
	h["Grpc-Message"] = []string{why.explain() + " (request " + id + ")"}
	x.code = http.StatusOK
	x.w.WriteHeader(http.StatusOK)
}

// page is an error body in the form that the client likes best.
func page(accept []string, code int, text, id string) (kind string, body []byte) {
	title := http.StatusText(code)
	switch preferred(accept) {
	case "html":
		return "text/html; charset=utf-8", fmt.Appendf(nil, pageHTML, code, html.EscapeString(title), code, html.EscapeString(title),
			html.EscapeString(text), html.EscapeString(id))
	case "json":
		b, _ := json.Marshal(struct {
			Status  int    `json:"status"`
			Error   string `json:"error"`
			Message string `json:"message"`
			Request string `json:"request_id"`
		}{code, title, text, id})
		return "application/json", append(b, '\n')
	}
	return "text/plain; charset=utf-8", fmt.Appendf(nil, "%d %s\n%s\nrequest id: %s\n", code, title, text, id)
}

const pageHTML = `<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><meta name="robots" content="noindex">
<title>%d %s</title><style>
:root{color-scheme:light dark}body{margin:0;min-height:100vh;display:grid;place-items:center;font:16px/1.5 system-ui,sans-serif;background:Canvas;color:CanvasText}
main{max-width:32rem;padding:2rem}b{font-size:4rem;line-height:1;font-weight:200;letter-spacing:-.04em}h1{font-size:1.25rem;margin:.5rem 0 1rem}small{opacity:.6}code{font-size:.95em}
</style></head><body><main><b>%d</b><h1>%s</h1><p>%s</p><small>Request <code>%s</code></small></main></body></html>
`

// preferred is html, json or text: what Accept likes best, text if in doubt.
func preferred(accept []string) string {
	best, bestQ := "text", 0.0
	for _, v := range accept {
		if len(v) > 1024 {
			v = v[:1024]
		}
		for part := range strings.SplitSeq(v, ",") {
			media, params, _ := strings.Cut(part, ";")
			q := 1.0
			for p := range strings.SplitSeq(params, ";") {
				if s, ok := strings.CutPrefix(strings.TrimSpace(p), "q="); ok {
					if f, err := strconv.ParseFloat(s, 64); err == nil && f >= 0 && f <= 1 {
						q = f
					} else {
						q = 0
					}
				}
			}
			kind := ""
			switch m := strings.ToLower(strings.TrimSpace(media)); {
			case m == "text/html" || m == "application/xhtml+xml":
				kind = "html"
			case m == "application/json" || strings.HasSuffix(m, "+json"):
				kind = "json"
			case m == "text/plain" || m == "text/*" || m == "*/*":
				kind = "text"
			}
			if kind != "" && q > bestQ {
				best, bestQ = kind, q
			}
		}
	}
	return best
}
