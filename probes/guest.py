"""Handlers that are guest code: C functions with the kernel's prototypes, called with the kernel's structures.

    int pre_handler(struct kprobe *p, struct pt_regs *regs);            true: registers are set, skip the instruction
    void post_handler(struct kprobe *p, struct pt_regs *regs, unsigned long flags);
    int handler(struct kretprobe_instance *ri, struct pt_regs *regs);   and an entry_handler: true declines the call

Rules: runs in the engine's thread. The structures lie in the data half of the window, in the layout of Linux 5.18 to
6.12 on x86 (struct kprobe up to `opcode`), and are written before each call; of pt_regs, and of an instance's data,
what the handler changed is taken over. A handler that fails is taken out of service with its probe, which says why.
"""

from __future__ import annotations

import struct
import weakref
from collections.abc import Callable
from typing import Final, Protocol

from emu.iface import Machine
from probes.abi import ABIS, WORD, Scalar, abi_for, encode
from probes.arch import Convention
from probes.calls import Calls
from probes.errors import ProbeError
from probes.kprobe import Kprobe, PostHandler, PreHandler
from probes.lookup import Functions
from probes.regs import Regs
from probes.room import Room

# arch/x86/include/asm/ptrace.h; what is not in `Convention.registers` is a segment or one of the last five
_LAST: Final = ("orig_ax", "ip", "cs", "flags", "sp", "ss")
_PT_REGS: Final = {
    8: (*("r15", "r14", "r13", "r12", "bp", "bx", "r11", "r10", "r9", "r8", "ax", "cx", "dx", "si", "di"), *_LAST),
    4: (*("bx", "cx", "dx", "si", "di", "bp", "ax", "ds", "es", "fs", "gs"), *_LAST),
}
_KPROBE_SIZE: Final = 256  # struct kprobe has 120 bytes on amd64; its guest may read on
_NAME_SIZE: Final = 128  # KSYM_NAME_LEN until 6.1
_INSTANCE_WORDS: Final = 6  # of struct kretprobe_instance before `data`: rcu, llist, rph, ret_addr, frame
_DATA_SIZE: Final = 4096
_RESULT: Final = Scalar(32, signed=True)


class Instance(Protocol):
    """What a return probe's handlers get; see kretprobe.ReturnInstance."""

    data: bytearray
    ret_addr: int


class GuestHandlers:
    """Makes Python handlers of guest functions.

    `functions` finds them by name. `failed` is told which probe's handler failed and why.
    """

    def __init__(
        self,
        machine: Machine,
        convention: Convention,
        calls: Calls,
        room: Room,
        functions: Functions,
        failed: Callable[[Kprobe, str], None],
    ) -> None:
        self._machine = machine
        self._window = machine.window
        self._convention = convention
        self._calls = calls
        self._room = room
        self._functions = functions
        self._failed = failed
        self._abi = abi_for(convention.word)
        self._names = _PT_REGS[convention.word]
        self._format = f"<{len(self._names)}{'Q' if convention.word == 8 else 'I'}"
        self._frame: int | None = None  # offset of pt_regs, then of a struct kretprobe_instance
        self._structs: weakref.WeakKeyDictionary[Kprobe, int] = weakref.WeakKeyDictionary()
        self._free: list[int] = []

    def pre(self, function: str) -> PreHandler:
        """`function` as a pre_handler; ProbeError ENOENT where there is none of that name, here and below."""
        self._functions.check(function)

        def handler(kp: Kprobe, regs: Regs) -> bool:
            return bool(self._run(kp, function, regs, self._kprobe(kp)))

        return handler

    def post(self, function: str) -> PostHandler:
        """`function` as a post_handler."""
        self._functions.check(function)

        def handler(kp: Kprobe, regs: Regs) -> None:
            self._run(kp, function, regs, self._kprobe(kp), 0)

        return handler

    def returned(self, kp: Kprobe, function: str) -> Callable[[Instance, Regs], bool]:
        """`function` as a handler or an entry_handler of the return probe on `kp`."""
        self._functions.check(function)

        def handler(instance: Instance, regs: Regs) -> bool:
            word, data = self._convention.word, bytes(instance.data)
            at = self._frame_at() + struct.calcsize(self._format)
            head = bytes(4 * word) + instance.ret_addr.to_bytes(word, "little") + regs.sp.to_bytes(word, "little")
            self._window.write(at, head + data)
            result = self._run(kp, function, regs, self._window.address(at))
            instance.data[:] = self._window.read(at + _INSTANCE_WORDS * word, len(data))
            return bool(result)

        return handler

    # ------------------------------------------------------------------------------------------------------ one call

    def _run(self, kp: Kprobe, function: str, regs: Regs, first: int, *more: int) -> int:
        """Call function(first, pt_regs, more ...) and take over what it made of pt_regs. 0 where it failed."""
        at = self._frame_at()
        before = self._pt_regs(regs)
        self._window.write(at, struct.pack(self._format, *before))
        values = (first, self._window.address(at), *more)
        try:
            gpr, stack = encode(self._abi, (WORD,) * len(values), values)
            result = self._calls.run(self._functions.address(function), gpr, stack)
        except ProbeError as error:
            self._failed(kp, f"{function} failed: {error.reason}")
            return 0
        after = struct.unpack(self._format, self._window.read(at, struct.calcsize(self._format)))
        for name, old, new in zip(self._names, before, after, strict=True):
            if old != new:
                self._take_over(regs, name, new)
        return _RESULT.read(result[ABIS[self._abi.name].result[0]], self._convention.word)

    def _pt_regs(self, regs: Regs) -> list[int]:
        mask = self._convention.mask
        known = {name: regs.cpu.gpr[number] & mask for name, number in self._convention.registers.items()}
        known |= {name: regs.segment(name) for name in self._convention.segments}
        known |= {"ip": regs.ip & mask, "flags": regs.flags, "orig_ax": regs.orig_ax}
        return [known[name] for name in self._names]

    def _take_over(self, regs: Regs, name: str, value: int) -> None:
        """Segments and orig_ax aren't: no handler of Linux could set them either."""
        number = self._convention.registers.get(name)
        if number is not None:
            regs.cpu.gpr[number] = value
        elif name == "ip":
            regs.ip = value
        elif name == "flags":
            regs.flags = value

    # --------------------------------------------------------------------------------------------------- structures

    def _frame_at(self) -> int:
        if self._frame is None:
            size = struct.calcsize(self._format) + _INSTANCE_WORDS * self._convention.word + _DATA_SIZE
            _, self._frame = self._room.take(0, size)
        return self._frame

    def _kprobe(self, kp: Kprobe) -> int:
        """Address of the probe's struct kprobe, filled in; the same for every hit of a probe."""
        at = self._structs.get(kp)
        if at is None:
            at = self._free.pop() if self._free else self._room.take(0, _KPROBE_SIZE + _NAME_SIZE)[1]
            self._structs[kp] = at
            weakref.finalize(kp, self._free.append, at)
        word = self._convention.word
        name = (kp.symbol or "").encode("utf-8")[: _NAME_SIZE - 1]
        words = (0, 0, 0, 0, kp.nmissed, kp.address or 0, self._window.address(at + _KPROBE_SIZE) if name else 0)
        image = b"".join((value & self._convention.mask).to_bytes(word, "little") for value in words)
        image += (kp.offset & 0xFFFFFFFF).to_bytes(word, "little")  # unsigned int, and what aligns the next pointer
        self._window.write(at, image.ljust(_KPROBE_SIZE, b"\0") + name.ljust(_NAME_SIZE, b"\0"))
        return self._window.address(at)
