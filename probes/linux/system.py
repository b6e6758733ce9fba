"""The operating system in a machine: its tasks, their mappings and files, the page cache, the log. From outside.

Rules: called in the machine's thread, at any stop or hit. Nothing is cached of what the guest may change, and nothing
in the guest changes. Each method is one question (see program.question): it answers, or raises NotAvailable with the
reason. Kernel objects are drgn's: `task.mm.exe_file` reads as it does in C, and drgn's helpers take them.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from drgn import Object, Program, cast
from drgn.helpers.linux.fs import for_each_file, inode_for_each_page
from drgn.helpers.linux.list import list_for_each_entry
from drgn.helpers.linux.mm import for_each_vma, page_index, page_to_pfn
from drgn.helpers.linux.pid import find_task, for_each_task
from drgn.helpers.linux.xarray import xa_is_value, xa_load

from emu.iface import Machine, MemoryFault
from probes.linux.kernel import KernelTypes, kernel_types
from probes.linux.modules import LoadedModule, describe, loaded_modules
from probes.linux.names import Names
from probes.linux.paths import file_path, mapping_name
from probes.linux.printk import LogRecord, log_records
from probes.linux.program import KernelMemory, NotAvailable, make_program, question
from probes.linux.tasks import LinuxTasks, current_tasks

PAGE: Final = 0x1000
_MAX_LINKS: Final = 40  # MAXSYMLINKS, include/linux/namei.h
VM_READ, VM_WRITE, VM_EXEC, VM_SHARED, VM_MAYSHARE = 1, 2, 4, 8, 0x80  # include/linux/mm.h


@dataclass(frozen=True, slots=True)
class Mapping:
    """A vm_area_struct. `offset` is of its first byte in the file, in bytes; `file` and `inode` are addresses, 0 for
    anonymous memory."""

    start: int
    end: int
    flags: int
    offset: int
    file: int
    inode: int
    vma: Object

    @property
    def executable(self) -> bool:
        return bool(self.flags & VM_EXEC)


class Linux:
    """One machine's Linux. Made by `linux_of`."""

    def __init__(self, machine: Machine, kernel: KernelTypes) -> None:
        self.kernel = kernel
        self._machine = machine
        self._memory = KernelMemory(machine, kernel.root)
        self._names = Names(lambda address, size: self._memory.virtual(address, size, 0, False))
        self._program: Program | None = None
        self._tasks: LinuxTasks | str | None = None

    @property
    def program(self) -> Program:
        """For drgn's own helpers, and for what nothing here answers. It raises drgn's exceptions: see `asking`."""
        if self._program is None:
            self._program = make_program(self.kernel, self._memory)
        return self._program

    @contextmanager
    def asking(self, what: str) -> Iterator[Program]:
        """One question of the caller's own; `what` begins the text of the NotAvailable it may end with."""
        with question(what, self._memory):
            if self._memory.translate(self.kernel.page_tables) is None:
                raise NotAvailable(what, "the kernel has not set up its page tables yet")
            yield self.program

    def unbounded(self) -> None:
        """From here on `program` may be read without end: for a person, who can interrupt."""
        self._memory.bounded = False

    def object(self, type_name: str, address: int) -> Object:
        """A pointer, say "struct file *", with that value."""
        return Object(self.program, type_name, address)

    # --------------------------------------------------------------------------------------------------------- tasks

    def current(self) -> Object:
        """`struct task_struct *` of the task that runs, its kernel's or its user's side."""
        if self._tasks is None:
            self._tasks = current_tasks(self._machine.memory, self.kernel)
        with self.asking("the current task is") as program:
            if isinstance(self._tasks, str):
                raise NotAvailable("the current task is", self._tasks)
            try:
                address = self._tasks.address()
            except MemoryFault:
                raise NotAvailable("the current task is", "the kernel has not set up its per-cpu area yet") from None
            return Object(program, "struct task_struct *", address)

    def tasks(self) -> list[Object]:
        """Every thread of every process by rising pid, as `struct task_struct *`; without the idle task, pid 0."""
        with self.asking("the tasks are") as program:
            return list(for_each_task(program))

    def processes(self) -> list[Object]:
        """The leader of every process, by age; the kernel's threads are processes too."""
        with self.asking("the tasks are") as program:
            return list(list_for_each_entry("struct task_struct", program["init_task"].tasks.address_of_(), "tasks"))

    def task(self, pid: int) -> Object:
        """The thread with that number. NotAvailable where there is none."""
        with self.asking(f"task {pid} is") as program:
            found = find_task(program, pid)
            if not found:
                raise NotAvailable(f"task {pid} is", "there is none")
            return found

    # -------------------------------------------------------------------------------------------------------- memory

    def mappings(self, mm: Object) -> list[Mapping]:
        """Of a `struct mm_struct *`, in address order; none for a kernel thread's NULL."""
        with self.asking("the mappings are"):
            return [_mapping(vma) for vma in for_each_vma(mm)] if mm else []

    def mapping_name(self, mapping: Mapping) -> str:
        """What /proc/PID/maps shows last: a path, [heap], [stack] ..., or nothing."""
        with self.asking("the mapping's name is"):
            return mapping_name(mapping.vma)

    def read_user(self, mm: Object, address: int, size: int) -> bytes:
        """A process's memory, whoever runs now. MemoryFault where a page is not present."""
        with self.asking("the process's memory is"):
            root = self._memory.translate(mm.pgd.value_())
            if root is None:
                raise NotAvailable("the process's memory is", "it has no page tables")
        found = []
        while size > 0:
            paddr = self._machine.memory.translate(address, root)
            if paddr is None:
                raise MemoryFault(address)
            count = min(size, PAGE - address % PAGE)
            found.append(self._machine.memory.read_physical(paddr, count))
            address, size = address + count, size - count
        return b"".join(found)

    # --------------------------------------------------------------------------------------------------------- files

    def files(self, task: Object) -> list[tuple[int, Object]]:
        """(descriptor, `struct file *`) of all a task has open; not of one that an open() under way has reserved."""
        with self.asking("the files are"):
            return [(descriptor, file) for descriptor, file in for_each_file(task) if file]

    def path(self, file: Object) -> str:
        """Of a `struct file *`, as /proc/PID/fd shows it."""
        with self.asking("the path is"):
            return file_path(file)

    def inode(self, path: str) -> Object | None:
        """`struct inode *` of an absolute path, if the kernel has it in its cache of names; links are not followed."""
        with self.asking(f"{path} is") as program:
            found = self._names.inode(program, path)
            return None if found is None else self.object("struct inode *", found)

    def follow(self, path: str) -> Object | None:
        """`struct inode *` behind every symbolic link, as init sees an absolute path; None where a part of the way is
        not in memory."""
        links, done, left = 0, "", [part for part in path.split("/") if part]
        inode = self.inode("/")
        while left:
            part = left.pop(0)
            if part == "..":
                done = done.rpartition("/")[0]
                inode = self.inode(done or "/")
            elif part != ".":
                inode = self.inode(f"{done}/{part}")
                if inode is not None and stat.S_ISLNK(inode.i_mode.value_()):
                    links += 1
                    target = self._target(inode)
                    if links > _MAX_LINKS or target is None:
                        return None
                    left = [piece for piece in target.split("/") if piece] + left
                    done = "" if target.startswith("/") else done
                    inode = self.inode(done or "/")
                else:
                    done = f"{done}/{part}"
            if inode is None:
                return None
        return inode

    def _target(self, inode: Object) -> str | None:
        """Where a link leads, if that is in memory."""
        with self.asking("the link is"):
            data = bytes(inode.i_link.string_()) if inode.i_link.read_() else None
            size = inode.i_size.value_()
        try:
            data = data if data is not None else self.read_file(inode, 0, min(size, PAGE))
        except MemoryFault:
            return None
        return data.decode("utf-8", "surrogateescape")

    def page(self, inode: Object, index: int) -> int | None:
        """Physical address of page `index` of a file, None where it is not in the page cache."""
        with self.asking("the page cache is") as program:
            entry = xa_load(inode.i_mapping.i_pages.address_of_(), index)
            if not entry or xa_is_value(entry):
                return None
            page = cast(program.type("struct page *"), entry)  # of a large folio the first
            return (int(page_to_pfn(page)) + index - int(page_index(page))) * PAGE

    def pages(self, inode: Object) -> list[tuple[int, int]]:
        """(index, physical address) of all of a file that is in the page cache; of a large folio its first page."""
        with self.asking("the page cache is"):
            return [(index, int(page_to_pfn(page)) * PAGE) for index, page in inode_for_each_page(inode)]

    def read_file(self, inode: Object, offset: int, size: int) -> bytes:
        """A file's bytes from the page cache. MemoryFault, with the offset, where a page is not in it."""
        found = []
        while size > 0:
            paddr = self.page(inode, offset // PAGE)
            if paddr is None:
                raise MemoryFault(offset)
            count = min(size, PAGE - offset % PAGE)
            found.append(self._machine.memory.read_physical(paddr + offset % PAGE, count))
            offset, size = offset + count, size - count
        return b"".join(found)

    # --------------------------------------------------------------------------------------------------- the kernel

    def modules(self) -> list[LoadedModule]:
        """What is loaded, the newest first."""
        with self.asking("the modules are") as program:
            return loaded_modules(program)

    def module(self, address: int) -> LoadedModule:
        """The one whose `struct module` is there, in the list or not."""
        with self.asking("the module is"):
            return describe(self.object("struct module *", address))

    def log(self) -> list[LogRecord]:
        """What the kernel has printed and still keeps, oldest first."""
        with self.asking("the kernel's log is") as program:
            return log_records(program)


def linux_of(machine: Machine) -> Linux:
    """The Linux in `machine`. NotAvailable where there is none, or one whose structures nobody knows."""
    kernel = kernel_types(machine)
    if isinstance(kernel, str):
        raise NotAvailable("the guest's operating system is", kernel)
    return Linux(machine, kernel)


def _mapping(vma: Object) -> Mapping:
    file = vma.vm_file.read_()
    return Mapping(
        vma.vm_start.value_(),
        vma.vm_end.value_(),
        vma.vm_flags.value_(),
        vma.vm_pgoff.value_() * PAGE if file else 0,
        file.value_(),
        file.f_inode.value_() if file else 0,
        vma,
    )
