"""The kernel in the guest is asked itself: the same lines written to its own kprobe_events and uprobe_events."""

from __future__ import annotations

import functools
import os
import re

import pytest

from emu.boot import GuestMachine
from tests.conformance.definitions import judge_of
from tests.support.kernels import another, run_shell

_TRACING = "/sys/kernel/tracing"
_ASK = (
    'ask() { : > /tmp/e; echo > $T/error_log; printf %s "$2" > /tmp/d; cat /tmp/d > $T/$1 2>/tmp/e; echo STATUS $?; '
    "cat /tmp/e $T/error_log; echo LISTED; cat $T/$1; : > $T/$1; }"
)
_LOGGED = re.compile(r"error: (.*)\n  Command: .*\n {11}( *)\^")

KPROBES = r"""
p vfs_read file->f_path.dentry->d_name.name:string pos:x64 count:string
p vfs_read file.f_flags
p vfs_read file->f_path.nope
p vfs_read count->x
p vfs_read pos->x
p vfs_read pos:string
r kfree $retval
r vfs_read $retvalx
r kernel_clone $retval args->flags:x32
p schedule $arg*
p schedule $arg1
p vfs_read $arg0
p vfs_read count $arg* $arg*
p vfs_read $arg1:u8 $arg2:string $arg4:symbol
p _printk $arg*
p vfs_read +u0(+0(%di):b9@0/8
p vfs_read ++5(%di) +-5(%di)
p vfs_read -+5(%di)
p vfs_read +u0(%xx)
p vfs_read \1:string[2]
p vfs_read %di:symstr[2]
p vfs_read $stack:symstr
p vfs_read \"
p vfs_read %di:b18446744073709551615@2/64
p vfs_read %di:b4@0/9
p vfs_read @_sdata+x
p vfs_read @nosuch
p vfs_read a=$arg1:%pd %bad
p vfs_read $arg1:%pd %bad
p vfs_read +0(%di):x64[64] +0(%di):x64[64] +0(%di):x64[64] +0(%di):x64[64] +0(%di):x64[64] +0(%di):x64[64] +0(%di):x64
p vfs_read+880
r vfs_read+4 $arg1
pfoo:bar vfs_read
r99999999999:bar vfs_read
p:sched/sched_switch vfs_read
p jiffies_64
p copy_user_generic
p clear_page_rep
p sched_clock
p do_syscall_64
p finish_task_switch.isra.0
p trace_printk:x @nosuch
-:/
"""
UPROBES = r"""
r10:foo /bin/busybox:0x1020 $retvalx:s32 @+-8:string
p /bin/busybox:0x1020 @sym
p /bin/busybox:0x1020(0x10)%return
p /bin/busybox:0x1020x
p /bin/busybox:99999999999999999999
p /bin/busybox/:5
p ./bin/../bin//sh:5
p:sched/sched_switch /bin/busybox:5
"""


@functools.cache
def asked(kernel: str) -> GuestMachine:
    machine = another(kernel)
    run_shell(machine, f"T={_TRACING}; mount -t tracefs t $T; {_ASK}")
    return machine


@pytest.mark.parametrize("kernel", ["6.12"])
@pytest.mark.parametrize(
    ("file", "line"),
    [("kprobe_events", line) for line in KPROBES.strip().split("\n")]
    + [("uprobe_events", line) for line in UPROBES.strip().split("\n")],
)
def test_the_guests_own_kernel_says_the_same(kernel: str, file: str, line: str) -> None:
    """Its listing, or the errno, the text and the column of its last word in error_log."""
    said = run_shell(asked(kernel), f"ask {file} '{line}'").partition("STATUS ")[2]
    answer, _, listing = said.partition("LISTED")
    logged = _LOGGED.findall(answer)
    judge = judge_of()
    judge.forget()
    verdict = judge.judge(line, "kprobe" if file == "kprobe_events" else "uprobe")
    if verdict.error is None:
        assert (answer.split()[0], listing.strip()) == ("0", verdict.listing)
        return
    error = verdict.error
    assert f"write error: {os.strerror(error.errno)}\n" in answer
    assert [(text, len(spaces)) for text, spaces in logged[-1:]] == (
        [] if error.token is None else [(error.reason, error.column)]
    )
