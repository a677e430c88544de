package network

import (
	"errors"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What is set is that of the namespace which a thread is in, and of no other,
// however many use a view, and while views come and go.
func TestParameters(t *testing.T) {
	const name = "ipv4/ip_unprivileged_port_start"
	before := readFile("/proc/sys/net/" + name)
	var p parameters
	var wg sync.WaitGroup
	for range 8 {
		ns := newNamespace(t)
		wg.Go(func() {
			err := inNamespace(ns, func() error {
				for range viewUses {
					if err := p.set(name, "77"); err != nil {
						return err
					}
				}
				if got := strings.TrimSpace(readFile("/proc/sys/net/" + name)); got != "77" {
					t.Errorf("it is %q", got)
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if after := readFile("/proc/sys/net/" + name); after != before {
		t.Errorf("the host's was %q and is %q", before, after)
	}
	err := inNamespace(newNamespace(t), func() error { return p.set("ipv4/no_such_thing", "1") })
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "net/ipv4/no_such_thing") {
		t.Errorf("got %v", err)
	}
	err = inNamespace(newNamespace(t), func() error { return p.set(name, "many") })
	if !errors.Is(err, unix.EINVAL) {
		t.Errorf("got %v", err)
	}
	p.close()
	if p.view != nil {
		t.Error("a view is left")
	}
}

// A view is thrown away after some uses, with the names that the kernel keeps in
// it, but not while somebody uses it.
func TestParameters_ViewsAreRenewed(t *testing.T) {
	const name = "ipv4/ip_unprivileged_port_start"
	var p parameters
	defer p.close()
	err := inNamespace(newNamespace(t), func() error {
		if err := p.set(name, "79"); err != nil {
			return err
		}
		first := p.view
		for range viewUses - 1 {
			if err := p.set(name, "79"); err != nil {
				return err
			}
			if p.view != first {
				t.Fatal("it is renewed before its time")
			}
		}
		fd := first.Fd()
		p.mu.RLock() // somebody uses it
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := p.set("ipv4/no_such_thing", "1"); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("got %v", err)
			}
		})
		time.Sleep(20 * time.Millisecond)
		if _, err := unix.FcntlInt(fd, unix.F_GETFD, 0); err != nil {
			t.Errorf("it is closed while it is used: %v", err)
		}
		p.mu.RUnlock()
		wg.Wait()
		if p.view == first {
			t.Fatal("it is not renewed")
		}
		p.work.Wait()
		if _, err := unix.FcntlInt(fd, unix.F_GETFD, 0); !errors.Is(err, unix.EBADF) {
			t.Errorf("it is left open: %v", err)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// Where no view can be made /proc does.
func TestParameters_WithoutAView(t *testing.T) {
	var p parameters
	p.uses.Store(1) // it was tried
	defer p.close()
	const name = "ipv4/ip_unprivileged_port_start"
	err := inNamespace(newNamespace(t), func() error {
		err := p.set(name, "78")
		if got := strings.TrimSpace(readFile("/proc/sys/net/" + name)); got != "78" {
			t.Errorf("it is %q", got)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	if p.view != nil {
		t.Error("there is one")
	}
}
