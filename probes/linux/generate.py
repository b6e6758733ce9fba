"""Makes a type profile (profile.py) from a kernel's debug image: what its DWARF says of a few dozen structures.

Rules: a tool; reads one file, gives text. What is listed here is what our questions and drgn's helpers look at, in any
kernel from 5.10 to 6.12; what a kernel does not have is left out, and whoever asks for it is told so.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import drgn

from emu.iface import ImageError
from emu.images.cache import write_atomic
from emu.images.elf import ElfFile
from probes.linux.profile import user_profiles

STRUCTURES: Final = {
    # tasks
    "task_struct": "thread_info __state state exit_state flags stack pid tgid comm mm active_mm fs files tasks "
    "thread_pid pid_links parent real_parent group_leader signal thread_node thread cred exit_code utime stime on_cpu "
    "sched_class prio static_prio migration_disabled",
    "thread_info": "flags status cpu",
    "thread_struct": "sp",
    "signal_struct": "thread_head nr_threads",
    "pid": "level tasks numbers",
    "upid": "nr ns",
    "pid_namespace": "idr level",
    "idr": "idr_rt idr_base",
    "cred": "uid euid",
    "kuid_t": "val",
    # trees and lists
    "list_head": "next prev",
    "hlist_head": "first",
    "hlist_node": "next pprev",
    "hlist_bl_node": "next pprev",
    "xarray": "xa_flags xa_head",
    "xa_node": "shift offset count parent slots",
    "maple_tree": "ma_root ma_flags",
    "maple_node": "ma64 mr64 alloc",
    "maple_arange_64": "pivot slot meta",
    "maple_range_64": "pivot slot meta",
    "maple_metadata": "end gap",
    "atomic_t": "counter",
    "atomic_long_t": "counter",
    "rb_node": "rb_left rb_right",
    # memory
    "mm_struct": "mm_mt mmap pgd brk start_brk start_stack arg_start arg_end env_start env_end start_code end_code "
    "exe_file context total_vm mm_users owner",
    "mm_context_t": "vdso vdso_image",
    "vm_area_struct": "vm_start vm_end vm_flags vm_pgoff vm_file vm_mm vm_ops vm_private_data vm_next anon_name shared",
    "vm_operations_struct": "name",
    "vm_special_mapping": "name",
    "anon_vma_name": "name",
    "page": "flags mapping index compound_head lru",
    "pglist_data": "node_mem_map node_start_pfn node_spanned_pages",
    # files
    "path": "mnt dentry",
    "vfsmount": "mnt_root mnt_flags",
    "mount": "mnt mnt_parent mnt_mountpoint mnt_mounts mnt_child mnt_instance mnt_pcp mnt_count",
    "mnt_pcp": "mnt_count",
    "dentry": "d_flags d_hash d_parent d_name d_inode d_op d_sb d_subdirs d_child d_children d_sib",
    "qstr": "name len",
    "dentry_operations": "d_dname",
    "inode": "i_mode i_ino i_sb i_mapping i_size i_rdev i_op i_fop i_data i_nlink i_generation i_link i_writecount "
    "i_count",
    "address_space_operations": "read_folio readahead readpage readpages free_folio freepage migrate_folio migratepage",
    "readahead_control": "mapping _index _nr_pages",
    "super_block": "s_dev s_type s_id s_bdev s_mounts",
    "file_system_type": "name",
    "address_space": "host i_pages nrpages a_ops i_mmap",
    "file": "f_path f_inode f_mapping f_mode f_flags f_pos f_op",
    "files_struct": "fdt",
    "fdtable": "max_fds fd open_fds",
    "fs_struct": "root pwd",
    # log and modules
    "printk_ringbuffer": "desc_ring text_data_ring",
    "prb_desc_ring": "count_bits descs infos head_id tail_id",
    "prb_data_ring": "size_bits data",
    "prb_desc": "state_var text_blk_lpos",
    "prb_data_blk_lpos": "begin next",
    "printk_info": "seq ts_nsec text_len facility flags level caller_id dev_info",
    "dev_printk_info": "subsystem device",
    "module": "state list name core_layout init_layout mem refcnt source_list kallsyms core_kallsyms init "
    "percpu percpu_size",
    "module_layout": "base size text_size",
    "module_memory": "base size",
    "module_use": "source_list source",
    "mod_kallsyms": "symtab num_symtab strtab typetab",
    "elf32_sym": "st_name st_value st_size st_info st_other st_shndx",
    # processors
    "pcpu_hot": "current_task preempt_count",
    "inactive_task_frame": "flags si di bx bp ret_addr r15 r14 r13 r12",
    "pt_regs": "bx cx dx si di bp ax ds es fs gs orig_ax ip cs flags sp ss",
}
"""Structure, union or typedef of one -> its members; a member of an unnamed part is one of the structure's own."""

