// filemap.S: a page cache whose reads complete later, and the files and the "disk" behind it.
//
// A fault on a page of a file asks the file's address_space: is it in `pages`? If not, the readpage or readpages operation
// of its table `a_ops` queues a request for it and returns at once; the faulting task sleeps. At a later clock tick the
// "disk" completes the request: only then does data arrive, the page become up to date and the task wake. So a probe
// put into a page when readpage returns is overwritten; the place to insert it is completion (end_page_read) or the
// moment the page goes into a page table (do_set_pte).

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
    mov arg2, [xsp + W]
    mov arg1, xbx
    call page_slot
    mov xax, [xax]
    test xax, xax
    jz .Lnot_cached
    test dword ptr [xax + PAGE.flags], PG_UPTODATE
    jnz .Lfilemap_done
    mov arg1, xax
    call sleep_on                            // a page is its own wait channel
    jmp .Lfilemap_again
.Lnot_cached:
    mov xcx, [xsp + W]
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
    mov arg2, xcx
    mov arg1, xbx
    call page_slot
    cmp WORD ptr [xax], 0
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

// struct page **page_slot(struct address_space *mapping, unsigned long index): where that page is kept, see layout.slot;
// changes no other register
SYM_FUNC_START(page_slot)
.if BITS == 64
    mov rax, rsi
    shr rax, 20
    xor eax, esi
    and eax, CACHE_SLOTS - 1
    lea rax, [rdi + rax * 8 + MAPPING.pages]
.else
    push ecx
    mov ecx, edx
    shr ecx, 20
    xor ecx, edx
    and ecx, CACHE_SLOTS - 1
    lea eax, [eax + ecx * 4 + MAPPING.pages]
    pop ecx
.endif
    ret
SYM_FUNC_END(page_slot)

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
    push xax
    mov arg2, xcx
    mov arg1, xbx
    call page_slot
    pop xcx
    mov [xax], xcx
    mov xax, xcx
    inc WORD ptr [xbx + MAPPING.nrpages]
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(add_to_page_cache)

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

// The same, for a disk that fails half-way: the first page is queued, the others are given up; -5 (EIO)
SYM_FUNC_START(disk_readpages_partial)
    push xbp
    mov xbp, xsp
    push xbx
    COUNT(disk_readpages_partial)
.if BITS == 64
    mov rbx, rdx
.else
    mov ebx, ecx
    mov ecx, [ebp + 8]
.endif
    push xcx
    mov arg1, [xbx]
    call queue_read
.Lgive_up_next:
    dec WORD ptr [xsp]
    jz .Lgiven_up
    add xbx, W
    mov arg1, [xbx]
    call remove_from_page_cache
    jmp .Lgive_up_next
.Lgiven_up:
    pop xcx
    mov xax, -5
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(disk_readpages_partial)

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

// void end_page_read(struct page *page): data has arrived: copy it, mark the page up to date, unlock it, wake who waits;
// while io_errors lasts none has, and the page goes out of the cache
SYM_FUNC_START(end_page_read)
    push xbp
    mov xbp, xsp
    push xbx
    COUNT(end_page_read)
    mov xbx, arg1
    cmp WORD ptr [REL(io_errors)], 0
    je .Lread_well
    dec WORD ptr [REL(io_errors)]
    call remove_from_page_cache
    jmp .Lread_over
.Lread_well:
    mov xcx, [xbx + PAGE.mapping]
    mov xcx, [xcx + MAPPING.host]
    mov xdx, [xbx + PAGE.index]
    and edx, CACHE_SLOTS - 1
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
.Lread_over:
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
    xor ecx, ecx                             // slot
    xor edx, edx                             // pages dropped
.Ldrop_next:
    cmp ecx, CACHE_SLOTS
    jae .Ldropped
    mov xax, [xbx + MAPPING.pages + xcx * W]
    test xax, xax
    jz .Lkeep_page
    test dword ptr [xax + PAGE.flags], PG_LOCKED
    jnz .Lkeep_page
    push xcx
    push xdx
    push xax
    mov arg1, xax
    call remove_from_page_cache
    pop arg1
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

