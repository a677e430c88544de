package dispatch

import (
	"math/rand/v2"
	"net/http"
	"net/netip"
	"net/textproto"
	"strings"
)

// hopHeader tells whether a field belongs to one connection only, or is one
// that the front door writes itself. name is in canonical form.
func hopHeader(name string) bool {
	switch name {
	case "Connection", "Keep-Alive", "Proxy-Connection", "Proxy-Authenticate", "Proxy-Authorization",
		"Te", "Trailer", "Transfer-Encoding", "Upgrade", "Http2-Settings", "Content-Length":
		return true
	}
	return false
}

// ownHeader tells whether only the front door may tell an app this. An app
// behind CGI or WSGI cannot tell X_Forwarded_For from X-Forwarded-For, so
// neither may come from a client.
func ownHeader(name string) bool {
	switch name[0] {
	case 'X', 'F', 'H', 'E', 'P':
	default:
		return false
	}
	if strings.IndexByte(name, '_') >= 0 {
		name = textproto.CanonicalMIMEHeaderKey(strings.ReplaceAll(name, "_", "-"))
		if hopHeader(name) {
			return true
		}
	}
	switch name {
	case "Forwarded", "X-Real-Ip", "X-Request-Id", "Host", "Expect", "Proxy":
		return true
	}
	return strings.HasPrefix(name, "X-Forwarded-")
}

// forbiddenTrailer tells whether a field may not come after a body, since it
// says how to read the message or who sent it.
func forbiddenTrailer(name string) bool {
	name = textproto.CanonicalMIMEHeaderKey(name)
	if name == "" || hopHeader(name) || ownHeader(name) {
		return true
	}
	switch name {
	case "Authorization", "Cookie", "Set-Cookie", "Content-Encoding", "Content-Type", "Content-Range", "Cache-Control",
		"Max-Forwards", "Range", "Www-Authenticate":
		return true
	}
	return strings.HasPrefix(name, "If-")
}

// named lists the fields that Connection declares to be of this connection
// only, beyond those that always are.
func named(connection []string) []string {
	var list []string
	for _, v := range connection {
		for t := range strings.SplitSeq(v, ",") {
			t = textproto.TrimString(t)
			switch {
			case t == "", strings.EqualFold(t, "close"), strings.EqualFold(t, "keep-alive"):
			default:
				if name := textproto.CanonicalMIMEHeaderKey(t); !hopHeader(name) && len(list) < 32 {
					list = append(list, name)
				}
			}
		}
	}
	return list
}

// hasToken tells whether one of the comma-separated values is token.
func hasToken(values []string, token string) bool {
	for _, v := range values {
		if strings.EqualFold(v, token) {
			return true
		}
		for t := range strings.SplitSeq(v, ",") {
			if strings.EqualFold(textproto.TrimString(t), token) {
				return true
			}
		}
	}
	return false
}

// validToken tells whether s is an HTTP token, as methods and field names are.
func validToken(s string) bool {
	if s == "" {
		return false
	}
	for i := range len(s) {
		if !tokenByte(s[i]) {
			return false
		}
	}
	return true
}

func tokenByte(c byte) bool {
	switch {
	case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		return true
	}
	return strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0
}

// origin is what an app is told about where a request came from.
type origin struct {
	// before lists the hops that a trusted proxy named, client first, each as
	// it stands in X-Forwarded-For; empty for a client of our own.
	before []string
	peer   string // who sent it to us
	host   string
	proto  string
}

// originOf reads what a trusted proxy says, and nothing of what others say.
// X-Forwarded-For, where there is one, decides, because many proxies pass the
// client's Forwarded through unseen.
func originOf(h http.Header, trusted bool, peer, host, proto string) origin {
	o := origin{peer: peer, host: host, proto: proto}
	if !trusted {
		return o
	}
	if xff := h["X-Forwarded-For"]; len(xff) > 0 {
		for _, v := range xff {
			for t := range strings.SplitSeq(v, ",") {
				if a, ok := parseNode(textproto.TrimString(t)); ok && len(o.before) < 32 {
					o.before = append(o.before, a)
				}
			}
		}
		if p := h["X-Forwarded-Proto"]; len(p) > 0 {
			o.setProto(p[0])
		}
		if f := h["X-Forwarded-Host"]; len(f) > 0 {
			o.setHost(f[0])
		}
		return o
	}
	elements, ok := parseForwarded(h["Forwarded"])
	if !ok {
		elements = nil
	}
	for _, e := range elements {
		if a, ok := parseNode(e.node); ok {
			o.before = append(o.before, a)
		}
	}
	if len(elements) > 0 {
		o.setProto(elements[0].proto)
		o.setHost(elements[0].host)
		return o
	}
	if p := h["X-Forwarded-Proto"]; len(p) > 0 {
		o.setProto(p[0])
	}
	if f := h["X-Forwarded-Host"]; len(f) > 0 {
		o.setHost(f[0])
	}
	return o
}

func (o *origin) setProto(s string) {
	switch strings.ToLower(s) {
	case "http":
		o.proto = "http"
	case "https":
		o.proto = "https"
	}
}

