// main.S: start_kernel, and the workloads that the command line chooses.
//
// The command line is a list of words, `name` or `name=number`, carried out in order by the init task.

SYM_FUNC_START(start_kernel)                 // void start_kernel(void): becomes the idle task; does not return
    push xbp
    mov xbp, xsp
    call console_init
    lea arg1, [REL(banner)]
    call printk
    lea arg1, [REL(command_line_message)]
    call printk
    lea arg1, [REL(command_line)]
    call printk
    lea arg1, [REL(newline)]
    call printk
    call mem_init
    call pic_init
    call pit_init
    lea arg1, [REL(init_task)]
    lea arg2, [REL(run_workloads)]
    mov arg3, 0
    call task_init
    lea arg1, [REL(user_task)]
    lea arg2, [REL(enter_user)]
    mov arg3, USER_PROGRAM
    call task_init
    lea arg1, [REL(ready_message)]
    call printk
    call cpu_idle
SYM_FUNC_END(start_kernel)

SYM_FUNC_START(run_workloads)                // void run_workloads(void): the init task
    push xbp
    mov xbp, xsp
    push xbx
    sub xsp, W                               // the number after '='
    lea xbx, [REL(command_line)]
.Lnext_word:
    cmp byte ptr [xbx], 0x20
    jne .Lword_start
    inc xbx
    jmp .Lnext_word
.Lword_start:
    cmp byte ptr [xbx], 0
    je .Lno_more_words
    mov arg1, xbx
    call find_workload
    test xax, xax
    jz .Lunknown_word
    push WORD ptr [xax + WORKLOAD.fn]
    mov xbx, [xax + WORKLOAD.length]
    add xbx, [REL(current_word)]
    mov WORD ptr [xsp + W], 1
    cmp byte ptr [xbx], 0x3d                 // '='
    jne .Lword_parsed
    inc xbx
    mov arg1, xbx
    lea arg2, [xsp + W]
    call parse_number
    mov xbx, xax
.Lword_parsed:
    pop xcx
    mov arg1, [xsp]
    call xcx
    jmp .Lnext_word
.Lunknown_word:
    lea arg1, [REL(unknown_message)]
    call printk
    mov arg1, xbx
    call printk
    lea arg1, [REL(newline)]
    call printk
.Lno_more_words:
    lea arg1, [REL(done_message)]
    call printk
    add xsp, W
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(run_workloads)

// struct workload *find_workload(const char *word): by its name, up to '=', space or the end; 0 if there is none
SYM_FUNC_START(find_workload)
    push xbp
    mov xbp, xsp
    push xbx
    mov [REL(current_word)], arg1
    lea xbx, [REL(workloads)]
.Ltry_workload:
    xor eax, eax
    mov xcx, [xbx + WORKLOAD.name]
    test xcx, xcx
    jz .Lworkload_done
    mov xdx, [REL(current_word)]
.Lcompare_word:
    mov al, [xcx]
    test al, al
    jz .Lname_matched
    cmp al, [xdx]
    jne .Lother_workload
    inc xcx
    inc xdx
    jmp .Lcompare_word
.Lname_matched:
    mov al, [xdx]
    test al, al
    jz .Lworkload_found
    cmp al, 0x20
    je .Lworkload_found
    cmp al, 0x3d
    je .Lworkload_found
.Lother_workload:
    add xbx, SIZEOF.WORKLOAD
    jmp .Ltry_workload
.Lworkload_found:
    mov xax, xbx
.Lworkload_done:
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(find_workload)

// ---- the workloads: void f(long number)

SYM_FUNC_START(do_calls)                     // calls=N: exercise(1) .. exercise(N)
    push xbp
    mov xbp, xsp
    push xbx
    push arg1
    xor ebx, ebx
.Lcalls_next:
    cmp xbx, [xsp]
    jae .Lcalls_done
    inc xbx
    mov arg1, xbx
    call exercise
    jmp .Lcalls_next
