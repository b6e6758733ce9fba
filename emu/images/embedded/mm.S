// mm.S: page faults of ring 3, page tables, page frames.

// long do_page_fault(struct pt_regs *regs, unsigned long address): 1 if the instruction can run again or elsewhere
SYM_FUNC_START(do_page_fault)
    push xbp
    mov xbp, xsp
    COUNT(do_page_fault)
    test dword ptr [arg1 + REGS.error], 1    // a protection violation: nothing to bring in
    jnz .Lfault_not_ours
.if BITS == 64
    mov rdi, rsi
.else
    mov eax, edx
.endif
    mov xdx, [REL(current)]
    cmp WORD ptr [xdx + TASK.ptes], 0
    je .Lfault_not_ours
    call handle_mm_fault
    jmp .Lpage_fault_done
.Lfault_not_ours:
    xor eax, eax
.Lpage_fault_done:
    pop xbp
    ret
SYM_FUNC_END(do_page_fault)

// long handle_mm_fault(unsigned long address): make the user page at `address` present; 0 if nothing is mapped there
SYM_FUNC_START(handle_mm_fault)
    push xbp
    mov xbp, xsp
    push xbx
    push arg1
    COUNT(handle_mm_fault)
    lea xbx, [REL(user_vmas)]
.Lfind_vma:
    cmp WORD ptr [xbx + VMA.start], 0
    je .Lno_vma
    mov xcx, [xsp]
    sub xcx, [xbx + VMA.start]
    cmp xcx, [xbx + VMA.size]
    jb .Lvma_found
    add xbx, SIZEOF.VMA
    jmp .Lfind_vma
.Lno_vma:
    xor eax, eax
    jmp .Lmm_fault_done
.Lvma_found:
    shr xcx, 12
    add xcx, [xbx + VMA.pgoff]               // page index in the file
    cmp WORD ptr [xbx + VMA.file], 0
    je .Lanonymous
.if BITS == 64
    mov rdi, rbx
    mov rsi, rcx
.else
    mov eax, ebx
    mov edx, ecx
.endif
    call filemap_fault
    jmp .Lhave_page
.Lanonymous:
    call do_anonymous_page
.Lhave_page:
.if BITS == 64
    mov rdi, rbx
    mov rsi, rax
    mov rdx, [rsp]
.else
    mov edx, eax
    mov eax, ebx
    mov ecx, [esp]
.endif
    call do_set_pte
    mov eax, 1
.Lmm_fault_done:
    pop xcx
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(handle_mm_fault)

// struct page *do_anonymous_page(void): a page of zeros
SYM_FUNC_START(do_anonymous_page)
    push xbp
    mov xbp, xsp
    push xbx
    COUNT(do_anonymous_page)
    call alloc_page
    mov xbx, xax
    mov WORD ptr [xbx + PAGE.flags], PG_ALLOCATED + PG_UPTODATE
.if BITS == 64
    mov rdi, [rbx + PAGE.frame]
    xor esi, esi
    mov edx, 4096
    add rdi, [rip + kernel_offset]
.else
    mov eax, [ebx + PAGE.frame]
    xor edx, edx
    mov ecx, 4096
    add eax, [kernel_offset]
.endif
    call memset
    mov xax, xbx
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(do_anonymous_page)

// void do_set_pte(struct vma *vma, struct page *page, unsigned long address): every page of ring 3 arrives through here
SYM_FUNC_START(do_set_pte)
    push xbp
    mov xbp, xsp
    push xbx
    COUNT(do_set_pte)
.if BITS == 64
    mov rcx, [rsi + PAGE.frame]
    mov rax, rdi
    mov rbx, rdx
.else
    push ecx
    mov ecx, [edx + PAGE.frame]
    pop ebx
.endif
    or xcx, 5                                // present, user
    cmp WORD ptr [xax + VMA.file], 0
    jne .Lread_only
    or xcx, 2                                // writable
.Lread_only:
    sub xbx, USER_START
    shr xbx, 12
    mov xdx, [REL(current)]
    mov xdx, [xdx + TASK.ptes]
    mov [xdx + xbx * PTE_SIZE], xcx          // with PAE the upper half is always 0
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(do_set_pte)

