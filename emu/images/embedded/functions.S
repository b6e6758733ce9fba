// functions.S: functions worth probing, one kind of instruction or of behaviour each. exercise.S calls them.
//
// Arguments and results are in the C convention: SysV on 64-bit, regparm(3) on 32-bit. Each counts its own calls.

SYM_FUNC_START(target)                       // unsigned long target(unsigned long v): v / 3
    push xbp
    mov xbp, xsp
    COUNT(target)
    mov xax, arg1
    xor edx, edx
    mov ecx, 3
    div xcx
    pop xbp
    ret
SYM_FUNC_END(target)

SYM_FUNC_START(target2)                      // unsigned long target2(unsigned long v): v / 3 + 1
    push xbp
    mov xbp, xsp
    COUNT(target2)
    mov xax, arg1
    xor edx, edx
    mov ecx, 3
    div xcx
    inc xax
    pop xbp
    ret
SYM_FUNC_END(target2)

SYM_FUNC_START(recursed_target)              // unsigned long recursed_target(unsigned long v): v / 3; for handlers to call
    push xbp
    mov xbp, xsp
    COUNT(recursed_target)
    mov xax, arg1
    xor edx, edx
    mov ecx, 3
    div xcx
    pop xbp
    ret
SYM_FUNC_END(recursed_target)

SYM_FUNC_START(nested_target)                // unsigned long nested_target(unsigned long v): inner_target(v) + 1
    push xbp
    mov xbp, xsp
    COUNT(nested_target)
    call inner_target
    inc xax
    pop xbp
    ret
SYM_FUNC_END(nested_target)

SYM_FUNC_START(inner_target)                 // unsigned long inner_target(unsigned long v): 2 v
    push xbp
    mov xbp, xsp
    COUNT(inner_target)
    mov xax, arg1
    add xax, xax
    pop xbp
    ret
SYM_FUNC_END(inner_target)

SYM_FUNC_START(fib)                          // unsigned long fib(unsigned long n): recursive; fib(6) is 25 calls
    push xbp
    mov xbp, xsp
    push xbx
    push arg1
    COUNT(fib)
    mov xax, arg1
    cmp xax, 2
    jb .Lfib_done
    dec arg1
    call fib
    mov xbx, xax
    mov arg1, [xsp]
    sub arg1, 2
    call fib
    add xax, xbx
.Lfib_done:
    pop xcx
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(fib)

SYM_FUNC_START(testprobe)                    // long testprobe(long a, long b, long c, long d, long e, long f): their sum
    push xbp
    mov xbp, xsp
    COUNT(testprobe)
.if BITS == 64
    lea rax, [rdi + rsi]
    add rax, rdx
    add rax, rcx
    add rax, r8
    add rax, r9
.else
    add eax, edx
    add eax, ecx
    add eax, [ebp + 8]
    add eax, [ebp + 12]
    add eax, [ebp + 16]
.endif
    pop xbp
    ret
SYM_FUNC_END(testprobe)

SYM_FUNC_START(sum8)                         // long sum8(long a, ... long h): arguments on the stack with both conventions
    push xbp
    mov xbp, xsp
    COUNT(sum8)
.if BITS == 64
    lea rax, [rdi + rsi]
    add rax, rdx
    add rax, rcx
    add rax, r8
    add rax, r9
    add rax, [rbp + 16]
    add rax, [rbp + 24]
.else
    add eax, edx
    add eax, ecx
    add eax, [ebp + 8]
    add eax, [ebp + 12]
    add eax, [ebp + 16]
    add eax, [ebp + 20]
    add eax, [ebp + 24]
.endif
    pop xbp
    ret
SYM_FUNC_END(sum8)

SYM_FUNC_START(copy_bytes)                   // void *copy_bytes(void *to, const void *from, size_t n): through memcpy
    push xbp
    mov xbp, xsp
    COUNT(copy_bytes)
    call memcpy
    pop xbp
    ret
SYM_FUNC_END(copy_bytes)

SYM_FUNC_START(loop_target)                  // long loop_target(long i): with n = i & 7, 1 + .. + n by `loop`; 100 for n = 0
    push xbp
    mov xbp, xsp
    COUNT(loop_target)
    mov xcx, arg1
    and ecx, 7
    xor eax, eax
    jxcxz .Lloop_empty
.Lloop_again:
    add xax, xcx
    loop .Lloop_again
    jmp .Lloop_end
.Lloop_empty:
    mov eax, 100
.Lloop_end:
    pop xbp
    ret
SYM_FUNC_END(loop_target)