VARIABLES: Final = (
    *("init_task", "init_pid_ns", "modules", "prb", "__per_cpu_offset", "task_state_array", "swapper_pg_dir"),
    *("current_task", "pcpu_hot", "__preempt_count"),
    *("mem_map", "contig_page_data", "mem_section", "vmemmap_base", "page_offset_base", "vmalloc_base"),
)
CONSTANTS: Final = (
    *("PIDTYPE_PID", "PIDTYPE_TGID", "LOG_CONT", "LOG_NEWLINE"),
    *("PG_locked", "PG_uptodate", "PG_dirty", "PG_writeback", "PG_head"),
    *("desc_committed", "desc_finalized", "desc_reserved", "desc_reusable"),
    *("MODULE_STATE_LIVE", "MODULE_STATE_COMING", "MODULE_STATE_GOING", "MODULE_STATE_UNFORMED", "MOD_MEM_NUM_TYPES"),
)
_UNTYPED: Final = {"swapper_pg_dir": "void"}  # made in assembly
_HEAD: Final = """\
# What the kernel below does not say of itself: made by `gdbstub fetch --debug` from its debug image; do not edit.
"""


def generate(path: Path, release: str) -> tuple[str, str]:
    """The build-id and the profile of the debug image at `path`. ImageError where it is none.

    `release` is what `uname -r` prints there.
    """
    data = path.read_bytes()
    elf = ElfFile(str(path), data)
    build_id = elf.build_id()
    addresses = {symbol.name: symbol.address for symbol in elf.symbols()}
    if build_id is None or "init_task" not in addresses:
        raise ImageError(str(path), "no debug image of a kernel: it has no build-id or no symbols")
    program = drgn.Program()
    module = program.extra_module("vmlinux", create=True)
    module.address_ranges = ((0, (1 << 64) - 1),)
    module.try_file(path, force=True)
    if module.debug_file_status != drgn.ModuleFileStatus.HAVE:
        raise ImageError(str(path), "the image has no DWARF")
    writer = _Writer(program)
    body = [*writer.variables(addresses), *writer.constants(), *writer.structures()]
    bits = 64 if program.type("void *").size == 8 else 32
    lines = [f"kernel {release} {bits} {build_id.hex()}", *writer.integers(), *body]
    return build_id.hex(), _HEAD + "\n".join(lines) + "\n"


def make_profile(path: Path, release: str) -> Path:
    """Put the profile of the debug image at `path` where find_profile() looks for a user's. -> the file."""
    build_id, text = generate(path, release)
    kept = user_profiles() / f"{build_id}.txt"
    write_atomic(kept, text.encode("ascii"))
    return kept


