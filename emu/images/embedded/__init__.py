"""The embedded guest: a small kernel of our own, 64- and 32-bit, assembled from the .S files beside this module.

It needs no file from anywhere and boots in milliseconds: tests, bug reports and the demo without a network run on it.
Rules: any thread; imports `emu.images.plan` and keystone behind `assembler`, nothing of the machine.

What it does: maps itself into the upper half, sets up GDT, TSS, IDT, 8259s, 8254 and serial line, prints lines up to
"embedded: ready", and runs an init task that carries out the command line, a helper task and a program in ring 3, all
preempted by the timer. Command line: words in order, `name` or `name=N` (N is 1 if left out):

    calls=N      exercise(1) .. exercise(N): the functions of functions.S, once a round
    sleep=N      two tasks at once call sleeping_target(1) .. sleeping_target(N)
    deaths=N     N times, a task ends inside dying_target
    traps=N      int3, divide error, undefined instruction and #GP in the kernel, survived
    patch=N      the kernel rewrites an instruction of patched_target and back
    opens=N      ring 3 opens "/file/000", "/file/001" ..: do_open(name, flags) with flags 0, 1 ..
    faults=N     ring 3 reads all of /data twice through two mappings, then all cached pages are dropped
    user=N       ring 3 says hello, calls user_target(1) .. and, on a page of its own, user_cold(1) ..
    getpids=N    ring 3 asks for its pid (SYSCALL or SYSENTER; the others use SYSCALL or int 0x80)
    sum=N        the kernel adds up the bytes of /bin/program, read through the page cache, into `work_result`
    partial      from here on readpages fails half-way: it reads its first page and gives the others up
    ioerrors=N   the next N reads of a page fail: it goes out of the page cache, and whoever wants it asks again
    drop         all cached pages are dropped
    both=N       N times, ring 3 runs from pages read anew while the helper task reads /data
    cow=N        ring 3 gets a private copy of page N of /bin/program
    write=N      the last byte of page 1 of /bin/program becomes N, on the disk; `work_result` < 0: writers are denied
    big=N        ring 3 calls the function in page 1 of /big and that in page layout.BIG_HIGH, N times each
    crash        ring 3 executes ud2 and is killed
    loop  idle  panic  exit=N  reset  poweroff  halt  triple  doublefault      what they say; these do not return

After the last word it prints "embedded: done" and idles; a line typed at it is answered with "echo: LINE".

Symbols worth knowing: `current` (pointer to struct task), `jiffies`, `checksum` (sum of all results of `calls` and
`patch`), `counters` with one `count_NAME` word for each NAME that counts its own calls, `disk_aops` (the
address_space_operations of both files), `data_inode`, `program_inode`. Structures are in `layout`.
"""

from __future__ import annotations

import functools
from importlib import resources

from emu.iface import ImageError
from emu.images.embedded import layout
from emu.images.embedded.assembler import Assembled, assemble
from emu.images.plan import Image, Segment, flat_start

__all__ = ["embedded_guest", "embedded_kernel", "embedded_program", "kernel_source", "program_source"]

NAME = "embedded"
_COMMON = (
    "entry",
    "traps",
    "sched",
    "console",
    "lib",
    "mm",
    "filemap",
    "syscalls",
    "main",
    "exercise",
    "functions",
    "data",
)


def embedded_guest(bits: int, append: str = "", *, pae: bool = False) -> Image:
    """The guest of `bits` (32 or 64) with the command line `append`, ready to start; 32 MiB of RAM hold it.

    `pae` gives the 32-bit one three-level page tables. ImageError for a command line that does not fit.
    """
    limit = layout.COMMAND_LINE_SIZE - 1
    if len(append) > limit or not append.isascii() or "\0" in append:
        raise ImageError(NAME, f"the command line must be at most {limit} ASCII characters without NUL")
    command_line = append.encode("ascii")
    kernel = embedded_kernel(bits, pae)
    data = bytearray(kernel.code)
    program = embedded_program(bits)
    for name, content in (("command_line", command_line), ("disk_program", program.code)):
        start = kernel.offset(name)
        data[start : start + len(content)] = content
    segment = Segment(layout.KERNEL_PADDR[bits], bytes(data))
    tables, start_state = flat_start(NAME, [segment], segment.paddr, bits)
    return Image(NAME, "embedded", (segment, *tables), start_state, kernel.symbols)


@functools.cache
def embedded_kernel(bits: int, pae: bool = False) -> Assembled:
    """The kernel at its virtual address, before command line and program are put in. ValueError for other `bits`."""
    if bits not in layout.KERNEL_PADDR or (pae and bits != 32):
        raise ValueError(f"no embedded kernel of {bits} bits with pae={pae}")
    base = layout.KERNEL_PADDR[bits] + layout.KERNEL_OFFSET[bits]
    return assemble(kernel_source(bits), bits, base, layout.names(bits, pae))


@functools.cache
def embedded_program(bits: int) -> Assembled:
    """The program of ring 3, linked at `layout.USER_PROGRAM`: the contents of the guest's file /bin/program."""
    return assemble(program_source(), bits, layout.USER_PROGRAM, layout.names(bits, pae=False))


def kernel_source(bits: int) -> str:
    """The kernel's assembly text, in the dialect of `assembler`."""
    return _read(f"boot_{bits}", f"entry_{bits}", *_COMMON)


def program_source() -> str:
    """The ring-3 program's assembly text."""
    return _read("user")


def _read(*names: str) -> str:
    folder = resources.files(__name__)
    return "\n".join((folder / f"{name}.S").read_text(encoding="ascii") for name in names)