SYM_FUNC_START(branch_target)                // long branch_target(long i): i & 1, i & 2, i & 4 counted by conditional jumps
    push xbp
    mov xbp, xsp
    COUNT(branch_target)
    mov xcx, arg1
    xor eax, eax
    test cl, 1
    jz .Lbit1
    inc eax
.Lbit1:
    test cl, 2
    je .Lbit2
    inc eax
.Lbit2:
    bt ecx, 2
    jnc .Lbit4
    inc eax
.Lbit4:
    pop xbp
    ret
SYM_FUNC_END(branch_target)

SYM_FUNC_START(indirect_target)              // long indirect_target(long i): inner_target by register, target by memory
    push xbp
    mov xbp, xsp
    push xbx
    COUNT(indirect_target)
    mov xbx, arg1
    lea xcx, [REL(inner_target)]
    call xcx
    push xax
    mov arg1, xbx
    call WORD ptr [REL(target_pointer)]
    pop xcx
    add xax, xcx
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(indirect_target)

SYM_FUNC_START(jump_table_target)            // long jump_table_target(long i): 10, 20, 30 or 40 by jmp [table + i & 3]
    push xbp
    mov xbp, xsp
    COUNT(jump_table_target)
    mov xcx, arg1
    and ecx, 3
    lea xdx, [REL(jump_table)]
    jmp WORD ptr [xdx + xcx * W]
.Lcase0:
    mov eax, 10
    jmp .Lcase_done
.Lcase1:
    mov eax, 20
    jmp .Lcase_done
.Lcase2:
    mov eax, 30
    jmp .Lcase_done
.Lcase3:
    mov eax, 40
.Lcase_done:
    pop xbp
    ret
SYM_FUNC_END(jump_table_target)

SYM_FUNC_START(ret_imm_target)               // long __stdcall ret_imm_target(long a, long b): a + b; ret imm16
    push xbp
    mov xbp, xsp
    COUNT(ret_imm_target)
    mov xax, [xbp + 2 * W]
    add xax, [xbp + 3 * W]
    pop xbp
    ret 2 * W
SYM_FUNC_END(ret_imm_target)

SYM_FUNC_START(flags_target)                 // long flags_target(long i): pushf, cli, sti, popf; i + (IF when called)
    push xbp
    mov xbp, xsp
    COUNT(flags_target)
    mov xcx, arg1
    pushfx
    pushfx
    pop xax
    cli
    shr eax, 9
    and eax, 1
    add xax, xcx
    sti
    popfx
    pop xbp
    ret
SYM_FUNC_END(flags_target)

// long skip_frames(long depth): 7, after `depth` calls of skipped_target that never return (as longjmp does it)
SYM_FUNC_START(skip_frames)
    push xbp
    mov xbp, xsp
    push xbx
    COUNT(skip_frames)
    mov [REL(jump_sp)], xsp
    call skipped_target
    mov eax, 1                               // not reached
.Lskip_frames_done:
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(skip_frames)

SYM_FUNC_START(skipped_target)               // void skipped_target(long depth)
    push xbp
    mov xbp, xsp
    COUNT(skipped_target)
    dec arg1
    jz .Llongjmp
    call skipped_target
    pop xbp                                  // not reached
    ret
.Llongjmp:
    mov xsp, [REL(jump_sp)]
    lea xbp, [xsp + W]
    mov eax, 7
    jmp .Lskip_frames_done
SYM_FUNC_END(skipped_target)

SYM_FUNC_START(sleeping_target)              // long sleeping_target(long ticks): sleeps that long; ticks + 1
    push xbp
    mov xbp, xsp
    push xbx
    COUNT(sleeping_target)
    mov xbx, arg1
    call sleep_ticks
    lea xax, [xbx + 1]
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(sleeping_target)

SYM_FUNC_START(dying_target)                 // void dying_target(long code): its task ends inside it
    push xbp
    mov xbp, xsp
    COUNT(dying_target)
    call do_exit
SYM_FUNC_END(dying_target)

SYM_FUNC_START(busy_loop)                    // void busy_loop(long which): counts in busy_counts[which]; does not return
    push xbp
    mov xbp, xsp
    mov xcx, arg1
    lea xdx, [REL(busy_counts)]
.Lbusy_again:
    inc WORD ptr [xdx + xcx * W]
    jmp .Lbusy_again
SYM_FUNC_END(busy_loop)

SYM_FUNC_START(atomic_target)                // long atomic_target(long i): lock xadd, lock cmpxchg; the value before
    push xbp
    mov xbp, xsp
    COUNT(atomic_target)
    mov xcx, arg1
    lea xdx, [REL(atomic_value)]
    mov xax, xcx
    lock xadd [xdx], xax
    push xax
    add xcx, xax                             // what is there now
    mov xax, xcx
    inc xcx
    lock cmpxchg [xdx], xcx
    pop xax
    pop xbp
    ret
