// traps.S: what exceptions and interrupts mean, and the end of the road: panic.

// void do_trap(struct pt_regs *regs)
SYM_FUNC_START(do_trap)
    push xbp
    mov xbp, xsp
    push xbx
    mov xbx, arg1
    mov xax, [xbx + REGS.vector]
    cmp xax, 14
    je .Lpage_fault
    cmp xax, 3
    je .Lbreakpoint
    cmp xax, 1
    je .Ldebug
    cmp xax, 8
    je .Ldouble_fault
    COUNT(traps)
.Lfault:
    test dword ptr [xbx + REGS.cs], 3
    jnz .Lkill
    mov arg1, xbx
    call fixup_exception
    test eax, eax
    jnz .Ltrap_done
    lea arg1, [REL(unhandled_message)]
    call panic
.Lkill:
    mov arg1, xbx
    call kill_current
.Lbreakpoint:
    COUNT(int3)
    jmp .Ltrap_done
.Ldebug:
    COUNT(debug)
    jmp .Ltrap_done
.Ldouble_fault:
    lea arg1, [REL(double_fault_message)]
    call panic
.Lpage_fault:
.if BITS == 64
    mov rsi, cr2
    mov rdi, rbx
.else
    mov edx, cr2
    mov eax, ebx
.endif
    call do_page_fault
    test eax, eax
    jz .Lfault
.Ltrap_done:
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(do_trap)

// long fixup_exception(struct pt_regs *regs): 1 if the faulting instruction has an entry in ex_table, and go on there
SYM_FUNC_START(fixup_exception)
    push xbp
    mov xbp, xsp
    push xbx
    mov xbx, arg1
    mov xdx, [xbx + REGS.ip]
    lea xcx, [REL(ex_table)]
    xor eax, eax
.Lsearch_extable:
    cmp WORD ptr [xcx], 0
    je .Lfixup_done
    cmp [xcx], xdx
    je .Lfixup_found
    add xcx, 2 * W
    jmp .Lsearch_extable
.Lfixup_found:
    COUNT(fixup_exception)
    mov xdx, [xcx + W]
    mov [xbx + REGS.ip], xdx
    mov eax, 1
.Lfixup_done:
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(fixup_exception)

// void kill_current(struct pt_regs *regs): a task did in ring 3 what it must not; does not return
SYM_FUNC_START(kill_current)
    push xbp
    mov xbp, xsp
    push WORD ptr [arg1 + REGS.vector]
    COUNT(kill_current)
    lea arg1, [REL(killed_message)]
    call printk
    pop arg1
    call print_number
    lea arg1, [REL(newline)]
    call printk
    mov xax, -1
    mov arg1, xax
    call do_exit
SYM_FUNC_END(kill_current)

// void do_irq(struct pt_regs *regs)
SYM_FUNC_START(do_irq)
    push xbp
    mov xbp, xsp
    mov xdx, [arg1 + REGS.vector]
    mov eax, 0x20                            // end of interrupt
    out 0x20, al
    cmp xdx, TIMER_VECTOR
    jne .Lnot_timer
    call do_timer
    jmp .Lirq_done
.Lnot_timer:
    call do_serial
.Lirq_done:
    pop xbp
    ret
SYM_FUNC_END(do_irq)

// void panic(const char *message): says so and stops for good; does not return
SYM_FUNC_START(panic)
    push xbp
    mov xbp, xsp
    push xbx
    mov xbx, arg1
    cli
    lea arg1, [REL(panic_message)]
    call printk
    mov arg1, xbx
    call printk
    lea arg1, [REL(newline)]
    call printk
.Lpanic_halt:
    cli
    hlt
    jmp .Lpanic_halt
SYM_FUNC_END(panic)

// Instructions that may fault in ring 0, and where to go on then.
SYM_DATA_START(ex_table)
    .pointer .Lprobe_read, .Lprobe_read_failed
    .pointer .Lcopy_user, .Lbad_user_string
    .pointer .Ltrap_divide, .Ltrap_divide_done
    .pointer .Ltrap_ud2, .Ltrap_ud2_done
    .pointer .Ltrap_gp, .Ltrap_gp_done
    .pointer 0, 0
SYM_DATA_END(ex_table)
SYM_DATA_START(panic_message)
    .asciz "embedded: panic: "
SYM_DATA_END(panic_message)
SYM_DATA_START(unhandled_message)
    .asciz "unhandled trap in the kernel"
SYM_DATA_END(unhandled_message)
SYM_DATA_START(double_fault_message)
    .asciz "double fault"
SYM_DATA_END(double_fault_message)
SYM_DATA_START(killed_message)
    .asciz "embedded: task killed by trap "
SYM_DATA_END(killed_message)
newline:
    .asciz "\n"
    .balign 8
