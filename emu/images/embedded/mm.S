// mm.S: demand paging from files, through a page cache whose reads complete later.
//
// A fault on a page of a file asks the file's address_space: is it in `pages`? If not, the readpage or readpages operation
// of its table `a_ops` queues a request for it and returns at once; the faulting task sleeps. At a later clock tick the
// "disk" completes the request: only then does data arrive, the page become up to date and the task wake. So a probe
// put into a page when readpage returns is overwritten; the place to insert it is completion (end_page_read) or the
// moment the page goes into a page table (do_set_pte).

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
    shr xcx, 12                              // page index in the mapping
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

// struct page *filemap_fault(struct vma *vma, unsigned long index): the page, up to date; sleeps until it is
SYM_FUNC_START(filemap_fault)
    push xbp
    mov xbp, xsp
    push xbx
    COUNT(filemap_fault)
.if BITS == 64
    push rsi
    push rdi
.else
    push edx
    push eax
.endif
.Lfilemap_again:
    mov xbx, [xsp]
    mov xbx, [xbx + VMA.file]
    mov xbx, [xbx + FILE.f_mapping]
    mov xcx, [xsp + W]
    mov xax, [xbx + MAPPING.pages + xcx * W]
    test xax, xax
    jz .Lnot_cached
    test dword ptr [xax + PAGE.flags], PG_UPTODATE
    jnz .Lfilemap_done
    mov arg1, xax
    call sleep_on                            // a page is its own wait channel
    jmp .Lfilemap_again
.Lnot_cached:
    mov xax, [xsp]
.if BITS == 64
    mov rdi, [rax + VMA.file]
    mov rsi, rcx
.else
    mov eax, [eax + VMA.file]
    mov edx, ecx
.endif
    call page_cache_read
    jmp .Lfilemap_again
.Lfilemap_done:
    add xsp, 2 * W
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(filemap_fault)

// long page_cache_read(struct file *file, unsigned long index): start reading that page, with the next one if it is not
// there either; does not wait
SYM_FUNC_START(page_cache_read)
    push xbp
    mov xbp, xsp
    push xbx
    COUNT(page_cache_read)
.if BITS == 64
    push rsi
    push rdi
.else
    push edx
    push eax
.endif
    sub xsp, 2 * W                           // struct page *pages[2]; above it: file, index
    mov xbx, [xsp + 2 * W]
    mov xbx, [xbx + FILE.f_mapping]
.if BITS == 64
    mov rdi, rbx
    mov rsi, [rsp + 3 * W]
.else
    mov eax, ebx
    mov edx, [esp + 3 * W]
.endif
    call add_to_page_cache
    mov [xsp], xax
    mov xcx, [xsp + 3 * W]
    inc xcx
    cmp xcx, [xbx + MAPPING.size]
    jae .Lread_one
    cmp WORD ptr [xbx + MAPPING.pages + xcx * W], 0
    jne .Lread_one
.if BITS == 64
    mov rdi, rbx
    mov rsi, rcx
.else
    mov eax, ebx
    mov edx, ecx
.endif
    call add_to_page_cache
    mov [xsp + W], xax
    mov xdx, [xbx + MAPPING.a_ops]
.if BITS == 64
    mov rax, rdx
    mov rdi, [rsp + 2 * W]
    mov rsi, rbx
    mov rdx, rsp
    mov ecx, 2
    call [rax + AOPS.readpages]              // int (*readpages)(file, mapping, pages, nr)
.else
    mov ecx, esp
    push 2                                   // the fourth argument of regparm(3) goes on the stack
    mov eax, [esp + 3 * W]
    push edx
    mov edx, ebx
    pop ebx
    call [ebx + AOPS.readpages]
    pop ecx
.endif
    jmp .Lread_started
.Lread_one:
    mov xcx, [xbx + MAPPING.a_ops]
.if BITS == 64
    mov rdi, [rsp + 2 * W]
    mov rsi, [rsp]
.else
    mov eax, [esp + 2 * W]
    mov edx, [esp]
