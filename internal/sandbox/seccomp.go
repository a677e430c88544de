package sandbox

import (
	"encoding/binary"
	"fmt"
	"maps"
	"runtime"
	"slices"

	"github.com/elastic/go-seccomp-bpf/arch"
	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// SeccompProfile is the default profile for a container that holds the given
// capabilities ("CAP_CHOWN"), in the form of the OCI runtime specification.
func SeccompProfile(caps []string) (*specs.LinuxSeccomp, error) {
	p, err := seccomp.GetDefaultProfile(&specs.Spec{Process: &specs.Process{
		Capabilities: &specs.LinuxCapabilities{Bounding: caps},
	}})
	if err != nil {
		return nil, fmt.Errorf("read seccomp profile: %w", err)
	}
	return p, nil
}

// compileSeccomp makes the BPF program of a profile for this machine's native
// system calls; those of other architectures get the default action.
//
// The kernel runs a new filter once for each system call number when it is
// attached, so a long chain of comparisons would cost every start some tenth
// of a millisecond: the numbers are searched as a tree instead.
func compileSeccomp(p *specs.LinuxSeccomp) ([]byte, error) {
	info, err := arch.GetInfo(runtime.GOARCH)
	if err != nil {
		return nil, fmt.Errorf("compile seccomp: %w", err)
	}
	fallback, err := seccompAction(p.DefaultAction, p.DefaultErrnoRet)
	if err != nil {
		return nil, err
	}
	rules := map[uint32][]seccompRule{}
	for _, s := range p.Syscalls {
		action, err := seccompAction(s.Action, s.ErrnoRet)
		if err != nil {
			return nil, err
		}
		for _, name := range s.Names {
			if nr, ok := info.SyscallNames[name]; ok { // others do not exist here
				rules[uint32(nr)] = append(rules[uint32(nr)], seccompRule{action, s.Args}) //nolint:gosec // a system call number
			}
		}
	}

	// Leaves: runs of numbers with the same, unconditional answer, and single
	// numbers with conditions.
	var leaves []seccompLeaf
	plain := func(from uint32, action uint32) {
		if n := len(leaves); n == 0 || !slices.Equal(leaves[n-1].code, []bpf.Instruction{bpf.RetConstant{Val: action}}) {
			leaves = append(leaves, seccompLeaf{from, []bpf.Instruction{bpf.RetConstant{Val: action}}})
		}
	}
	plain(0, fallback)
	for _, nr := range slices.Sorted(maps.Keys(rules)) {
		if r := rules[nr]; len(r[0].args) == 0 {
			plain(nr, r[0].action)
		} else {
			code, err := conditionCode(r, fallback)
			if err != nil {
				return nil, err
			}
			leaves = append(leaves, seccompLeaf{nr, code})
		}
		if _, next := rules[nr+1]; !next {
			plain(nr+1, fallback)
		}
	}

	prog := []bpf.Instruction{
		bpf.LoadAbsolute{Off: 4, Size: 4},                                  // architecture
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(info.ID), SkipTrue: 1}, //nolint:gosec // an AUDIT_ARCH number
		bpf.RetConstant{Val: fallback},
		bpf.LoadAbsolute{Off: 0, Size: 4}, // number
	}
	prog = append(prog, searchCode(leaves)...)
	raw, err := bpf.Assemble(prog)
	if err != nil {
		return nil, fmt.Errorf("compile seccomp: %w", err)
	}
	return filterBytes(raw), nil
}

// filterBytes lays a BPF program out as struct sock_filter.
func filterBytes(raw []bpf.RawInstruction) []byte {
	out := make([]byte, 0, 8*len(raw))
	for _, i := range raw {
		out = binary.NativeEndian.AppendUint16(out, i.Op)
		out = append(out, i.Jt, i.Jf)
		out = binary.NativeEndian.AppendUint32(out, i.K)
	}
	return out
}

type seccompRule struct {
	action uint32
	args   []specs.LinuxSeccompArg
}

type seccompLeaf struct {
	from uint32
	code []bpf.Instruction
}

