"""Jprobes: a function of ours with the prototype of the probed one, called at its entry with its arguments.

Rules: runs in the engine's thread; a client of `core`, as in kernel/kprobes.c until 4.14, and knows no other client.
The entry sees the arguments before any of the function has run and after every kprobe of the place. What it does to
registers and to the first 64 bytes of the stack is undone, what it does elsewhere stays; x87 and SSE registers that a
Python entry writes stay too. A probe met while it runs is a reentrant hit.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

from emu.iface import Machine, MemoryFault
from probes.abi import Abi, AbiName, Prototype, Slot, abi_for, prototype
from probes.core import Kprobes
from probes.errors import ProbeError
from probes.kprobe import Kprobe, PreHandler
from probes.lookup import Functions, ImageFunctions, is_entry
from probes.regs import Regs

SAVED_STACK: Final = 64  # MIN_STACK_SIZE, arch/x86/include/asm/kprobes.h until 4.14
_COPIED_STACK: Final = 256  # what a guest entry may see of its caller's arguments
_PAGE: Final = 4096
Handler: TypeAlias = Callable[[Kprobe, Regs], None]
Filter: TypeAlias = Callable[[Kprobe, Regs], bool]


class Jprobe:
    """A probe on the entry of the function that `kp` names.

    `entry` is a Python function, whose annotations (`probes.abi`) say how wide its arguments are, whose `*args` are C's
    variable ones, whose `-> struct` tells of a structure returned, and whose keyword-only `regs` is given the
    registers; or the address or symbol of guest code, which ends by `jprobe_return()` or by returning. `abi` is how the
    probed function takes its arguments: "sysv", "regparm3" or "cdecl"; None is the kernel's own.

    A pre_handler that `kp` has runs right before the entry, and may keep it from running as any other.
    `filter(kp, regs)`: false means the entry is not called for this hit.
    """

    def __init__(
        self,
        *,
        kp: Kprobe,
        entry: Callable[..., object] | str | int,
        abi: AbiName | None = None,
        filter: Filter | None = None,
    ) -> None:
        if not (callable(entry) or isinstance(entry, str | int)):
            raise TypeError(f"a jprobe's entry is a function, a symbol or an address, not {entry!r}")
        self.kp = kp
        self.entry = entry
        self.abi = abi
        self.filter = filter
        self.before: PreHandler | None = None  # kp's own pre_handler, while registered

    @property
    def registered(self) -> bool:
        return self.kp.registered

    @property
    def notes(self) -> tuple[str, ...]:
        return self.kp.notes

    def __repr__(self) -> str:
        return f"<Jprobe {self.kp!r}>"


class Jprobes:
    """All jprobes of a machine. `functions` finds guest entries by name; in the image where it is None."""

    def __init__(self, machine: Machine, word: int, kprobes: Kprobes, functions: Functions | None = None) -> None:
        self._machine = machine
        self._word = word
        self._kprobes = kprobes
        self._functions = functions or ImageFunctions(machine)

    def register(self, jp: Jprobe) -> None:
        """As register_jprobe(): ProbeError EINVAL off a function's entry, EEXIST for a second one at an address."""
        kp, handler = jp.kp, _filtered(self._handler(jp), jp.filter)
        if kp.registered:
            raise ProbeError(errno.EINVAL, "this probe is registered already")
        if kp.post_handler is not None:
            raise ProbeError(errno.EINVAL, "a jprobe has no post_handler")
        jp.before = kp.pre_handler
        kp.pre_handler, kp.last = handler if jp.before is None else _both(jp.before, handler), True
        try:
            self._kprobes.register(kp)
            if kp.address is not None and not is_entry(self._machine, kp.address):
                self._kprobes.unregister(kp)
                raise ProbeError(errno.EINVAL, "a jprobe must be at the entry of a function")
        except ProbeError:
            kp.pre_handler, kp.last = jp.before, False
            raise

    def unregister(self, jp: Jprobe) -> None:
        """Allowed inside the entry, too."""
        self._kprobes.unregister(jp.kp)
        jp.kp.pre_handler, jp.kp.last = jp.before, False

    # ------------------------------------------------------------------------------------------------------ handlers

    def _handler(self, jp: Jprobe) -> Handler:
        if callable(jp.entry):
            return _PythonEntry(jp.entry, abi_for(self._word, jp.abi)).run
        entry, machine = jp.entry, self._machine
        if isinstance(entry, str):
            self._functions.check(entry)
        elif machine.memory.translate(entry) is None and not machine.window.contains(entry):
            raise ProbeError(errno.EFAULT, f"the entry {entry:#x} is not mapped")
        return lambda kp, regs: self._run_guest(entry, kp, regs)

    def _run_guest(self, entry: str | int, kp: Kprobe, regs: Regs) -> None:
        """The entry runs on a copy of the stack, so that there is nothing to undo.

        One that fails is taken out of service: nobody could be told otherwise.
        """
        arguments = _mapped(regs, regs.sp + self._word, _COPIED_STACK)
        try:
            address = self._functions.address(entry) if isinstance(entry, str) else entry
            self._kprobes.calls.run(address, {}, arguments)
        except ProbeError as error:
            self._kprobes.disable(kp)
            kp.notes += (f"disabled, because its entry failed: {error.reason}",)


