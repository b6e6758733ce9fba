// entry.S: exception and interrupt stubs, the same for both word sizes, and the table they are installed from.
//
// Each stub leaves the same frame, struct pt_regs: general registers, vector, error code, the processor's frame.

SYM_FUNC_START(divide_error)
    push 0
    push 0
    jmp common_trap
SYM_FUNC_END(divide_error)
SYM_FUNC_START(debug)
    push 0
    push 1
    jmp common_trap
SYM_FUNC_END(debug)
SYM_FUNC_START(int3)
    push 0
    push 3
    jmp common_trap
SYM_FUNC_END(int3)
SYM_FUNC_START(invalid_op)
    push 0
    push 6
    jmp common_trap
SYM_FUNC_END(invalid_op)
SYM_FUNC_START(device_not_available)
    push 0
    push 7
    jmp common_trap
SYM_FUNC_END(device_not_available)
SYM_FUNC_START(double_fault)
    push 8                                   // the error code is there already
    jmp common_trap
SYM_FUNC_END(double_fault)
SYM_FUNC_START(general_protection)
    push 13
    jmp common_trap
SYM_FUNC_END(general_protection)
SYM_FUNC_START(page_fault)
    push 14
    jmp common_trap
SYM_FUNC_END(page_fault)
SYM_FUNC_START(timer_interrupt)
    push 0
    push TIMER_VECTOR
    jmp common_interrupt
SYM_FUNC_END(timer_interrupt)
SYM_FUNC_START(serial_interrupt)
    push 0
    push SERIAL_VECTOR
    jmp common_interrupt
SYM_FUNC_END(serial_interrupt)
SYM_FUNC_START(spurious_interrupt)           // IRQ 7: nothing to acknowledge
    iretx
SYM_FUNC_END(spurious_interrupt)

SYM_FUNC_START(common_interrupt)
    SAVE_REGISTERS
    mov arg1, xsp
    call do_irq
    jmp return_from_trap
SYM_FUNC_END(common_interrupt)

SYM_FUNC_START(common_trap)
    SAVE_REGISTERS
    mov arg1, xsp
    call do_trap
    jmp return_from_trap
SYM_FUNC_END(common_trap)

// Preemption, of ring 3 and of the kernel alike: never where interrupts were off, which is how critical sections are made.
SYM_FUNC_START(return_from_trap)
    cmp WORD ptr [REL(need_resched)], 0
    je .Lno_resched
    test dword ptr [xsp + REGS.flags], 0x200 // IF
    jz .Lno_resched
    call schedule
.Lno_resched:
    RESTORE_REGISTERS
    iretx
SYM_FUNC_END(return_from_trap)

// The first thing a new task runs, from switch_to: xbx is its function, xbp the argument.
SYM_FUNC_START(ret_from_fork)
    mov arg1, xbp
    xor ebp, ebp
    sti
    call xbx
    xor eax, eax
    mov arg1, xax
    call do_exit
SYM_FUNC_END(ret_from_fork)

SYM_FUNC_START(setup_idt)                    // void setup_idt(void)
    push xbp
    mov xbp, xsp
    push xbx
    lea xbx, [REL(trap_table)]
.Lnext_gate:
    cmp WORD ptr [xbx + GATE.handler], 0
    je .Lgates_done
    mov arg1, [xbx + GATE.vector]
    mov arg2, [xbx + GATE.handler]
    mov arg3, [xbx + GATE.type]
    call set_gate
    add xbx, SIZEOF.GATE
    jmp .Lnext_gate
.Lgates_done:
.if BITS == 64
    lidt [rip + idt_descriptor]
.else
    mov byte ptr [idt + 8 * 8 + 5], 0x85     // #DF: a task gate, so that a bad stack cannot hurt it
    mov word ptr [idt + 8 * 8 + 2], DOUBLE_FAULT_SELECTOR
    .byte 0x0f, 0x01, 0x1d                   // lidt [idt_descriptor]: see lgdt in boot_32.S
    .long idt_descriptor
.endif
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(setup_idt)

SYM_DATA_START(trap_table)                   // struct gate { long vector; void *handler; long type | ist << 16; }
    .pointer 0, divide_error, 0x8e           // 0x8e: interrupt gate, DPL 0
    .pointer 1, debug, 0x8e
    .pointer 3, int3, 0xee                   // 0xee: DPL 3
    .pointer 6, invalid_op, 0x8e
    .pointer 7, device_not_available, 0x8e
    .pointer 8, double_fault, 0x1008e        // IST 1
    .pointer 13, general_protection, 0x8e
    .pointer 14, page_fault, 0x8e
    .pointer TIMER_VECTOR, timer_interrupt, 0x8e
    .pointer SERIAL_VECTOR, serial_interrupt, 0x8e
    .pointer 0x27, spurious_interrupt, 0x8e
.if BITS == 32
    .pointer 0x80, entry_int80, 0xee
.endif
    .pointer 0, 0, 0
SYM_DATA_END(trap_table)
