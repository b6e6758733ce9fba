// boot_32.S: from the loader's flat protected mode to paging, with 4 MiB pages or (PAE) 2 MiB ones.
//
// Entered at the physical address of the image, paging and interrupts off. Until the jump to the linked address, every
// reference to memory takes KERNEL_OFFSET off by hand.

SYM_FUNC_START(startup)                      // void startup(void): does not return
    mov edi, kernel_pd - KERNEL_OFFSET       // physical 0 .. 64 MiB, here at KERNEL_OFFSET and, for now, at 0
    mov eax, 0x83                            // present, writable, large
.if PAE
    mov ecx, 32
.else
    mov ecx, 16
.endif
.Lboot_map:
    mov [edi], eax
.if PAE
    add eax, 0x200000
    add edi, 8
.else
    mov [edi - 768 * 4], eax                 // the identity entry of the same directory
    mov [edi + 4096], eax                    // user_pgd, next to init_pgd: without PAE each directory has its own copy
    add eax, 0x400000
    add edi, 4
.endif
    dec ecx
    jnz .Lboot_map

    mov eax, cr4
.if PAE
    or eax, 0x630                            // OSFXSR, OSXMMEXCPT, PAE, PSE
.else
    or eax, 0x610                            // OSFXSR, OSXMMEXCPT, PSE
.endif
    mov cr4, eax
    mov eax, init_pgd - KERNEL_OFFSET
    mov cr3, eax
    mov eax, cr0
    and eax, 0xfffffff3                      // EM, TS off
    or eax, 0x80010002                       // PG, WP, MP
    mov cr0, eax
    mov eax, .Lhigh
    jmp eax
.Lhigh:
    mov esp, init_stack_end
    .byte 0x0f, 0x01, 0x15                   // lgdt [gdt_descriptor]: keystone adds 66, which drops base 31..24
    .long gdt_descriptor
    push KERNEL_CS
    mov eax, .Lreload_cs
    push eax
    retf
.Lreload_cs:
    mov eax, KERNEL_DS
    mov ss, ax
    mov eax, USER_DS                         // flat and good at every privilege: entry code need not reload it
    mov ds, ax
    mov es, ax
    xor eax, eax
    mov fs, ax
    mov gs, ax
    // The identity map goes: a null pointer must fault.
.if PAE
    mov dword ptr [init_pgd], 0
.else
    mov edi, init_pgd
    mov ecx, 16
    xor eax, eax
    rep stosd
.endif
    mov eax, cr3
    mov cr3, eax

    call setup_tss
    call setup_idt
    call setup_syscall
    xor ebp, ebp                             // the outermost frame: backtraces end here
    call start_kernel
    ud2
SYM_FUNC_END(startup)

SYM_FUNC_START(set_tss_base)                 // void set_tss_base(void *descriptor, void *tss)
    mov [eax + 2], dx
    shr edx, 16
    mov [eax + 4], dl
    mov [eax + 7], dh
    ret
SYM_FUNC_END(set_tss_base)

SYM_FUNC_START(setup_tss)                    // void setup_tss(void)
    push ebp
    mov ebp, esp
    mov eax, gdt_tss
    mov edx, tss
    call set_tss_base
    mov eax, gdt_double_fault_tss
    mov edx, double_fault_tss
    call set_tss_base
    mov dword ptr [tss + 4], init_stack_end  // ESP0, until the first switch_to
    mov dword ptr [tss + 8], KERNEL_DS       // SS0
    mov dword ptr [tss + 100], 0x680000      // I/O map base past the limit: no port for ring 3
    mov eax, TSS_SELECTOR
    ltr ax
    // The double fault task: a task gate gives it registers and a stack that were good before the fault.
    mov eax, cr3
    mov [double_fault_tss + 28], eax
    mov dword ptr [double_fault_tss + 32], double_fault_task
    mov dword ptr [double_fault_tss + 36], 2
    mov dword ptr [double_fault_tss + 56], double_fault_stack_end
    mov dword ptr [double_fault_tss + 72], USER_DS        // ES
    mov dword ptr [double_fault_tss + 76], KERNEL_CS
    mov dword ptr [double_fault_tss + 80], KERNEL_DS      // SS
    mov dword ptr [double_fault_tss + 84], USER_DS        // DS
    mov dword ptr [double_fault_tss + 100], 0x680000
    pop ebp
    ret
