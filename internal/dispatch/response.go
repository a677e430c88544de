package dispatch

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/http"
	"net/textproto"
	"strings"
)

// responseHead is the header of a response from an instance, read with no
// trust in it.
type responseHead struct {
	code       int
	length     int64 // -1: not said
	lengthText string
	chunked    bool
	close      bool
	upgrade    string
	events     bool     // text/event-stream
	trailer    []string // names announced
	named      []string // by Connection
}

var (
	errMalformed = errors.New("malformed response")
	errHeadSize  = errors.New("response header too large")
)

// readHead reads a whole header block. The usual one lies complete in the
// buffer and costs one allocation.
func readHead(r *bufio.Reader, limit int) (string, error) {
	for scanned := 0; ; {
		b, _ := r.Peek(r.Buffered())
		if end, ok := headEnd(b, scanned); ok {
			block := string(b[:end])
			_, err := r.Discard(end)
			return block, err
		}
		scanned = max(0, len(b)-3)
		if len(b) == r.Size() {
			break
		}
		if _, err := r.Peek(len(b) + 1); err != nil {
			return "", err
		}
	}
	var long []byte
	for {
		line, err := r.ReadSlice('\n')
		long = append(long, line...)
		if len(long) > limit {
			return "", errHeadSize
		}
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		if err != nil {
			return "", err
		}
		if end, ok := headEnd(long, max(0, len(long)-3)); ok && end == len(long) {
			return string(long), nil
		}
	}
}

// headEnd finds the end of the empty line that ends a header. Apps that end
// their lines with LF alone are understood.
func headEnd(b []byte, from int) (int, bool) {
	for i := from; ; {
		nl := bytes.IndexByte(b[i:], '\n')
		if nl < 0 {
			return 0, false
		}
		i += nl + 1
		switch {
		case i < len(b) && b[i] == '\n':
			return i + 1, true
		case i+1 < len(b) && b[i] == '\r' && b[i+1] == '\n':
			return i + 2, true
		}
	}
}

// statusOf reads the code of a header block's first line.
func statusOf(block string) (int, error) {
	if len(block) < len("HTTP/1.1 200") || block[:7] != "HTTP/1." || block[7] != '0' && block[7] != '1' || block[8] != ' ' {
		return 0, errMalformed
	}
	code := 0
	for _, c := range []byte(block[9:12]) {
		if c < '0' || c > '9' {
			return 0, errMalformed
		}
		code = code*10 + int(c-'0')
	}
	if code < 100 || code > 999 || len(block) > 12 && block[12] != ' ' && block[12] != '\r' && block[12] != '\n' {
		return 0, errMalformed
	}
	return code, nil
}

// parse reads block into d and the fields to pass on into h.
func (d *responseHead) parse(block string, maxLines int, h http.Header) (err error) {
	*d = responseHead{length: -1}
	if d.code, err = statusOf(block); err != nil {
		return err
	}
	old := block[7] == '0'
	d.close = old
	lines := strings.Count(block, "\n") - 2
	if lines > maxLines {
		return errHeadSize
	}
	values := make([]string, 0, max(lines, 0))
	_, rest, _ := strings.Cut(block, "\n")
	for rest != "" {
		var line string
		line, rest, _ = strings.Cut(rest, "\n")
		line = strings.TrimSuffix(line, "\r")
		if line == "" {
			break
		}
		name, value, ok := strings.Cut(line, ":")
		if !ok || !validToken(name) {
			return errMalformed
		}
		value = textproto.TrimString(value)
		if !validValue(value) {
			return errMalformed
		}
		name = textproto.CanonicalMIMEHeaderKey(name)
		if hopHeader(name) {
			if err := d.own(name, value, old); err != nil {
				return err
			}
			continue
		}
		if name == "Content-Type" && len(value) >= len(eventStream) && strings.EqualFold(value[:len(eventStream)], eventStream) {
			d.events = true
		}
		if prev := h[name]; prev != nil {
			h[name] = append(prev, value)
			continue
		}
		values = append(values, value)
		h[name] = values[len(values)-1 : len(values) : len(values)]
	}
	for _, n := range d.named {
		delete(h, n)
	}
	if d.chunked && d.length >= 0 {
		return errMalformed
	}
	return nil
}

const eventStream = "text/event-stream"

// own reads a field that says something about this connection or message.
func (d *responseHead) own(name, value string, old bool) error {
	switch name {
	case "Content-Length":
		n, ok := parseDigits([]byte(value))
		if !ok || d.length >= 0 && d.length != n {
			return errMalformed
		}
		d.length, d.lengthText = n, value
	case "Transfer-Encoding":
		if d.chunked || old || !strings.EqualFold(value, "chunked") {
			return errMalformed
		}
		d.chunked = true
	case "Connection":
		v := []string{value}
		switch {
		case hasToken(v, "close"):
			d.close = true
		case old && hasToken(v, "keep-alive"):
			d.close = false
		}
		if !strings.EqualFold(value, "close") && !strings.EqualFold(value, "keep-alive") {
			d.named = append(d.named, named(v)...)
		}
	case "Upgrade":
		d.upgrade = value
	case "Trailer":
		for t := range strings.SplitSeq(value, ",") {
			t = textproto.CanonicalMIMEHeaderKey(textproto.TrimString(t))
			if validToken(t) && !forbiddenTrailer(t) && len(d.trailer) < 32 {
				d.trailer = append(d.trailer, t)
			}
		}
	}
	return nil
}

func validValue(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}

// bodyless tells whether the response to method has no body whatever its
// header says.
func (d *responseHead) bodyless(method string) bool {
	return method == http.MethodHead || d.code == http.StatusNoContent || d.code == http.StatusNotModified || d.code < 200
}

// readTrailer reads what follows the last chunk and gives the fields that may
// be passed on.
func readTrailer(r *bufio.Reader, maxLines, limit int) (http.Header, error) {
	var h http.Header
	for size := 0; ; {
		line, err := r.ReadSlice('\n')
		if err != nil {
			if errors.Is(err, bufio.ErrBufferFull) {
				return nil, errHeadSize
			}
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
		s := strings.TrimSuffix(strings.TrimSuffix(string(line), "\n"), "\r")
		if s == "" {
			return h, nil
		}
		if size += len(line); size > limit || len(h) >= maxLines {
			return nil, errHeadSize
		}
		name, value, ok := strings.Cut(s, ":")
		if value = textproto.TrimString(value); !ok || !validToken(name) || !validValue(value) {
			return nil, errMalformed
		}
		if forbiddenTrailer(name) {
			continue
		}
		if h == nil {
			h = http.Header{}
		}
		h.Add(name, value)
	}
}
