"""Registers of tasks that do not run: what they entered the kernel with, and what they left the processor with.

Rules: the machine's thread; asks inside a question of the caller's (`Linux.asking`). Sources: struct pt_regs
(arch/x86/include/asm/ptrace.h) at the top of a task's kernel stack, struct inactive_task_frame (asm/switch_to.h) where
thread.sp points; 5.10 to 6.12.
"""

from __future__ import annotations

from typing import Final

from drgn import Object, sizeof

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