.Lcalls_done:
    pop xcx
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(do_calls)

SYM_FUNC_START(do_sleep)                     // sleep=N: init and helper each call sleeping_target(1) .. (N), at the same time
    push xbp
    mov xbp, xsp
    push xbx
    mov xbx, arg1
    lea arg1, [REL(helper_task)]
    lea arg2, [REL(sleeper)]
    mov arg3, xbx
    call task_init
    mov arg1, xbx
    call sleeper
    lea arg1, [REL(helper_task)]
    call wait_for_task
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(do_sleep)

SYM_FUNC_START(do_deaths)                    // deaths=N: N times, the helper task calls dying_target
    push xbp
    mov xbp, xsp
    push xbx
    mov xbx, arg1
.Ldeaths_next:
    lea arg1, [REL(helper_task)]
    lea arg2, [REL(dying_target)]
    mov arg3, xbx
    call task_init
    lea arg1, [REL(helper_task)]
    call wait_for_task
    dec xbx
    jg .Ldeaths_next
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(do_deaths)

SYM_FUNC_START(do_loop)                      // loop: init and helper compute for ever, preempted by the timer
    push xbp
    mov xbp, xsp
    lea arg1, [REL(helper_task)]
    lea arg2, [REL(busy_loop)]
    mov arg3, 1
    call task_init
    xor eax, eax
    mov arg1, xax
    call busy_loop
SYM_FUNC_END(do_loop)

SYM_FUNC_START(do_opens)                     // opens=N: ring 3 opens "/file/000" .. with flags 0 ..
    push xbp
    mov xbp, xsp
    mov arg2, arg1
    mov arg1, WORK_OPENS
    call run_user
    pop xbp
    ret
SYM_FUNC_END(do_opens)

SYM_FUNC_START(do_faults)                    // faults=N: ring 3 reads every page of /data through both mappings, evicts, N times
    push xbp
    mov xbp, xsp
    mov arg2, arg1
    mov arg1, WORK_FAULTS
    call run_user
    pop xbp
    ret
SYM_FUNC_END(do_faults)

SYM_FUNC_START(do_user)                      // user=N: ring 3 calls user_target(1) .. (N) and user_cold(1) .. (N)
    push xbp
    mov xbp, xsp
    mov arg2, arg1
    mov arg1, WORK_CALLS
    call run_user
    pop xbp
    ret
SYM_FUNC_END(do_user)

SYM_FUNC_START(do_getpids)                   // getpids=N: ring 3 asks for its pid N times
    push xbp
    mov xbp, xsp
    mov arg2, arg1
    mov arg1, WORK_GETPIDS
    call run_user
    pop xbp
    ret
SYM_FUNC_END(do_getpids)

SYM_FUNC_START(do_crash)                     // crash: ring 3 executes ud2 and is killed
    push xbp
    mov xbp, xsp
    mov arg2, arg1
    mov arg1, WORK_CRASH
    call run_user
    pop xbp
    ret
SYM_FUNC_END(do_crash)

SYM_FUNC_START(do_sum)                       // sum=N: N times, the kernel adds up the bytes of /bin/program
    push xbp
    mov xbp, xsp
    push xbx
    mov xbx, arg1
.Lsum_next:
    lea arg1, [REL(user_vmas)]
    call sum_file
    mov [REL(work_result)], xax
    dec xbx
    jg .Lsum_next
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(do_sum)

SYM_FUNC_START(do_partial)                   // partial: from now on readpages reads only the first page it is asked for
    push xbp
    mov xbp, xsp
    lea xcx, [REL(partial_aops)]
    mov [REL(program_mapping) + MAPPING.a_ops], xcx
    mov [REL(data_mapping) + MAPPING.a_ops], xcx
    pop xbp
    ret
SYM_FUNC_END(do_partial)

