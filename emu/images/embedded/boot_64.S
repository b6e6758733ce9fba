// boot_64.S: from the loader's identity map to the kernel's own tables, in long mode.
//
// Entered at the physical address of the image with flat 64-bit segments and interrupts off.

SYM_FUNC_START(startup)                      // void startup(void): does not return
    // The page directory that maps physical 0 .. 64 MiB at KERNEL_OFFSET, in 2 MiB pages; every task shares it.
    lea rdi, [rip + kernel_pd]
    mov eax, 0x83                            // present, writable, 2 MiB
    mov ecx, 32
.Lboot_map:
    mov [rdi], rax
    add rax, 0x200000
    add rdi, 8
    dec ecx
    jnz .Lboot_map

    lea rax, [rip + init_pgd]                // RIP is still physical, so this is what CR3 wants
    mov cr3, rax
    mov rax, [rip + high_address]
    jmp rax
high_address:
    .pointer .Lhigh
.Lhigh:
    lea rsp, [rip + init_stack_end]
    lgdt [rip + gdt_descriptor]
    push KERNEL_CS
    lea rax, [rip + reload_cs]
    push rax
    retfq
reload_cs:
    mov eax, KERNEL_DS
    mov ss, ax
    xor eax, eax
    mov ds, ax
    mov es, ax
    mov fs, ax
    mov gs, ax
    mov qword ptr [rip + init_pgd], 0        // the identity map goes: a null pointer must fault
    mov rax, cr3
    mov cr3, rax

    mov rax, cr0
    and eax, 0xfffffff3                      // EM, TS off: SSE and x87 are ours to use
    or eax, 0x10002                          // WP, MP
    mov cr0, rax
    mov rax, cr4
    or eax, 0x600                            // OSFXSR, OSXMMEXCPT
    mov cr4, rax

    call setup_tss
    call setup_idt
    call setup_syscall
    xor ebp, ebp                             // the outermost frame: backtraces end here
    call start_kernel
    ud2
SYM_FUNC_END(startup)

SYM_FUNC_START(setup_tss)                    // void setup_tss(void)
    push rbp
    mov rbp, rsp
    lea rax, [rip + tss]
    lea rdx, [rip + gdt_tss]
    mov [rdx + 2], ax                        // base 15..0
    shr rax, 16
    mov [rdx + 4], al                        // base 23..16
    mov [rdx + 7], ah                        // base 31..24
    shr rax, 16
    mov [rdx + 8], eax                       // base 63..32
    lea rax, [rip + init_stack_end]
    mov [rip + tss + 4], rax                 // RSP0, until the first switch_to
    lea rax, [rip + double_fault_stack_end]
    mov [rip + tss + 36], rax                // IST1
    mov eax, TSS_SELECTOR
    ltr ax
    pop rbp
    ret
SYM_FUNC_END(setup_tss)

SYM_FUNC_START(setup_syscall)                // void setup_syscall(void): the MSRs of SYSCALL and SYSRET
    push rbp
    mov rbp, rsp
    mov ecx, 0xc0000080                      // EFER: SCE on
    rdmsr
    or eax, 1
    wrmsr
    mov ecx, 0xc0000081                      // STAR: SYSCALL loads CS 0x08, SS 0x10; SYSRET CS 0x2b, SS 0x23
    xor eax, eax
    mov edx, 0x00180008
    wrmsr
    mov ecx, 0xc0000082                      // LSTAR
    lea rax, [rip + entry_syscall]
    mov rdx, rax
    shr rdx, 32
    wrmsr
    mov ecx, 0xc0000084                      // SFMASK: TF, IF, DF, NT, AC
    mov eax, 0x44700
    xor edx, edx
    wrmsr
    pop rbp
    ret
SYM_FUNC_END(setup_syscall)

SYM_FUNC_START(set_gate)                     // void set_gate(long vector, void *handler, long type | ist << 16)
    push rbp
    mov rbp, rsp
    shl rdi, 4
    lea rax, [rip + idt]
    add rdi, rax
    mov [rdi], si                            // offset 15..0
    mov word ptr [rdi + 2], KERNEL_CS
    mov [rdi + 5], dl                        // present, DPL, gate type
    shr edx, 16
    mov [rdi + 4], dl                        // IST
    shr rsi, 16
    mov [rdi + 6], si
    shr rsi, 16
    mov [rdi + 8], esi
    mov dword ptr [rdi + 12], 0
    pop rbp
    ret
SYM_FUNC_END(set_gate)

SYM_DATA_START(gdt)
    .quad 0
    .quad 0x00af9b000000ffff                 // 0x08 kernel code, 64-bit
    .quad 0x00cf93000000ffff                 // 0x10 kernel data
    .quad 0x00cffb000000ffff                 // 0x18 user code, 32-bit: SYSRET's layout wants a place for it
    .quad 0x00cff3000000ffff                 // 0x20 user data
    .quad 0x00affb000000ffff                 // 0x28 user code, 64-bit
gdt_tss:
    .quad 0x0000890000000067, 0              // 0x30 TSS; setup_tss fills in the base
SYM_DATA_END(gdt)
SYM_DATA_START(gdt_descriptor)
    .short 63
    .quad gdt
SYM_DATA_END(gdt_descriptor)
SYM_DATA_START(idt_descriptor)
    .short 4095
    .quad idt
SYM_DATA_END(idt_descriptor)

    .balign 4096
SYM_DATA_START(init_pgd)                     // the kernel tasks' PML4
    .quad boot_pdpt - KERNEL_OFFSET + 3
    .fill 510, 8, 0
    .quad kernel_pdpt - KERNEL_OFFSET + 3
SYM_DATA_END(init_pgd)
boot_pdpt:
    .quad kernel_pd - KERNEL_OFFSET + 3
    .fill 511, 8, 0
kernel_pdpt:                                 // entry 510 is 0xffffffff80000000
    .fill 510, 8, 0
    .quad kernel_pd - KERNEL_OFFSET + 3
    .quad 0
SYM_DATA_START(kernel_pd)
    .fill 512, 8, 0
SYM_DATA_END(kernel_pd)
SYM_DATA_START(user_pgd)                     // the user task's PML4: its own low half, the same upper half
    .quad user_pdpt - KERNEL_OFFSET + 7
    .fill 510, 8, 0
    .quad kernel_pdpt - KERNEL_OFFSET + 3
SYM_DATA_END(user_pgd)
user_pdpt:
    .quad user_pd - KERNEL_OFFSET + 7
    .fill 511, 8, 0
user_pd:                                     // 0x400000 .. 0x7fffff: two tables side by side
    .quad 0, 0
    .quad user_ptes - KERNEL_OFFSET + 7
    .quad user_ptes + 4096 - KERNEL_OFFSET + 7
    .fill 508, 8, 0
SYM_DATA_START(user_ptes)
    .fill 1024, 8, 0
SYM_DATA_END(user_ptes)
