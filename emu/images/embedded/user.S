// user.S: the program of the ring-3 task, linked at USER_PROGRAM. It is the contents of the file /bin/program: every page
// of it, this first one too, is paged in on demand. It waits for work from the init task and does it.

SYM_FUNC_START(user_main)
    mov xbp, xsp
    sub xsp, 64                              // struct work { op, argument }; a file name after it
.Luser_next:
    mov arg1, SYS_NEXT_WORK
    mov arg2, xsp
    call user_syscall
    mov xax, [xsp]
    cmp xax, WORK_OPENS
    je .Luser_opens
    cmp xax, WORK_FAULTS
    je .Luser_faults
    cmp xax, WORK_CALLS
    je .Luser_calls
    cmp xax, WORK_GETPIDS
    je .Luser_getpids
    cmp xax, WORK_BIG
    je .Luser_big
    ud2                                      // WORK_CRASH
.Luser_opens:
    lea arg2, [xsp + 2 * W]
    mov arg1, [xsp + W]
    call user_opens
    jmp .Luser_done
.Luser_faults:
    mov arg1, [xsp + W]
    call user_faults
    jmp .Luser_done
.Luser_calls:
    mov arg1, [xsp + W]
    call user_calls
    jmp .Luser_done
.Luser_getpids:
    mov arg1, [xsp + W]
    call user_getpids
    jmp .Luser_done
.Luser_big:
    mov arg1, [xsp + W]
    call user_big
.Luser_done:
    mov xcx, xax
    mov arg1, SYS_WORK_DONE
    mov arg2, xcx
    call user_syscall
    jmp .Luser_next
SYM_FUNC_END(user_main)

SYM_FUNC_START(user_syscall)                 // long user_syscall(long number, long a, long b): SYSCALL or int 0x80
.if BITS == 64
    mov rax, rdi
    mov rdi, rsi
    mov rsi, rdx
    syscall
    ret
.else
    push ebx
    push esi
    mov ebx, edx
    mov esi, ecx
    int 0x80
    pop esi
    pop ebx
    ret
.endif
SYM_FUNC_END(user_syscall)

SYM_FUNC_START(user_getpid)                  // long user_getpid(void): SYSCALL or SYSENTER
    mov eax, SYS_GETPID
.if BITS == 64
    syscall
.else
    mov ecx, esp
    lea edx, [sysenter_return]
    sysenter
sysenter_return:
.endif
    ret
SYM_FUNC_END(user_getpid)

SYM_FUNC_START(user_opens)                   // long user_opens(long n, char *buffer): open /file/000 .. ; how many failed
    push xbp
    mov xbp, xsp
    push xbx
    push arg2                                // [xbp - 2W] buffer
    push arg1                                // [xbp - 3W] n
    push 0                                   // [xbp - 4W] failures
    xor ebx, ebx
.Lopens_next:
    cmp xbx, [xbp - 3 * W]
    jae .Lopens_done
    mov xcx, [xbp - 2 * W]
    mov dword ptr [xcx], 0x6c69662f          // "/fil"
    mov dword ptr [xcx + 4], 0x2f65          // "e/"
    mov byte ptr [xcx + 9], 0
    mov eax, ebx
    add xcx, 8
.Lname_digit:                                // three digits, last first, at buffer + 6 .. 8
    xor edx, edx
    push xbx
    mov ebx, 10
    div ebx
    pop xbx
    add edx, 0x30
    mov [xcx], dl
    dec xcx
    mov xdx, xcx
    sub xdx, [xbp - 2 * W]
    cmp edx, 6
    jae .Lname_digit
    mov xcx, [xbp - 2 * W]
.if BITS == 64
    mov edi, SYS_OPEN
    mov rsi, rcx
    mov rdx, rbx
.else
    mov eax, SYS_OPEN
    mov edx, ecx
    mov ecx, ebx
.endif
    call user_syscall
    inc xbx
    test xax, xax
    jns .Lopens_next
    inc WORD ptr [xbp - 4 * W]
    jmp .Lopens_next
.Lopens_done:
    pop xax
    add xsp, 2 * W
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(user_opens)

SYM_FUNC_START(user_faults)                  // long user_faults(long rounds): sum of the first bytes of all pages seen
    push xbp
    mov xbp, xsp
    push xbx
    push arg1                                // [xbp - 2W] rounds left
    xor ebx, ebx
.Lfaults_next:
    cmp WORD ptr [xbp - 2 * W], 0
    je .Lfaults_done
    xor ecx, ecx
.Lread_page:
    movzx eax, byte ptr [xcx + USER_DATA]
    add xbx, xax
    movzx eax, byte ptr [xcx + USER_ALIAS]
    add xbx, xax
    add ecx, 4096
    cmp ecx, DATA_PAGES * 4096
    jb .Lread_page
    mov arg1, SYS_DROP_PAGES
    call user_syscall
    dec WORD ptr [xbp - 2 * W]
    jmp .Lfaults_next
.Lfaults_done:
    mov xax, xbx
    pop xcx
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(user_faults)

// long user_calls(long n): says hello; then the sum of user_target(i) + user_cold(i), i = 1 .. n
SYM_FUNC_START(user_calls)
    push xbp
    mov xbp, xsp
    push xbx
    push arg1                                // [xbp - 2W] n
    push 0                                   // [xbp - 3W] sum
    lea arg2, [REL(user_hello)]
    mov arg1, SYS_WRITE
    call user_syscall
    xor ebx, ebx
.Luser_calls_next:
    cmp xbx, [xbp - 2 * W]
    jae .Luser_calls_done
    inc xbx
    mov arg1, xbx
    call user_target
    add [xbp - 3 * W], xax
    mov arg1, xbx
    call user_cold
    add [xbp - 3 * W], xax
    jmp .Luser_calls_next
.Luser_calls_done:
    pop xax
    pop xcx
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(user_calls)

SYM_FUNC_START(user_getpids)                 // long user_getpids(long n): the last answer
    push xbp
    mov xbp, xsp
    push xbx
    mov xbx, arg1
.Lgetpids_next:
    call user_getpid
    dec xbx
    jg .Lgetpids_next
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(user_getpids)

SYM_FUNC_START(user_big)                     // long user_big(long n): calls big_target in both pages of /big, n times
    push xbp
    mov xbp, xsp
    push xbx
    push arg1                                // [xbp - 2W] n
    xor ebx, ebx
.Lbig_next:
    inc xbx
    mov arg1, xbx
    mov xcx, USER_BIG + 16
    call xcx
    mov arg1, xbx
    mov xcx, USER_BIG_HIGH + 16
    call xcx
    cmp xbx, [xbp - 2 * W]
    jb .Lbig_next
    pop xcx
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(user_big)

user_hello:
    .asciz "program: hello from ring 3\n"

    .balign 4096                             // page 1
SYM_FUNC_START(user_target)                  // long user_target(long v): 2 v
    push xbp
    mov xbp, xsp
    mov xcx, arg1
    lea xax, [xcx + xcx]
    pop xbp
    ret
SYM_FUNC_END(user_target)

    .balign 4096                             // page 2: nothing else is here, so it is cold until it is called
SYM_FUNC_START(user_cold)                    // long user_cold(long v): v + 1
    push xbp
    mov xbp, xsp
    mov xcx, arg1
    lea xax, [xcx + 1]
    pop xbp
    ret
SYM_FUNC_END(user_cold)
    .balign 4096
