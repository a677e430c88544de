package dispatch

import (
	"net/netip"
	"strings"
)

// hostName makes a host name, in lower case and without port and final dot,
// out of what a client sent as Host or authority. ok is false if it is none.
func hostName(s string) (host string, ok bool) {
	if s == "" || len(s) > 253+1+6 {
		return "", false
	}
	if s[0] == '[' {
		end := strings.IndexByte(s, ']')
		if end < 0 || !portOK(s[end+1:]) {
			return "", false
		}
		a, err := netip.ParseAddr(s[1:end])
		if err != nil || !a.Is6() || a.Zone() != "" {
			return "", false
		}
		return a.String(), true
	}
	upper := false
	end := len(s)
	for i := range len(s) {
		c := s[i]
		switch {
		case c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '.' || c == '_':
		case c >= 'A' && c <= 'Z':
			upper = true
		case c == ':':
			if !portOK(s[i:]) {
				return "", false
			}
			end = i
		default:
			return "", false
		}
		if end == i {
			break
		}
	}
	s = strings.TrimSuffix(s[:end], ".")
	if s == "" || len(s) > 253 || s[0] == '.' || strings.Contains(s, "..") {
		return "", false
	}
	if upper {
		s = strings.ToLower(s)
	}
	return s, true
}

// portOK tells whether s is empty or a colon and a port number (or nothing).
func portOK(s string) bool {
	if s == "" {
		return true
	}
	if s[0] != ':' || len(s) > 6 {
		return false
	}
	n := 0
	for _, c := range []byte(s[1:]) {
		if c < '0' || c > '9' {
			return false
		}
		n = n*10 + int(c-'0')
	}
	return n <= 65535
}
