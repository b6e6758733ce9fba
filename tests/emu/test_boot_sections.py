"""The sections told to a debugger for a guest that is no ELF file: gdb takes names in them for functions or data."""

from __future__ import annotations

import pytest

from emu import boot_embedded


@pytest.mark.parametrize("bits", [32, 64])
def test_every_function_lies_in_code_alone(bits: int):
    """Data that an assembler put amid the code must not stretch a data section over it: gdb then sets no breakpoint."""
    machine = boot_embedded(bits, "loop")
    functions = [symbol.address for symbol in machine.symbols if symbol.kind in "Tt"]
    for section in machine.guest.sections:
        inside = [address for address in functions if section.address <= address < section.address + section.size]
        assert inside == (functions if section.executable else []), section
