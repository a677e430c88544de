package sandbox

import (
	"encoding/binary"
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"
)

// waitid collects the child behind a pidfd if it has ended.
func waitid(pidfd int, info *unix.Siginfo) error {
	for {
		err := unix.Waitid(unix.P_PIDFD, pidfd, info, unix.WEXITED|unix.WNOHANG, nil)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// exitStatus reads the fields of SIGCHLD's siginfo: si_code at 8, and behind
// si_pid and si_uid si_status at 24.
func exitStatus(info *unix.Siginfo) status {
	b := (*[32]byte)(unsafe.Pointer(info))
	value := int(int32(binary.NativeEndian.Uint32(b[24:]))) //nolint:gosec // a signed number
	const cldExited = 1
	if code := binary.NativeEndian.Uint32(b[8:]); code != cldExited {
		return status{signal: unix.Signal(value)}
	}
	return status{code: value}
}