func seccompAction(a specs.LinuxSeccompAction, errno *uint) (uint32, error) {
	switch a {
	case specs.ActAllow:
		return unix.SECCOMP_RET_ALLOW, nil
	case specs.ActErrno:
		n := uint(unix.EPERM)
		if errno != nil {
			n = *errno
		}
		return unix.SECCOMP_RET_ERRNO | uint32(n&0xfff), nil
	case specs.ActKillProcess:
		return unix.SECCOMP_RET_KILL_PROCESS, nil
	default:
		return 0, fmt.Errorf("compile seccomp: action %s is not supported", a)
	}
}

// searchCode is a binary tree over the leaves.
func searchCode(leaves []seccompLeaf) []bpf.Instruction {
	if len(leaves) == 1 {
		return leaves[0].code
	}
	mid := len(leaves) / 2
	left, right := searchCode(leaves[:mid]), searchCode(leaves[mid:])
	var code []bpf.Instruction
	if len(left) <= 255 {
		code = append(code, bpf.JumpIf{Cond: bpf.JumpGreaterOrEqual, Val: leaves[mid].from, SkipTrue: uint8(len(left))})
	} else { // a conditional jump reaches 255 instructions, a plain one all
		code = append(code,
			bpf.JumpIf{Cond: bpf.JumpGreaterOrEqual, Val: leaves[mid].from, SkipFalse: 1},
			bpf.Jump{Skip: uint32(len(left))}) //nolint:gosec // a filter has at most 4096 instructions
	}
	return append(append(code, left...), right...)
}

// conditionCode answers with the first rule whose arguments all match.
func conditionCode(rules []seccompRule, fallback uint32) ([]bpf.Instruction, error) {
	code := []bpf.Instruction{bpf.RetConstant{Val: fallback}}
	for _, r := range slices.Backward(rules) {
		one := []bpf.Instruction{bpf.RetConstant{Val: r.action}}
		for _, a := range slices.Backward(r.args) {
			c, err := argumentCode(a, uint8(len(one))) //nolint:gosec // a handful
			if err != nil {
				return nil, err
			}
			one = append(c, one...)
		}
		code = append(one, code...)
	}
	return code, nil
}

// argumentCode goes on where a 64-bit argument matches and else skips what
// follows, rest instructions. The low word is first, as on every machine Go
// calls little endian.
func argumentCode(a specs.LinuxSeccompArg, rest uint8) ([]bpf.Instruction, error) {
	low := bpf.LoadAbsolute{Off: uint32(16 + 8*a.Index), Size: 4} //nolint:gosec // 0 to 5
	high := bpf.LoadAbsolute{Off: low.Off + 4, Size: 4}
	hv, lv := uint32(a.Value>>32), uint32(a.Value) //nolint:gosec // split in two
	switch a.Op {
	case specs.OpEqualTo:
		return []bpf.Instruction{
			high, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: hv, SkipTrue: rest + 2},
			low, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: lv, SkipTrue: rest},
		}, nil
	case specs.OpNotEqual:
		return []bpf.Instruction{
			high, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: hv, SkipTrue: 2},
			low, bpf.JumpIf{Cond: bpf.JumpEqual, Val: lv, SkipTrue: rest},
		}, nil
	case specs.OpMaskedEqual: // Value is the mask, ValueTwo what is wanted
		hw, lw := uint32(a.ValueTwo>>32), uint32(a.ValueTwo) //nolint:gosec // split in two
		return []bpf.Instruction{
			high, bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: hv},
			bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: hw, SkipTrue: rest + 3},
			low, bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: lv},
			bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: lw, SkipTrue: rest},
		}, nil
	case specs.OpLessThan:
		return []bpf.Instruction{
			high, bpf.JumpIf{Cond: bpf.JumpLessThan, Val: hv, SkipTrue: 3},
			bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: hv, SkipTrue: rest + 2},
			low, bpf.JumpIf{Cond: bpf.JumpGreaterOrEqual, Val: lv, SkipTrue: rest},
		}, nil
	default:
		return nil, fmt.Errorf("compile seccomp: comparison %s is not supported", a.Op)
	}
}
