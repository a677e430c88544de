package oci

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// gVisor's runsc runs a container as a small family: the sandbox, which is the
// container's kernel and its first process on the host, its stubs, in which the
// container's programs execute, and the gofer, which opens files for it. It is
// told to leave cgroups alone, since old releases know but some; so the family
// is put into the container's group here, before the program starts, and is
// collected here when it has ended.
type family struct {
	// Gofer has the root filesystem as its root.
	Gofer int `json:"gofer"`
	// Groups are the process groups of gofer and stubs.
	Groups []int `json:"groups"`
}

// enlist finds the family of a created container and puts it into its cgroup.
func (c *container) enlist() error {
	files, err := filepath.Glob(filepath.Join(c.r.states(), c.name+"*.state"))
	if err != nil || len(files) != 1 {
		return fmt.Errorf("find gofer of %s: %d state files, %w", c.spec.ID, len(files), errors.Join(err, os.ErrNotExist))
	}
	raw, err := os.ReadFile(files[0])
	if err != nil {
		return fmt.Errorf("find gofer: %w", err)
	}
	var s struct{ GoferPID int }
	if err := json.Unmarshal(raw, &s); err != nil {
		return fmt.Errorf("find gofer: %w", err)
	}
	c.family.Gofer = s.GoferPID
	members := []int{c.pid, s.GoferPID}
	group, err := unix.Getpgid(s.GoferPID)
	if err != nil {
		return fmt.Errorf("find gofer: %w", err)
	}
	c.family.Groups = []int{group}
	for _, p := range processes() {
		if p.parent == c.pid && !slices.Contains(c.family.Groups, p.group) {
			c.family.Groups = append(c.family.Groups, p.group)
		}
	}
	for _, p := range processes() {
		if slices.Contains(c.family.Groups, p.group) && !slices.Contains(members, p.pid) {
			members = append(members, p.pid)
		}
	}
	var errs []error
	for _, pid := range members {
		errs = append(errs, c.group.Add(pid))
	}
	return errors.Join(errs...)
}

// collect waits for those of the family that outlived the sandbox and became
// our children. They have been killed.
func (f *family) collect() {
	for _, group := range f.Groups {
		for {
			var ws unix.WaitStatus
			_, err := unix.Wait4(-group, &ws, 0, nil)
			if err != nil && !errors.Is(err, unix.EINTR) {
				break // none is left, or none is ours
			}
		}
	}
}

type processInfo struct{ pid, parent, group int }

// processes of the host.
func processes() []processInfo {
	entries, _ := os.ReadDir("/proc")
	var all []processInfo
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		fields, err := statFields(pid)
		if err != nil {
			continue // it has ended
		}
		parent, _ := strconv.Atoi(fields[1])
		group, _ := strconv.Atoi(fields[2])
		all = append(all, processInfo{pid, parent, group})
	}
	return all
}

// statFields are the fields of /proc/PID/stat from the third one, the state.
func statFields(pid int) ([]string, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return nil, err
	}
	// The second field is the program's name in parentheses and may hold anything.
	s := string(b)
	fields := strings.Fields(s[strings.LastIndexByte(s, ')')+1:])
	if len(fields) < 20 {
		return nil, fmt.Errorf("read state of process %d: too few fields", pid)
	}
	return fields, nil
}
