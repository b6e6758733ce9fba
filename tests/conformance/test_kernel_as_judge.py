"""A Linux guest traces itself while we trace it: the same definitions, at the same places, at the same time."""

from __future__ import annotations

import base64
import re

import pytest

from emu import GuestMachine
from probes import Manager, rawtext
from probes.tracefs import Tracefs
from tests.support.kernels import run_shell

# A return probe of the guest's replaces the return address, which its own $stack0 then shows and ours does not: so no
# function has both, and none with a return probe is left by a jump to another. Probes on an ENDBR stand behind it there
# and on it here, so what is defined behind it comes first, which is met last.
DEFINITIONS = r"""
p:j01 do_sys_openat2 file=+0($arg2):ustring
p:j02 do_sys_openat2 file=+u0($arg2):string dfd=$arg1:s32 dfu=$arg1:u32 dfx=$arg1:x32
p:j03 do_sys_openat2 a=%di b=%si:x64 c=%dx:u64 d=%cx e=%r8 f=%r9 g=%bx h=%r12:u8 i=%r13:s16 j=%cs:u16 k=%ss
p:j04 do_sys_openat2 s0=$stack0:symbol s1=$stack1 s2=$stack2:x32 s3=$stack3:s8 st=$stack
p:j05 do_sys_openat2 c=$comm imm=\1 neg=\-5:s32 hex=\0xff:x8 txt=\"hello"
p:j06 do_sys_openat2 ban=@linux_proc_banner+3:string first=@linux_proc_banner:char arr=@linux_proc_banner:x8[8]
p:j07 do_sys_openat2 fl=+0($arg3):u64 mode=+8($arg3):x64 b=+0($arg3):b4@2/32 b2=+0($arg3):b1@15/16 b3=+0($arg3):b8@0/64
p:j08 do_sys_openat2 name8=+0($arg2):x8[6] ch=+0($arg2):char[4] w=+0($arg2):u16 s=+1($arg2):s8
p:j09 do_sys_openat2 bad=+0($arg1):string bad2=+0(+0($arg1)):u32 bad3=+0($arg1):u64[2] argv=+0($stack):x64[3]
r:j10 do_filp_open ret=$retval rets=$retval:s32 retx=$retval:x8 retu=$retval:u16
p:j15 vfs_read+4 count=$arg3:u32
p:j11 vfs_read file buf count pos
p:j12 vfs_read $arg*
p:j13 vfs_read name=file->f_path.dentry->d_name.name:string ino=file->f_inode->i_ino mode=file->f_mode
p:j14 vfs_read sym=+0($stack):symbol ss=+0($stack):symstr ip=%ip:symbol fl=%flags
r:j16 __x64_sys_read ret=$retval
r:j17 ksys_write%return ax=%ax:s32 c=$comm ret=$retval:x8
p:j18 vfs_open name=+0(+0x28(+8($arg1))):string d=$arg1 f=$arg2
p:j19 vfs_open dn=path->dentry->d_name.name:string par=path->dentry->d_parent->d_name.name:string fl=file->f_flags:x32
r:j20 vfs_open ret=$retval:s32 path
p:j21 getname_flags filename:ustring flags
p:j22 kmem_cache_alloc_noprof size=%si:x32
p:j23 fput f=%di d=$arg1:%pD
p:j24 __x64_sys_openat di=+112($arg1):s32 si=+104($arg1):x64 path=+u0(+104($arg1)):string nr=+120($arg1):u32
p:j25 __x64_sys_write fd=+112($arg1):u32 n=+96($arg1):u64 data=+u0(+104($arg1)):string
p:j26 vfs_write $arg*
p:j27 dput dn=dentry->d_name.name:string len=dentry->d_name.len:u32
p:j28 do_exit code=$arg1:x32 c=$comm
p:j29 vfs_fstat fd=$arg1:s32 stat=$arg2
p:j30 exit_mmap mm=$arg1 users=mm->mm_users.counter:s32
p:j31 do_filp_open dfd=$arg1:s32 name=pathname->name:string u=pathname->uptr
p:j32 path_openat nd=$arg1
r:j33 alloc_empty_file flags cred ret=$retval:u64
p:j34 do_dentry_open f=$arg1 ino=+0x40(%di):u64
""".strip()
TRACING = "/sys/kernel/tracing"
WORK = "cat /proc/version >/dev/null; head -c 300 /init >/dev/null; wc /etc/nothing; ls -d /bin"