// struct page *alloc_page(void): a free page frame; panics if there is none
SYM_FUNC_START(alloc_page)
    push xbp
    mov xbp, xsp
    lea xax, [REL(mem_map)]
    mov ecx, NR_PAGES
.Lalloc_next:
    cmp WORD ptr [xax + PAGE.flags], 0
    je .Lalloc_done
    add xax, SIZEOF.PAGE
    dec ecx
    jnz .Lalloc_next
    lea arg1, [REL(no_memory_message)]
    call panic
.Lalloc_done:
    pop xbp
    ret
SYM_FUNC_END(alloc_page)

// void mem_init(void): give every struct page its frame
SYM_FUNC_START(mem_init)
    push xbp
    mov xbp, xsp
    lea xdx, [REL(mem_map)]
    lea xax, [REL(page_frames)]
    sub xax, [REL(kernel_offset)]
    mov ecx, NR_PAGES
.Lnext_frame:
    mov [xdx + PAGE.frame], xax
    add xax, 4096
    add xdx, SIZEOF.PAGE
    dec ecx
    jnz .Lnext_frame
    pop xbp
    ret
SYM_FUNC_END(mem_init)

// void unmap_page(struct page *page): take it out of the user's page tables, wherever it is mapped
SYM_FUNC_START(unmap_page)
    push xbp
    mov xbp, xsp
    push xbx
    COUNT(unmap_page)
    mov xbx, [arg1 + PAGE.frame]
    lea xdx, [REL(user_ptes)]
    mov ecx, 1024
.Lunmap_next:
    mov xax, [xdx]
    test al, 1
    jz .Lnot_this_pte
    and xax, -4096
    cmp xax, xbx
    jne .Lnot_this_pte
    mov WORD ptr [xdx], 0
.Lnot_this_pte:
    add xdx, PTE_SIZE
    dec ecx
    jnz .Lunmap_next
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(unmap_page)

// long break_cow(struct vma *vma, unsigned long index): give ring 3 a private copy of a page of its first mapping, as a
// debugger that writes into it does; 1
SYM_FUNC_START(break_cow)
    push xbp
    mov xbp, xsp
    push xbx
    push arg2
    COUNT(break_cow)
    pushfx
    cli
    call filemap_fault
    push WORD ptr [xax + PAGE.frame]
    call do_anonymous_page
    mov xbx, [xax + PAGE.frame]
    pop xcx
    add xcx, [REL(kernel_offset)]
    mov xdx, xbx
    add xdx, [REL(kernel_offset)]
.if BITS == 64
    mov rdi, rdx
    mov rsi, rcx
    mov edx, 4096
.else
    mov eax, edx
    mov edx, ecx
    mov ecx, 4096
.endif
    call memcpy
    popfx
    pop xcx
    lea xdx, [REL(user_ptes)]
    or xbx, 5                                // present, user
    mov [xdx + xcx * PTE_SIZE], xbx
    mov eax, 1
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(break_cow)

SYM_DATA_START(kernel_offset)
    .pointer KERNEL_OFFSET
SYM_DATA_END(kernel_offset)
// struct vma { start, size in bytes, file (0: anonymous), pgoff }: the address space of the ring-3 task
SYM_DATA_START(user_vmas)
    .pointer USER_PROGRAM, PROGRAM_PAGES * 4096, program_file, 0
data_vma:
    .pointer USER_DATA, DATA_PAGES * 4096, data_file, 0
    .pointer USER_ALIAS, DATA_PAGES * 4096, data_file, 0  // the same file a second time
    .pointer USER_BIG, 4096, big_file, 1
    .pointer USER_BIG_HIGH, 4096, big_file, BIG_HIGH
    .pointer USER_STACK_END - 0x10000, 0x10000, 0, 0
    .pointer 0, 0, 0, 0
SYM_DATA_END(user_vmas)
no_memory_message:
    .asciz "out of memory"
    .balign 8
SYM_DATA_START(mem_map)                      // struct page { flags, index, mapping, frame }
    .fill NR_PAGES * SIZEOF.PAGE, 1, 0
SYM_DATA_END(mem_map)