SYM_FUNC_END(atomic_target)

SYM_FUNC_START(sse_target)                   // long sse_target(long i): 4 i, by SSE
    push xbp
    mov xbp, xsp
    COUNT(sse_target)
    mov xcx, arg1
    cvtsi2ss xmm0, ecx
    addss xmm0, xmm0
    addss xmm0, xmm0
    cvttss2si eax, xmm0
    pop xbp
    ret
SYM_FUNC_END(sse_target)

SYM_FUNC_START(x87_target)                   // long x87_target(long i): 2 i, by x87
    push xbp
    mov xbp, xsp
    COUNT(x87_target)
    mov xcx, arg1
    push xcx
    fild dword ptr [xsp]
    fadd st(0), st(0)
    fistp dword ptr [xsp]
    pop xax
    pop xbp
    ret
SYM_FUNC_END(x87_target)

SYM_FUNC_START(endbr_target)                 // long endbr_target(long i): i; begins as gcc's functions in Linux do
.if BITS == 64
    .byte 0xf3, 0x0f, 0x1e, 0xfa             // endbr64
.else
    .byte 0xf3, 0x0f, 0x1e, 0xfb             // endbr32
.endif
    .byte 0x0f, 0x1f, 0x44, 0x00, 0x00       // the 5-byte nop that ftrace would patch
    push xbp
    mov xbp, xsp
    COUNT(endbr_target)
    mov xax, arg1
    pop xbp
    ret
SYM_FUNC_END(endbr_target)

SYM_FUNC_START(tail_target)                  // unsigned long tail_target(unsigned long v): target(v), by a jump
    COUNT(tail_target)
    jmp target
SYM_FUNC_END(tail_target)

SYM_FUNC_START(stack_segment_target)         // long stack_segment_target(long i): i, after MOV SS with its shadow
    push xbp
    mov xbp, xsp
    COUNT(stack_segment_target)
    mov xcx, arg1
    mov ax, ss
    mov ss, ax
    mov xax, xcx
    pop xbp
    ret
SYM_FUNC_END(stack_segment_target)

SYM_FUNC_START(port_target)                  // long port_target(void): the interrupt mask of the first 8259, by in al, 0x21
    push xbp
    mov xbp, xsp
    COUNT(port_target)
    xor eax, eax
    in al, 0x21
    pop xbp
    ret
SYM_FUNC_END(port_target)

SYM_FUNC_START(probe_read)                   // long probe_read(const void *address): 0, or -14 where that faults
    push xbp
    mov xbp, xsp
    COUNT(probe_read)
    mov xcx, arg1
.Lprobe_read:
    mov cl, [xcx]
    xor eax, eax
    jmp .Lprobe_read_done
.Lprobe_read_failed:
    mov xax, -14
.Lprobe_read_done:
    pop xbp
    ret
SYM_FUNC_END(probe_read)

SYM_FUNC_START(patched_target)               // long patched_target(void): 1 as a nop, 2 as a jump
    push xbp
    mov xbp, xsp
    COUNT(patched_target)
    mov eax, 1
patch_site:
    .byte 0x0f, 0x1f, 0x44, 0x00, 0x00
    jmp .Lpatched_done
.Lpatched:
    inc eax
.Lpatched_done:
    pop xbp
    ret
SYM_FUNC_END(patched_target)

    .balign 4096
    .fill 4096 - STRADDLE, 1, 0xcc
SYM_FUNC_START_UNALIGNED(straddling_target)  // long straddling_target(long i): i + 0x12345678; `add` crosses a page
    push xbp
    mov xbp, xsp
    mov xax, arg1
straddling_instruction:
    add xax, 0x12345678
    COUNT(straddling_target)
    pop xbp
    ret
SYM_FUNC_END(straddling_target)

    .balign 8
SYM_DATA_START(target_pointer)
    .pointer target
SYM_DATA_END(target_pointer)
SYM_DATA_START(jump_table)
    .pointer .Lcase0, .Lcase1, .Lcase2, .Lcase3
SYM_DATA_END(jump_table)
SYM_DATA_START(jump_sp)
    .pointer 0
SYM_DATA_END(jump_sp)
SYM_DATA_START(atomic_value)
    .pointer 0
SYM_DATA_END(atomic_value)
SYM_DATA_START(busy_counts)
    .pointer 0, 0
SYM_DATA_END(busy_counts)
