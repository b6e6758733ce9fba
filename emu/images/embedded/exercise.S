// exercise.S: what calls the functions of functions.S: the workloads calls=N, sleep=N, traps=N and patch=N.

// void exercise(long i): call every function below once, with arguments made from i; adds up what they return
SYM_FUNC_START(exercise)
    push xbp
    mov xbp, xsp
    push xbx
    COUNT(exercise)
    mov xbx, arg1

    mov arg1, xbx
    call target
    add [REL(checksum)], xax
    mov arg1, xbx
    call target2
    add [REL(checksum)], xax
    mov arg1, xbx
    call recursed_target
    add [REL(checksum)], xax
    mov arg1, xbx
    call nested_target
    add [REL(checksum)], xax
    mov arg1, 6
    call fib
    add [REL(checksum)], xax
.if BITS == 64
    mov edi, 1
    mov esi, 2
    mov edx, 3
    mov ecx, 4
    mov r8d, 5
    mov r9d, 6
    call testprobe
    add [rip + checksum], rax
    push 8
    push 7
    mov edi, 1
    mov esi, 2
    mov edx, 3
    mov ecx, 4
    mov r8d, 5
    mov r9d, 6
    call sum8
    add rsp, 16
.else
    push 6
    push 5
    push 4
    mov eax, 1
    mov edx, 2
    mov ecx, 3
    call testprobe
    add esp, 12
    add [checksum], eax
    push 8
    push 7
    push 6
    push 5
    push 4
    mov eax, 1
    mov edx, 2
    mov ecx, 3
    call sum8
    add esp, 20
.endif
    add [REL(checksum)], xax
    lea arg1, [REL(copy_buffer)]
    lea arg2, [REL(copy_source)]
    mov arg3, 32
    call copy_bytes
    lea arg1, [REL(copy_buffer)]
    call strlen
    add [REL(checksum)], xax
    lea arg1, [REL(copy_buffer)]
    lea arg2, [REL(copy_source)]
    call strcmp
    add [REL(checksum)], xax
    mov arg1, xbx
    call loop_target
    add [REL(checksum)], xax
    mov arg1, xbx
    call branch_target
    add [REL(checksum)], xax
    mov arg1, xbx
    call indirect_target
    add [REL(checksum)], xax
    mov arg1, xbx
    call jump_table_target
    add [REL(checksum)], xax
    push 40
    push xbx
    call ret_imm_target                      // takes its two arguments off the stack
    add [REL(checksum)], xax
    mov arg1, xbx
    call flags_target
    add [REL(checksum)], xax
    mov arg1, 3
    call skip_frames
    add [REL(checksum)], xax
    mov arg1, xbx
    call atomic_target
    add [REL(checksum)], xax
    mov arg1, xbx
    call sse_target
    add [REL(checksum)], xax
    mov arg1, xbx
    call stack_segment_target
    add [REL(checksum)], xax
    call port_target
    add [REL(checksum)], xax
    mov arg1, xbx
    call straddling_target
    add [REL(checksum)], xax
    mov arg1, xbx
    call endbr_target
    add [REL(checksum)], xax
    mov arg1, xbx
    call tail_target
    add [REL(checksum)], xax
    mov arg1, xbx
    call x87_target
    add [REL(checksum)], xax
    lea arg1, [REL(checksum)]
    call probe_read
    mov arg1, BAD_ADDRESS
    call probe_read
    add [REL(checksum)], xax
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(exercise)

SYM_FUNC_START(sleeper)                      // void sleeper(long n): sleeping_target(1) .. sleeping_target(n)
    push xbp
    mov xbp, xsp
    push xbx
    push arg1
    xor ebx, ebx
.Lsleeper_next:
    cmp xbx, [xsp]
    jae .Lsleeper_done
    inc xbx
    mov arg1, xbx
    call sleeping_target
    jmp .Lsleeper_next
.Lsleeper_done:
    pop xcx
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(sleeper)

SYM_FUNC_START(do_traps)                     // traps=N: int3, divide error, undefined instruction, #GP, N times each
    push xbp
    mov xbp, xsp
    push xbx
    mov xbx, arg1
.Ltraps_next:
    int3
    xor eax, eax
    xor edx, edx
    xor ecx, ecx
.Ltrap_divide:
    div ecx
.Ltrap_divide_done:
.Ltrap_ud2:
    ud2
.Ltrap_ud2_done:
    mov eax, 0xfff0                          // no such descriptor
.Ltrap_gp:
    mov fs, ax
.Ltrap_gp_done:
    dec xbx
    jg .Ltraps_next
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(do_traps)

// patch=N: N times, turn the 5-byte nop of patched_target into a jump and back, calling it in either state
SYM_FUNC_START(do_patch)
    push xbp
    mov xbp, xsp
    push xbx
    mov xbx, arg1
.Lpatch_next:
    lea xcx, [REL(patch_site)]
    mov byte ptr [xcx], 0xe9                 // jmp .Lpatched
    mov dword ptr [xcx + 1], .Lpatched - patch_site - 5
    call patched_target
    add [REL(checksum)], xax
    lea xcx, [REL(patch_site)]
    mov dword ptr [xcx], 0x00441f0f          // nop dword ptr [eax + eax + 0]
    mov byte ptr [xcx + 4], 0
    call patched_target
    add [REL(checksum)], xax
    dec xbx
    jg .Lpatch_next
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(do_patch)

    .balign 8
SYM_DATA_START(checksum)                     // sum of all results: equal runs have equal sums
    .pointer 0
SYM_DATA_END(checksum)
SYM_DATA_START(copy_source)
    .asciz "thirty-one bytes and their NUL "
SYM_DATA_END(copy_source)
SYM_DATA_START(copy_buffer)
    .fill 32, 1, 0
SYM_DATA_END(copy_buffer)