class _PythonEntry:
    """A Python function with what its signature says."""

    def __init__(self, function: Callable[..., Any], abi: Abi) -> None:
        self._function = function
        self._abi = abi
        self._prototype: Prototype = prototype(function)
        self._slots = self._prototype.slots(abi)

    def run(self, kp: Kprobe, regs: Regs) -> None:
        cpu = regs.cpu
        kept = [cpu.gpr[number] for number in range(16)], cpu.eflags, cpu.pc, regs.ip
        sp = regs.sp
        stack = _mapped(regs, sp, SAVED_STACK)
        extra: dict[str, Any] = {"regs": regs} if self._prototype.wants_regs else {}
        try:
            self._function(*self._values(regs), **extra)
        finally:
            for number, value in enumerate(kept[0]):
                cpu.gpr[number] = value
            cpu.eflags, cpu.pc, regs.ip = kept[1:]
            if _mapped(regs, sp, SAVED_STACK) != stack:
                regs.write(sp, stack)

    def _values(self, regs: Regs) -> list[int]:
        """The arguments; of the variable ones those that lie on mapped stack."""
        declared = self._prototype.types
        fixed, more = self._slots[: len(declared)], self._slots[len(declared) :]
        pairs = zip(declared, fixed, strict=True)
        values = [scalar.read(self._raw(regs, slot), self._abi.word) for scalar, slot in pairs]
        for slot in more:
            try:
                values.append(self._raw(regs, slot))
            except MemoryFault:
                break
        return values

    def _raw(self, regs: Regs, slot: Slot) -> int:
        bits = 8 * self._abi.word
        words: Sequence[int] = [regs.cpu.gpr[number] & regs.convention.mask for number in slot.registers]
        if not words:
            words = [regs.stack(1 + slot.stack + index) for index in range(slot.words)]
        return sum(word << bits * index for index, word in enumerate(words))


def _filtered(handler: Handler, wanted: Filter | None) -> Handler:
    if wanted is None:
        return handler

    def run(kp: Kprobe, regs: Regs) -> None:
        if wanted(kp, regs):
            handler(kp, regs)

    return run


def _both(before: PreHandler, handler: Handler) -> PreHandler:
    def run(kp: Kprobe, regs: Regs) -> object:
        taken = before(kp, regs)
        if not taken:
            handler(kp, regs)
        return taken

    return run


def _mapped(regs: Regs, address: int, size: int) -> bytes:
    """Up to `size` bytes from `address`: to the end of its page where the next is missing, none where it is itself."""
    try:
        return regs.read(address, size)
    except MemoryFault:
        rest = _PAGE - address % _PAGE
    try:
        return regs.read(address, min(rest, size))
    except MemoryFault:
        return b""
