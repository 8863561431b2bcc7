# The guest of `ci/rig --self-test`: 64-bit, one vCPU, loaded and entered at 0x100000 in ring 0 with
# interrupts off. Ring 3 takes page faults, undefined instructions and software interrupts in turn, while
# MSIs arrive; each handler checks what the CPU pushed, and ring 3 checks its registers. A guest on a sound
# CPU runs for ever.
#
# Registers of ring 3: r12 counts, r13 is the address that will fault, r14 the RIP that a handler must
# find on its stack, r15 a constant.

#include "layout.h"

        .code64
        .globl  _start
_start: jmp     boot
        .balign 8
        # The host reads these addresses into the IDT.
        .quad   page_fault, undefined, call_gate, round_gate, message, unexpected

boot:   mov     $KERNEL_STACK, %rsp
        mov     $0x28, %eax
        ltr     %ax
        mov     $0x80f, %ecx            # x2APIC: spurious vector register, software enable
        mov     $0x1ff, %eax
        xor     %edx, %edx
        wrmsr
        push    $0x23                   # SS, RSP, RFLAGS with IF, CS and RIP of ring 3
        push    $USER_STACK
        push    $0x202
        push    $0x1b
        lea     user(%rip), %rax
        push    %rax
        xor     %r12d, %r12d
        movabs  $0x0123456789abcdef, %r15
        iretq

user:   inc     %r12
        movzbl  %r12b, %r13d
        shl     $12, %r13
        add     $TOUCHED, %r13
        lea     1f(%rip), %r14
1:      mov     %r12, (%r13)            # not present: page_fault maps it
        cmp     %r12, (%r13)
        jne     wrong
        lea     2f(%rip), %r14
2:      ud2
        lea     3f(%rip), %r14
        int     $0x80
3:      mov     %r12, WRITTEN-TOUCHED(%r13)
        push    %r12                    # the stack is written, and read back
        pop     %rax
        cmp     %rax, %r12
        jne     wrong
        movabs  $0x0123456789abcdef, %rax
        cmp     %rax, %r15
        jne     wrong
        cmp     $USER_STACK, %rsp
        jne     wrong
        test    %r12b, %r12b
        jnz     user
        lea     4f(%rip), %r14
        int     $0x81
4:      jmp     user
wrong:  ud2                             # r14 does not match: undefined reports it

# Checks the frame of an exception from ring 3: \rip is the offset of its RIP on the stack.
.macro  frame rip, code
        mov     $\code, %bl
        cmp     %r14, \rip(%rsp)
        jne     failed
        cmpq    $0x1b, \rip+8(%rsp)
        jne     failed
        cmpq    $USER_STACK, \rip+24(%rsp)
        jne     failed
.endm

page_fault:
        frame   8, 0x10
        cmpq    $6, (%rsp)              # a write from ring 3 to a page that is not present
        jne     failed
        mov     %cr2, %rax
        cmp     %rax, %r13
        jne     failed
        shr     $12, %rax
        orq     $1, PAGE_TABLES(,%rax,8)
        invlpg  (%r13)
        add     $8, %rsp
        iretq

undefined:
        frame   0, 0x20
        addq    $2, (%rsp)
        iretq

call_gate:
        frame   0, 0x30
        iretq

# All pages of TOUCHED become not present again, and the host hears of the round.
round_gate:
        frame   0, 0x40
        mov     $TOUCHED_PAGES, %ecx
1:      andq    $~1, PAGE_TABLES+TOUCHED/4096*8-8(,%rcx,8)
        loop    1b
        mov     %cr3, %rax
        mov     %rax, %cr3
        out     %al, $PORT_ROUND
        iretq

message:
        push    %rax
        push    %rcx
        push    %rdx
        incq    MESSAGES
        mov     $0x80b, %ecx            # end of interrupt
        xor     %eax, %eax
        xor     %edx, %edx
        wrmsr
        pop     %rdx
        pop     %rcx
        pop     %rax
        iretq

unexpected:
        mov     $0x50, %bl
failed: mov     %bl, %al
        out     %al, $PORT_FAILED
        hlt
        jmp     failed
