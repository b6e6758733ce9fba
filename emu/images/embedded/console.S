// console.S: the serial line (16550 at 0x3f8), the interrupt controllers and the timer.

// void console_init(void): 8 bits, no parity, FIFO, interrupt on receive
SYM_FUNC_START(console_init)
    push xbp
    mov xbp, xsp
    mov edx, 0x3fb                           // LCR: divisor latch
    mov al, 0x80
    out dx, al
    mov edx, 0x3f8                           // 115200 baud
    mov al, 1
    out dx, al
    inc edx
    xor eax, eax
    out dx, al
    mov edx, 0x3fb                           // LCR: 8N1
    mov al, 3
    out dx, al
    dec edx                                  // FCR: FIFOs on and empty
    mov al, 7
    out dx, al
    mov edx, 0x3fc                           // MCR: DTR, RTS, OUT2 (lets the interrupt through)
    mov al, 0x0b
    out dx, al
    mov edx, 0x3f9                           // IER: received data
    mov al, 1
    out dx, al
    pop xbp
    ret
SYM_FUNC_END(console_init)

// void put_char(long c)
SYM_FUNC_START(put_char)
    push xbp
    mov xbp, xsp
    mov xcx, arg1
    mov edx, 0x3fd                           // LSR
.Ltransmit_busy:
    in al, dx
    test al, 0x20                            // THRE
    jz .Ltransmit_busy
    mov edx, 0x3f8
    mov eax, ecx
    out dx, al
    pop xbp
    ret
SYM_FUNC_END(put_char)

// void printk(const char *text)
SYM_FUNC_START(printk)
    push xbp
    mov xbp, xsp
    push xbx
    COUNT(printk)
    mov xbx, arg1
.Lprint_next:
    movzx eax, byte ptr [xbx]
    test eax, eax
    jz .Lprint_done
    mov arg1, xax
    call put_char
    inc xbx
    jmp .Lprint_next
.Lprint_done:
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(printk)

// void print_number(unsigned long n): in decimal
SYM_FUNC_START(print_number)
    push xbp
    mov xbp, xsp
    push xbx
    sub xsp, 32
    mov xax, arg1
    lea xbx, [xsp + 31]
    mov byte ptr [xbx], 0
    mov ecx, 10
.Lnext_digit:
    xor edx, edx
    div xcx
    add edx, 0x30
    dec xbx
    mov [xbx], dl
    test xax, xax
    jnz .Lnext_digit
    mov arg1, xbx
    call printk
    add xsp, 32
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(print_number)

// void do_serial(void): receive interrupt. Echoes what arrives; at the end of a line, says what it was.
SYM_FUNC_START(do_serial)
    push xbp
    mov xbp, xsp
    push xbx
    COUNT(do_serial)
.Lreceive_next:
    mov edx, 0x3fd
    in al, dx
    test al, 1                               // data ready
    jz .Lreceive_done
    mov edx, 0x3f8
    in al, dx
    movzx ebx, al
    cmp ebx, 13
    jne .Lnot_return
    mov ebx, 10
.Lnot_return:
    mov arg1, xbx
    call put_char
    mov xcx, [REL(line_length)]
    lea xdx, [REL(line_buffer)]
    cmp ebx, 10
    je .Lline_complete
    cmp xcx, 127
    je .Lreceive_next                        // a line too long loses its tail
    mov [xdx + xcx], bl
    inc WORD ptr [REL(line_length)]
    jmp .Lreceive_next
.Lline_complete:
    mov byte ptr [xdx + xcx], 0
    mov WORD ptr [REL(line_length)], 0
    call line_received
    jmp .Lreceive_next
.Lreceive_done:
    pop xbx
    pop xbp
    ret
SYM_FUNC_END(do_serial)

// void line_received(void): line_buffer holds a line of input
SYM_FUNC_START(line_received)
    push xbp
    mov xbp, xsp
    COUNT(line_received)
    lea arg1, [REL(echo_message)]
    call printk
    lea arg1, [REL(line_buffer)]
    call printk
    lea arg1, [REL(newline)]
    call printk
    pop xbp
    ret
SYM_FUNC_END(line_received)

// void pic_init(void): IRQ 0-7 at vector 0x20, 8-15 at 0x28; the timer, the cascade and the serial line unmasked
SYM_FUNC_START(pic_init)
    push xbp
    mov xbp, xsp
    mov al, 0x11                             // ICW1
    out 0x20, al
    out 0xa0, al
    mov al, 0x20                             // ICW2
    out 0x21, al
    mov al, 0x28
    out 0xa1, al
    mov al, 4                                // ICW3
    out 0x21, al
    mov al, 2
    out 0xa1, al
    mov al, 1                                // ICW4
    out 0x21, al
    out 0xa1, al
    mov al, 0xea                             // masks
    out 0x21, al
    mov al, 0xff
    out 0xa1, al
    pop xbp
    ret
SYM_FUNC_END(pic_init)

// void pit_init(void): channel 0 interrupts HZ times a second
SYM_FUNC_START(pit_init)
    push xbp
    mov xbp, xsp
    mov al, 0x34                             // channel 0, both bytes, rate generator
    out 0x43, al
    mov eax, PIT_DIVISOR
    out 0x40, al
    shr eax, 8
    out 0x40, al
    pop xbp
    ret
SYM_FUNC_END(pit_init)

SYM_DATA_START(line_length)
    .pointer 0
SYM_DATA_END(line_length)
SYM_DATA_START(line_buffer)
    .fill 128, 1, 0
SYM_DATA_END(line_buffer)
SYM_DATA_START(echo_message)
    .asciz "echo: "
SYM_DATA_END(echo_message)
    .balign 8