.endif
    call [xcx + AOPS.readpage]               // int (*readpage)(file, page)
.Lread_started:
    add xsp, 4 * W
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(page_cache_read)

// struct page *add_to_page_cache(struct address_space *mapping, unsigned long index): a new page, locked, without data
SYM_FUNC_START(add_to_page_cache)
    push xbp
    mov xbp, xsp
    push xbx
    COUNT(add_to_page_cache)
.if BITS == 64
    mov rbx, rdi
    push rsi
.else
    mov ebx, eax
    push edx
.endif
    call alloc_page
    pop xcx
    mov WORD ptr [xax + PAGE.flags], PG_ALLOCATED + PG_LOCKED
    mov [xax + PAGE.index], xcx
    mov [xax + PAGE.mapping], xbx
    mov [xbx + MAPPING.pages + xcx * W], xax
    inc WORD ptr [xbx + MAPPING.nrpages]
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(add_to_page_cache)

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

// int disk_readpage(struct file *file, struct page *page): queue one page; returns before any data is there
SYM_FUNC_START(disk_readpage)
    push xbp
    mov xbp, xsp
    COUNT(disk_readpage)
.if BITS == 64
    mov rdi, rsi
.else
    mov eax, edx
.endif
    call queue_read
    xor eax, eax
    pop xbp
    ret
SYM_FUNC_END(disk_readpage)

// int disk_readpages(struct file *file, struct address_space *mapping, struct page **pages, unsigned nr)
SYM_FUNC_START(disk_readpages)
    push xbp
    mov xbp, xsp
    push xbx
    COUNT(disk_readpages)
.if BITS == 64
    mov rbx, rdx
.else
    mov ebx, ecx
    mov ecx, [ebp + 8]
.endif
.Lqueue_next:
    push xcx
    mov arg1, [xbx]
    call queue_read
    pop xcx
    add xbx, W
    dec ecx
    jnz .Lqueue_next
    xor eax, eax
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(disk_readpages)

// void queue_read(struct page *page): the disk will have it at the next tick. Ring of 64: more than there are pages.
SYM_FUNC_START(queue_read)
    push xbp
    mov xbp, xsp
    COUNT(queue_read)
    mov xcx, [REL(read_queue_tail)]
    lea xdx, [REL(read_queue)]
    mov [xdx + xcx * W], arg1
    inc xcx
    and xcx, 63
    mov [REL(read_queue_tail)], xcx
    pop xbp
    ret
SYM_FUNC_END(queue_read)

// void complete_reads(void): the disk's interrupt, so to speak: finish what was queued before this tick
SYM_FUNC_START(complete_reads)
    push xbp
    mov xbp, xsp
.Lcomplete_next:
    mov xcx, [REL(read_queue_head)]
    cmp xcx, [REL(read_queue_tail)]
    je .Lcompleted
    lea xdx, [REL(read_queue)]
    mov arg1, [xdx + xcx * W]
    inc xcx
    and xcx, 63
    mov [REL(read_queue_head)], xcx
    call end_page_read
    jmp .Lcomplete_next
.Lcompleted:
    pop xbp
    ret
SYM_FUNC_END(complete_reads)

// void end_page_read(struct page *page): data has arrived: copy it, mark the page up to date, unlock it, wake who waits
SYM_FUNC_START(end_page_read)
    push xbp
    mov xbp, xsp
    push xbx
    COUNT(end_page_read)
    mov xbx, arg1
    mov xcx, [xbx + PAGE.mapping]
    mov xcx, [xcx + MAPPING.host]
    mov xdx, [xbx + PAGE.index]
    shl xdx, 12
    add xdx, [xcx + INODE.data]
    mov xcx, [xbx + PAGE.frame]
    add xcx, [REL(kernel_offset)]
.if BITS == 64
    mov rdi, rcx
    mov rsi, rdx
    mov edx, 4096
.else
    mov eax, ecx
    mov ecx, 4096
.endif
    call memcpy
    mov WORD ptr [xbx + PAGE.flags], PG_ALLOCATED + PG_UPTODATE
    mov arg1, xbx
    call wake_up
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(end_page_read)

