package dispatch

import (
	"bytes"
	"errors"
)

// framing follows the bytes of an HTTP/1.1 connection from a client and
// refuses whatever two readers could understand differently: line ends that
// are not CR LF, folded lines, Content-Length that is repeated, malformed or
// beside Transfer-Encoding, transfer codings other than a single "chunked",
// malformed chunks, and too many or too long header lines. It is much stricter
// than net/http, which reads the same bytes after it, so where both accept they
// agree on where a request ends.
//
// After a request that asks for an upgrade, and on a connection that begins
// with the HTTP/2 preface, the rest is not HTTP/1.1 and passes unseen; the
// handler closes such a connection unless it really was upgraded.
type framing struct {
	maxLine, maxLines int

	state   frameState
	first   bool   // no request has been seen yet on this connection
	partial []byte // begin of a line whose end has not come
	lines   int    // header lines of this request
	size    int    // bytes of its header
	left    int64  // bytes of body or chunk to come
	length  int64  // Content-Length, or -1
	chunked bool
	upgrade bool
	http10  bool
}

type frameState uint8

const (
	atRequest frameState = iota
	inHeader
	inBody
	atChunk
	inChunk
	afterChunk
	inTrailer
	unseen
)

var (
	errLineEnd  = errors.New("line does not end with CR LF")
	errFolded   = errors.New("folded or blank line in header")
	errLength   = errors.New("malformed or repeated Content-Length")
	errCoding   = errors.New("transfer coding other than one \"chunked\", or beside Content-Length")
	errChunk    = errors.New("malformed chunk")
	errTooBig   = errors.New("header line too long or too many of them")
	errTrailer  = errors.New("field not allowed in trailer")
	errVersion  = errors.New("version other than HTTP/1.1 and HTTP/1.0")
	errBadBytes = errors.New("control character in header")
)

var http2Preface = []byte("PRI * HTTP/2.0")

func newFraming(maxLine, maxLines int) framing {
	return framing{maxLine: maxLine, maxLines: maxLines, first: true, length: -1}
}

// check follows p. It gives how many bytes of p may be passed on; if that is
// not all, err says what is wrong with what comes then.
func (f *framing) check(p []byte) (int, error) {
	for i := 0; i < len(p); {
		switch f.state {
		case unseen:
			return len(p), nil
		case inBody, inChunk:
			n := int64(len(p) - i)
			if n < f.left {
				f.left -= n
				return len(p), nil
			}
			i += int(f.left)
			f.left = 0
			if f.state == inBody {
				f.endRequest()
			} else {
				f.state = afterChunk
			}
		default:
			nl := bytes.IndexByte(p[i:], '\n')
			if nl < 0 {
				if len(f.partial)+len(p)-i > f.maxLine {
					return i, errTooBig
				}
				f.partial = append(f.partial, p[i:]...)
				return len(p), nil
			}
			line := p[i : i+nl]
			if len(f.partial) > 0 {
				if len(f.partial)+nl > f.maxLine {
					return i, errTooBig
				}
				f.partial = append(f.partial, line...)
				line = f.partial
			}
			err := f.line(line)
			f.partial = f.partial[:0]
			if err != nil {
				return i, err
			}
			i += nl + 1
		}
	}
	return len(p), nil
}

