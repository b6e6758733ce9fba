// entry_32.S: the ways into the kernel and out of it that depend on the word size: register frame, SYSENTER, switch_to.

.macro SAVE_REGISTERS                        // above them on the stack: vector, error code, the processor's frame
    push eax
    push ebp
    push edi
    push esi
    push edx
    push ecx
    push ebx
    cld
.endm

.macro RESTORE_REGISTERS
    pop ebx
    pop ecx
    pop edx
    pop esi
    pop edi
    pop ebp
    pop eax
    add esp, 8                               // vector, error code
.endm

// SYSENTER saves nothing. Our convention: the user has put its return address in EDX and its stack in ECX.
SYM_FUNC_START(entry_sysenter)
    mov esp, [esp + 4]                       // SYSENTER_ESP is the TSS: ESP0
    push USER_DS
    push ecx
    pushfd
    or dword ptr [esp], 0x200                // SYSENTER cleared IF
    push USER_CS
    push edx
    push 0
    push SYSCALL_VECTOR
    SAVE_REGISTERS
    mov eax, esp
    call do_syscall
    cmp dword ptr [need_resched], 0
    je .Lsyscall_leave
    call schedule
.Lsyscall_leave:
    RESTORE_REGISTERS
    mov edx, [esp]                           // EIP
    mov ecx, [esp + 12]                      // ESP
    sti                                      // takes effect after SYSEXIT
    sysexit
SYM_FUNC_END(entry_sysenter)

// int 0x80
SYM_FUNC_START(entry_int80)
    push 0
    push SYSCALL_VECTOR
    SAVE_REGISTERS
    mov eax, esp
    call do_syscall
    jmp return_from_trap
SYM_FUNC_END(entry_int80)

// Where the task gate of vector 8 leads: the interrupted task is in the other TSS.
SYM_FUNC_START(double_fault_task)
    mov eax, double_fault_message
    call panic
SYM_FUNC_END(double_fault_task)

// void switch_to(struct task *prev, struct task *next): returns in `next`, where that called it
SYM_FUNC_START(switch_to)
    push ebp
    push ebx
    push esi
    push edi
    pushfd
    mov [eax + TASK.sp], esp
    mov esp, [edx + TASK.sp]
    mov [current], edx
    mov eax, [edx + TASK.stack_top]
    mov [tss + 4], eax                       // ESP0
    mov eax, [edx + TASK.cr3]
    mov ecx, cr3
    cmp eax, ecx
    je .Lsame_space
    mov cr3, eax
.Lsame_space:
    popfd
    pop edi
    pop esi
    pop ebx
    pop ebp
    ret
SYM_FUNC_END(switch_to)

// void enter_user(void *pc): leave for ring 3 with an empty user stack; does not return
SYM_FUNC_START(enter_user)
    cli
    push USER_DS
    push USER_STACK_END
    push 0x202                               // IF
    push USER_CS
    push eax
    xor ebp, ebp
    iretd
SYM_FUNC_END(enter_user)