// long drop_pages(struct address_space *mapping): evict what is cached and not being read; how many pages went
SYM_FUNC_START(drop_pages)
    push xbp
    mov xbp, xsp
    push xbx
    COUNT(drop_pages)
    pushfx
    cli
    mov xbx, arg1
    xor ecx, ecx                             // index
    xor edx, edx                             // pages dropped
.Ldrop_next:
    cmp xcx, [xbx + MAPPING.size]
    jae .Ldropped
    mov xax, [xbx + MAPPING.pages + xcx * W]
    test xax, xax
    jz .Lkeep_page
    test dword ptr [xax + PAGE.flags], PG_LOCKED
    jnz .Lkeep_page
    mov WORD ptr [xbx + MAPPING.pages + xcx * W], 0
    dec WORD ptr [xbx + MAPPING.nrpages]
    mov WORD ptr [xax + PAGE.flags], 0
    push xcx
    push xdx
    mov arg1, xax
    call unmap_page
    pop xdx
    pop xcx
    inc xdx
.Lkeep_page:
    inc xcx
    jmp .Ldrop_next
.Ldropped:
    mov xax, cr3                             // no stale translation
    mov cr3, xax
    mov xax, xdx
    popfx
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(drop_pages)

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

SYM_DATA_START(kernel_offset)
    .pointer KERNEL_OFFSET
SYM_DATA_END(kernel_offset)
SYM_DATA_START(disk_aops)                    // struct address_space_operations, writable: { readpage, readpages }
    .pointer disk_readpage, disk_readpages
SYM_DATA_END(disk_aops)

// struct vma { start, size in bytes, file (0: anonymous) }: the address space of the ring-3 task
SYM_DATA_START(user_vmas)
    .pointer USER_PROGRAM, PROGRAM_PAGES * 4096, program_file
    .pointer USER_DATA, DATA_PAGES * 4096, data_file
    .pointer USER_ALIAS, DATA_PAGES * 4096, data_file  // the same file a second time
    .pointer USER_STACK_END - 0x10000, 0x10000, 0
    .pointer 0, 0, 0
SYM_DATA_END(user_vmas)

// struct file { f_inode, f_mapping }
SYM_DATA_START(program_file)
    .pointer program_inode, program_mapping
SYM_DATA_END(program_file)
SYM_DATA_START(data_file)
    .pointer data_inode, data_mapping
SYM_DATA_END(data_file)
// struct inode { ino, name, size in bytes, data on the disk, i_mapping }
SYM_DATA_START(program_inode)
    .pointer 1, program_name, PROGRAM_PAGES * 4096, disk_program, program_mapping
SYM_DATA_END(program_inode)
SYM_DATA_START(data_inode)
    .pointer 2, data_name, DATA_PAGES * 4096, disk_data, data_mapping
SYM_DATA_END(data_inode)
// struct address_space { host, a_ops, nrpages, size in pages, pages[16] }
SYM_DATA_START(program_mapping)
    .pointer program_inode, disk_aops, 0, PROGRAM_PAGES, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
SYM_DATA_END(program_mapping)
SYM_DATA_START(data_mapping)
    .pointer data_inode, disk_aops, 0, DATA_PAGES, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
SYM_DATA_END(data_mapping)
program_name:
    .asciz "/bin/program"
data_name:
    .asciz "/data"
no_memory_message:
    .asciz "out of memory"
    .balign 8
SYM_DATA_START(read_queue_head)
    .pointer 0
SYM_DATA_END(read_queue_head)
SYM_DATA_START(read_queue_tail)
    .pointer 0
SYM_DATA_END(read_queue_tail)
SYM_DATA_START(read_queue)
    .fill 64, W, 0
SYM_DATA_END(read_queue)
SYM_DATA_START(mem_map)                      // struct page { flags, index, mapping, frame }
    .fill NR_PAGES * SIZEOF.PAGE, 1, 0
SYM_DATA_END(mem_map)
