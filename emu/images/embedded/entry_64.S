// entry_64.S: the ways into the kernel and out of it that depend on the word size: register frame, SYSCALL, switch_to.

.macro SAVE_REGISTERS                        // above them on the stack: vector, error code, the processor's frame
    push rdi
    push rsi
    push rdx
    push rcx
    push rax
    push r8
    push r9
    push r10
    push r11
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    cld
.endm

.macro RESTORE_REGISTERS
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    pop r11
    pop r10
    pop r9
    pop r8
    pop rax
    pop rcx
    pop rdx
    pop rsi
    pop rdi
    add rsp, 16                              // vector, error code
.endm

// SYSCALL leaves RSP to us and no per-CPU area is needed with one processor: two words in memory do, interrupts are off.
SYM_FUNC_START(entry_syscall)
    mov [rip + syscall_user_sp], rsp
    mov rsp, [rip + tss + 4]                 // RSP0 is the current task's
    push USER_DS
    push qword ptr [rip + syscall_user_sp]
    push r11                                 // RFLAGS
    push USER_CS
    push rcx                                 // RIP
    push 0
    push SYSCALL_VECTOR
    SAVE_REGISTERS
    mov rdi, rsp
    call do_syscall
    cmp qword ptr [rip + need_resched], 0
    je .Lsyscall_leave
    call schedule
.Lsyscall_leave:
    RESTORE_REGISTERS
    mov rcx, [rsp]                           // RIP
    mov r11, [rsp + 16]                      // RFLAGS
    mov rsp, [rsp + 24]
    sysret
SYM_FUNC_END(entry_syscall)

SYM_DATA_START(syscall_user_sp)
    .quad 0
SYM_DATA_END(syscall_user_sp)

// void switch_to(struct task *prev, struct task *next): returns in `next`, where that called it
SYM_FUNC_START(switch_to)
    push rbp
    push rbx
    push r12
    push r13
    push r14
    push r15
    pushfq
    mov [rdi + TASK.sp], rsp
    mov rsp, [rsi + TASK.sp]
    mov [rip + current], rsi
    mov rax, [rsi + TASK.stack_top]
    mov [rip + tss + 4], rax                 // RSP0
    mov rax, [rsi + TASK.cr3]
    mov rcx, cr3
    cmp rax, rcx
    je .Lsame_space
    mov cr3, rax
.Lsame_space:
    popfq
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbx
    pop rbp
    ret
SYM_FUNC_END(switch_to)

// void enter_user(void *pc): leave for ring 3 with an empty user stack; does not return
SYM_FUNC_START(enter_user)
    cli
    push USER_DS
    push USER_STACK_END
    push 0x202                               // IF
    push USER_CS
    push rdi
    xor ebp, ebp
    iretq
SYM_FUNC_END(enter_user)
