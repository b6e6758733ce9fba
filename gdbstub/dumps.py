"""Memory as a person reads it: the rows of `monitor xp`.

Rules: pure, standard library only.
"""

from __future__ import annotations


def dump(address: int, data: bytes, style: str, size: int) -> list[str]:
    """Rows of `data` as QEMU's `x` prints them."""
    per_row = (8 if size == 1 else 16) // size
    items = [data[offset : offset + size] for offset in range(0, len(data), size)]
    return [
        f"{address + start * size:016x}: "
        + " ".join(_show(item, style, size) for item in items[start : start + per_row])
        for start in range(0, len(items), per_row)
    ]


def _show(item: bytes, style: str, size: int) -> str:
    value = int.from_bytes(item, "little", signed=style == "d")
    match style:
        case "x":
            return f"0x{value:0{size * 2}x}"
        case "o":
            return f"0{value:o}"
        case "c":
            return repr(chr(value))
        case _:
            return str(value)
