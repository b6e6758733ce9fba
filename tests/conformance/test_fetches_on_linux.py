"""Every kind of fetch argument, armed together on Debian's 6.12 kernel while its shell reads a file."""

from __future__ import annotations

import re

import pytest

from probes import Manager
from tests.support.kernels import another, run_shell

_POINTER, _SMALL = r"0xffff[89a-f][0-9a-f]{11}", r"\d{1,6}"
_READ = rf"file={_POINTER} buf=0x[0-9a-f]+ count={_SMALL} pos=({_POINTER}|0x0)"
DEFINITIONS = {
    # parameters: by register, by number, by name, with fields
    "vfs_read %di %si:x64 %dx:u32": rf"arg1={_POINTER} arg2=0x[0-9a-f]+ arg3={_SMALL}",
    "vfs_read $arg*": _READ,
    "vfs_read $arg1 $arg3:s32": rf"file={_POINTER} count={_SMALL}",
    "vfs_read file->f_flags file->f_mode:x32": rf"arg1={_SMALL} arg2=0x[0-9a-f]+",
    "vfs_read n=file->f_path.dentry->d_name.name:string": 'n="(version|ttyS0|busybox|)"',
    "vfs_read n=file:%pD m=$arg1:%pD": 'n="(.*)" m="\\1"',
    "vfs_read m=file->f_inode->i_mode i=file->f_inode->i_ino": rf"m={_SMALL} i=\d+",
    "dput n=dentry:%pd": r'n=("[^"]*"|\(fault\))',
    "do_sys_openat2 dfd=$arg1:s32 f=+0($arg2):ustring": 'dfd=-100 f="/proc/version"',
    "do_sys_openat2 f=+u0($arg2):string": 'f="/proc/version"',
    "do_sys_openat2 f=filename:ustring how->flags how->mode": 'f="/proc/version" arg2=32768 arg3=0',
    "do_sys_openat2 a=+0($arg2):char[6] b=+6(%si):u8": r"a=\{'/','p','r','o','c','/'\} b=118",
    "__x64_sys_openat di=regs->di:s32 f=+u0(+104($arg1)):string": 'di=-100 f="/proc/version"',
    "do_syscall_64 nr=$arg2:s32 same=regs->orig_ax": r"nr=(\d+) same=\1",
    "vfs_write n=count d=+0($arg2):ustring": rf'n={_SMALL} d="[^"]+"',
    "kfree object": rf"object=({_POINTER}|0x0)",
    "handle_mm_fault vma->vm_start address flags:x32": r"arg1=\d+ address=\d+ flags=0x[0-9a-f]+",
    # returns, with arguments of the entry
    "vfs_read%return n=$retval:s64 count": rf"n={_SMALL} count={_SMALL}",
    "do_sys_openat2%return fd=$retval f=+0($arg2):ustring how->flags": 'fd=3 f="/proc/version" arg3=32768',
    "vfs_read%return $arg* $retval": rf"{_READ} arg5={_SMALL}",
    "vfs_open%return r=$retval n=path->dentry->d_name.name:string": 'r=0 n="(version|busybox)"',
    "kernel_clone%return pid=$retval e=args->exit_signal": r"pid=\d+ e=17",
    # stack, flags, code
    "vfs_read sp=$stack s=+0($stack):symbol t=$stack0:symbol": r"sp=0xffff\w+ s=(ksys_read\+0x6f/0xf0|\S+) t=\1",
    "vfs_read t=$stack0:symstr u=+0($stack):symstr": r't="(ksys_read\+0x6f/0xf0|[^"]+)" u="\1"',
    "vfs_read ip=%ip:symbol cs=%cs ss=%ss fl=%flags o=%orig_ax": (
        r"ip=vfs_read\+0x5/0x370 cs=0x10 ss=0x18 fl=0x\w+ o=0xf{16}"
    ),
    "vfs_read+11 ax=%ax:u64 r15=%r15": r"ax=\d+ r15=0x[0-9a-f]+",
    # data, immediates, the task
    "vfs_read b=@linux_proc_banner:string c=@linux_proc_banner+3:char d=@linux_proc_banner:u32": (
        r"b=\"%s version %s [^\"]+\" c='v' d=1981838117"
    ),
    "vfs_read j=@jiffies_64:u64": r"j=\d+",
    'vfs_read c=$comm n=\\42 m=\\-1:s16 t=\\"hello"': 'c="(cat|sh)" n=0x2a m=-1 t="hello"',
    # types: bit fields of the line and of BTF, arrays, nesting, failures
    "do_sys_openat2 l=+0($arg2):b4@0/8 h=+0($arg2):b4@4/8": "l=15 h=2",  # '/' is 0x2f
    "wake_up_new_task f=p->sched_reset_on_fork c=p->comm:string s=p->policy": 'f=0 c="sh" s=0',
    "vfs_read a=+0(%di):x64[2] b=+0(%di):s8[3]": r"a=\{0x[0-9a-f]+,0x[0-9a-f]+\} b=\{-?\d+,-?\d+,-?\d+\}",
    "vfs_read d=+0(+0x28(+0x48($arg1))):string": 'd="(version|ttyS0|busybox|)"',
    "vfs_read s=+0(\\0):string n=+0(\\16):u32 a=+0(\\0):x8[2]": r"s=\(fault\) n=0 a=\{0x0,0x0\}",
}


@pytest.mark.parametrize("kernel", ["6.12"])
def test_every_kind_of_fetch_is_right_on_a_real_kernel(kernel: str) -> None:
    """All at once; each hit of each event shows what its kind promises, and one at least is made."""
    machine = another(kernel)
    probes = Manager(machine)
    for number, line in enumerate(DEFINITIONS):
        probes.add("kprobe", f"p:e{number} {line}")
    assert "Linux version 6.12" in run_shell(machine, "cat /proc/version | cat; true | cat")
    shown: dict[str, set[str]] = {}
    for record in probes.trace.last():
        shown.setdefault(record.event, set()).add(record.text().partition(") ")[2])
    for number, (line, pattern) in enumerate(DEFINITIONS.items()):
        texts = shown.get(f"e{number}", set())
        right = {text for text in texts if re.fullmatch(pattern, text, re.DOTALL)}
        assert right, f"{line}: {texts}"
        names_one = any(name in pattern for name in ("version", "'p','r'", '"sh"'))  # others are opened or made, too
        assert right == texts or names_one, f"{line}: {texts - right}"