class _Writer:
    def __init__(self, program: drgn.Program) -> None:
        self._program = program
        self._integers: dict[str, drgn.Type] = {"unsigned int": program.type("unsigned int")}
        self._opaque: dict[str, drgn.Type] = {}

    def integers(self) -> Iterator[str]:
        for name, type_ in sorted(self._integers.items()):
            boolean = type_.kind == drgn.TypeKind.BOOL
            yield f"int {type_.size} {'b' if boolean else 's' if type_.is_signed else 'u'} {name}"

    def variables(self, addresses: dict[str, int]) -> Iterator[str]:
        for name in VARIABLES:
            if name not in addresses:
                continue
            spelled = _UNTYPED.get(name)
            if spelled is None:
                try:
                    spelled = self._spell(self._program.variable(name).type_, name)
                except LookupError:
                    continue
            yield f"variable {addresses[name]:x} {name} {spelled}"

    def constants(self) -> Iterator[str]:
        for name in CONSTANTS:
            try:
                yield f"constant {self._program.constant(name).value_()} {name}"
            except LookupError:
                continue

    def structures(self) -> Iterator[str]:
        for name, members in STRUCTURES.items():
            type_ = self._find(name)
            if type_ is not None and type_.is_complete():
                yield from self._structure(type_, name, members.split())
        while self._opaque:
            name, type_ = self._opaque.popitem()
            if type_.is_complete():
                yield f"{_WORDS[type_.kind]} {type_.size} {name}"

    def _find(self, name: str) -> drgn.Type | None:
        for spelled in (f"struct {name}", name):
            try:
                type_ = self._program.type(spelled)
            except LookupError:
                continue
            return _bare(type_)
        return None

    def _structure(self, type_: drgn.Type, name: str, wanted: list[str]) -> Iterator[str]:
        yield f"{_WORDS[type_.kind]} {type_.size} {name}"
        for member, bit_offset in _flat(type_, 0):
            if member.name in wanted:
                spelled = self._spell(member.type, f"{name}.{member.name}")
                where = f"{bit_offset // 8}"
                if member.bit_field_size is not None:
                    where = f"{bit_offset // 8}.{bit_offset % 8}:{member.bit_field_size}"
                yield f" {where} {member.name} {spelled}"

    def _spell(self, type_: drgn.Type, place: str, name: str = "") -> str:
        """`place` names a structure that has no name; `name` is the typedef that was followed."""
        match type_.kind:
            case drgn.TypeKind.TYPEDEF:
                return self._spell(type_.type, place, type_.name)
            case drgn.TypeKind.POINTER:
                return _suffixed(self._spell(type_.type, place), "*")
            case drgn.TypeKind.ARRAY:
                return _suffixed(self._spell(type_.type, place), f"[{type_.length or 0}]")
            case drgn.TypeKind.STRUCT | drgn.TypeKind.UNION:
                known = type_.tag or name or place
                if known not in STRUCTURES:
                    self._opaque[known] = type_
                return f"{_WORDS[type_.kind]} {known}"
            case drgn.TypeKind.FUNCTION:
                return "function"
            case drgn.TypeKind.VOID:
                return "void"
            case drgn.TypeKind.ENUM:
                assert type_.type is not None
                return self._spell(type_.type, place)
        name = str(type_.name)
        self._integers[name] = type_
        return name


_WORDS: Final = {drgn.TypeKind.STRUCT: "struct", drgn.TypeKind.UNION: "union"}


def _flat(type_: drgn.Type, start: int) -> Iterator[tuple[drgn.TypeMember, int]]:
    """Members with their offset in bits, those of unnamed parts among them."""
    for member in type_.members or ():
        if member.name is None:
            yield from _flat(_bare(member.type), start + member.bit_offset)
        else:
            yield member, start + member.bit_offset


def _bare(type_: drgn.Type) -> drgn.Type:
    while type_.kind == drgn.TypeKind.TYPEDEF:
        type_ = type_.type
    return type_


def _suffixed(spelled: str, suffix: str) -> str:
    return f"{spelled}{suffix}" if spelled.endswith(("*", "]")) else f"{spelled} {suffix}"
