"""Bodies for the lock-step oracle: every class of the single-step table, code bytes beside their assembly.

`DATA` in a line of code stands for the data page's address, little-endian.
"""

from tests.probes.lockstep import DATA, Body

_FLAG_IMAGES = (0x2, 0x3, 0x6, 0x42, 0x43, 0x82, 0x802, 0x882, 0x8C7)


def _conditions() -> str:
    """Every condition, short and near, on flag images that tell them apart."""
    lines = []
    for image in _FLAG_IMAGES:
        for code in range(16):
            lines += [
                f"68{image.to_bytes(4, 'little').hex()} ; push image",
                "9d ; popf",
                f"{0x70 | code:02x}02 ; jcc +2",
                "ffc3 ; inc ebx",
                f"0f{0x80 | code:02x}02000000 ; jcc near +2",
                "ffc6 ; inc esi",
            ]
    return "\n".join(lines)


def _loops(prefix: str) -> str:
    """loopne, loope, loop and jcxz with counts 0, 1 and 2 and both values of ZF."""
    lines = []
    for opcode in ("e0", "e1", "e2", "e3"):
        for count in ("00000000", "01000000", "02000000"):
            for compare in ("39db ; cmp ebx,ebx", "83fbff ; cmp ebx,-1"):
                lines += [f"b9{count} ; mov ecx,n", compare, f"{prefix}{opcode}02 ; loopcc +2", "ffc5 ; inc ebp"]
    return "\n".join(lines)


_COMMON = {
    "conditions": _conditions(),
    "loops": _loops(""),
    "loops_by_address_size": _loops("67"),
    "backward_branches": """
        b905000000 ; mov ecx,5
        ffc0       ; inc eax
        e2fc       ; loop -4
        b903000000 ; mov ecx,3
        90         ; nop
        ffc9       ; dec ecx
        75fb       ; jnz -5
        b904000000 ; mov ecx,4
        e2fe       ; loop to itself
    """,
    "no_ops": """
        90                   ; nop
        6690                 ; xchg ax,ax
        f390                 ; pause
        0f1f440000           ; nop [rax+rax]
        662e0f1f840000000000 ; nopw cs:[rax+rax]
    """,
    "call_and_return": """
        e802000000 ; call +2
        eb03       ; jmp +3
        ffc0       ; inc eax
        c3         ; ret
    """,
    "return_that_pops": """
        6a11       ; push 0x11
        e802000000 ; call +2
        eb03       ; jmp +3
        c20400     ; ret 4
    """,
    "flags": """
        f9   ; stc
        9c   ; pushf
        f8   ; clc
        9d   ; popf
        669c ; pushfw
        669d ; popfw
        9c   ; pushf
        58   ; pop ax
    """,
    "interrupt_flag": """
        fb ; sti
        90 ; nop
        9c ; pushf
        fa ; cli
        9c ; pushf
        fb ; sti
        fb ; sti
        fa ; cli
    """,
    "frames": """
        c8100000 ; enter 16,0
        6a05     ; push 5
        58       ; pop ax
        c9       ; leave
        54       ; push sp
        5c       ; pop sp
    """,
    "strings": """
        bfDATA     ; mov edi,DATA
        beDATA     ; mov esi,DATA
        83c640     ; add esi,64
        b90a000000 ; mov ecx,10
        f3a4       ; rep movsb
        b903000000 ; mov ecx,3
        f3ab       ; rep stosd
        f3a4       ; rep movsb, cx 0
        b043       ; mov al,0x43
        b940000000 ; mov ecx,64
        f2ae       ; repne scasb, found
        b902000000 ; mov ecx,2
        f2ae       ; repne scasb, not found
        a4         ; movsb
        ac         ; lodsb
        b902000000 ; mov ecx,2
        f3a6       ; repe cmpsb
    """,
    "locked": """
        bbDATA     ; mov ebx,DATA
        b807000000 ; mov eax,7
        f00fc103   ; lock xadd [ebx],eax
        f0ff03     ; lock inc [ebx]
        f00fb10b   ; lock cmpxchg [ebx],ecx
    """,
    "stack_segment": """
        8cd0 ; mov eax,ss
        8ed0 ; mov ss,eax
        ffc3 ; inc ebx
        8ed0 ; mov ss,eax
        50   ; push ax
    """,
    "time": """
        0fa2 ; cpuid
        0f31 ; rdtsc
        89c6 ; mov esi,eax
        0f31 ; rdtsc
        29f0 ; sub eax,esi
    """,
    "ports": """
        e680       ; out 0x80,al
        b041       ; mov al,'A'
        e6e9       ; out 0xe9,al
        baf9030000 ; mov edx,0x3f9
        ec         ; in al,dx
    """,
    "x87": """
        dbe3   ; fninit
        d9e8   ; fld1
        d9eb   ; fldpi
        d8c1   ; fadd st1
        bbDATA ; mov ebx,DATA
        d933   ; fnstenv [ebx]
        dd33   ; fnsave [ebx]
    """,
    "divide": """
        b864000000 ; mov eax,100
        31d2       ; xor edx,edx
        bb07000000 ; mov ebx,7
        f7f3       ; div ebx
        31db       ; xor ebx,ebx
        f7f3       ; div ebx (#DE)
    """,
    "software_interrupts": """
        cd20 ; int 0x20
        90   ; nop
        cd80 ; int 0x80
        cc   ; int3
        65cc ; gs int3
        90   ; nop
    """,
    "undefined": """
        90   ; nop
        0f0b ; ud2
    """,
    "general_protection": """
        b8ffff0000 ; mov eax,0xffff
        8ed8       ; mov ds,eax
    """,
    "control_registers": """
        0f20c0 ; mov ax,cr0
        0f22c0 ; mov cr0,ax
        0f20d9 ; mov cx,cr3
        0f22d9 ; mov cr3,cx
    """,
    "tables": """
        bbDATA ; mov ebx,DATA
        0f0103 ; sgdt [ebx]
        0f0113 ; lgdt [ebx]
        0f010b ; sidt [ebx]
        0f011b ; lidt [ebx]
    """,
    "user_trap_flag": """
        6802010000 ; push 0x102 (TF)
        9d         ; popf
        90         ; nop (#DB after it)
        90         ; nop
    """,
}

