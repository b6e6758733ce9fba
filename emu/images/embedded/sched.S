// sched.S: tasks, round-robin scheduling, sleeping and waking, the clock tick.
//
// struct task is TASK in layout.py. Everything here runs with interrupts off; a task that sleeps is switched away from
// inside schedule() and returns from it when it has been woken and chosen again.

// void task_init(struct task *t, void (*fn)(long), long argument): ready to run fn(argument) in ring 0
SYM_FUNC_START(task_init)
    push xbp
    mov xbp, xsp
    push xbx
    mov xbx, arg1
    push arg3
    push arg2
    mov xcx, [xbx + TASK.stack_top]
    sub xcx, SIZEOF.SWITCH_FRAME             // what switch_to pops
    mov WORD ptr [xcx + SWITCH_FRAME.flags], 2
    pop WORD ptr [xcx + SWITCH_FRAME.bx]     // fn
    pop WORD ptr [xcx + SWITCH_FRAME.bp]     // argument
    lea xax, [REL(ret_from_fork)]
    mov [xcx + SWITCH_FRAME.ip], xax
    mov [xbx + TASK.sp], xcx
    mov WORD ptr [xbx + TASK.state], TASK_RUNNABLE
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(task_init)

// void schedule(void): give the processor to the next runnable task; interrupts are off
SYM_FUNC_START(schedule)
    push xbp
    mov xbp, xsp
    COUNT(schedule)
    mov WORD ptr [REL(need_resched)], 0
    mov xcx, [REL(current)]
    mov xax, [xcx + TASK.next]               // a ring of all tasks but the idle one
    mov xdx, xax
.Lnext_task:
    cmp WORD ptr [xdx + TASK.state], TASK_RUNNABLE
    je .Lchosen
    mov xdx, [xdx + TASK.next]
    cmp xdx, xax
    jne .Lnext_task
    lea xdx, [REL(idle_task)]
.Lchosen:
    cmp xdx, xcx
    je .Lschedule_done
    COUNT(switch_to)
.if BITS == 64
    mov rdi, rcx
    mov rsi, rdx
.else
    mov eax, ecx
.endif
    call switch_to
.Lschedule_done:
    pop xbp
    ret
SYM_FUNC_END(schedule)

// void sleep_on(void *channel): until wake_up(channel)
SYM_FUNC_START(sleep_on)
    push xbp
    mov xbp, xsp
    mov xcx, [REL(current)]
    mov [xcx + TASK.wait], arg1
    mov WORD ptr [xcx + TASK.state], TASK_WAITING
    call schedule
    pop xbp
    ret
SYM_FUNC_END(sleep_on)

// void wake_up(void *channel): every task that sleeps on it
SYM_FUNC_START(wake_up)
    push xbp
    mov xbp, xsp
    lea xcx, [REL(init_task)]
.Lwake_next:
    cmp WORD ptr [xcx + TASK.state], TASK_WAITING
    jne .Lwake_skip
    cmp [xcx + TASK.wait], arg1
    jne .Lwake_skip
    mov WORD ptr [xcx + TASK.state], TASK_RUNNABLE
    mov WORD ptr [REL(need_resched)], 1
.Lwake_skip:
    mov xcx, [xcx + TASK.next]
    lea xdx, [REL(init_task)]
    cmp xcx, xdx
    jne .Lwake_next
    pop xbp
    ret
SYM_FUNC_END(wake_up)

// void sleep_ticks(long ticks): for that many clock ticks, at least one
SYM_FUNC_START(sleep_ticks)
    push xbp
    mov xbp, xsp
    pushfx
    cli
    mov xcx, [REL(current)]
    add arg1, [REL(jiffies)]
    mov [xcx + TASK.wake_tick], arg1
    mov WORD ptr [xcx + TASK.state], TASK_SLEEPING
    call schedule
    popfx
    pop xbp
    ret
SYM_FUNC_END(sleep_ticks)

// void do_exit(long code): the current task ends; does not return
SYM_FUNC_START(do_exit)
    push xbp
    mov xbp, xsp
    COUNT(do_exit)
    cli
    mov xcx, [REL(current)]
    mov [xcx + TASK.exit_code], arg1
    mov WORD ptr [xcx + TASK.state], TASK_DEAD
    mov arg1, xcx
    call wake_up                             // whoever waits for this task
    call schedule
    ud2
SYM_FUNC_END(do_exit)

// void wait_for_task(struct task *t): until it has ended
SYM_FUNC_START(wait_for_task)
    push xbp
    mov xbp, xsp
    push xbx
    mov xbx, arg1
    pushfx
    cli
.Lwait_for_task:
    cmp WORD ptr [xbx + TASK.state], TASK_DEAD
    je .Ltask_ended
    mov arg1, xbx
    call sleep_on
    jmp .Lwait_for_task
.Ltask_ended:
    popfx
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(wait_for_task)

// void do_timer(void): one clock tick, in interrupt context
SYM_FUNC_START(do_timer)
    push xbp
    mov xbp, xsp
    COUNT(do_timer)
    inc WORD ptr [REL(jiffies)]
    call complete_reads
    mov xdx, [REL(jiffies)]
    lea xcx, [REL(init_task)]
.Lcheck_sleeper:
    cmp WORD ptr [xcx + TASK.state], TASK_SLEEPING
    jne .Lnot_due
    cmp [xcx + TASK.wake_tick], xdx
    ja .Lnot_due
    mov WORD ptr [xcx + TASK.state], TASK_RUNNABLE
.Lnot_due:
    mov xcx, [xcx + TASK.next]
    lea xax, [REL(init_task)]
    cmp xcx, xax
    jne .Lcheck_sleeper
    mov WORD ptr [REL(need_resched)], 1
    pop xbp
    ret
SYM_FUNC_END(do_timer)

// void cpu_idle(void): what the processor does when no task wants it; does not return
SYM_FUNC_START(cpu_idle)
    sti
    hlt
    jmp cpu_idle
SYM_FUNC_END(cpu_idle)

SYM_DATA_START(current)                      // struct task *current
    .pointer idle_task
SYM_DATA_END(current)
SYM_DATA_START(jiffies)
    .pointer 0
SYM_DATA_END(jiffies)
SYM_DATA_START(need_resched)
    .pointer 0
SYM_DATA_END(need_resched)

// pid, comm, state, sp, stack_top, cr3, ptes, wait, wake_tick, exit_code, next
SYM_DATA_START(idle_task)
    .pointer 0, comm_idle, TASK_RUNNABLE, 0, init_stack_end, init_pgd - KERNEL_OFFSET, 0, 0, 0, 0, init_task
SYM_DATA_END(idle_task)
SYM_DATA_START(init_task)                    // carries out the workloads of the command line
    .pointer 1, comm_init, TASK_DEAD, 0, init_task_stack_end, init_pgd - KERNEL_OFFSET, 0, 0, 0, 0, helper_task
SYM_DATA_END(init_task)
SYM_DATA_START(helper_task)                  // the second kernel task
    .pointer 2, comm_helper, TASK_DEAD, 0, helper_stack_end, init_pgd - KERNEL_OFFSET, 0, 0, 0, 0, user_task
SYM_DATA_END(helper_task)
SYM_DATA_START(user_task)                    // ring 3
    .pointer 3, comm_user, TASK_DEAD, 0, user_kernel_stack_end, user_pgd - KERNEL_OFFSET, user_ptes, 0, 0, 0, init_task
SYM_DATA_END(user_task)
comm_idle:
    .asciz "idle"
comm_init:
    .asciz "init"
comm_helper:
    .asciz "helper"
comm_user:
    .asciz "program"
    .balign 8
