package sandbox

import (
	"encoding/binary"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"

	"github.com/elastic/go-seccomp-bpf/arch"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// runFilter interprets a compiled filter. The interpreter reads words as big
// endian, so struct seccomp_data is laid out with big-endian words.
func runFilter(t *testing.T, prog []byte, nr, auditArch uint32, args [6]uint64) uint32 {
	t.Helper()
	var raw []bpf.RawInstruction
	for i := 0; i < len(prog); i += 8 {
		raw = append(raw, bpf.RawInstruction{
			Op: binary.LittleEndian.Uint16(prog[i:]), Jt: prog[i+2], Jf: prog[i+3],
			K: binary.LittleEndian.Uint32(prog[i+4:]),
		})
	}
	ins, ok := bpf.Disassemble(raw)
	if !ok {
		t.Fatal("the filter holds an unknown instruction")
	}
	vm, err := bpf.NewVM(ins)
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 64)
	binary.BigEndian.PutUint32(data[0:], nr)
	binary.BigEndian.PutUint32(data[4:], auditArch)
	for i, a := range args {
		binary.BigEndian.PutUint32(data[16+8*i:], uint32(a))
		binary.BigEndian.PutUint32(data[20+8*i:], uint32(a>>32))
	}
	out, err := vm.Run(data)
	if err != nil {
		t.Fatal(err)
	}
	return uint32(out)
}

// naive answers as the profile reads: the first rule that names the call and
// whose arguments all match.
func naive(p *specs.LinuxSeccomp, name string, args [6]uint64) uint32 {
	for _, s := range p.Syscalls {
		if !slices.Contains(s.Names, name) {
			continue
		}
		match := true
		for _, a := range s.Args {
			v := args[a.Index]
			switch a.Op {
			case specs.OpEqualTo:
				match = match && v == a.Value
			case specs.OpNotEqual:
				match = match && v != a.Value
			case specs.OpMaskedEqual:
				match = match && v&a.Value == a.ValueTwo
			case specs.OpLessThan:
				match = match && v < a.Value
			}
		}
		if match {
			action, _ := seccompAction(s.Action, s.ErrnoRet)
			return action
		}
	}
	action, _ := seccompAction(p.DefaultAction, p.DefaultErrnoRet)
	return action
}

func TestSeccomp_CompiledFilterAnswersAsTheProfileReads(t *testing.T) {
	info, err := arch.GetInfo(runtime.GOARCH)
	if err != nil {
		t.Fatal(err)
	}
	for name, caps := range map[string][]string{
		"default":   defaultCaps,
		"sys_admin": append(slices.Clone(defaultCaps), "CAP_SYS_ADMIN"),
	} {
		t.Run(name, func(t *testing.T) {
			profile, err := SeccompProfile(caps)
			if err != nil {
				t.Fatal(err)
			}
			prog, err := compileSeccomp(profile)
			if err != nil {
				t.Fatal(err)
			}
			// Every value that a rule mentions, and its neighbours, and some by chance.
			values := []uint64{0, 1, 1 << 32, ^uint64(0)}
			for _, s := range profile.Syscalls {
				for _, a := range s.Args {
					values = append(values, a.Value, a.Value-1, a.Value+1, a.Value|1<<33, a.ValueTwo)
				}
			}
			rnd := rand.New(rand.NewPCG(1, 2))
			for range 20 {
				values = append(values, rnd.Uint64())
			}
			for call, nr := range info.SyscallNames {
				for _, v := range values {
					args := [6]uint64{v, v, v, v, v, v}
					got := runFilter(t, prog, uint32(nr), uint32(info.ID), args)
					if want := naive(profile, call, args); got != want {
						t.Fatalf("%s(%#x...): got action %#x, want %#x", call, v, got, want)
					}
				}
			}
		})
	}
}

func TestSeccomp_OtherArchitecturesAndUnknownCallsAreRefused(t *testing.T) {
	profile, err := SeccompProfile(defaultCaps)
	if err != nil {
		t.Fatal(err)
	}
	prog, err := compileSeccomp(profile)
	if err != nil {
		t.Fatal(err)
	}
	info, _ := arch.GetInfo(runtime.GOARCH)
	fallback, _ := seccompAction(profile.DefaultAction, profile.DefaultErrnoRet)
	read := uint32(info.SyscallNames["read"])
	for name, c := range map[string]struct{ nr, arch uint32 }{
		"another architecture":     {read, uint32(arch.I386.ID)},
		"x32":                      {0x40000000 | read, uint32(info.ID)},
		"a call of the far future": {5000, uint32(info.ID)},
	} {
		if got := runFilter(t, prog, c.nr, c.arch, [6]uint64{}); got != fallback {
			t.Errorf("%s: got action %#x, want %#x", name, got, fallback)
		}
	}
	if got := runFilter(t, prog, read, uint32(info.ID), [6]uint64{}); got != unix.SECCOMP_RET_ALLOW {
		t.Errorf("read: got action %#x, want allow", got)
	}
}

func TestSeccomp_UnsupportedProfilesAreRefused(t *testing.T) {
	for name, p := range map[string]*specs.LinuxSeccomp{
		"action":     {DefaultAction: specs.ActTrace},
		"comparison": {DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Op: "SCMP_CMP_XX"}}}}},
	} {
		if _, err := compileSeccomp(p); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
