"""Registers of tasks: what they entered the kernel with, what they left the processor with, and the running one's.

Rules: the machine's thread; asks inside a question of the caller's (`Linux.asking`). Sources: struct pt_regs
(arch/x86/include/asm/ptrace.h) at the top of a task's kernel stack, struct inactive_task_frame (asm/switch_to.h) where
thread.sp points; 5.10 to 6.12.
"""

from __future__ import annotations

from typing import Final

from drgn import Object, sizeof

from emu.iface import Registers
from probes.linux.system import Linux

_STACK_SIZE: Final = {8: 16 << 10, 4: 8 << 10}  # THREAD_SIZE, asm/page_64_types.h and page_32_types.h, without KASAN
# TOP_OF_KERNEL_STACK_PADDING, asm/thread_info.h: amd64 with FRED has two words, i386 8 bytes, with VM86 16
_PADDING: Final = {8: (0, 16), 4: (16, 8)}
_USER: Final = 3
# gdb's names of what a task keeps when it is switched away from, by the names in inactive_task_frame
_KEPT: Final = {
    8: {"bp": "rbp", "bx": "rbx", **{name: name for name in ("r12", "r13", "r14", "r15")}, "ret_addr": "rip"},
    4: {"bp": "ebp", "bx": "ebx", "si": "esi", "di": "edi", "flags": "eflags", "ret_addr": "eip"},
}
# pt_regs without orig_ax, which is no register
_ALL: Final = {
    8: "r15 r14 r13 r12 bp bx r11 r10 r9 r8 ax cx dx si di ip cs flags sp ss",
    4: "bx cx dx si di bp ax ds es fs gs ip cs flags sp ss",
}
_STACK_POINTER: Final = {8: "rsp", 4: "esp"}


def user_registers(linux: Linux, task: Object) -> Object | None:
    """`struct pt_regs *` of a task's last entry from user mode; None for one that has never been there."""
    word = linux.kernel.btf.pointer_size
    top = task.stack.value_() + _STACK_SIZE[word] - sizeof(linux.program.type("struct pt_regs"))
    for padding in _PADDING[word]:
        regs = linux.object("struct pt_regs *", top - padding)
        if regs.cs.value_() & regs.ss.value_() & _USER == _USER:
            return regs
    return None


def switched_registers(linux: Linux, task: Object) -> dict[str, int]:
    """What a task that does not run goes on with, by gdb's names: in __schedule(), or where a new task begins.

    The others are not kept: a function called may change them.
    """
    word = linux.kernel.btf.pointer_size
    at = task.thread.sp.value_()
    frame = linux.object("struct inactive_task_frame *", at)
    found = {name: int(frame.member_(member).value_()) for member, name in _KEPT[word].items()}
    return found | {_STACK_POINTER[word]: at + sizeof(frame.type_.type)}


def running_registers(linux: Linux, registers: Registers) -> Object:
    """`struct pt_regs` of the processor as it is now: what drgn's `stack_trace` takes for the running task."""
    layout, word = linux.program.type("struct pt_regs"), linux.kernel.btf.pointer_size
    data = bytearray(sizeof(layout))
    for name in _ALL[word].split():
        member = layout.member(name)  # 6.12 has some in unions
        at, size = member.bit_offset // 8, sizeof(member.type)
        data[at : at + size] = registers.read(_gdb_name(name, word)).to_bytes(word, "little")[:size]
    return Object.from_bytes_(linux.program, layout, bytes(data))


def _gdb_name(member: str, word: int) -> str:
    """Of a member of pt_regs."""
    if member == "flags":
        return "eflags"
    return member if member[1:] == "s" or member[1:].isdigit() else f"{'r' if word == 8 else 'e'}{member}"
