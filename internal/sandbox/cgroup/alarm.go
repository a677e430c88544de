package cgroup

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// Alarm calls f, each time in a goroutine of the alarm's own, when the memory
// of the group goes above at bytes: before its limit is reached, if at is below
// that. On v1 a threshold event says so (it says so too when the memory falls
// again; f looks for itself). On v2 memory.high does: there the kernel slows
// the group down until f has made room, or stop was called.
func (g *Group) Alarm(at int64, f func()) (stop func(), err error) {
	if g.root.v2 {
		return g.alarmV2(at, f)
	}
	usage, err := os.Open(g.file("memory", "memory.usage_in_bytes"))
	if err != nil {
		return nil, fmt.Errorf("set memory alarm: %w", err)
	}
	defer usage.Close()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("set memory alarm: %w", err)
	}
	event := os.NewFile(uintptr(fd), "memory alarm")
	line := fmt.Sprintf("%d %d %d", fd, usage.Fd(), at)
	if err := write(g.file("memory", "cgroup.event_control"), line); err != nil {
		return nil, errors.Join(fmt.Errorf("set memory alarm: %w", err), event.Close())
	}
	go listen(event, 8, f)
	return closer(event), nil
}

func (g *Group) alarmV2(at int64, f func()) (func(), error) {
	high, events := g.file("memory", "memory.high"), g.file("memory", "memory.events")
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("set memory alarm: %w", err)
	}
	notes := os.NewFile(uintptr(fd), "memory alarm")
	if _, err := unix.InotifyAddWatch(fd, events, unix.IN_MODIFY); err != nil {
		return nil, errors.Join(fmt.Errorf("watch %s: %w", events, err), notes.Close())
	}
	if err := write(high, strconv.FormatInt(at, 10)); err != nil {
		return nil, errors.Join(fmt.Errorf("set memory alarm: %w", err), notes.Close())
	}
	go listen(notes, 4096, f)
	end := closer(notes)
	return func() {
		_ = write(high, "max") // or the group is gone
		end()
	}, nil
}

// listen calls f for everything that comes, until the file is closed.
func listen(file *os.File, size int, f func()) {
	buf := make([]byte, size)
	for {
		n, err := file.Read(buf)
		if err != nil {
			return
		}
		if n == 8 && binary.NativeEndian.Uint64(buf) == 0 {
			continue
		}
		f()
	}
}

func closer(f *os.File) func() {
	var once sync.Once
	return func() { once.Do(func() { _ = f.Close() }) }
}
