"""Numbers that the embedded guest's assembly shares with whoever looks into its memory: structures and constants.

Rules: data and arithmetic, standard library only. The assembly writes `TASK.pid` and `SIZEOF.TASK` for what is declared
here, so a structure is laid out once. Every field is one machine word: 8 bytes on 64 bits, 4 on 32.
"""

from __future__ import annotations

KERNEL_OFFSET = {64: 0xFFFF_FFFF_8000_0000, 32: 0xC000_0000}
"""Virtual minus physical address of everything the kernel maps; as Linux's __START_KERNEL_map and PAGE_OFFSET."""
KERNEL_PADDR = {64: 0x100_0000, 32: 0x10_0000}
"""Where the image is put; its first byte is the entry."""
USER_PROGRAM = 0x40_0000
"""Where the ring-3 program is linked and mapped: page n of /bin/program is at USER_PROGRAM + n * 4096."""
COMMAND_LINE_SIZE = 256
HZ = 1000
"""Clock ticks a second. 1000, not 100: a tick is then a million instructions, which a test can afford to wait for."""
PIT_HZ = 1_193_182
"""Input clock of the 8254."""

STRUCTURES: dict[str, tuple[str, ...]] = {
    # sched.S. state: TASK_*; wait: what it sleeps on; ptes: 0 for a kernel task; next: a ring without the idle task
    "TASK": (*("pid", "comm", "state", "sp", "stack_top", "cr3", "ptes", "wait", "wake_tick", "exit_code", "next"),),
    # mm.S, filemap.S
    "VMA": ("start", "size", "file", "pgoff"),
    "FILE": ("f_inode", "f_mapping"),
    "INODE": ("ino", "name", "data", "i_mapping", "i_writecount"),
    "MAPPING": ("host", "a_ops", "nrpages", "size", "pages"),
    "AOPS": ("readpage", "readpages", "freepage"),
    "PAGE": ("flags", "index", "mapping", "frame"),
    # entry.S, main.S
    "GATE": ("vector", "handler", "type"),
    "WORKLOAD": ("name", "fn", "length"),
}
"""Fields of each structure in order. MAPPING.pages is the first of CACHE_SLOTS words, see `slot`; size is in pages."""

CACHE_SLOTS = 16
"""Pages of a file that can be in memory at a time."""

_FRAME = ("vector", "error", "ip", "cs", "flags", "sp", "ss")
WORD_SIZE_STRUCTURES: dict[int, dict[str, tuple[str, ...]]] = {
    64: {
        "REGS": (
            "r15",
            "r14",
            "r13",
            "r12",
            "bp",
            "bx",
            "r11",
            "r10",
            "r9",
            "r8",
            "ax",
            "cx",
            "dx",
            "si",
            "di",
            *_FRAME,
        ),
        "SWITCH_FRAME": ("flags", "r15", "r14", "r13", "r12", "bx", "bp", "ip"),
    },
    32: {
        "REGS": ("bx", "cx", "dx", "si", "di", "bp", "ax", *_FRAME),
        "SWITCH_FRAME": ("flags", "di", "si", "bx", "bp", "ip"),
    },
}
"""What entry_64.S and entry_32.S push: struct pt_regs, and what switch_to leaves on the stack of a task."""

PROGRAM_PAGES = 3
DATA_PAGES = 5
BIG_PAGES = 0x100002
"""Of /big, which repeats itself every 16 pages and is larger than 4 GiB: byte offsets do not fit into 32 bits."""
BIG_HIGH = 0x100001
"""The page of /big at USER_BIG_HIGH; page 1, of the same bytes, is at USER_BIG."""
_CONSTANTS = {
    "COMMAND_LINE_SIZE": COMMAND_LINE_SIZE,
    "PIT_DIVISOR": round(PIT_HZ / HZ),
    "TASK_RUNNABLE": 0,
    "TASK_WAITING": 1,  # on TASK.wait
    "TASK_SLEEPING": 2,  # until TASK.wake_tick
    "TASK_DEAD": 3,
    "PG_ALLOCATED": 1,
    "PG_LOCKED": 2,  # a read is under way
    "PG_UPTODATE": 4,
    "NR_PAGES": 32,
    "PROGRAM_PAGES": PROGRAM_PAGES,
    "DATA_PAGES": DATA_PAGES,
    "BIG_PAGES": BIG_PAGES,
    "BIG_HIGH": BIG_HIGH,
    "CACHE_SLOTS": CACHE_SLOTS,
    "USER_START": USER_PROGRAM,
    "USER_PROGRAM": USER_PROGRAM,
    "USER_DATA": 0x50_0000,
    "USER_ALIAS": 0x60_0000,
    "USER_BIG": 0x68_0000,
    "USER_BIG_HIGH": 0x6C_0000,
    "USER_STACK_END": 0x80_0000,
    "BAD_ADDRESS": 0x10,
    "TIMER_VECTOR": 0x20,
    "SERIAL_VECTOR": 0x24,
    "SYSCALL_VECTOR": 0x80,
    "KERNEL_CS": 0x08,
    "KERNEL_DS": 0x10,
    "USER_DS": 0x23,
    "DOUBLE_FAULT_SELECTOR": 0x28,
    "TSS_SELECTOR": 0x30,
    "SYS_EXIT": 0,
    "SYS_GETPID": 1,
    "SYS_WRITE": 2,
    "SYS_OPEN": 3,
    "SYS_NEXT_WORK": 4,
    "SYS_WORK_DONE": 5,
    "SYS_DROP_PAGES": 6,
    "NR_SYSCALLS": 7,
    "WORK_OPENS": 1,
    "WORK_FAULTS": 2,
    "WORK_CALLS": 3,
    "WORK_GETPIDS": 4,
    "WORK_CRASH": 5,
    "WORK_BIG": 6,
    "O_WRONLY": 1,
}


def offset(bits: int, structure: str, member: str) -> int:
    """Bytes from the start of `structure` to `member` ("TASK", "pid"); KeyError or ValueError if there is no such."""
    fields = STRUCTURES.get(structure) or WORD_SIZE_STRUCTURES[bits][structure]
    return fields.index(member) * (bits // 8)


def slot(index: int) -> int:
    """Which of MAPPING.pages holds the page `index` of a file."""
    return (index ^ index >> 20) % CACHE_SLOTS


def names(bits: int, pae: bool) -> dict[str, str]:
    """Every word of the dialect that stands for a number: constants, `STRUCTURE.field`, `SIZEOF.STRUCTURE`."""
    word = bits // 8
    table = {
        "BITS": bits,
        "PAE": int(pae),
        "W": word,
        "PTE_SIZE": 8 if pae else word,
        "KERNEL_OFFSET": KERNEL_OFFSET[bits],
        "USER_CS": 0x2B if bits == 64 else 0x1B,
        "STRADDLE": 10 if bits == 64 else 8,  # puts the page boundary 3 bytes into straddling_instruction
        **_CONSTANTS,
    }
    for structure, fields in (STRUCTURES | WORD_SIZE_STRUCTURES[bits]).items():
        table[f"SIZEOF.{structure}"] = len(fields) * word
        for index, member in enumerate(fields):
            table[f"{structure}.{member}"] = index * word
    return {name: f"{value:#x}" for name, value in table.items()}
