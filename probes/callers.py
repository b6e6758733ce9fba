"""What stands before a return address: whether a word on the stack is one, and which function the call names.

Rules: reads guest code and symbols only. Source: Intel SDM vol. 2, CALL; of Linux's entry code arch/x86/entry.
"""

from __future__ import annotations

from typing import Final

from emu.iface import Machine, MemoryFault

_DIRECT: Final = 0xE8  # call rel32, and rel16 behind an operand size prefix
_DIRECT_SIZES: Final = (5, 3)
_GROUP_5: Final = 0xFF  # call r/m is /2, a far one /3
_INDIRECT_SIZES: Final = range(2, 8)  # with a SIB byte and a displacement of 32 bits
_FAR_DIRECT, _FAR_SIZE = 0x9A, 7
_USER: Final = 3
_KNOWN: Final = 4096  # return addresses remembered; a kernel's hot function has some hundreds of callers


class Callers:
    """The calls of a machine's guest. Addresses below `kernel_start` are of programs, where ring 0 has none."""

    def __init__(self, machine: Machine, kernel_start: int = 0) -> None:
        self._machine = machine
        self._kernel_start = kernel_start
        self._known: set[int] = set()

    def in_entry_code(self, address: int) -> bool:
        """Linux's way into the kernel and out of it: whatever comes there by an interrupt, a jump or an `iret`.

        The word on top of the stack may then be where an `iret` is to go, and look like a return address.
        """
        lookup = self._machine.symbols.lookup
        start, end = lookup("__entry_text_start"), lookup("__entry_text_end")
        return bool(start and end) and start[0].address <= address < end[0].address

    def is_return_address(self, address: int, cpl: int = 0) -> bool:
        """It stands behind a call, or is where a function begins: kernels push those by hand, as for a new task.

        `cpl` is the privilege level that would return. Other words lie on top of the stack where code is entered
        without a call, as interrupts and labels are.
        """
        if address < self._kernel_start and cpl != _USER:
            return False  # on a program's stack, where SYSCALL leaves it, or in the frame of an interrupt
        if address in self._known:
            return True
        try:
            code = self._machine.memory.read(address - _FAR_SIZE, _FAR_SIZE)
        except MemoryFault:
            code = b""  # the page's beginning, and no page before it
        found = _ends_with_call(code) or self._begins_function(address)
        if found:
            if len(self._known) >= _KNOWN:
                self._known.clear()
            self._known.add(address)
        return found

    def _begins_function(self, address: int) -> bool:
        symbol = self._machine.symbols.find(address)
        return symbol is not None and symbol[1] == 0

    def target(self, address: int) -> int | None:
        """Of the direct call that returns to `address`; None where it is another kind or nothing is mapped."""
        size = _DIRECT_SIZES[0]
        try:
            code = self._machine.memory.read(address - size, size)
        except MemoryFault:
            return None
        return address + int.from_bytes(code[1:], "little", signed=True) if code[0] == _DIRECT else None


def _ends_with_call(code: bytes) -> bool:
    if not code:
        return False
    direct = code[0] == _FAR_DIRECT or any(code[-size] == _DIRECT for size in _DIRECT_SIZES)
    return direct or any(code[-size] == _GROUP_5 and code[1 - size] >> 3 & 7 in (2, 3) for size in _INDIRECT_SIZES)