_LONG = {
    "loop_zero_extends": """
        48c7c1ffffffff ; mov rcx,-1
        67e200         ; loop +0, counting ecx
    """,
    "call_register": """
        4c8d1d06000000 ; lea r11,[rip+6]
        41ffd3         ; call r11
        eb04           ; jmp +4
        90             ; nop
        ffc3           ; inc ebx
        c3             ; ret
    """,
    "call_memory": """
        488d0511000000   ; lea rax,[rip+17]
        48890425DATA     ; mov [DATA],rax
        ff1425DATA       ; call [DATA]
        eb03             ; jmp +3
        ffc5             ; inc ebp
        c3               ; ret
    """,
    "call_rip_relative": """
        488d050f000000 ; lea rax,[rip+15]
        488905f8000000 ; mov [rip+0xf8],rax
        ff15f2000000   ; call [rip+0xf2]
        eb03           ; jmp +3
        ffc5           ; inc ebp
        c3             ; ret
    """,
    "call_stack_pointer": """
        68c3000000 ; push 0xc3 (ret)
        ffd4       ; call rsp
        58         ; pop rax
    """,
    "jump_register": """
        488d0503000000 ; lea rax,[rip+3]
        ffe0           ; jmp rax
        90             ; nop
        ffc3           ; inc ebx
    """,
    "jump_memory": """
        488d050f000000 ; lea rax,[rip+15]
        48890425DATA   ; mov [DATA],rax
        ff2425DATA     ; jmp [DATA]
        ffc3           ; inc ebx
    """,
    "far_return": """
        6a10           ; push 0x10
        488d0503000000 ; lea rax,[rip+3]
        50             ; push rax
        48cb           ; retfq
        ffc3           ; inc ebx
    """,
    "far_return_that_pops": """
        6a33           ; push 0x33
        6a10           ; push 0x10
        488d0505000000 ; lea rax,[rip+5]
        50             ; push rax
        48ca0800       ; retfq 8
        ffc3           ; inc ebx
    """,
    "interrupt_return": """
        4889e3         ; mov rbx,rsp
        6a18           ; push 0x18
        53             ; push rbx
        9c             ; pushf
        6a10           ; push 0x10
        488d0503000000 ; lea rax,[rip+3]
        50             ; push rax
        48cf           ; iretq
        ffc3           ; inc ebx
    """,
    "rip_relative": """
        488b0540000000       ; mov rax,[rip+64]
        488d1d10000000       ; lea rbx,[rip+16]
        8105f000000011223344 ; add dword [rip+0xf0],0x44332211
        813df000000011223344 ; cmp dword [rip+0xf0],0x44332211
        0f1005e0000000       ; movups xmm0,[rip+0xe0]
        0f5705e0000000       ; xorps xmm0,[rip+0xe0]
    """,
    "wide_operands": """
        48b88877665544332211 ; mov rax,imm64
        48a3DATA00000000     ; mov [DATA],rax
        f0480fc70c25DATA     ; lock cmpxchg16b [DATA]
    """,
    "vectors": """
        bbDATA     ; mov ebx,DATA
        660f6f03   ; movdqa xmm0,[rbx]
        660f6f4b10 ; movdqa xmm1,[rbx+16]
        660febc1   ; por xmm0,xmm1
        660fd7c0   ; pmovmskb eax,xmm0
        c5f1ebc0   ; vpor xmm0,xmm1,xmm0 (opcode eb)
    """,
    "fxsave": """
        bbDATA ; mov ebx,DATA
        d9e8   ; fld1
        0fae03 ; fxsave [rbx]
    """,
    "model_registers": """
        b9000100c0 ; mov ecx,0xc0000100
        b834120000 ; mov eax,0x1234
        31d2       ; xor edx,edx
        0f30       ; wrmsr
        31c0       ; xor eax,eax
        0f32       ; rdmsr
        0f01f8     ; swapgs
        0f01f8     ; swapgs
    """,
    "demand_page": """
        0f20d8           ; mov rax,cr3
        80a008200000fe   ; and byte [rax+0x2008],~1
        0f013c25DATA     ; invlpg [DATA]
        48ff0425DATA     ; inc qword [DATA] (#PF, mapped by the handler, again)
    """,
    "demand_page_of_a_call": """
        0f20d8           ; mov rax,cr3
        bc00082000       ; mov esp,DATA+0x800
        80a008200000fe   ; and byte [rax+0x2008],~1
        0f013c25DATA     ; invlpg [DATA]
        bcf07f1f00       ; mov esp,0x1f7ff0
        e800000000       ; call +0
    """,
    "system_call": """
        b9800000c0     ; mov ecx,0xc0000080 (EFER)
        0f32           ; rdmsr
        83c801         ; or eax,1
        0f30           ; wrmsr
        ffc1           ; inc ecx
        b9810000c0     ; mov ecx,0xc0000081 (STAR)
        31c0           ; xor eax,eax
        ba10001000     ; mov edx,0x100010
        0f30           ; wrmsr
        ffc1           ; inc ecx (LSTAR)
        488d0508000000 ; lea rax,[rip+8]
        31d2           ; xor edx,edx
        0f30           ; wrmsr
        0f05           ; syscall
        90             ; nop
        90             ; nop
        51             ; push rcx (the target of syscall)
    """,
}

