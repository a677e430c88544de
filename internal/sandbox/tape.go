package sandbox

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// tape is a list of system calls with their data, as the init program plays
// it (see init.go).
type tape struct {
	ops  []op
	data []byte
	// pointers are places in data that hold an offset in data and become its
	// address when the tape is sealed.
	pointers []int
}

type op struct {
	name string
	nr   uint64 // with flags in the upper half
	args [6]word
	// toOp and toArg: where the result is stored, if result is set.
	result      bool
	toOp, toArg int
}

// word is an argument: a number, or the offset of something in data.
type word struct {
	value uint64
	data  bool
}

func num[T ~int | ~int32 | ~uint32 | ~uint64 | ~int64 | ~uintptr](n T) word {
	return word{value: uint64(n)} //nolint:gosec // sign extension is meant: AT_FDCWD
}

// bytes places data, aligned to eight, and gives its address as an argument.
func (t *tape) bytes(b []byte) word {
	for len(t.data)%8 != 0 {
		t.data = append(t.data, 0)
	}
	off := len(t.data)
	t.data = append(t.data, b...)
	return word{value: uint64(off), data: true} //nolint:gosec // not negative
}

// str places a NUL-terminated string.
func (t *tape) str(s string) word { return t.bytes(append([]byte(s), 0)) }

// strs places a NULL-terminated array of strings, as execve wants it.
func (t *tape) strs(ss []string) word {
	offsets := make([]uint64, len(ss))
	for i, s := range ss {
		offsets[i] = t.str(s).value
	}
	var array []byte
	for _, o := range offsets {
		array = binary.LittleEndian.AppendUint64(array, o)
	}
	w := t.bytes(binary.LittleEndian.AppendUint64(array, 0))
	for i := range ss {
		t.pointers = append(t.pointers, int(w.value)+8*i) //nolint:gosec // small
	}
	return w
}

// words places numbers and addresses: a struct.
func (t *tape) words(ws ...word) word {
	var b []byte
	for _, w := range ws {
		b = binary.LittleEndian.AppendUint64(b, w.value)
	}
	at := t.bytes(b)
	for i, w := range ws {
		if w.data {
			t.pointers = append(t.pointers, int(at.value)+8*i) //nolint:gosec // small
		}
	}
	return at
}

// call appends an operation and gives its index. name is for people.
func (t *tape) call(name string, nr uint64, args ...word) int {
	o := op{name: name, nr: nr}
	copy(o.args[:], args)
	t.ops = append(t.ops, o)
	return len(t.ops) - 1
}

// feed stores the result of operation from in the first argument of operation to.
func (t *tape) feed(from, to int) {
	o := &t.ops[from]
	o.result, o.toOp, o.toArg = true, to, 0
}

// errTapeFull: the arguments and the environment are larger than the init
// program's memory.
var errTapeFull = errors.New("arguments and environment are too large")

// seal lays the tape out as one message.
func (t *tape) seal() ([]byte, error) {
	base := (len(t.ops) + 1) * opSize
	if size := base + len(t.data); size > initTapeMax {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", errTapeFull, len(t.data), initTapeMax-base)
	}
	msg := make([]byte, base, base+len(t.data))
	msg = append(msg, t.data...)
	le := binary.LittleEndian
	dataAddr := uint64(initTape + base) //nolint:gosec // small
	for i, o := range t.ops {
		at := msg[i*opSize:]
		le.PutUint64(at, o.nr)
		for j, a := range o.args {
			if a.data {
				a.value += dataAddr
			}
			le.PutUint64(at[8+8*j:], a.value)
		}
		if o.result {
			le.PutUint64(at[56:], uint64(initTape+o.toOp*opSize+8+8*o.toArg)) //nolint:gosec // small
		}
	}
	le.PutUint64(msg[len(t.ops)*opSize:], opEnd)
	for _, p := range t.pointers {
		at := msg[base+p:]
		le.PutUint64(at, le.Uint64(at)+dataAddr)
	}
	return msg, nil
}

// callError says which operation of a tape failed and how.
type callError struct {
	op    string
	errno unix.Errno
}

func (e *callError) Error() string { return e.op + ": " + e.errno.Error() }
func (e *callError) Unwrap() error { return e.errno }

// report reads what the init program wrote about one operation: its result if
// it is not negative, else the error.
func (t *tape) report(msg []byte) (int, error) {
	if len(msg) != 16 {
		return 0, fmt.Errorf("init program wrote %d bytes", len(msg))
	}
	i := (int64(binary.LittleEndian.Uint64(msg)) - initTape) / opSize //nolint:gosec // checked below
	result := int64(binary.LittleEndian.Uint64(msg[8:]))              //nolint:gosec // a signed result
	if i < 0 || i >= int64(len(t.ops)) {
		return 0, fmt.Errorf("init program reports an operation that is not on its tape")
	}
	if result < 0 {
		return 0, &callError{op: t.ops[i].name, errno: unix.Errno(-result)}
	}
	return int(result), nil
}
