"""The guest's operating system as text, in the formats of the guest's own ps, /proc, lsmod and dmesg.

Rules: lines out, one an item; asks `Linux` only, whose NotAvailable goes through. What a guest can put into a name is
shown escaped: a line stays a line.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final

from drgn import Object
from drgn.helpers.linux.sched import task_state_to_char

from emu.iface import MemoryFault
from probes.linux.program import NotAvailable
from probes.linux.system import PAGE, VM_EXEC, VM_MAYSHARE, VM_READ, VM_WRITE, Linux, Mapping

_MAX_ARGUMENTS: Final = 4096  # bytes of a command line that are shown
_DEFAULT_PRIORITY: Final = 120  # static_prio of nice 0, include/linux/sched/prio.h
_NAME_COLUMN: Final = {8: 72, 4: 48}  # show_vma_header_prefix() in fs/proc/task_mmu.c


def processes(linux: Linux) -> list[str]:
    """`ps -o pid,ppid,stat,args` of BusyBox."""
    lines = ["PID   PPID  STAT COMMAND"]
    for task in linux.processes():
        with linux.asking("the list of processes is"):
            pid, parent = task.tgid.value_(), task.real_parent.tgid.value_()
            state = task_state_to_char(task) + (" " if task.mm else "W") + _niceness(task)
        lines.append(f"{pid:5d} {parent:5d} {state.rstrip():<4} {_command(linux, task)}")
    return lines


def maps(linux: Linux, pid: int) -> list[str]:
    """/proc/PID/maps."""
    task = linux.task(pid)
    word = linux.kernel.btf.pointer_size
    lines = [_mapping_line(linux, mapping, word) for mapping in linux.mappings(task.mm)]
    return lines or ["(none: a thread of the kernel's own, or a process that has ended)"]


def files(linux: Linux, pid: int) -> list[str]:
    """What `ls -l /proc/PID/fd` shows of each descriptor."""
    found = linux.files(linux.task(pid))
    return [f"{descriptor} -> {_escaped(linux.path(file))}" for descriptor, file in found] or ["(none open)"]


def modules(linux: Linux) -> list[str]:
    """lsmod, and where each module lies."""
    lines = ["Module                  Size  Used by"]
    for module in linux.modules():
        users = f" {','.join(module.users)}" if module.users else ""
        lines.append(f"{_escaped(module.name):<19} {module.size:8d}  {module.references}{users}")
    return lines


def log(linux: Linux) -> list[str]:
    """dmesg."""
    lines = []
    for record in linux.log():
        seconds, rest = divmod(record.timestamp // 1000, 1_000_000)
        text = record.text.decode("utf-8", "backslashreplace")
        lines += [f"[{seconds:5d}.{rest:06d}] {_escaped(line, keep=chr(9))}" for line in text.split("\n")]
    return lines


def page_cache(linux: Linux, path: str) -> list[str]:
    """A file's pages in memory: offset in the file, physical address; runs of pages that follow each other as one."""
    what = f"the page cache of {path} is"
    if not path.startswith("/"):
        raise NotAvailable(what, "a path begins with /")
    inode = linux.follow(path)
    if inode is None:
        raise NotAvailable(what, "the kernel has no such name in its cache")
    with linux.asking("the file is"):
        number, size, kind = inode.i_ino.value_(), inode.i_size.value_(), stat.S_IFMT(inode.i_mode.value_())
    if kind not in (stat.S_IFREG, stat.S_IFBLK):
        raise NotAvailable(what, "it is no file that has pages")
    pages = linux.pages(inode)
    total = -(-size // PAGE)
    lines = [f"{path}: inode {number}, {size} bytes, {len(pages)} of {total} pages"]
    lines += [f"{first * PAGE:08x}-{(last + 1) * PAGE:08x}  at {paddr:08x}" for first, last, paddr in _runs(pages)]
    return lines


def _runs(pages: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(first index, last index, physical address of the first) of pages adjacent in both."""
    if not pages:
        return
    start = pages[0]
    for one, following in pairwise([*pages, (-1, -1)]):
        if following != (one[0] + 1, one[1] + PAGE):
            yield start[0], one[0], start[1]
            start = following


def _niceness(task: Object) -> str:
    priority = task.static_prio.value_()
    return "<" if priority < _DEFAULT_PRIORITY else "N" if priority > _DEFAULT_PRIORITY else " "


def _command(linux: Linux, task: Object) -> str:
    """The arguments, as BusyBox shows them: after the task's name where argv[0] does not tell it."""
    with linux.asking("the task's name is"):
        comm = task.comm.string_().decode("utf-8", "backslashreplace")
        mm = task.mm.read_()
        start, end = (mm.arg_start.value_(), mm.arg_end.value_()) if mm else (0, 0)
    if end <= start:
        return f"[{_escaped(comm)}]"
    try:
        raw = linux.read_user(mm, start, min(end - start, _MAX_ARGUMENTS))
    except MemoryFault:
        return f"{{{_escaped(comm)}}} (arguments not present)"
    words = raw.rstrip(b"\0").decode("utf-8", "backslashreplace").split("\0")
    name = words[0].removeprefix("-").rpartition("/")[2]
    shown = _escaped(" ".join(words))
    return shown if name[:15] == comm else f"{{{_escaped(comm)}}} {shown}"


def _mapping_line(linux: Linux, mapping: Mapping, word: int) -> str:
    device = number = 0
    if mapping.inode:
        with linux.asking("the file is"):
            inode = mapping.vma.vm_file.f_inode.read_()
            device, number = inode.i_sb.s_dev.value_(), inode.i_ino.value_()
    rights = "".join(
        letter if mapping.flags & bit else "-" for letter, bit in (("r", VM_READ), ("w", VM_WRITE), ("x", VM_EXEC))
    )
    line = (
        f"{mapping.start:08x}-{mapping.end:08x} {rights}{'s' if mapping.flags & VM_MAYSHARE else 'p'} "
        f"{mapping.offset:08x} {device >> 20:02x}:{device & 0xFFFFF:02x} {number} "
    )
    name = _escaped(linux.mapping_name(mapping))
    return f"{line:<{_NAME_COLUMN[word]}} {name}" if name else line


def _escaped(text: str, keep: str = "") -> str:
    return "".join(
        letter if letter.isprintable() or letter in keep else letter.encode("unicode_escape").decode()
        for letter in text
    )