_PROTECTED = {
    "call_register": """
        e800000000 ; call +0
        58         ; pop eax
        83c00a     ; add eax,10
        ffd0       ; call eax
        eb04       ; jmp +4
        90         ; nop
        ffc3       ; inc ebx
        c3         ; ret
    """,
    "call_memory": """
        e800000000 ; call +0
        58         ; pop eax
        83c011     ; add eax,17
        a3DATA     ; mov [DATA],eax
        ff15DATA   ; call [DATA]
        eb03       ; jmp +3
        ffc3       ; inc ebx
        c3         ; ret
    """,
    "call_stack_pointer": """
        68c3000000 ; push 0xc3 (ret)
        ffd4       ; call esp
        58         ; pop eax
    """,
    "jump_memory": """
        e800000000 ; call +0
        58         ; pop eax
        83c00f     ; add eax,15
        a3DATA     ; mov [DATA],eax
        ff25DATA   ; jmp [DATA]
        ffc3       ; inc ebx
    """,
    "far_return": """
        0e         ; push cs
        e800000000 ; call +0
        83042405   ; add dword [esp],5
        cb         ; retf
        ffc3       ; inc ebx
    """,
    "interrupt_return": """
        9c         ; pushf
        0e         ; push cs
        e800000000 ; call +0
        83042405   ; add dword [esp],5
        cf         ; iret
        ffc3       ; inc ebx
    """,
    "segments": """
        60 ; pusha
        61 ; popa
        06 ; push es
        07 ; pop es
        1e ; push ds
        1f ; pop ds
        16 ; push ss
        17 ; pop ss
        90 ; nop
    """,
    "decimal": """
        b812000000 ; mov eax,0x12
        27         ; daa
        d40a       ; aam
        37         ; aaa
    """,
    "overflow": """
        ce         ; into, not taken
        b8ffffff7f ; mov eax,0x7fffffff
        83c001     ; add eax,1
        ce         ; into, taken
        90         ; nop
    """,
    "bounds": """
        bbDATA         ; mov ebx,DATA
        c70300000000   ; mov dword [ebx],0
        c7430410000000 ; mov dword [ebx+4],16
        b805000000     ; mov eax,5
        6203           ; bound eax,[ebx]
        b820000000     ; mov eax,32
        6203           ; bound eax,[ebx] (#BR)
    """,
    "far_pointers": """
        bbDATA       ; mov ebx,DATA
        66c743041800 ; mov word [ebx+4],0x18
        c403         ; les eax,[ebx]
        0fb203       ; lss eax,[ebx]
        8cd0         ; mov eax,ss
    """,
}


def _bodies(bits: int, own: dict[str, str]) -> list[Body]:
    data = DATA.to_bytes(4, "little").hex()
    return [
        Body(f"{name}_{bits}", bits, "\n".join(_with_data(line, data) for line in text.strip().splitlines()))
        for name, text in {**_COMMON, **own}.items()
    ]


def _with_data(line: str, data: str) -> str:
    code, mark, comment = line.partition(";")
    return code.replace("DATA", data) + mark + comment


BODIES = [*_bodies(64, _LONG), *_bodies(32, _PROTECTED)]