func (o *origin) setHost(s string) {
	if _, ok := hostName(s); ok {
		o.host = s
	}
}

// appendFor writes the value of X-Forwarded-For.
func (o *origin) appendFor(b []byte) []byte {
	for _, a := range o.before {
		b = append(append(b, a...), ", "...)
	}
	return append(b, o.peer...)
}

// appendForwarded writes the value of Forwarded (RFC 7239).
func (o *origin) appendForwarded(b []byte) []byte {
	for _, a := range o.before {
		b = append(appendNode(b, a), ", "...)
	}
	b = appendNode(b, o.peer)
	b = append(b, ";host="...)
	if strings.IndexByte(o.host, ':') >= 0 {
		b = append(append(append(b, '"'), o.host...), '"')
	} else {
		b = append(b, o.host...)
	}
	return append(append(b, ";proto="...), o.proto...)
}

func appendNode(b []byte, a string) []byte {
	b = append(b, "for="...)
	if strings.IndexByte(a, ':') >= 0 {
		return append(append(append(b, `"[`...), a...), `]"`...)
	}
	return append(b, a...)
}

// parseNode reads an address as X-Forwarded-For and Forwarded carry it, with
// or without port and brackets. Names ("unknown", "_hidden") are no address.
func parseNode(s string) (string, bool) {
	if len(s) > 64 {
		return "", false
	}
	if a, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(s, "["), "]")); err == nil {
		return a.WithZone("").Unmap().String(), true
	}
	if ap, err := netip.ParseAddrPort(s); err == nil {
		return ap.Addr().WithZone("").Unmap().String(), true
	}
	return "", false
}

// element is one hop of a Forwarded field.
type element struct{ node, host, proto string }

// parseForwarded reads Forwarded fields. Anything malformed spoils all of it.
func parseForwarded(values []string) ([]element, bool) {
	var all []element
	for _, s := range values {
		p := forwardedParser{s: s}
		for {
			e, ok := p.element()
			if !ok || len(all) == 32 {
				return nil, false
			}
			all = append(all, e)
			p.space()
			if p.i == len(p.s) {
				break
			}
			if p.s[p.i] != ',' {
				return nil, false
			}
			p.i++
			p.space()
		}
	}
	return all, true
}

type forwardedParser struct {
	s string
	i int
}

func (p *forwardedParser) space() {
	for p.i < len(p.s) && (p.s[p.i] == ' ' || p.s[p.i] == '\t') {
		p.i++
	}
}

func (p *forwardedParser) element() (e element, ok bool) {
	for {
		name := p.token()
		if name == "" || p.i == len(p.s) || p.s[p.i] != '=' {
			return e, false
		}
		p.i++
		value, ok := p.value()
		if !ok {
			return e, false
		}
		var to *string
		switch strings.ToLower(name) {
		case "for":
			to = &e.node
		case "host":
			to = &e.host
		case "proto":
			to = &e.proto
		}
		if to != nil {
			if *to != "" {
				return e, false
			}
			*to = value
		}
		p.space()
		if p.i == len(p.s) || p.s[p.i] != ';' {
			return e, true
		}
		p.i++
		p.space()
	}
}

func (p *forwardedParser) token() string {
	from := p.i
	for p.i < len(p.s) && tokenByte(p.s[p.i]) {
		p.i++
	}
	return p.s[from:p.i]
}

func (p *forwardedParser) value() (string, bool) {
	if p.i == len(p.s) || p.s[p.i] != '"' {
		v := p.token()
		return v, v != ""
	}
	var b strings.Builder
	for p.i++; p.i < len(p.s); p.i++ {
		switch c := p.s[p.i]; {
		case c == '"':
			p.i++
			return b.String(), true
		case c == '\\':
			if p.i++; p.i == len(p.s) {
				return "", false
			}
			b.WriteByte(p.s[p.i])
		case c < ' ' && c != '\t' || c == 0x7f:
			return "", false
		default:
			b.WriteByte(c)
		}
	}
	return "", false
}

// requestID names one request in pages, logs and apps.
type requestID struct {
	text [32]byte
	long string // taken from a trusted proxy
}

func (id *requestID) set(h http.Header, trusted bool) {
	id.long = ""
	if trusted {
		if v := h["X-Request-Id"]; len(v) == 1 && validRequestID(v[0]) {
			id.long = v[0]
			return
		}
	}
	const digits = "0123456789abcdef"
	for i := 0; i < len(id.text); i += 16 {
		n := rand.Uint64()
		for j := range 16 {
			id.text[i+j] = digits[n&15]
			n >>= 4
		}
	}
}

func validRequestID(s string) bool {
	if s == "" || len(s) > 128 {
		return false
	}
	for i := range len(s) {
		if c := s[i]; !tokenByte(c) && strings.IndexByte(":=/+@", c) < 0 {
			return false
		}
	}
	return true
}

func (id *requestID) append(b []byte) []byte {
	if id.long != "" {
		return append(b, id.long...)
	}
	return append(b, id.text[:]...)
}

func (id *requestID) String() string {
	if id.long != "" {
		return id.long
	}
	return string(id.text[:])
}
