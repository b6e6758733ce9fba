// syscalls.S: what ring 3 can ask for. Number in xax; arguments in rdi, rsi (64-bit) or ebx, esi (32-bit); result in xax.

// void do_syscall(struct pt_regs *regs)
SYM_FUNC_START(do_syscall)
    push xbp
    mov xbp, xsp
    push xbx
    COUNT(do_syscall)
    mov xbx, arg1
    mov xcx, [xbx + REGS.ax]
    mov xax, -38                             // ENOSYS
    cmp xcx, NR_SYSCALLS
    jae .Lsyscall_done
    lea xax, [REL(sys_call_table)]
    mov xcx, [xax + xcx * W]
    sti
.if BITS == 64
    mov rdi, [rbx + REGS.di]
    mov rsi, [rbx + REGS.si]
.else
    mov eax, [ebx + REGS.bx]
    mov edx, [ebx + REGS.si]
.endif
    call xcx
    cli
.Lsyscall_done:
    mov [xbx + REGS.ax], xax
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(do_syscall)

SYM_FUNC_START(sys_exit)                     // void sys_exit(long code)
    push xbp
    mov xbp, xsp
    call do_exit
SYM_FUNC_END(sys_exit)

SYM_FUNC_START(sys_getpid)                   // long sys_getpid(void)
    push xbp
    mov xbp, xsp
    COUNT(sys_getpid)
    mov xax, [REL(current)]
    mov xax, [xax + TASK.pid]
    pop xbp
    ret
SYM_FUNC_END(sys_getpid)

SYM_FUNC_START(sys_write)                    // long sys_write(const char *text): to the console, up to its NUL
    push xbp
    mov xbp, xsp
    sub xsp, 128
    COUNT(sys_write)
.if BITS == 64
    mov rsi, rdi
    mov rdi, rsp
    mov edx, 128
.else
    mov edx, eax
    mov eax, esp
    mov ecx, 128
.endif
    call strncpy_from_user
    test xax, xax
    js .Lwrite_done
    push xax
    lea xcx, [xsp + W]
    mov arg1, xcx
    call printk
    pop xax
.Lwrite_done:
    leave
    ret
SYM_FUNC_END(sys_write)

SYM_FUNC_START(sys_open)                     // long sys_open(const char *name, int flags)
    push xbp
    mov xbp, xsp
    push xbx
    sub xsp, 128
    COUNT(sys_open)
.if BITS == 64
    mov ebx, esi
    mov rsi, rdi
    mov rdi, rsp
    mov edx, 128
.else
    mov ebx, edx
    mov edx, eax
    mov eax, esp
    mov ecx, 128
.endif
    call strncpy_from_user
    test xax, xax
    js .Lopen_done
    mov arg1, xsp
    mov arg2, xbx
    call do_open
.Lopen_done:
    add xsp, 128
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(sys_open)

// int do_open(const char *name, int flags): the inode's number, or -2 (ENOENT), or -26 (ETXTBSY) for a writer who is
// denied; a writer is counted
SYM_FUNC_START(do_open)
    push xbp
    mov xbp, xsp
    push xbx
    push arg2
    push arg1
    COUNT(do_open)
    lea xbx, [REL(inode_table)]
.Lopen_next:
    mov xax, -2
    cmp WORD ptr [xbx], 0
    je .Lopen_found
    mov xcx, [xbx]
    mov xdx, [xcx + INODE.name]
.if BITS == 64
    mov rsi, rdx
.endif
    mov arg1, [xsp]
    call strcmp
    add xbx, W
    test eax, eax
    jnz .Lopen_next
    mov xcx, [xbx - W]
    mov xax, [xcx + INODE.ino]
    test WORD ptr [xsp + W], O_WRONLY
    jz .Lopen_found
    mov xax, -26
    cmp WORD ptr [xcx + INODE.i_writecount], 0
    jl .Lopen_found
    inc WORD ptr [xcx + INODE.i_writecount]
    mov xax, [xcx + INODE.ino]
.Lopen_found:
    add xsp, 2 * W
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(do_open)

// long sys_next_work(struct work *w): sleep until init has work; w->op, w->argument say what
SYM_FUNC_START(sys_next_work)
    push xbp
    mov xbp, xsp
    push xbx
    mov xbx, arg1
    pushfx
    cli
.Lwork_wait:
    cmp WORD ptr [REL(work_op)], 0
    jne .Lwork_there
    lea arg1, [REL(work_op)]
    call sleep_on
    jmp .Lwork_wait
.Lwork_there:
    popfx
    mov xax, [REL(work_op)]
    mov [xbx], xax                           // may fault: the user's stack is paged in like everything else
    mov xax, [REL(work_argument)]
    mov [xbx + W], xax
    xor eax, eax
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(sys_next_work)

SYM_FUNC_START(sys_work_done)                // long sys_work_done(long result)
    push xbp
    mov xbp, xsp
    mov [REL(work_result)], arg1
    mov WORD ptr [REL(work_op)], 0
    lea arg1, [REL(user_task)]
    call wake_up
    xor eax, eax
    pop xbp
    ret
SYM_FUNC_END(sys_work_done)

SYM_FUNC_START(sys_drop_pages)               // long sys_drop_pages(void): evict the cached pages of both files
    push xbp
    mov xbp, xsp
    push xbx
    lea arg1, [REL(data_mapping)]
    call drop_pages
    mov xbx, xax
    lea arg1, [REL(program_mapping)]
    call drop_pages
    add xax, xbx
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(sys_drop_pages)

// void run_user(long op, long argument): have the ring-3 task do it, and wait; returns too if that task dies
SYM_FUNC_START(run_user)
    push xbp
    mov xbp, xsp
    pushfx
    cli
    mov [REL(work_op)], arg1
    mov [REL(work_argument)], arg2
    lea arg1, [REL(work_op)]
    call wake_up
.Lrun_user_wait:
    cmp WORD ptr [REL(work_op)], 0
    je .Lrun_user_done
    lea arg1, [REL(user_task)]
    cmp WORD ptr [arg1 + TASK.state], TASK_DEAD
    je .Lrun_user_done
    call sleep_on
    jmp .Lrun_user_wait
.Lrun_user_done:
    mov WORD ptr [REL(work_op)], 0
    popfx
    pop xbp
    ret
SYM_FUNC_END(run_user)

SYM_DATA_START(sys_call_table)
    .pointer sys_exit, sys_getpid, sys_write, sys_open, sys_next_work, sys_work_done, sys_drop_pages
SYM_DATA_END(sys_call_table)
SYM_DATA_START(inode_table)                  // every file there is
    .pointer program_inode, data_inode, big_inode, 0
SYM_DATA_END(inode_table)
SYM_DATA_START(work_op)
    .pointer 0
SYM_DATA_END(work_op)
SYM_DATA_START(work_argument)
    .pointer 0
SYM_DATA_END(work_argument)
SYM_DATA_START(work_result)
    .pointer 0
SYM_DATA_END(work_result)
