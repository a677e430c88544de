package sandbox

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// The init program.
//
// A container must do a few dozen things inside its own namespaces before the
// app's program may run: mount, pivot, drop privileges. A second copy of the
// daemon could do them, as other runtimes do, but starting a Go runtime costs
// more than everything else together, and the daemon's binary would be
// visible inside. Instead the daemon compiles the list of system calls (a
// tape) and the first process of a sandbox is a machine that plays it: about
// two hundred bytes of code, in a sealed memory file, with no libraries, no
// runtime and nothing to read but its tape.
//
// The machine: it starts with a SOCK_SEQPACKET socket as descriptor 3, receives
// one message (with descriptors) into its memory at initTape, plays it, and
// waits for the next. When the socket is closed it ends. An operation is
// eight words:
//
//	system call number | flags << 32, six arguments, address for the result
//
// so a result can be stored into the arguments of a later operation. An
// operation that fails ends the machine, which first writes the operation's
// address and its negative errno to the socket; opMayFail goes on instead.
// opFork is for clone: the child goes on, the parent writes the operation's
// address and the child's pid, and waits for its next tape. A word of all ones
// ends a tape.
// execve succeeds silently: the socket is close-on-exec, so its other end sees
// the end of file.
const (
	initRAM     = 0x10000000 // as in init_amd64.s
	initRAMSize = 0x40000
	initMsghdr  = initRAM
	initIovec   = initRAM + 0x40
	initControl = initRAM + 0x200
	initTape    = initRAM + 0x1000
	initTapeMax = initRAMSize - 0x1000
	initCode    = 0x400000

	initControlMax = 0xe00

	opSize    = 64
	opEnd     = ^uint64(0)
	opMayFail = 1 << 32
	opFork    = 2 << 32
)

func initProgram() //nolint:unused // in assembly, where its address is taken

// initProgramBytes is where the code of initProgram stands.
func initProgramBytes() *[1024]byte

// newInitProgram builds the init program as an ELF executable in a sealed,
// anonymous memory file.
func newInitProgram() (*os.File, error) {
	code := initProgramBytes()[:]
	n := bytes.Index(code, []byte("fastinit"))
	if n < 0 {
		return nil, fmt.Errorf("make init program: its end mark is missing")
	}
	code = code[:n]

	// Two segments: code (read, execute) with the headers before it, and
	// memory (read, write) that begins with the preset msghdr and iovec.
	const headers = 64 + 3*56
	ram := make([]byte, 0x80)
	le := binary.LittleEndian
	le.PutUint64(ram[0x10:], initIovec)      // msg_iov
	le.PutUint64(ram[0x18:], 1)              // msg_iovlen
	le.PutUint64(ram[0x20:], initControl)    // msg_control
	le.PutUint64(ram[0x28:], initControlMax) // msg_controllen
	le.PutUint64(ram[0x40:], initTape)       // iov_base
	le.PutUint64(ram[0x48:], initTapeMax)    // iov_len

	const ramOffset = 0x1000
	var elf bytes.Buffer
	w := func(v any) { _ = binary.Write(&elf, le, v) } // a bytes.Buffer never fails
	w([16]byte{0x7f, 'E', 'L', 'F', 2, 1, 1})
	w([]uint16{2, 62}) // executable, x86-64
	w(uint32(1))
	w([]uint64{initCode + headers, 64, 0})
	w(uint32(0))
	w([]uint16{64, 56, 3, 0, 0, 0})
	segment := func(typ, flags uint32, offset, addr, file, mem uint64) {
		w([]uint32{typ, flags})
		w([]uint64{offset, addr, addr, file, mem, 0x1000})
	}
	segment(1, 5, 0, initCode, uint64(headers+len(code)), uint64(headers+len(code)))
	segment(1, 6, ramOffset, initRAM, uint64(len(ram)), initRAMSize)
	segment(0x6474e551, 6, 0, 0, 0, 0) // GNU_STACK: not executable
	elf.Write(code)
	elf.Write(make([]byte, ramOffset-elf.Len()))
	elf.Write(ram)

	fd, err := unix.MemfdCreate("fastcontainer-init", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("make init program: %w", err)
	}
	f := os.NewFile(uintptr(fd), "fastcontainer-init")
	if _, err := f.Write(elf.Bytes()); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("make init program: %w", err)
	}
	seals := unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("seal init program: %w", err)
	}
	return f, nil
}