// void remove_from_page_cache(struct page *page): tell its operations, then its frame is free again
SYM_FUNC_START(remove_from_page_cache)
    push xbp
    mov xbp, xsp
    push xbx
    COUNT(remove_from_page_cache)
    mov xbx, arg1
    mov xcx, [xbx + PAGE.mapping]
    dec WORD ptr [xcx + MAPPING.nrpages]
    mov arg2, [xbx + PAGE.index]
    mov arg1, xcx
    call page_slot
    mov WORD ptr [xax], 0
    mov xcx, [xbx + PAGE.mapping]
    mov xcx, [xcx + MAPPING.a_ops]
    mov xcx, [xcx + AOPS.freepage]
    test xcx, xcx
    jz .Lnobody_told
    mov arg1, xbx
    call xcx                                 // void (*freepage)(page)
.Lnobody_told:
    mov WORD ptr [xbx + PAGE.flags], 0
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(remove_from_page_cache)

// unsigned long sum_file(struct vma *vma): the sum of the file's bytes as a read through the page cache sees them
SYM_FUNC_START(sum_file)
    push xbp
    mov xbp, xsp
    push xbx
    push arg1                                // [xbp - 2W] vma
    push 0                                   // [xbp - 3W] page index
    COUNT(sum_file)
    xor ebx, ebx
.Lsum_page:
    pushfx
    cli
.if BITS == 64
    mov rdi, [rbp - 2 * W]
    mov rsi, [rbp - 3 * W]
.else
    mov eax, [ebp - 2 * W]
    mov edx, [ebp - 3 * W]
.endif
    call filemap_fault
    mov xdx, [xax + PAGE.frame]
    add xdx, [REL(kernel_offset)]
    mov ecx, 4096
.Lsum_byte:
    movzx eax, byte ptr [xdx]
    add xbx, xax
    inc xdx
    dec ecx
    jnz .Lsum_byte
    popfx
    mov xdx, [xbp - 2 * W]
    mov xdx, [xdx + VMA.file]
    mov xdx, [xdx + FILE.f_mapping]
    mov xcx, [xbp - 3 * W]
    inc xcx
    mov [xbp - 3 * W], xcx
    cmp xcx, [xdx + MAPPING.size]
    jb .Lsum_page
    mov xax, xbx
    add xsp, 2 * W
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(sum_file)

SYM_DATA_START(disk_aops)                    // struct address_space_operations, writable: { readpage, readpages, freepage }
    .pointer disk_readpage, disk_readpages, 0
SYM_DATA_END(disk_aops)
SYM_DATA_START(partial_aops)                 // of the disk that fails half-way
    .pointer disk_readpage, disk_readpages_partial, 0
SYM_DATA_END(partial_aops)
// struct file { f_inode, f_mapping }
SYM_DATA_START(program_file)
    .pointer program_inode, program_mapping
SYM_DATA_END(program_file)
SYM_DATA_START(data_file)
    .pointer data_inode, data_mapping
SYM_DATA_END(data_file)
SYM_DATA_START(big_file)
    .pointer big_inode, big_mapping
SYM_DATA_END(big_file)
// struct inode { ino, name, data on the disk, i_mapping, i_writecount: who writes, or negative, who denies it }
SYM_DATA_START(program_inode)
    .pointer 1, program_name, disk_program, program_mapping, 0
SYM_DATA_END(program_inode)
SYM_DATA_START(data_inode)
    .pointer 2, data_name, disk_data, data_mapping, 0
SYM_DATA_END(data_inode)
SYM_DATA_START(big_inode)
    .pointer 3, big_name, disk_big, big_mapping, 0
SYM_DATA_END(big_inode)
// struct address_space { host, a_ops, nrpages, size in pages, pages[16] }
SYM_DATA_START(program_mapping)
    .pointer program_inode, disk_aops, 0, PROGRAM_PAGES, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
SYM_DATA_END(program_mapping)
SYM_DATA_START(data_mapping)
    .pointer data_inode, disk_aops, 0, DATA_PAGES, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
SYM_DATA_END(data_mapping)
SYM_DATA_START(big_mapping)
    .pointer big_inode, disk_aops, 0, BIG_PAGES, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
SYM_DATA_END(big_mapping)
program_name:
    .asciz "/bin/program"
data_name:
    .asciz "/data"
big_name:
    .asciz "/big"
    .balign 8
SYM_DATA_START(io_errors)                    // so many reads to come fail
    .pointer 0
SYM_DATA_END(io_errors)
SYM_DATA_START(read_queue_head)
    .pointer 0
SYM_DATA_END(read_queue_head)
SYM_DATA_START(read_queue_tail)
    .pointer 0
SYM_DATA_END(read_queue_tail)
SYM_DATA_START(read_queue)
    .fill 64, W, 0
SYM_DATA_END(read_queue)
