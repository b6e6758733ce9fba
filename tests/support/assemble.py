"""Code bytes for tests, from the assembly they stand for.

Rules: tests only. Keystone's known mistakes are listed in `emu.images.embedded.assembler`: where an exact encoding
matters, write `.byte` or compare with the manual.
"""

from __future__ import annotations

import functools

from emu.images.embedded.assembler import encode


@functools.cache
def assemble(source: str, bits: int, address: int = 0x1000) -> bytes:
    """The machine code of `source` (Intel syntax, statements split by newline or `;`) at `address`, for 32 or 64 bits.

    AssemblyError where keystone refuses the text.
    """
    return encode(source, bits, address)
