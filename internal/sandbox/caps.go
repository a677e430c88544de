package sandbox

import (
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/moby/sys/capability"
	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// defaultCaps is what containers get unless they ask otherwise: what ordinary
// servers need to drop privileges and bind low ports, and nothing that
// reaches the host.
var defaultCaps = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL",
	"CAP_NET_BIND_SERVICE", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP",
	"CAP_SETUID", "CAP_SYS_CHROOT", "CAP_AUDIT_WRITE",
}

// Capabilities applies changes to the default set. Names are taken with or
// without "CAP_", in any case; ALL is every capability.
func Capabilities(add, drop []string) ([]string, error) {
	set := slices.Clone(defaultCaps)
	for _, name := range drop {
		c, err := capName(name)
		if err != nil {
			return nil, err
		}
		set = slices.DeleteFunc(set, func(s string) bool { return c == "CAP_ALL" || s == c })
	}
	for _, name := range add {
		c, err := capName(name)
		if err != nil {
			return nil, err
		}
		switch {
		case c == "CAP_ALL":
			set = set[:0]
			for _, k := range capability.ListKnown() {
				set = append(set, "CAP_"+strings.ToUpper(k.String()))
			}
		case !slices.Contains(set, c):
			set = append(set, c)
		}
	}
	return set, nil
}

// capMask is a set of capabilities as bits.
func capMask(names []string) (uint64, error) {
	mask := uint64(0)
	for _, name := range names {
		i, err := capNumber(name)
		if err != nil {
			return 0, err
		}
		mask |= 1 << i
	}
	return mask, nil
}

// dropCaps adds to the tape what takes a bounding set down to the ones kept.
// Each costs some microseconds, so most are dropped ahead.
func dropCaps(t *tape, from, keep uint64) {
	for i := range 64 {
		if from&^keep&(1<<i) != 0 {
			t.call("drop capability", unix.SYS_PRCTL, num(unix.PR_CAPBSET_DROP), num(i), num(0), num(0), num(0))
		}
	}
}

func capName(name string) (string, error) {
	c := strings.ToUpper(name)
	if !strings.HasPrefix(c, "CAP_") {
		c = "CAP_" + c
	}
	if c == "CAP_ALL" {
		return c, nil
	}
	if _, err := capNumber(c); err != nil {
		return "", err
	}
	return c, nil
}

func capNumber(name string) (int, error) {
	if n, ok := capNumbers()[name]; ok {
		return n, nil
	}
	return 0, &fleet.Error{
		Op: "set capabilities", Subject: name, Kind: fleet.ErrInvalid,
		Err:  fmt.Errorf("there is no such capability"),
		Hint: "names are as in capabilities(7): NET_BIND_SERVICE, SYS_PTRACE, ...",
	}
}

var capNumbers = sync.OnceValue(func() map[string]int {
	numbers := map[string]int{}
	for _, k := range capability.ListKnown() {
		numbers["CAP_"+strings.ToUpper(k.String())] = int(k)
	}
	return numbers
})

// lastCap is the highest capability of this kernel.
func lastCap() int {
	for c := unix.CAP_LAST_CAP + 16; c > 0; c-- {
		if _, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(c), 0, 0, 0); err == nil {
			return c
		}
	}
	return unix.CAP_LAST_CAP
}
