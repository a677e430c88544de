package simulate

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Log is what access logs say: the requests of each app.
type Log struct {
	// Apps by name, each with the times of its requests, in order.
	Names []string
	times map[string][]time.Time
	// Lines that were read, and those of them that are no access log.
	Lines, Bad int
	// FirstBad is where the first of those is: FILE:LINE.
	FirstBad string
}

const (
	// maxLine bounds a line; what is longer is counted as bad.
	maxLine = 64 << 10
	// maxRequests bounds what is kept in memory.
	maxRequests = 50_000_000
)

// ReadLogs reads access logs in the common or combined format, also those with
// the host in front (vhost_combined) and those compressed by gzip. The host
// names the app; without one the file does.
func ReadLogs(files ...string) (*Log, error) {
	l := &Log{times: map[string][]time.Time{}}
	for _, name := range files {
		f, err := os.Open(name)
		if err != nil {
			return nil, fmt.Errorf("read access log: %w", err)
		}
		err = l.read(name, f)
		_ = f.Close()
		if err != nil {
			return nil, fmt.Errorf("read access log %s: %w", name, err)
		}
	}
	for name, times := range l.times {
		slices.SortFunc(times, func(a, b time.Time) int { return a.Compare(b) })
		l.Names = append(l.Names, name)
	}
	// Those with most requests first.
	slices.SortFunc(l.Names, func(a, b string) int { return cmp.Or(len(l.times[b])-len(l.times[a]), strings.Compare(a, b)) })
	if len(l.Names) == 0 {
		return nil, fmt.Errorf("none of the %d lines is of an access log in the common or combined format", l.Lines)
	}
	return l, nil
}

func (l *Log) read(name string, r io.Reader) error {
	br := bufio.NewReaderSize(r, maxLine)
	if magic, _ := br.Peek(2); bytes.Equal(magic, []byte{0x1f, 0x8b}) {
		z, err := gzip.NewReader(br)
		if err != nil {
			return err
		}
		br = bufio.NewReaderSize(z, maxLine)
	}
	own := strings.TrimSuffix(strings.TrimSuffix(filepath.Base(name), ".gz"), ".log")
	for n := 1; ; n++ {
		line, err := br.ReadSlice('\n')
		tooLong := errors.Is(err, bufio.ErrBufferFull)
		for errors.Is(err, bufio.ErrBufferFull) {
			_, err = br.ReadSlice('\n')
		}
		if len(line) > 0 && !bytes.Equal(bytes.TrimSpace(line), nil) {
			l.Lines++
			host, at, ok := parseLine(line)
			switch {
			case tooLong || !ok:
				if l.Bad++; l.FirstBad == "" {
					l.FirstBad = fmt.Sprintf("%s:%d", name, n)
				}
			case l.Lines-l.Bad > maxRequests:
				return fmt.Errorf("more than %d requests", maxRequests)
			default:
				if host == "" {
					host = own
				}
				l.times[host] = append(l.times[host], at)
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// parseLine finds host and time of a line:
//
//	[host[:port] ]client ident user [10/Oct/2000:13:55:36 -0700] "GET / HTTP/1.1" 200 ...
func parseLine(line []byte) (host string, at time.Time, ok bool) {
	open := bytes.IndexByte(line, '[')
	if open < 0 {
		return "", at, false
	}
	length := bytes.IndexByte(line[open:], ']')
	if length < 0 {
		return "", at, false
	}
	at, err := time.Parse("02/Jan/2006:15:04:05 -0700", string(line[open+1:open+length]))
	if err != nil {
		return "", at, false
	}
	rest := bytes.TrimSpace(line[open+length+1:])
	if len(rest) == 0 || rest[0] != '"' {
		return "", at, false
	}
	switch f := bytes.Fields(line[:open]); len(f) {
	case 3:
	case 4:
		h, _, _ := bytes.Cut(f[0], []byte(":"))
		host = strings.ToLower(string(h))
	default:
		return "", at, false
	}
	return host, at, true
}

// Day of the log: from its first to its last request. The requests of one
// second, which is all that a log tells, are spread over it.
func (l *Log) Day(seed uint64) Day {
	var first, last time.Time
	for _, times := range l.times {
		if first.IsZero() || times[0].Before(first) {
			first = times[0]
		}
		if end := times[len(times)-1]; end.After(last) {
			last = end
		}
	}
	return Day{Apps: len(l.Names), Span: last.Sub(first) + time.Minute, Seed: seed, App: func(i int) Arrivals {
		times := l.times[l.Names[i]]
		n := 0
		return func() (time.Duration, bool) {
			if n >= len(times) {
				return 0, false
			}
			from, to := n, n // of this second
			for from > 0 && times[from-1].Equal(times[n]) {
				from--
			}
			for to < len(times) && times[to].Equal(times[n]) {
				to++
			}
			at := times[n].Sub(first) + time.Duration(float64(n-from)/float64(to-from)*float64(time.Second))
			n++
			return at, true
		}
	}}
}
