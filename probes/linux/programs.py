"""Programs in a Linux guest, for uprobes: files by path, mappings, and what happens to them.

Rules: the machine's thread. Events come from silent kprobes on the functions that the kernel itself calls for its own
uprobes (kernel/events/uprobes.c, 5.10 to 6.12), so they are where a mapping is complete and nothing in it has run; they
hit at mmap, exec, fork and exit, not at page faults.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from drgn import Object
from drgn.helpers.linux.mm import vma_find

from emu.iface import Cpu, Machine, MemoryFault
from probes.core import Kprobes
from probes.kprobe import Kprobe, register_together
from probes.linux.pagecache import LinuxPageCache
from probes.linux.program import NotAvailable
from probes.linux.saved import user_registers
from probes.linux.system import VM_MAYSHARE, VM_SHARED, VM_WRITE, Linux
from probes.linux.tasks import current_tasks
from probes.programs import Ended, Event, Exited, FileId, Forked, Mapped, PageCache, ProgramFile, Region, Unmapped
from probes.regs import Regs

_LONG: Final = 0x000FFFFFFFFFF000  # CR3's address of a top-level table: 4-level, and legacy or PAE
_PROTECTED: Final = 0xFFFFFFE0
_USER: Final = 3
_SECOND_TABLE: Final = 0x1000  # the user's half of a pair of tables, PTI_USER_PGTABLE_BIT


@dataclass(frozen=True, slots=True)
class LinuxFile:
    """Implements ProgramFile for an inode. Valid while the kernel keeps the inode: for the moment of one event."""

    linux: Linux
    inode: Object

    @property
    def id(self) -> FileId:
        return file_id(self.inode)

    @property
    def regular(self) -> bool:
        return stat.S_ISREG(self.inode.i_mode.value_())

    @property
    def size(self) -> int:
        return int(self.inode.i_size.value_())

    def read(self, offset: int, size: int) -> bytes:
        return self.linux.read_file(self.inode, offset, max(0, min(size, self.size - offset)))


def file_id(inode: Object) -> FileId:
    """Of a `struct inode *`."""
    return FileId(inode.i_sb.s_dev.value_(), inode.i_ino.value_(), inode.i_generation.value_())


class LinuxPrograms:
    """Implements Programs."""

    def __init__(self, machine: Machine, linux: Linux, kprobes: Kprobes) -> None:
        self._machine = machine
        self._linux = linux
        self._kprobes = kprobes
        self._tasks = current_tasks(machine.memory, linux.kernel)
        if isinstance(self._tasks, str):
            raise NotAvailable("uprobes are", self._tasks)
        self._mask = _LONG if linux.kernel.btf.pointer_size == 8 else _PROTECTED
        self._split: bool | None = None  # user mode has tables of its own (page-table isolation)
        self._watches = {
            "uprobe_mmap": self._on_mmap,
            "move_page_tables": self._on_move,
            "uprobe_munmap": self._on_munmap,
            "uprobe_dup_mmap": self._on_fork,
            "uprobe_clear_state": self._on_end,
            "do_exit": self._on_exit,
        }
        self._seen: tuple[int, tuple[Mapped, ...]] = (-1, ())  # instruction count, and all mappings of files then
        kprobes.after_restore(self._forget)

    def _forget(self) -> None:
        self._seen = (-1, ())

    # ------------------------------------------------------------------------------------------------- files by path

    def open(self, path: str) -> ProgramFile | None:
        """Absolute paths as init sees them. None too where a part of it is not in the kernel's cache of names."""
        try:
            inode = self._linux.follow(path)
        except NotAvailable:
            return None  # the kernel has not come that far
        return None if inode is None else LinuxFile(self._linux, inode)

    # ------------------------------------------------------------------------------------------------------- mappings

    def mapped(self, space: int | None = None) -> Iterator[Mapped]:
        """All processes' are read once for as long as the guest stands still: thousands of probes come at one stop."""
        now = self._machine.clock.instructions
        if space is not None and self._seen[0] != now:
            yield from self._read_mapped(space)
            return
        if self._seen[0] != now:
            self._seen = now, tuple(self._read_mapped())
        yield from (mapped for mapped in self._seen[1] if space is None or mapped.region.space == space)

    def _read_mapped(self, space: int | None = None) -> Iterator[Mapped]:
        try:
            processes = self._linux.processes()
            spaces = {mm.value_(): mm for process in processes if (mm := process.mm.read_())}
            for mm in spaces.values():
                if space is not None and self._space(mm) != space:
                    continue
                for mapping in self._linux.mappings(mm):
                    if (found := self._mapping(mapping.vma)) is not None:
                        yield found
        except NotAvailable:
            return  # no process yet

    def _mapping(self, vma: Object) -> Mapped | None:
        file = vma.vm_file.read_()
        if not file:
            return None
        content = LinuxFile(self._linux, file.f_inode.read_())
        name = file.f_path.dentry.d_name.name.string_().decode("utf-8", "surrogateescape")
        start, end, offset = vma.vm_start.value_(), vma.vm_end.value_(), vma.vm_pgoff.value_() << 12
        flags = vma.vm_flags.value_()
        region = Region(
            self._space(vma.vm_mm),
            start,
            end,
            offset,
            content.id,
            name,
            bool(flags & VM_WRITE),
            bool(flags & VM_MAYSHARE),
        )
        return Mapped(region, content)

    def _space(self, mm: Object) -> int:
        paddr = self._machine.memory.translate(mm.pgd.value_(), self._linux.kernel.root)
        return -1 if paddr is None else paddr & self._mask

    def stack(self, space: int, address: int) -> int:
        """The start of the current process's mapping there; 0 where there is none."""
        with self._linux.asking("the stack is"):
            vma = vma_find(self._linux.current().mm, address)
            return int(vma.vm_start.value_()) if vma else 0

    def file_at(self, address: int) -> tuple[ProgramFile | None, int] | None:
        try:
            with self._linux.asking("the mapping is"):
                mm = self._linux.current().mm.read_()
                vma = vma_find(mm, address) if mm else None
                if not vma:
                    return None
                file = vma.vm_file.read_()
                if not file:
                    return None, 0
                offset = address - vma.vm_start.value_() + (vma.vm_pgoff.value_() << 12)
                return LinuxFile(self._linux, file.f_inode.read_()), offset
        except NotAvailable:
            return None

    def physical(self, space: int, address: int, *, store: bool = False) -> int | None:
        memory = self._machine.memory
        return memory.storable(address, space) if store else memory.translate(address, space)

    def may_store(self, address: int) -> bool:
        """As valid_ref_ctr_vma() in kernel/events/uprobes.c, and not beyond the file's end, which is SIGBUS."""
        try:
            with self._linux.asking("the mapping is"):
                mm = self._linux.current().mm.read_()
                vma = vma_find(mm, address) if mm else None
                if not vma or not vma.vm_file or vma.vm_flags.value_() & (VM_WRITE | VM_SHARED) != VM_WRITE:
                    return False
                offset = address - vma.vm_start.value_() + (vma.vm_pgoff.value_() << 12)
                return bool(offset < vma.vm_file.f_inode.i_size.value_())
        except NotAvailable:
            return False

    def resumes(self, space: int) -> Iterator[int]:
        cpu = self._machine.cpu
        if cpu.cpl == _USER and self.space(cpu) == space:
            yield cpu.pc
        for task in self._linux.tasks():
            with self._linux.asking("where tasks go on is"):
                mm = task.mm.read_()
                regs = user_registers(self._linux, task) if mm and self._space(mm) == space else None
            if regs is not None:
                yield regs.ip.value_()

    def user_stack(self) -> int | None:
        """task_pt_regs(current)->sp."""
        with self._linux.asking("the user's stack is"):
            regs = user_registers(self._linux, self._linux.current())
            return None if regs is None else int(regs.sp.value_())

    # ------------------------------------------------------------------------------------------------- the processor

    def space(self, cpu: Cpu) -> int:
        space = cpu.cr3 & self._mask
        if space & _SECOND_TABLE and self._mask == _LONG and cpu.cpl == 3:
            if self._split is None:
                kernel = self._linux.kernel.page_tables
                self._split = self._machine.memory.translate(kernel, space) is None
            if self._split:
                space -= _SECOND_TABLE
        return space

    def thread(self, cpu: Cpu) -> int:
        assert not isinstance(self._tasks, str)  # checked when this was made
        try:
            return self._tasks.address()
        except MemoryFault:
            return 0

    def cache(self) -> PageCache:
        return LinuxPageCache(self._machine, self._linux)

    # --------------------------------------------------------------------------------------------------------- events

    def watch(self, tell: Callable[[Event], None]) -> Callable[[], None]:
        """ProbeError where this kernel lacks one of the functions."""
        probes = [Kprobe(symbol=name, pre_handler=self._handler(call, tell)) for name, call in self._watches.items()]
        register_together(probes, self._kprobes.register, self._kprobes.unregister)

        def end() -> None:
            for probe in probes:
                self._kprobes.unregister(probe)

        return end

    def _handler(
        self, call: Callable[[Regs], Event | None], tell: Callable[[Event], None]
    ) -> Callable[[Kprobe, Regs], None]:
        def handler(kp: Kprobe, regs: Regs) -> None:
            try:
                with self._linux.asking("what happens to programs is"):
                    event = call(regs)
            except NotAvailable as error:
                kp.notes = (error.reason,)  # memory of the kernel's that it has destroyed itself
                return
            if event is not None:
                self._forget()
                tell(event)

        return handler

    def _vma(self, address: int) -> Object:
        return self._linux.object("struct vm_area_struct *", address)

    def _on_mmap(self, regs: Regs) -> Event | None:
        """int uprobe_mmap(struct vm_area_struct *vma)"""
        return self._mapping(self._vma(regs.arg(1)))

    def _on_move(self, regs: Regs) -> Event | None:
        """unsigned long move_page_tables(vma, old_addr, struct vm_area_struct *new_vma, ...): mremap() and exec"""
        return self._mapping(self._vma(regs.arg(3)))

    def _on_munmap(self, regs: Regs) -> Event:
        """void uprobe_munmap(struct vm_area_struct *vma, unsigned long start, unsigned long end)

        From unmap_single_vma() in mm/memory.c. munmap() has taken the mapping out of the process's tree by then.
        """
        vma, start, end = self._vma(regs.arg(1)), regs.arg(2), regs.arg(3)

        def kept() -> bool:
            with self._linux.asking("the mapping is"):
                return bool(vma_find(vma.vm_mm, start) == vma)

        return Unmapped(self._space(vma.vm_mm), start, end, kept)

    def _on_fork(self, regs: Regs) -> Event:
        """void uprobe_dup_mmap(struct mm_struct *oldmm, struct mm_struct *newmm)"""
        old, new = (self._linux.object("struct mm_struct *", regs.arg(number)) for number in (1, 2))
        return Forked(self._space(old), self._space(new))

    def _on_end(self, regs: Regs) -> Event:
        """void uprobe_clear_state(struct mm_struct *mm)"""
        return Ended(self._space(self._linux.object("struct mm_struct *", regs.arg(1))))

    def _on_exit(self, regs: Regs) -> Event:
        return Exited(self.thread(regs.cpu))


def linux_programs(machine: Machine, linux: Linux, kprobes: Kprobes) -> LinuxPrograms:
    """ProbeError where the kernel has no support for uprobes of its own, or does not say what is needed."""
    missing = [name for name in ("uprobe_mmap", "uprobe_munmap") if not machine.symbols.lookup(name)]
    if missing:
        raise NotAvailable("uprobes are", f"this kernel has no {missing[0]}")
    return LinuxPrograms(machine, linux, kprobes)