// line takes one line, without its LF.
func (f *framing) line(b []byte) error {
	n := len(b) - 1
	if n < 0 || b[n] != '\r' {
		return errLineEnd
	}
	b = b[:n]
	if bytes.IndexByte(b, '\r') >= 0 {
		return errLineEnd
	}
	if bytes.IndexByte(b, 0) >= 0 {
		return errBadBytes
	}
	switch f.state {
	case atRequest:
		if f.first && bytes.Equal(b, http2Preface) {
			f.state = unseen
			return nil
		}
		f.first = false
		if n == 0 || b[0] == ' ' || b[0] == '\t' {
			return errFolded
		}
		f.state, f.lines, f.size = inHeader, 0, n
		f.length, f.chunked, f.upgrade = -1, false, false
		f.http10 = bytes.HasSuffix(b, []byte(" HTTP/1.0"))
		if !f.http10 && !bytes.HasSuffix(b, []byte(" HTTP/1.1")) {
			return errVersion
		}
		return nil
	case inHeader:
		if n == 0 {
			return f.endHeader()
		}
		if err := f.count(n); err != nil {
			return err
		}
		if b[0] == ' ' || b[0] == '\t' {
			return errFolded
		}
		return f.field(b)
	case atChunk:
		return f.chunk(b)
	case afterChunk:
		if n != 0 {
			return errChunk
		}
		f.state = atChunk
		return nil
	case inTrailer:
		if n == 0 {
			f.endRequest()
			return nil
		}
		if err := f.count(n); err != nil {
			return err
		}
		if b[0] == ' ' || b[0] == '\t' {
			return errFolded
		}
		name, _, _ := bytes.Cut(b, []byte(":"))
		if forbiddenTrailer(string(bytes.TrimSpace(name))) {
			return errTrailer
		}
	}
	return nil
}

func (f *framing) count(n int) error {
	f.lines++
	f.size += n + 2
	if f.lines > f.maxLines || f.size > f.maxLine {
		return errTooBig
	}
	return nil
}

// field looks at the few fields that say where a request ends.
func (f *framing) field(b []byte) error {
	colon := bytes.IndexByte(b, ':')
	switch colon {
	case len("upgrade"), len("content-length"), len("transfer-encoding"):
	default:
		// net/http refuses names with spaces, so padding hides nothing.
		return nil
	}
	name := b[:colon]
	value := bytes.Trim(b[colon+1:], " \t")
	switch {
	case equalFold(name, "content-length"):
		if f.length >= 0 || f.chunked {
			if f.chunked {
				return errCoding
			}
			return errLength
		}
		n, ok := parseDigits(value)
		if !ok {
			return errLength
		}
		f.length = n
	case equalFold(name, "transfer-encoding"):
		if f.chunked || f.length >= 0 || f.http10 || !equalFold(value, "chunked") {
			return errCoding
		}
		f.chunked = true
	case equalFold(name, "upgrade"):
		f.upgrade = true
	}
	return nil
}

func (f *framing) endHeader() error {
	switch {
	case f.chunked:
		f.state = atChunk
	case f.length > 0:
		f.state, f.left = inBody, f.length
	default:
		f.endRequest()
	}
	return nil
}

func (f *framing) endRequest() {
	f.state = atRequest
	if f.upgrade {
		f.state = unseen
	}
}

// chunk reads the line before a chunk: its size in hex, maybe extensions.
func (f *framing) chunk(b []byte) error {
	if len(b) > 256 {
		return errChunk
	}
	size, _, _ := bytes.Cut(b, []byte(";"))
	if len(size) == 0 || len(size) > 15 {
		return errChunk
	}
	var n int64
	for _, c := range size {
		switch {
		case c >= '0' && c <= '9':
			c -= '0'
		case c >= 'a' && c <= 'f':
			c -= 'a' - 10
		case c >= 'A' && c <= 'F':
			c -= 'A' - 10
		default:
			return errChunk
		}
		n = n<<4 | int64(c)
	}
	for _, c := range b[len(size):] {
		if c < ' ' && c != '\t' || c == 0x7f {
			return errChunk
		}
	}
	if n == 0 {
		f.state, f.lines, f.size = inTrailer, 0, 0
		return nil
	}
	f.state, f.left = inChunk, n
	return nil
}

func parseDigits(b []byte) (int64, bool) {
	if len(b) == 0 || len(b) > 18 {
		return 0, false
	}
	var n int64
	for _, c := range b {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = n*10 + int64(c-'0')
	}
	return n, true
}

// equalFold tells whether b is the lower-case ASCII word s in any case.
func equalFold(b []byte, s string) bool {
	if len(b) != len(s) {
		return false
	}
	for i := range len(s) {
		c := b[i]
		if c >= 'A' && c <= 'Z' {
			c += 'a' - 'A'
		}
		if c != s[i] {
			return false
		}
	}
	return true
}
