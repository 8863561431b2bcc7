# Ring 0: as few instructions as can be, and only such as KVM's emulator knows.
#
# A CPU block (64 KiB, aligned) holds all that belongs to one CPU; the layout is that of `Block`
# in cpu.rs. The stacks are in it, so clearing the low 16 bits of RSP finds it in any ring.

.equ BLOCK_MASK,      -0x10000
.equ BLOCK_INTERRUPTS, 0x000
.equ BLOCK_NMIS,       0x008
.equ BLOCK_ENTRY,      0x010
.equ BLOCK_START_INFO, 0x018
.equ BLOCK_GDTR,       0x3f0
.equ BLOCK_GDT,        0x400
.equ BLOCK_TSS,        0x450
.equ BLOCK_STACK0,     0x2000       # top of ring 0's stack
.equ BLOCK_PORTS,      0x3000       # the TSS's I/O permission bitmap: ring 3 may use all ports
.equ BLOCK_PORTS_END,  0x5001
.equ BLOCK_STACK3,     0x10000      # top of ring 3's

# The selectors are Linux's: a host that runs ring 3 on its own descriptor table has these.
.equ CODE32, 0x08
.equ CODE64, 0x10
.equ DATA0,  0x18
.equ DATA3,  0x28 | 3
.equ CODE3,  0x30 | 3
.equ TSS,    0x38
.equ GDT_SIZE, 0x48

.equ RFLAGS3, 0x202                 # interrupts enabled
.equ APIC_EOI, 0xfee000b0

# The PVH entry point: note type 18, XEN_ELFNOTE_PHYS32_ENTRY (Xen's public/elfnote.h).
.section .note.pvh, "a", @note
.balign 4
.long 4, 8, 18
.asciz "Xen"
.quad pvh_entry

# Identity map: the first GiB as memory, the fourth as MMIO (no caching), with 2 MiB pages. The
# rest is added from ring 3 (paging.rs). All is accessible to ring 3.
.section .tables, "aw"
.balign 4096
.global page_map
page_map:
    .quad page_directories + 0x67
    .zero 511 * 8
.global page_directories
page_directories:
    .quad first_gib + 0x67
    .quad 0, 0
    .quad fourth_gib + 0x67
    .zero 508 * 8
first_gib:
    .set address, 0
    .rept 512
    .quad address + 0xe7
    .set address, address + 0x200000
    .endr
fourth_gib:
    .set address, 0xc0000000
    .rept 512
    .quad address + 0xff
    .set address, address + 0x200000
    .endr

.section .data
.balign 16
gdt_template:
    .quad 0
    .quad 0x00cf9b000000ffff        # CODE32
    .quad 0x00af9b000000ffff        # CODE64
    .quad 0x00cf93000000ffff        # DATA0
    .quad 0
    .quad 0x00cff3000000ffff        # DATA3
    .quad 0x00affb000000ffff        # CODE3
    .quad 0x0000890000000000 + BLOCK_PORTS_END - 1 - BLOCK_TSS, 0   # TSS, without its base
.balign 16
idt_pointer:
    .word 256 * 16 - 1
    .quad IDT
.balign 16
no_idt:
    .word 0
    .quad 0
.balign 8
.global ap_block
ap_block:
    .quad 0

# ---- From 32-bit protected mode without paging down to ring 3 --------------------------------
.section .text
.code32
.global pvh_entry
pvh_entry:                          # EBX: hvm_start_info
    mov al, 0x57
    out 0x80, al
    mov ebp, offset first_cpu
    mov dword ptr [ebp + BLOCK_START_INFO], ebx
    mov dword ptr [ebp + BLOCK_START_INFO + 4], 0
    mov dword ptr [ebp + BLOCK_ENTRY], offset first_entry
    mov dword ptr [ebp + BLOCK_ENTRY + 4], 0

descend:                            # EBP: this CPU's block
    cld
    lea edi, [ebp + BLOCK_GDT]
    mov esi, offset gdt_template
    mov ecx, GDT_SIZE / 4
    rep movsd
    lea eax, [ebp + BLOCK_TSS]
    mov word ptr [ebp + BLOCK_GDT + TSS + 2], ax
    shr eax, 16
    mov byte ptr [ebp + BLOCK_GDT + TSS + 4], al
    mov byte ptr [ebp + BLOCK_GDT + TSS + 7], ah
    lea eax, [ebp + BLOCK_STACK0]
    mov dword ptr [ebp + BLOCK_TSS + 4], eax
    mov dword ptr [ebp + BLOCK_TSS + 8], 0
    mov word ptr [ebp + BLOCK_TSS + 0x66], BLOCK_PORTS - BLOCK_TSS
    mov word ptr [ebp + BLOCK_GDTR], GDT_SIZE - 1
    lea eax, [ebp + BLOCK_GDT]
    mov dword ptr [ebp + BLOCK_GDTR + 2], eax
    lgdt [ebp + BLOCK_GDTR]

    mov eax, cr4
    or eax, 0x620                   # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset page_map
    mov cr3, eax
    mov ecx, 0xc0000080             # EFER
    rdmsr
    or eax, 0x100                   # LME
    wrmsr
    mov eax, cr0
    and eax, 0x9ffffff3             # not EM, TS, CD, NW
    or eax, 0x80010023              # PG, WP, NE, MP, PE
    mov cr0, eax
    .byte 0xea                      # far jump: LLVM's Intel syntax has none for 32 bits
    .long long_mode
    .word CODE64

