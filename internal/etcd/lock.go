package etcd

import (
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// lockDir keeps other processes out of a directory, at once: etcd itself would
// wait for them.
func lockDir(dir string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, &fleet.Error{Op: "open store", Subject: dir, Err: err}
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, &fleet.Error{Op: "open store", Subject: dir, Kind: fleet.ErrConflict, Err: errors.New("another process has it open"), Hint: "another daemon runs with this data directory: stop it, or choose another --data"}
		}
		return nil, &fleet.Error{Op: "open store", Subject: dir, Err: err}
	}
	return func() { _ = f.Close() }, nil
}
