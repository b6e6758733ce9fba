// lib.S: strings and memory, as a C library would have them.

// size_t strlen(const char *s)
SYM_FUNC_START(strlen)
    push xbp
    mov xbp, xsp
    push xdi
    COUNT(strlen)
    mov xdi, arg1
    xor eax, eax
    mov xcx, -1
    repne scasb
    not xcx
    lea xax, [xcx - 1]
    pop xdi
    pop xbp
    ret
SYM_FUNC_END(strlen)

// int strcmp(const char *a, const char *b): 0 if equal, else the difference of the first bytes that differ
SYM_FUNC_START(strcmp)
    push xbp
    mov xbp, xsp
    push xsi
    push xdi
    COUNT(strcmp)
.if BITS == 64
    mov rcx, rdi
    mov rdx, rsi
.else
    mov ecx, eax
.endif
    mov xsi, xcx
    mov xdi, xdx
.Lcompare_next:
    movzx eax, byte ptr [xsi]
    movzx ecx, byte ptr [xdi]
    inc xsi
    inc xdi
    sub eax, ecx
    jnz .Lcompare_done
    test ecx, ecx
    jnz .Lcompare_next
.Lcompare_done:
    pop xdi
    pop xsi
    pop xbp
    ret
SYM_FUNC_END(strcmp)

// void *memcpy(void *to, const void *from, size_t n): one rep movsb
SYM_FUNC_START(memcpy)
    push xbp
    mov xbp, xsp
    push xsi
    push xdi
    COUNT(memcpy)
.if BITS == 64
    mov rax, rdi
    mov rcx, rdx
.else
    mov edi, eax
    mov esi, edx
.endif
    rep movsb
    pop xdi
    pop xsi
    pop xbp
    ret
SYM_FUNC_END(memcpy)

// void *memset(void *to, int byte, size_t n): one rep stosb
SYM_FUNC_START(memset)
    push xbp
    mov xbp, xsp
    push xdi
    COUNT(memset)
    push arg1
.if BITS == 64
    mov eax, esi
    mov rcx, rdx
.else
    mov edi, eax
    mov eax, edx
.endif
    rep stosb
    pop xax
    pop xdi
    pop xbp
    ret
SYM_FUNC_END(memset)

// long strncpy_from_user(char *to, const char *from, long n): its length, or -14 (EFAULT); `from` may be paged in
SYM_FUNC_START(strncpy_from_user)
    push xbp
    mov xbp, xsp
    push xbx
    COUNT(strncpy_from_user)
.if BITS == 64
    mov rcx, rdx
    mov rdx, rdi
    mov rbx, rsi
.else
    xchg eax, edx
    mov ebx, eax
.endif
    push xcx
    cmp xbx, USER_START
    jb .Lbad_user_string
    cmp xbx, USER_STACK_END
    jae .Lbad_user_string
.Lcopy_user:
    mov al, [xbx]
    mov [xdx], al
    test al, al
    jz .Luser_copied
    inc xbx
    inc xdx
    dec xcx
    jnz .Lcopy_user
    dec xdx
    mov byte ptr [xdx], 0                    // cut
    inc xcx
.Luser_copied:
    pop xax
    sub xax, xcx
    jmp .Lstrncpy_done
.Lbad_user_string:
    pop xax
    mov xax, -14
.Lstrncpy_done:
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(strncpy_from_user)

// const char *parse_number(const char *text, unsigned long *n): the first byte that is no decimal digit
SYM_FUNC_START(parse_number)
    push xbp
    mov xbp, xsp
    push xbx
.if BITS == 64
    mov rcx, rdi
    push rsi
.else
    mov ecx, eax
    push edx
.endif
    xor ebx, ebx
.Lparse_digit:
    movzx eax, byte ptr [xcx]
    sub eax, 0x30
    cmp eax, 9
    ja .Lparse_done
    imul xbx, xbx, 10
    add xbx, xax
    inc xcx
    jmp .Lparse_digit
.Lparse_done:
    pop xdx
    mov [xdx], xbx
    mov xax, xcx
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(parse_number)