.code64
long_mode:
    mov ebp, ebp
    mov eax, DATA0
    mov ss, eax
    xor eax, eax
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    mov eax, TSS
    ltr ax
    lidt [idt_pointer]
    lea rsp, [rbp + BLOCK_STACK0]
    push DATA3
    lea rax, [rbp + BLOCK_STACK3]
    push rax
    push RFLAGS3
    push CODE3
    push qword ptr [rbp + BLOCK_ENTRY]
    mov edi, ebp
    iretq

# Ring 3 of the first CPU; from here on everything runs at full speed.
first_entry:                        # RDI: this CPU's block
    mov rdx, rdi
    mov edi, offset bss_start
    mov ecx, offset bss_end
    sub ecx, edi
    xor eax, eax
    rep stosb
    mov rdi, rdx
    call first_cpu_main
    ud2

# ---- Other CPUs: real mode, at the page that the startup IPI names ---------------------------
.global trampoline
.global trampoline_end
.code16
trampoline:
    cli
    mov ax, cs
    mov ds, ax
    .byte 0x66, 0x0f, 0x01, 0x16    # lgdt, 32-bit base
    .word trampoline_gdtr - trampoline
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea                # far jump
    .long other_entry32
    .word CODE32
.balign 4
trampoline_gdtr:
    .word GDT_SIZE - 1
    .long gdt_template
trampoline_end:

.code32
other_entry32:
    mov eax, DATA0
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov ebp, dword ptr [ap_block]
    jmp descend

# ---- Asking ring 0 ---------------------------------------------------------------------------
.code64
# R8 names the call; the others are the instruction's own registers.
.global ring0_gate
ring0_gate:
    ud2
    ret

exception_invalid_opcode:
    push 0
    push 6
    cmp qword ptr [rsp + 16], offset ring0_gate
    jne exception
    add rsp, 16
    add qword ptr [rsp], 2
    cmp r8d, 0
    je call_halt
    cmp r8d, 1
    je call_wrmsr
    cmp r8d, 2
    je call_cpuid
    cmp r8d, 3
    je call_triple_fault
    # An instruction that KVM's emulator does not know, on memory that is always emulated.
    mov eax, 0xfec00000
    popcnt rax, qword ptr [rax]
    iretq
call_halt:                          # RDI: interrupts counted when the caller decided to sleep
    mov rax, rsp
    and rax, BLOCK_MASK
    cmp qword ptr [rax + BLOCK_INTERRUPTS], rdi
    jne 1f
    sti
    hlt
    cli
1:  iretq
call_wrmsr:
    wrmsr
    iretq
call_cpuid:
    cpuid
    iretq
call_triple_fault:
    lidt [no_idt]
    ud2

# ---- Interrupts: counted, and acknowledged ---------------------------------------------------
.global interrupt
interrupt:
    push rax
    mov rax, rsp
    and rax, BLOCK_MASK
    inc qword ptr [rax + BLOCK_INTERRUPTS]
    mov eax, APIC_EOI
    mov dword ptr [rax], 0
    pop rax
.global interrupt_spurious
interrupt_spurious:
    iretq

exception_nmi:
    push rax
    mov rax, rsp
    and rax, BLOCK_MASK
    inc qword ptr [rax + BLOCK_INTERRUPTS]
    inc qword ptr [rax + BLOCK_NMIS]
    pop rax
    iretq

# ---- Exceptions: told to ring 3 --------------------------------------------------------------
exception:                          # on the stack: vector, error code, RIP, CS, RFLAGS, RSP, SS
    cmp qword ptr [rsp + 16], offset probe_read_at
    je recover
    cmp qword ptr [rsp + 16], offset probe_privileged_at
    je recover
    cmp qword ptr [rsp + 16], offset probe_invalid_at
    je recover
    pop rdi
    pop rsi
    mov rdx, qword ptr [rsp]
    mov rcx, cr2
    mov rax, rsp
    and rax, BLOCK_MASK
    # The fault may be ring 0's own: go to ring 3 whatever the frame says, on a fresh stack.
    lea rsp, [rax + BLOCK_STACK0]
    add rax, BLOCK_STACK3 - 8
    push DATA3
    push rax
    push RFLAGS3
    push CODE3
    push offset unexpected_exception
    iretq
recover:                            # the probe answers vector and error code
    pop rax
    pop rdx
    mov qword ptr [rsp], offset probe_end
    iretq

# Probes: instructions that fault, on purpose. RAX: the vector, or -1 if there was no fault.
.global probe_read
probe_read:
probe_read_at:
    mov al, byte ptr [rdi]
    mov rax, -1
    ret
.global probe_privileged
probe_privileged:
probe_privileged_at:
    lgdt [idt_pointer]
    mov rax, -1
    ret
.global probe_invalid
probe_invalid:
probe_invalid_at:
    ud2
    mov rax, -1
    ret
probe_end:
    ret

# Exceptions 0 to 31. Some push an error code; for the others the stub does.
.macro stub vector, has_code
.balign 16
    .if \vector == 2
    jmp exception_nmi
    .elseif \vector == 6
    jmp exception_invalid_opcode
    .else
    .if \has_code == 0
    push 0
    .endif
    push \vector
    jmp exception
    .endif
.endm
.balign 16
.global exception_stubs
exception_stubs:
.irp vector, 0, 1, 2, 3, 4, 5, 6, 7
    stub \vector, 0
.endr
    stub 8, 1
    stub 9, 0
.irp vector, 10, 11, 12, 13, 14
    stub \vector, 1
.endr
    stub 15, 0
    stub 16, 0
    stub 17, 1
.irp vector, 18, 19, 20
    stub \vector, 0
.endr
    stub 21, 1
.irp vector, 22, 23, 24, 25, 26, 27, 28
    stub \vector, 0
.endr
    stub 29, 1
    stub 30, 1
    stub 31, 0
