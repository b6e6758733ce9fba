"""A 64-bit image whose only kernel is its trap handlers: code of a test's runs, each trap is counted and goes on.

Rules: tests and the bench only; data, no machine. Everything is mapped by 4 KiB pages, as Linux maps what the processor
reads at a trap, and one page is not there. Registers that mean something: r13 counts traps, r14 is the pc of the last
one, rbx holds ABSENT.
"""

from __future__ import annotations

import struct

from emu.images.plan import CR0_PAGED, CR4_LONG, PAGE, Gdt, Image, Segment, Start
from tests.support.assemble import assemble

_TABLES, _GDT, _IDT, _TSS = 0x1000, 0x5000, 0x6000, 0x7000
KERNEL, _KERNEL_STACK = 0x8000, 0xA000
CODE, _USER_STACK = 0x10000, 0x12000
ABSENT = 0x100000
MEMORY = 2 << 20

_KERNEL_CS, _KERNEL_DS, _USER_DS, _USER_CS, _TSS_SELECTOR = 0x08, 0x10, 0x1B, 0x23, 0x28
_PRESENT_WRITABLE_USER = 7
_UD, _GP, _PF = 6, 13, 14

_SOURCE = """
    mov ax, {tss}; ltr ax
    lidt [{idt_pointer}]
    mov ecx, 0xc0000080; rdmsr; or eax, 1; wrmsr
    mov ecx, 0xc0000081; xor eax, eax; mov edx, {star}; wrmsr
    mov ecx, 0xc0000082; mov eax, {syscall}; xor edx, edx; wrmsr
    mov ecx, 0xc0000084; xor eax, eax; wrmsr
    mov rbx, {absent}
"""
_ENTER = {
    0: "jmp {code}",
    3: "push {user_ds}; push {user_stack}; push 2; push {user_cs}; push {code}; iretq",
}
_HANDLERS = {  # a trap goes on `skip` bytes after the instruction that raised it
    _UD: "inc r13; mov r14, [rsp]; add qword ptr [rsp], {skip}; iretq",
    _GP: "hlt",
    _PF: "add rsp, 8; inc r13; mov r14, [rsp]; add qword ptr [rsp], {skip}; iretq",
}
_SYSCALL_HANDLER = "inc r13; mov r14, rcx; .byte 0x48, 0x0f, 0x07"  # sysretq


def trapping_image(code: bytes, skip: int, ring: int = 3) -> Image:
    """`code` at CODE in ring 0 or 3; #UD and #PF are counted and skip the `skip` bytes of their instruction."""
    segments = (*_segments(skip, ring), Segment(CODE, code))
    return Image("trapping", "flat", segments, Start("long", KERNEL, _registers(), _gdt()))


def _registers() -> dict[str, int]:
    return {"rsp": _KERNEL_STACK, "cr0": CR0_PAGED, "cr3": _TABLES, "cr4": CR4_LONG}


def _gdt() -> Gdt:
    return Gdt(_GDT, 7 * 8 - 1, _KERNEL_CS, _KERNEL_DS)


def _segments(skip: int, ring: int) -> list[Segment]:
    syscall, first_handler, idt_pointer = KERNEL + 0x400, KERNEL + 0x500, _IDT + 0xFF0
    names = {
        "tss": _TSS_SELECTOR,
        "idt_pointer": idt_pointer,
        "star": _KERNEL_CS | (_USER_DS - 8) << 16,
        "syscall": syscall,
        "absent": ABSENT,
        "user_ds": _USER_DS,
        "user_stack": _USER_STACK,
        "user_cs": _USER_CS,
        "code": CODE,
        "skip": skip,
    }
    pages = [number << 12 | _PRESENT_WRITABLE_USER for number in range(512)]
    pages[ABSENT // PAGE] = 0
    tables = b"".join(
        struct.pack("<512Q", *entries)
        for entries in (
            *([_TABLES + PAGE * level | _PRESENT_WRITABLE_USER] + [0] * 511 for level in (1, 2, 3)),
            pages,
        )
    )
    tss_low = 0x67 | (_TSS & 0xFFFFFF) << 16 | 0x89 << 40
    code64, data = 0x00AF9B000000FFFF, 0x00CF93000000FFFF
    gdt = struct.pack("<7Q", 0, code64, data, data | 3 << 45, code64 | 3 << 45, tss_low, 0)
    idt = bytearray(PAGE)
    struct.pack_into("<HQ", idt, 0xFF0, 0xFEF, _IDT)
    handlers = []
    for index, (vector, source) in enumerate(_HANDLERS.items()):
        at = first_handler + 0x40 * index
        struct.pack_into("<HHBBHIQ", idt, vector * 16, at, _KERNEL_CS, 0, 0x8E, 0, 0, 0)
        handlers.append(Segment(at, assemble(source.format(**names), 64, at)))
    return [
        Segment(_TABLES, tables),
        Segment(_GDT, gdt),
        Segment(_IDT, bytes(idt)),
        Segment(_TSS, struct.pack("<IQ", 0, _KERNEL_STACK), 0x68),
        Segment(KERNEL, assemble((_SOURCE + _ENTER[ring]).format(**names), 64, KERNEL)),
        Segment(syscall, assemble(_SYSCALL_HANDLER, 64, syscall)),
        *handlers,
    ]
