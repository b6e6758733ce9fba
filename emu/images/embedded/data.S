// data.S: what is only space: stacks, tables the processor fills or reads, the page frames, and the "disk".

    .balign 16
SYM_DATA_START(command_line)                 // put here by the loader
    .fill COMMAND_LINE_SIZE, 1, 0
SYM_DATA_END(command_line)
SYM_DATA_START(tss)                          // of either word size: 104 bytes
    .fill 112, 1, 0
SYM_DATA_END(tss)
    .balign 4096
SYM_DATA_START(idt)
    .fill 4096, 1, 0
SYM_DATA_END(idt)
init_stack:
    .fill 4096, 1, 0
init_stack_end:
init_task_stack:
    .fill 4096, 1, 0
init_task_stack_end:
helper_stack:
    .fill 4096, 1, 0
helper_stack_end:
user_kernel_stack:
    .fill 4096, 1, 0
user_kernel_stack_end:
double_fault_stack:
    .fill 4096, 1, 0
double_fault_stack_end:
SYM_DATA_START(page_frames)
    .fill NR_PAGES * 4096, 1, 0
SYM_DATA_END(page_frames)
SYM_DATA_START(disk_program)                 // the assembled user.S, put here by the loader
    .fill PROGRAM_PAGES * 4096, 1, 0
SYM_DATA_END(disk_program)
SYM_DATA_START(disk_data)                    // page p is filled with the letter 'A' + p
    .fill 4096, 1, 0x41
    .fill 4096, 1, 0x42
    .fill 4096, 1, 0x43
    .fill 4096, 1, 0x44
    .fill 4096, 1, 0x45
SYM_DATA_END(disk_data)
    .balign 4096
SYM_DATA_START(disk_big)                     // three of the 16 pages that /big repeats
    .fill 4096, 1, 0x90
    .fill 16, 1, 0x90
SYM_DATA_START(big_target)                   // long big_target(long v): v + 1; 16 bytes into the page
    mov xax, arg1
    inc xax
    ret
SYM_DATA_END(big_target)
    .balign 4096
    .fill 4096, 1, 0x90
SYM_DATA_END(disk_big)
