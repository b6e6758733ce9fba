"""Modules as they come and go: the machine's symbols and the probes in them follow.

Rules: the machine's thread. Functions of the kernel's are probed, from when it has settled (before, nothing loads
modules); what was loaded already is read then, and again when the machine goes to another moment. Whatever else has
code in such memory, BPF for one, is followed where it is freed. The functions, from
5.10 to 6.12, kernel/module: a module's code is in its place and none of it has run at do_init_module(); it is there
still, and none of it will run any more, at free_module(); ftrace_free_mem() says which of it goes when its
initialisation is over.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from typing import Final

from emu import iface
from emu.symbols import GuestSymbols, Symbol, SymbolTable
from probes.core import Kprobes
from probes.errors import ProbeError
from probes.kprobe import Kprobe
from probes.linux.modules import module_symbols
from probes.linux.program import NotAvailable
from probes.linux.system import Linux
from probes.regs import Regs

_COMES, _GOES, _INITIALISED = "do_init_module", "free_module", "ftrace_free_mem"
_FREED: Final = ("module_memfree", "execmem_free")  # the second since 6.10; what BPF's code on i386 goes by, too
_LARGEST: Final = 64 << 20  # bytes of an area for code
_PAGE: Final = 4096
_MODULE: Final = "struct module *"


class ModuleWatch:
    """Keeps `symbols` as the guest's modules are, and the probes in them."""

    def __init__(self, symbols: iface.SymbolTable, kprobes: Kprobes, linux: Callable[[], Linux]) -> None:
        """`symbols` that cannot change have no modules; `linux` may raise NotAvailable."""
        self._known = isinstance(symbols, GuestSymbols)
        self._symbols = symbols if isinstance(symbols, GuestSymbols) else GuestSymbols(SymbolTable())
        self._kprobes = kprobes
        self._linux = linux
        self._started = False

    def start(self) -> None:
        """The guest has settled. Where its functions cannot be probed, modules are not known."""
        if self._started or not self._known:
            return
        try:
            self._linux()
        except NotAvailable:
            return
        self._started = True
        wanted = [(_COMES, self._comes), (_GOES, self._goes), (_INITIALISED, self._initialised)]
        wanted += [(name, self._freed) for name in _FREED]
        for name, handler in wanted:
            try:
                self._kprobes.register(Kprobe(symbol=name, pre_handler=handler))
            except ProbeError:
                continue  # a kernel without modules, or one that has the function inlined
        self._kprobes.after_restore(self.read_again)
        self.read_again()

    def missing(self, module: str | None) -> bool:
        """A module that is not loaded now."""
        return module is not None and module not in self._symbols.modules

    def check(self, module: str | None) -> None:
        """ProbeError ENOENT for a module's name where nobody knows this guest's modules."""
        if module is None:
            return
        if not self._known:
            raise ProbeError(errno.ENOENT, f"module {module} is not known: the guest's modules are not")
        try:
            self._linux()
        except NotAvailable as error:
            raise ProbeError(errno.ENOENT, f"module {module} is not known: {error.reason}") from error

    def read_again(self) -> None:
        """The machine is at another moment."""
        found: dict[str, list[Symbol]] = {}
        try:
            linux = self._linux()
            for module in linux.modules():
                with linux.asking("the module's symbols are"):
                    found[module.name] = module_symbols(linux.object(_MODULE, module.address))
        except (NotAvailable, iface.MemoryFault):
            found = {}
        for name in set(self._symbols.modules) - found.keys():
            self._symbols.unload(name)
        for name, symbols in found.items():
            self._symbols.load(name, symbols)
        self._kprobes.follow_modules()

    def _comes(self, kp: Kprobe, regs: Regs) -> None:
        self._read(regs.arg(1))
        self._kprobes.follow_modules()

    def _goes(self, kp: Kprobe, regs: Regs) -> None:
        try:
            module = self._linux().module(regs.arg(1))
        except NotAvailable:
            return
        for start, size in module.regions:
            self._kprobes.discard(start, start + size)
        self._symbols.unload(module.name)

    def _initialised(self, kp: Kprobe, regs: Regs) -> None:
        """ftrace_free_mem(module, start, end), of the kernel's own with no module."""
        module = regs.arg(1)
        if module:
            self._kprobes.discard(regs.arg(2), regs.arg(3))
            self._read(module)

    def _freed(self, kp: Kprobe, regs: Regs) -> None:
        """The kernel unmaps an area of code; a page that is not there follows each."""
        start = end = regs.arg(1)
        with contextlib.suppress(iface.MemoryFault):
            while end - start < _LARGEST:
                regs.read(end, 1)
                end += _PAGE
        self._kprobes.discard(start, end)

    def _read(self, address: int) -> None:
        """Take in the symbols of the `struct module` there."""
        try:
            linux = self._linux()
            name = linux.module(address).name
            with linux.asking("the module's symbols are"):
                symbols = module_symbols(linux.object(_MODULE, address))
        except NotAvailable:
            return
        self._symbols.load(name, symbols)
