#include "textflag.h"

// The init program of a sandbox: it receives messages of system calls and
// carries them out (see init.go for the machine that it is and the layout of
// its memory). It is never called in this process: its bytes are copied into
// a program of their own. It uses no stack and no memory but initRAM.
//
// R12 is initRAM, R13 the operation under way.

#define RAM      0x10000000
#define MSGHDR   0x0      // struct msghdr, preset
#define REPORT   0x100    // two words: address of the operation, its result
#define TAPE     0x1000

TEXT ·initProgram(SB), NOSPLIT|NOFRAME, $0
	MOVQ $RAM, R12

receive:
	MOVQ $0xe00, 0x28(R12)  // msg_controllen, which recvmsg overwrites
	MOVQ $47, AX            // recvmsg
	MOVQ $3, DI
	LEAQ MSGHDR(R12), SI
	MOVQ $0x40000000, DX    // MSG_CMSG_CLOEXEC
	SYSCALL
	CMPQ AX, $0
	JLE  quit               // the daemon is gone, or let go of us
	LEAQ TAPE(R12), R13

next:
	MOVQ 0(R13), AX
	CMPQ AX, $-1
	JEQ  receive            // end of the tape
	MOVQ 8(R13), DI
	MOVQ 16(R13), SI
	MOVQ 24(R13), DX
	MOVQ 32(R13), R10
	MOVQ 40(R13), R8
	MOVQ 48(R13), R9
	MOVL AX, AX             // the flags are in the upper half
	SYSCALL
	MOVQ 56(R13), BX
	TESTQ BX, BX
	JEQ  check
	MOVQ AX, 0(BX)

check:
	CMPQ AX, $-4095
	JCC  failed             // unsigned: -4095 to -1
	MOVL 4(R13), BX
	TESTL $2, BX            // opFork
	JEQ  advance
	TESTQ AX, AX
	JNE  forked             // in the parent

advance:
	ADDQ $64, R13
	JMP  next

forked:                         // tell the child's pid and wait for the next tape
	MOVQ R13, REPORT(R12)
	MOVQ AX, (REPORT+8)(R12)
	MOVQ $1, AX             // write
	MOVQ $3, DI
	LEAQ REPORT(R12), SI
	MOVQ $16, DX
	SYSCALL
	JMP  receive

failed:
	MOVL 4(R13), BX
	TESTL $1, BX            // opMayFail
	JNE  advance

	MOVQ R13, REPORT(R12)
	MOVQ AX, (REPORT+8)(R12)
	MOVQ $1, AX             // write
	MOVQ $3, DI
	LEAQ REPORT(R12), SI
	MOVQ $16, DX
	SYSCALL

quit:
	MOVQ $231, AX           // exit_group
	MOVQ $0, DI
	SYSCALL
	INT $3
	BYTE $0x66; BYTE $0x61; BYTE $0x73; BYTE $0x74 // "fastinit" marks the end
	BYTE $0x69; BYTE $0x6e; BYTE $0x69; BYTE $0x74

// func initProgramBytes() *[1024]byte
TEXT ·initProgramBytes(SB), NOSPLIT, $0-8
	MOVQ $·initProgram(SB), AX
	MOVQ AX, ret+0(FP)
	RET