SYM_FUNC_START(do_ioerrors)                  // ioerrors=N: the next N reads of a page fail
    mov [REL(io_errors)], arg1
    ret
SYM_FUNC_END(do_ioerrors)

SYM_FUNC_START(do_big)                       // big=N: ring 3 calls the function of either page of /big N times
    push xbp
    mov xbp, xsp
    mov arg2, arg1
    mov arg1, WORK_BIG
    call run_user
    pop xbp
    ret
SYM_FUNC_END(do_big)

SYM_FUNC_START(do_cow)                       // cow=N: from now on ring 3 has a private copy of page N of /bin/program
    push xbp
    mov xbp, xsp
    mov arg2, arg1
    lea arg1, [REL(user_vmas)]
    call break_cow
    pop xbp
    ret
SYM_FUNC_END(do_cow)

SYM_FUNC_START(do_drop)                      // drop: all cached pages are dropped
    push xbp
    mov xbp, xsp
    call sys_drop_pages
    pop xbp
    ret
SYM_FUNC_END(do_drop)

SYM_FUNC_START(do_write)                     // write=N: N becomes the last byte of page 1 of /bin/program, if it may be
    push xbp
    mov xbp, xsp
    push arg1
    mov arg2, O_WRONLY
    lea arg1, [REL(program_name)]
    call do_open
    pop xcx
    mov [REL(work_result)], xax
    test xax, xax
    js .Lwrite_denied
    lea xdx, [REL(disk_program)]
    mov [xdx + 8191], cl
    dec WORD ptr [REL(program_inode) + INODE.i_writecount]
.Lwrite_denied:
    pop xbp
    ret
SYM_FUNC_END(do_write)

// both=N: N times, ring 3 runs from pages that are read for it while the helper task reads /data
SYM_FUNC_START(do_both)
    push xbp
    mov xbp, xsp
    push xbx
    mov xbx, arg1
    lea arg1, [REL(helper_task)]
    lea arg2, [REL(data_reader)]
    mov arg3, xbx
    call task_init
.Lboth_next:
    call sys_drop_pages
    mov arg2, 1
    mov arg1, WORK_CALLS
    call run_user
    dec xbx
    jg .Lboth_next
    lea arg1, [REL(helper_task)]
    call wait_for_task
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(do_both)

SYM_FUNC_START(data_reader)                  // void data_reader(long n): n times, add up what /data has, read anew
    push xbp
    mov xbp, xsp
    push xbx
    mov xbx, arg1
.Lreader_next:
    lea arg1, [REL(data_mapping)]
    call drop_pages
    lea arg1, [REL(data_vma)]
    call sum_file
    dec xbx
    jg .Lreader_next
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(data_reader)

SYM_FUNC_START(do_idle)                      // idle: nothing, for ever
    push xbp
    mov xbp, xsp
    cli
    lea arg1, [REL(do_idle)]
    call sleep_on
    jmp do_idle
SYM_FUNC_END(do_idle)

SYM_FUNC_START(do_panic)                     // panic
    push xbp
    mov xbp, xsp
    lea arg1, [REL(asked_message)]
    call panic
SYM_FUNC_END(do_panic)

SYM_FUNC_START(do_debug_exit)                // exit=N: N goes to the debug exit port
    mov xcx, arg1
    mov eax, ecx
    mov edx, 0x501
    out dx, al
    cli
    hlt
SYM_FUNC_END(do_debug_exit)

SYM_FUNC_START(do_reset)                     // reset: by the keyboard controller
    mov al, 0xfe
    out 0x64, al
    cli
    hlt
SYM_FUNC_END(do_reset)

SYM_FUNC_START(do_poweroff)                  // poweroff: the ACPI port of a PC as emulators have it
    mov edx, 0x604
    mov eax, 0x2000
    out dx, ax
    cli
    hlt
SYM_FUNC_END(do_poweroff)

SYM_FUNC_START(do_halt)                      // halt: nothing can wake it
    cli
    hlt
    jmp do_halt
