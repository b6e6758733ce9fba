"""A Linux guest that rewrites its own text: none of our bytes may stand in it while it looks and writes.

Rules: the machine's thread; Linux function names live here and in `boot`, the mechanism in `text`. Static keys, ftrace,
static calls, the guest's own kprobes and BPF compare a site with what they expect before they have `text_poke` write
it, through another mapping of the page. So bytes are withdrawn from the entry of the function that compares until its
return, and armed again over what it has left there; PC hooks stand in for them meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from emu.iface import MachineError
from emu.machine import Machine
from emu.stops import Stop

# Linux 5.10 to 6.12. Those that compare come first; the last five write, for whoever may call them besides.
PATCHERS = (
    "jump_label_update",
    "__jump_label_update",
    "arch_jump_label_transform",
    "ftrace_modify_all_code",
    "arch_static_call_transform",
    "register_kprobe",
    "unregister_kprobes",
    "enable_kprobe",
    "disable_kprobe",
    "bpf_arch_text_poke",
    "text_poke_bp_batch",
    "text_poke",
    "text_poke_copy",
    "text_poke_set",
    "text_poke_early",
)
_STACK = 8192  # bytes; THREAD_SIZE of i386, half of amd64's: an inner call of the same task lies less than that deeper
_SP = 4


@dataclass(slots=True)
class _Call:
    """A patching function under way: the stack pointer at its entry, and how to stop waiting for its return."""

    sp: int
    cancel: Callable[[], None]


class PatchingGuard:
    """Keeps a machine's int3 bytes out of the guest's way while it patches itself. Calls may nest and sleep."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._calls: list[_Call] = []

    def entered(self) -> Stop | None:
        """A watch at the entry of a patching function, where the stack pointer is at the return address."""
        machine = self._machine
        if not machine.text.withdrawn:
            self._forget()  # calls of a moment that the machine has left
        sp = machine.cpu.gpr[_SP]
        if any(0 <= call.sp - sp < _STACK for call in self._calls):
            return None  # the caller is one itself, or this entry is met again
        word = machine.bits // 8
        try:
            returns_to = int.from_bytes(machine.memory.read(sp, word), "little")
            cancel = machine.watch(returns_to, lambda: self._returned(sp + word))
        except MachineError:
            return None  # no stack of the kernel's: nothing it could return from
        self._calls.append(_Call(sp, cancel))
        self._after_this_instruction(machine.text.withdraw)
        return None

    def _returned(self, sp: int) -> Stop | None:
        machine = self._machine
        if machine.cpu.gpr[_SP] != sp:
            return None  # another task's way through the same instruction
        over = [call for call in self._calls if call.sp == sp - machine.bits // 8]
        for call in over:
            call.cancel()
            self._calls.remove(call)
        if over and not self._calls:
            self._after_this_instruction(self._put_back)
        return None

    def _put_back(self) -> None:
        if not self._calls:
            self._machine.text.put_back()
            if self._machine.trap_client is not None:
                self._machine.trap_client.on_rewritten()

    def _after_this_instruction(self, act: Callable[[], None]) -> None:
        """Bytes and hooks change places between two instructions, where nobody is in the middle of asking about one."""
        pc = self._machine.cpu.linear_pc

        def moved_on() -> bool:
            if self._machine.cpu.linear_pc == pc:
                return True
            act()
            return False

        self._machine.follow(moved_on)

    def _forget(self) -> None:
        for call in self._calls:
            call.cancel()
        self._calls.clear()
