package network

import (
	"bytes"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestServers(t *testing.T) {
	for text, want := range map[string]string{
		"":                                 "",
		"nameserver 10.0.0.1\n":            "10.0.0.1",
		"nameserver 127.0.0.53\n":          "",
		"nameserver ::1\nnameserver fd::1": "",
		"# nameserver 1.1.1.1\nnameserver  9.9.9.9 # x\nsearch a b\n": "9.9.9.9",
		"nameserver\nnameserver x\noptions ndots:5":                   "",
	} {
		var got []string
		for _, a := range servers(text) {
			got = append(got, a.String())
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%q: got %q, want %q", text, got, want)
		}
	}
}

func FuzzServers(f *testing.F) {
	f.Add("nameserver 1.2.3.4\n")
	f.Fuzz(func(t *testing.T, text string) {
		for _, a := range servers(text) {
			if !a.Is4() || a.IsLoopback() {
				t.Errorf("%q gives %v", text, a)
			}
		}
	})
}

func TestNameservers(t *testing.T) {
	addrs := func(s string) (all []netip.Addr) {
		for _, f := range strings.Fields(s) {
			all = append(all, netip.MustParseAddr(f))
		}
		return all
	}
	host := addrs("192.0.2.1")
	for name, tt := range map[string]struct {
		configured string
		files      []string
		want       string
		warn       bool
	}{
		"of the host":                       {files: []string{"nameserver 10.0.0.1\n", "nameserver 10.0.0.2\n"}, want: "10.0.0.1"},
		"behind a local resolver":           {files: []string{"nameserver 127.0.0.53\n", "nameserver 10.0.0.2\n"}, want: "10.0.0.2"},
		"behind a resolver on the host":     {files: []string{"nameserver 192.0.2.1\n", "", "nameserver 10.0.0.3\n"}, want: "10.0.0.3"},
		"none":                              {files: []string{"nameserver 127.0.0.53\n", ""}, warn: true},
		"IPv6 alone":                        {files: []string{"nameserver 2001:db8::1\n"}, warn: true},
		"configured":                        {configured: "10.0.0.9", files: []string{"nameserver 10.0.0.1\n"}, want: "10.0.0.9"},
		"configured, but not reached":       {configured: "127.0.0.1", files: []string{"nameserver 10.0.0.1\n"}, warn: true},
		"more than a resolver takes notice": {configured: "10.0.0.1 10.0.0.2 10.0.0.3 10.0.0.4", want: "10.0.0.1 10.0.0.2 10.0.0.3"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			files := []string{filepath.Join(dir, "missing")}
			for i, text := range tt.files {
				f := filepath.Join(dir, string(rune('a'+i)))
				if err := os.WriteFile(f, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
				files = append(files, f)
			}
			var log bytes.Buffer
			found := nameservers(addrs(tt.configured), host, files, slog.New(slog.NewTextHandler(&log, nil)))
			var got []string
			for _, a := range found {
				got = append(got, a.String())
			}
			if strings.Join(got, " ") != tt.want || (strings.Count(log.String(), "hint=") == 1) != tt.warn {
				t.Errorf("got %q, want %q; log: %s", got, tt.want, log.String())
			}
		})
	}
}
