package network

import (
	"io"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
)

// Local resolvers (systemd-resolved, NetworkManager's dnsmasq) are the host's
// alone. They name the servers behind them in files of their own.
var resolvFiles = []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf", "/run/NetworkManager/no-stub-resolv.conf"}

const (
	maxResolvConf = 64 << 10
	maxServers    = 3 // resolv.conf(5) reads no more
)

// nameservers finds what containers can ask: those configured, else those of
// the first file that has any. hosts are the host's own addresses, which
// containers do not reach.
func nameservers(configured, hosts []netip.Addr, files []string, log *slog.Logger) []netip.Addr {
	out := func(a netip.Addr) bool { return !reachable(a) || slices.Contains(hosts, a) }
	found := slices.DeleteFunc(slices.Clone(configured), out)
	if len(configured) == 0 {
		for _, f := range files {
			if found = slices.DeleteFunc(servers(readFile(f)), out); len(found) > 0 {
				break
			}
		}
	}
	if len(found) == 0 {
		log.Warn("containers have no name server: they reach no IPv6, loopback or other address of the host", "hint", "set network.dns in the configuration")
	}
	return found[:min(len(found), maxServers)]
}

// readFile gives the beginning of a file, or nothing.
func readFile(name string) string {
	f, err := os.Open(name)
	if err != nil {
		return ""
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, maxResolvConf))
	if err != nil {
		return ""
	}
	return string(b)
}

// servers are the name servers of a resolv.conf(5) that containers can reach.
func servers(text string) []netip.Addr {
	var found []netip.Addr
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) < 2 || fields[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(fields[1]); err == nil && reachable(a) && !slices.Contains(found, a) {
			found = append(found, a)
		}
	}
	return found
}

// reachable is false for what means the host itself, and for all of IPv6. The
// unspecified address means the host, too.
func reachable(a netip.Addr) bool {
	return a.Is4() && !a.IsLoopback() && !a.IsUnspecified() && !a.IsMulticast()
}

func resolvConf(servers []netip.Addr) []byte {
	var b strings.Builder
	for _, s := range servers {
		b.WriteString("nameserver " + s.String() + "\n")
	}
	return []byte(b.String())
}