SYM_FUNC_END(do_halt)

SYM_FUNC_START(do_triple_fault)              // triple: no IDT to deliver #UD, #GP or #DF through
.if BITS == 64
    lidt [rip + empty_descriptor]
.else
    .byte 0x0f, 0x01, 0x1d                   // lidt [empty_descriptor]
    .long empty_descriptor
.endif
    ud2
SYM_FUNC_END(do_triple_fault)

SYM_FUNC_START(do_double_fault)              // doublefault: a fault with a stack that faults
    cli
    mov xsp, 0x1000
    push 0
SYM_FUNC_END(do_double_fault)

// struct workload { const char *name; void (*fn)(long); long length; }
SYM_DATA_START(workloads)
    .pointer name_calls, do_calls, 5
    .pointer name_sleep, do_sleep, 5
    .pointer name_traps, do_traps, 5
    .pointer name_patch, do_patch, 5
    .pointer name_deaths, do_deaths, 6
    .pointer name_loop, do_loop, 4
    .pointer name_opens, do_opens, 5
    .pointer name_faults, do_faults, 6
    .pointer name_user, do_user, 4
    .pointer name_getpids, do_getpids, 7
    .pointer name_sum, do_sum, 3
    .pointer name_partial, do_partial, 7
    .pointer name_ioerrors, do_ioerrors, 8
    .pointer name_big, do_big, 3
    .pointer name_cow, do_cow, 3
    .pointer name_drop, do_drop, 4
    .pointer name_write, do_write, 5
    .pointer name_both, do_both, 4
    .pointer name_crash, do_crash, 5
    .pointer name_idle, do_idle, 4
    .pointer name_panic, do_panic, 5
    .pointer name_exit, do_debug_exit, 4
    .pointer name_reset, do_reset, 5
    .pointer name_poweroff, do_poweroff, 8
    .pointer name_halt, do_halt, 4
    .pointer name_triple, do_triple_fault, 6
    .pointer name_doublefault, do_double_fault, 11
    .pointer 0, 0, 0
SYM_DATA_END(workloads)
name_calls:
    .asciz "calls"
name_sleep:
    .asciz "sleep"
name_traps:
    .asciz "traps"
name_patch:
    .asciz "patch"
name_deaths:
    .asciz "deaths"
name_loop:
    .asciz "loop"
name_opens:
    .asciz "opens"
name_faults:
    .asciz "faults"
name_user:
    .asciz "user"
name_getpids:
    .asciz "getpids"
name_sum:
    .asciz "sum"
name_partial:
    .asciz "partial"
name_ioerrors:
    .asciz "ioerrors"
name_big:
    .asciz "big"
name_cow:
    .asciz "cow"
name_drop:
    .asciz "drop"
name_write:
    .asciz "write"
name_both:
    .asciz "both"
name_crash:
    .asciz "crash"
name_idle:
    .asciz "idle"
name_panic:
    .asciz "panic"
name_exit:
    .asciz "exit"
name_reset:
    .asciz "reset"
name_poweroff:
    .asciz "poweroff"
name_halt:
    .asciz "halt"
name_triple:
    .asciz "triple"
name_doublefault:
    .asciz "doublefault"
SYM_DATA_START(banner)
.if BITS == 64
    .asciz "embedded: 64-bit kernel\n"
.else
    .asciz "embedded: 32-bit kernel\n"
.endif
SYM_DATA_END(banner)
command_line_message:
    .asciz "embedded: command line: "
ready_message:
    .asciz "embedded: ready\n"
done_message:
    .asciz "embedded: done\n"
unknown_message:
    .asciz "embedded: unknown workload: "
asked_message:
    .asciz "asked for by the command line"
    .balign 8
empty_descriptor:
    .fill 10, 1, 0
    .balign 8
SYM_DATA_START(current_word)
    .pointer 0
SYM_DATA_END(current_word)