def events(text: str, names: str = "cat|head|wc|ls") -> list[str]:
    """Each record of the commands that a test runs, from their fork on: process, context, event, without its time.

    A name is not compared: the guest's trace shows a process by the name it had last.
    """
    commands = set(re.findall(rf"^ *(?:{names})-(\d+) ", text, re.MULTILINE))
    records = re.split(r"^(?= *\S+-\d+ +\[000\])", text, flags=re.MULTILINE)
    found = (re.match(r" *\S+-(\d+) +(\[000\] \S+) +\d+\.\d+: (.*)", record, re.DOTALL) for record in records)
    return [f"{one[1]} {one[2]} {one[3].rstrip()}" for one in found if one is not None and one[1] in commands]


@pytest.mark.parametrize("kernel", ["6.12"], indirect=True)
def test_the_guests_own_trace_is_ours(linux: GuestMachine) -> None:
    """Same hits, arguments and order for 34 definitions of every kind; the guest's probes stand where ours do."""
    manager = Manager(linux)
    ours = Tracefs(manager)
    ours.write("kprobe_events", DEFINITIONS, append=False)
    run_shell(linux, f"mkdir -p {TRACING}; mount -t tracefs t {TRACING}; cat > /defs << 'END'\n{DEFINITIONS}\nEND")
    run_shell(linux, f'while read -r line; do echo "$line" >> {TRACING}/kprobe_events; done < /defs')
    assert run_shell(linux, f"cat {TRACING}/kprobe_events").split("\n") == ours.read("kprobe_events").splitlines()
    ours.write("events/kprobes/enable", "1", append=False)
    switch = f"{TRACING}/events/kprobes/enable"
    run_shell(linux, f"echo 1 > {switch}; {WORK}; echo 0 > {switch}")
    ours.write("events/kprobes/enable", "0", append=False)
    theirs = events(run_shell(linux, f"cat {TRACING}/trace", budget=2_000_000_000))
    mine = events(ours.read("trace"))
    assert {line.split(": ")[0].split()[-1] for line in theirs} == {
        line.split(":")[1].split()[0] for line in DEFINITIONS.splitlines()
    }
    assert mine == theirs


# Bytes that are no UTF-8, some that are, control characters and a newline; in names of files and of a program.
BYTES_DEFINITIONS = r"""
p:b1 do_sys_openat2 file=+0($arg2):ustring c=+0($arg2):char[12]
p:b2 vfs_open dn=path->dentry->d_name.name:string
""".strip()
BYTES_SETUP = (
    r"f=/tmp/$(printf 'a\377\303\251\033\001b\nc\td\200'); g=/tmp/$(printf 'z\376'); "
    """echo '#!/bin/sh' > $g; chmod +x $g; : > "$f" """
)
BYTES_COMMANDS = "cat|z\xfe"
BYTES_WORK = "$g; cat \"$f\"; cat /tmp/$(printf '\\303\\251\\377')"


@pytest.mark.parametrize("kernel", ["6.12"], indirect=True)
def test_strings_are_shown_byte_for_byte(linux: GuestMachine) -> None:
    """Whatever the bytes, in the trace, in `char`s and in a histogram, whose columns are counted in bytes; so is the
    name of a process, which the kernel shows as it was last."""
    ours = Tracefs(Manager(linux))
    ours.write("kprobe_events", BYTES_DEFINITIONS, append=False)
    run_shell(linux, f"mkdir -p {TRACING}; mount -t tracefs t {TRACING}; T={TRACING}/events/kprobes; {BYTES_SETUP}")
    for line in BYTES_DEFINITIONS.splitlines():
        run_shell(linux, f"echo '{line}' >> {TRACING}/kprobe_events")
    run_shell(linux, "echo hist:keys=file > $T/b1/trigger; echo 1 > $T/enable")
    ours.write("events/kprobes/b1/trigger", "hist:keys=file", append=False)
    ours.write("events/kprobes/enable", "1", append=False)
    run_shell(linux, f"{BYTES_WORK}; echo 0 > $T/enable")
    ours.write("events/kprobes/enable", "0", append=False)

    def theirs(file: str) -> bytes:
        return base64.b64decode(run_shell(linux, f"base64 {file}", budget=2_000_000_000))

    def mine(file: str) -> bytes:
        return rawtext.encode(ours.read(file))

    shown = events(theirs(f"{TRACING}/trace").decode("latin-1"), BYTES_COMMANDS)
    assert events(mine("trace").decode("latin-1"), BYTES_COMMANDS) == shown
    assert any('file="/tmp/a\xff\xc3\xa9\x1b\x01b\nc\td\x80" c={' in one and "'\xff','\xc3'" in one for one in shown)
    assert b"              z\xfe-" in mine("trace")
    rows = re.findall(rb"^\{ file: /tmp/.*?\n(?=\{|\n)", theirs("$T/b1/hist"), re.M | re.S)
    assert len(rows) == 3
    assert [row for row in rows if row not in mine("events/kprobes/b1/hist")] == []