SYM_FUNC_END(setup_tss)

SYM_FUNC_START(setup_syscall)                // void setup_syscall(void): the MSRs of SYSENTER
    push ebp
    mov ebp, esp
    xor edx, edx
    mov ecx, 0x174                           // SYSENTER_CS: also fixes SS and, for SYSEXIT, the user's CS and SS
    mov eax, KERNEL_CS
    wrmsr
    mov ecx, 0x175                           // SYSENTER_ESP: the TSS, where the entry finds ESP0
    mov eax, tss
    wrmsr
    mov ecx, 0x176                           // SYSENTER_EIP
    mov eax, entry_sysenter
    wrmsr
    pop ebp
    ret
SYM_FUNC_END(setup_syscall)

SYM_FUNC_START(set_gate)                     // void set_gate(long vector, void *handler, long type)
    push ebp
    mov ebp, esp
    lea eax, [idt + eax*8]
    mov [eax], dx                            // offset 15..0
    mov word ptr [eax + 2], KERNEL_CS
    mov byte ptr [eax + 4], 0
    mov [eax + 5], cl                        // present, DPL, gate type
    shr edx, 16
    mov [eax + 6], dx
    pop ebp
    ret
SYM_FUNC_END(set_gate)

SYM_DATA_START(gdt)
    .quad 0
    .quad 0x00cf9b000000ffff                 // 0x08 kernel code
    .quad 0x00cf93000000ffff                 // 0x10 kernel data
    .quad 0x00cffb000000ffff                 // 0x18 user code
    .quad 0x00cff3000000ffff                 // 0x20 user data
gdt_double_fault_tss:
    .quad 0x0000890000000067                 // 0x28 TSS of the double fault task
gdt_tss:
    .quad 0x0000890000000067                 // 0x30 TSS
SYM_DATA_END(gdt)
SYM_DATA_START(gdt_descriptor)
    .short 55
    .long gdt
SYM_DATA_END(gdt_descriptor)
SYM_DATA_START(idt_descriptor)
    .short 2047
    .long idt
SYM_DATA_END(idt_descriptor)
SYM_DATA_START(double_fault_tss)
    .fill 104, 1, 0
SYM_DATA_END(double_fault_tss)

.if PAE
    .balign 32
SYM_DATA_START(init_pgd)                     // four page-directory pointers each
    .quad kernel_pd - KERNEL_OFFSET + 1, 0, 0, kernel_pd - KERNEL_OFFSET + 1
SYM_DATA_END(init_pgd)
SYM_DATA_START(user_pgd)
    .quad user_pd - KERNEL_OFFSET + 1, 0, 0, kernel_pd - KERNEL_OFFSET + 1
SYM_DATA_END(user_pgd)
    .balign 4096
kernel_pd:
    .fill 512, 8, 0
user_pd:                                     // 0x400000 .. 0x7fffff: two tables side by side
    .quad 0, 0
    .quad user_ptes - KERNEL_OFFSET + 7
    .quad user_ptes + 4096 - KERNEL_OFFSET + 7
    .fill 508, 8, 0
SYM_DATA_START(user_ptes)
    .fill 1024, 8, 0
SYM_DATA_END(user_ptes)
.else
    .balign 4096
SYM_DATA_START(init_pgd)
    .fill 768, 4, 0
kernel_pd:
    .fill 256, 4, 0
SYM_DATA_END(init_pgd)
SYM_DATA_START(user_pgd)
    .long 0
    .long user_ptes - KERNEL_OFFSET + 7      // 0x400000 .. 0x7fffff
    .fill 1022, 4, 0
SYM_DATA_END(user_pgd)
SYM_DATA_START(user_ptes)
    .fill 1024, 4, 0
SYM_DATA_END(user_ptes)
.endif
