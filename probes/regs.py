"""The registers and memory a handler sees: pt_regs by the kernel's names, over the machine's state.

Rules: valid only during the handler it was given to, in the engine's thread; imports nothing of `probes.core`.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import overload

from emu.iface import Cpu, Machine
from probes.arch import Convention
from probes.calls import BUDGET, Calls
from probes.errors import CallError

PATH_MAX = 4096  # include/uapi/linux/limits.h; the longest string a probe reads, with its NUL
_PAGE = 4096


class _Gpr:
    """A general register as an attribute; writes are cut to the word size."""

    def __init__(self, number: int) -> None:
        self._number = number

    @overload
    def __get__(self, regs: None, owner: type) -> _Gpr: ...

    @overload
    def __get__(self, regs: Regs, owner: type) -> int: ...

    def __get__(self, regs: Regs | None, owner: type) -> int | _Gpr:
        if regs is None:
            return self
        return regs.cpu.gpr[self._number] & regs.convention.mask

    def __set__(self, regs: Regs, value: int) -> None:
        regs.cpu.gpr[self._number] = value & regs.convention.mask


class Regs:
    """What `handler(p, regs)` gets.

    `ip` is as Linux shows it: in a pre-handler the probed address + 1 (an int3 has been executed, whatever armed the
    probe really), in a post-handler the next instruction, in a fault handler the probed address. A pre-handler that
    returns true continues at the `ip` it has set; otherwise writing it has no effect. `stop` set by a pre-handler lets
    the run end there, as at a breakpoint, before the instruction.
    """

    __slots__ = ("_calls", "_machine", "convention", "cpu", "ip", "stop")

    ax, cx, dx, bx = _Gpr(0), _Gpr(1), _Gpr(2), _Gpr(3)
    sp, bp, si, di = _Gpr(4), _Gpr(5), _Gpr(6), _Gpr(7)
    r8, r9, r10, r11 = _Gpr(8), _Gpr(9), _Gpr(10), _Gpr(11)
    r12, r13, r14, r15 = _Gpr(12), _Gpr(13), _Gpr(14), _Gpr(15)

    def __init__(self, machine: Machine, convention: Convention, cpu: Cpu, ip: int, calls: Calls | None = None) -> None:
        self._machine = machine
        self._calls = calls
        self.convention = convention
        self.cpu = cpu
        self.ip = ip
        self.stop = False

    @property
    def flags(self) -> int:
        return self.cpu.eflags

    @flags.setter
    def flags(self, value: int) -> None:
        self.cpu.eflags = value

    @property
    def orig_ax(self) -> int:
        """-1: no system call number belongs to a breakpoint's frame."""
        return self.convention.mask

    def segment(self, name: str) -> int:
        """The selector in "cs", "ss", "ds", "es", "fs" or "gs"."""
        return self._machine.registers.read(name)

    def arg(self, number: int) -> int:
        """Argument `number`, from 1, at a function's entry: registers first, then above the return address."""
        if number < 1:
            raise ValueError("arguments are numbered from 1")
        in_registers = self.convention.argument_registers
        if number <= len(in_registers):
            return self.cpu.gpr[in_registers[number - 1]] & self.convention.mask
        return self.stack(number - len(in_registers))

    def stack(self, number: int) -> int:
        """Word `number`, from 0, up from the stack pointer."""
        word = self.convention.word
        return int.from_bytes(self.read(self.sp + number * word, word), "little")

    @property
    def retval(self) -> int:
        return self.cpu.gpr[self.convention.return_register] & self.convention.mask

    @retval.setter
    def retval(self, value: int) -> None:
        self.cpu.gpr[self.convention.return_register] = value & self.convention.mask

    def read(self, address: int, size: int) -> bytes:
        """Guest memory; MemoryFault where there is none."""
        return self._machine.memory.read(address & self.convention.mask, size)

    def write(self, address: int, data: bytes) -> None:
        self._machine.memory.write(address & self.convention.mask, data)

    def string(self, address: int, limit: int = PATH_MAX) -> str:
        """The C string at `address`, at most `limit` bytes; MemoryFault where a byte of it is missing."""
        raw = read_string(self._machine, address & self.convention.mask, limit)
        return raw.decode("utf-8", "backslashreplace")

    def call(
        self,
        target: str | int,
        *arguments: int,
        types: Sequence[object] | None = None,
        returns: object = int,
        abi: str | None = None,
        budget: int = BUDGET,
    ) -> int:
        """Call a guest function, by symbol or address, and return its result.

        `types` and `returns` are those of `probes.abi` where a machine word will not do (`u64` on i386 takes two);
        `abi` is "sysv", "regparm3" or "cdecl". Interrupts are off, the guest's clock stands still, every register is
        put back. CallError where the callee would sleep, runs longer than `budget` instructions or stops the machine,
        and for a hit in user mode: then registers are put back too, but what the callee has written so far stays,
        a lock it holds or a timer it has queued included.
        A probe on the callee's way is executed without its handlers and counted in its `nmissed`.
        """
        if self._calls is None:
            raise CallError(errno.EOPNOTSUPP, "no call can be made from here")
        return self._calls.call(target, *arguments, types=types, returns=returns, abi=abi, budget=budget)


def read_string(machine: Machine, address: int, limit: int = PATH_MAX) -> bytes:
    """Bytes up to a NUL or `limit`, page by page, so that a string at the end of mapped memory is read whole."""
    found = bytearray()
    memory = machine.memory
    while len(found) < limit:
        at = address + len(found)
        # Most strings are short: a first small read, then to the end of the page.
        size = min(limit - len(found), _PAGE - at % _PAGE, 64 if not found else _PAGE)
        piece = memory.read(at, size)
        end = piece.find(0)
        if end >= 0:
            return bytes(found + piece[:end])
        found += piece
    return bytes(found)