HISTOGRAMS_DEFINITIONS = r"""
p:h1 do_sys_openat2 dfd=$arg1:s32 file=+0($arg2):ustring n=%si:x64
r:h2 vfs_read n=$retval:s32 c=$arg3:u32
p:h3 do_filp_open dfd=$arg1:s32 arr=+0($arg2):x8[4]
""".strip()
HISTOGRAMS = """
h1 hist:keys=file
h1 hist:keys=common_pid,dfd:sort=dfd,hitcount.descending
h1 hist:keys=n.log2,file:vals=dfd,n.percent:sort=hitcount
h1 hist:keys=common_pid.execname:sort=common_pid.descending:size=200
h2 hist:keys=c,n:vals=n.hex,c.graph:sort=n.descending,c
h2 hist:keys=n.buckets=100,cpu:sort=cpu
h1 hist:keys=file.sym,dfd.hex
h1 hist:keys=file.sym-offset:sort=file
h1 hist:keys=file.syscall
h3 hist:keys=dfd.hex,common_pid.buckets=3
h3 hist:keys=__probe_ip.sym-offset,common_pid:sort=__probe_ip
h3 hist:keys=__probe_ip.sym:vals=common_timestamp.usecs:nohitcount
h3 hist:keys=__probe_ip.log2
h3 hist:keys=common_pid.syscall
h3 hist:keys=arr
""".strip()
HISTOGRAMS_WORK = "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14; do tail /tmp/f$i /tmp/g$((i%3)) >/dev/null 2>&1; done"


@pytest.mark.parametrize("kernel", ["6.12", "i386"], indirect=True)
def test_histograms_are_the_kernels_own(linux: GuestMachine, kernel: str) -> None:
    """Every line of their files, equal rows in the kernel's order, numbers as wide as its own; without the sums of
    times, which differ by those that the guest's own probes take."""
    definitions, histograms = HISTOGRAMS_DEFINITIONS, HISTOGRAMS.splitlines()
    if kernel == "i386":  # of 6.1, which has no $argN on return probes and not yet all modifiers
        for name, register in (("$arg1", "%ax"), ("$arg2", "%dx"), ("$arg3", "%cx"), ("%si:x64", "%cx")):
            definitions = definitions.replace(name, register)
        histograms = [line for line in histograms if not re.search("percent|graph|nohitcount|syscall", line)]
    ours = Tracefs(Manager(linux))
    ours.write("kprobe_events", definitions, append=False)
    run_shell(linux, f"mkdir -p {TRACING}; mount -t tracefs t {TRACING}; T={TRACING}/events/kprobes; stty cols 999")
    run_shell(linux, "for i in 1 3 5 7 9 11 13; do echo $i > /tmp/f$i; done")
    for line in definitions.splitlines():
        run_shell(linux, f"echo '{line}' >> {TRACING}/kprobe_events")
    for line in histograms:
        event, _, trigger = line.partition(" ")
        ours.write(f"events/kprobes/{event}/trigger", f'{trigger} if comm == "tail"', append=True)
        run_shell(linux, f"echo '{trigger} if comm == \"tail\"' >> $T/{event}/trigger")
    run_shell(linux, HISTOGRAMS_WORK)
    for event in ("h1", "h2", "h3"):
        theirs = run_shell(linux, f"cat $T/{event}/hist", budget=2_000_000_000).rstrip()
        mine = ours.read(f"events/kprobes/{event}/hist").rstrip()
        assert "hitcount: " in mine
        assert re.sub("stamp: *[0-9]+", "stamp", mine) == re.sub("stamp: *[0-9]+", "stamp", theirs)
