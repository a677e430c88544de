package sandboxtest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/fastcontainer/fastcontainer/internal/sandbox"
)

// linkGroup marks the links of this suite.
const linkGroup = 0x7e57

// pairs is a small network that works: a veth pair for each container.
type pairs struct {
	mu    sync.Mutex
	links map[string]bool
	calls []string
}

// The suite's addresses are reserved for documentation.
var (
	hostSide      = net.IPNet{IP: net.IPv4(198, 51, 100, 1), Mask: net.CIDRMask(30, 32)}
	containerSide = net.IPNet{IP: net.IPv4(198, 51, 100, 2), Mask: net.CIDRMask(30, 32)}
)

func (p *pairs) Attach(_ context.Context, name string, ns int) (sandbox.Link, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.calls = append(p.calls, "attach")
	attrs := netlink.NewLinkAttrs()
	attrs.Group = linkGroup
	attrs.Name = name
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns)}
	if err := netlink.LinkAdd(veth); err != nil {
		return sandbox.Link{}, fmt.Errorf("add link: %w", err)
	}
	host, err := netlink.LinkByName(name)
	if err != nil {
		return sandbox.Link{}, err
	}
	inside, err := netlink.NewHandleAt(netns.NsHandle(ns))
	if err != nil {
		return sandbox.Link{}, err
	}
	defer inside.Close()
	eth0, err := inside.LinkByName("eth0")
	if err != nil {
		return sandbox.Link{}, err
	}
	lo, err := inside.LinkByName("lo")
	if err != nil {
		return sandbox.Link{}, err
	}
	p.links[name] = true
	return sandbox.Link{Name: name, Address: netip.AddrFrom4([4]byte{198, 51, 100, 2}), State: json.RawMessage(`{"a":1}`)}, errors.Join(
		netlink.AddrAdd(host, &netlink.Addr{IPNet: &hostSide}), netlink.LinkSetUp(host),
		inside.AddrAdd(eth0, &netlink.Addr{IPNet: &containerSide}), inside.LinkSetUp(eth0), inside.LinkSetUp(lo),
	)
}

func (p *pairs) Detach(_ context.Context, l sandbox.Link) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.calls = append(p.calls, "detach")
	delete(p.links, l.Name)
	return removeLink(l.Name)
}

func removeLink(name string) error {
	host, err := netlink.LinkByName(name)
	if _, missing := errors.AsType[netlink.LinkNotFoundError](err); missing {
		return nil // it went with its namespace
	}
	if err != nil {
		return err
	}
	if err := netlink.LinkDel(host); err != nil && !strings.Contains(err.Error(), "no such device") {
		return err
	}
	return nil
}

func (p *pairs) Adopt(l sandbox.Link) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.calls = append(p.calls, "adopt "+string(l.State))
	p.links[l.Name] = true
	return nil
}

func (p *pairs) Clean(_ context.Context, keep []string) ([]string, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var removed []string
	for name := range p.links {
		if !slices.Contains(keep, name) {
			removed = append(removed, name)
			delete(p.links, name)
			if err := removeLink(name); err != nil {
				return removed, err
			}
		}
	}
	return removed, nil
}

func (p *pairs) ResolvConf() []byte { return []byte("nameserver 198.51.100.53\n") }

func (s *suite) network(t *testing.T) {
	p := &pairs{links: map[string]bool{}}
	first := s.open(t, p)
	spec := s.spec("httpd -f -p 80 -h /etc", nil)
	c, err := first.Start(testContext(t), spec)
	must(t, err)
	if want := netip.MustParseAddr("198.51.100.2"); c.Address() != want {
		t.Errorf("got address %s, want %s", c.Address(), want)
	}
	if b := fetch(t, "http://198.51.100.2/resolv.conf"); b != "nameserver 198.51.100.53\n" {
		t.Errorf("resolv.conf is %q", b)
	}
	if b := fetch(t, "http://198.51.100.2/hosts"); !strings.Contains(b, "198.51.100.2\tinside\n") {
		t.Errorf("hosts is %q", b)
	}
	must(t, first.Close())
	r := s.runtime(t, p)
	c, err = r.Adopt(testContext(t), c.State())
	must(t, err)
	if removed, err := r.Clean(testContext(t), nil); err != nil || len(removed) != 0 {
		t.Errorf("clean removed %v, %v", removed, err)
	}
	if c.Address() != netip.MustParseAddr("198.51.100.2") || len(p.links) != 1 {
		t.Errorf("got address %s, links %v", c.Address(), p.links)
	}
	fetch(t, "http://198.51.100.2/hostname")
	destroy(t, c)
	destroy(t, c)
	if want := []string{"attach", `adopt {"a":1}`, "detach"}; !slices.Equal(p.calls, want) || len(p.links) != 0 {
		t.Errorf("got calls %v, want %v, and links %v", p.calls, want, p.links)
	}
}

// fetch asks until the server listens.
func fetch(t *testing.T, url string) string {
	t.Helper()
	client := &http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	deadline := time.Now().Add(timeout)
	for {
		resp, err := client.Get(url)
		if err == nil {
			b, err := io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			must(t, err)
			return string(b)
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}
