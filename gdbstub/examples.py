"""Examples for the help of each command: what the end of `gdbstub COMMAND --help` and `monitor help VERB` show.

Rules: text only; README shows the former too (see tests.support.readme), and a test runs each line of the latter.
"""

from __future__ import annotations

from typing import Final

EXAMPLES: Final = {
    "boot": """\
examples:
  gdbstub boot
      Debian's kernel and a shell on this terminal; in another one: gdb -ex 'target remote :1234'
  gdbstub boot i386 --wait --console none
      stopped at the first instruction until gdb has come, for `break start_kernel`
  gdbstub boot --probe 'p:open do_sys_openat2 file=+0($arg2):string' --trace - --exec 'cat /proc/version'
      a probe, a command for the guest's shell, the trace as text
  gdbstub boot --console none --no-listen --until '^/ # ' --snapshot shell.snap
  gdbstub boot --restore shell.snap --exec 'ls /'
      boot once, go on from the prompt in less than a second
""",
    "load": """\
examples:
  gdbstub load embedded --wait
      our own small kernel, stopped at its first instruction until gdb has come
  gdbstub load kernel.elf --no-listen --until 'tests passed' --budget 2G --log int
      an ELF or multiboot kernel, unattended: 0 if the text came, 1 if not
  gdbstub load boot.bin --base 0x7c00 --bits 16 --log int,io --log-file boot.log
      a flat binary in real mode, with interrupts and port accesses in a log
""",
    "fetch": """\
examples:
  gdbstub fetch i386
  gdbstub fetch amd64 --package 'linux-image-6.12*-cloud-amd64-unsigned' --print
  gdbstub fetch i386 --package 'linux-image-6.1.0-*-686-pae-unsigned' --debug
      what ps, maps and their like need of a kernel that does not say it itself
""",
    "drgn": """\
examples:
  gdbstub drgn shell.snap
      then, say: print_dmesg(); for task in for_each_task(): print(task.pid, task.comm)
""",
    "monitor": """\
examples:
  gdbstub monitor :1234 help
  gdbstub monitor :1234 kprobe add 'p:open do_sys_openat2 file=+0($arg2):string'
  gdbstub monitor :1234 trace 20
""",
    "check": """\
examples:
  gdbstub check probes.txt
      every line as the kernel would take it, one after the other
  echo 'p vfs_read file->f_flagz' | gdbstub check - --kernel 'linux-image-6.12*-cloud-amd64-unsigned' --json
""",
    "symbols": """\
examples:
  gdbstub symbols 'vfs_*'
  gdbstub symbols ./vmlinuz do_sys_openat2
""",
    "report": """\
examples:
  gdbstub report opens.jsonl --flame opens.svg
""",
    "replay": """\
examples:
  gdbstub boot --restore shell.snap --log-rsp session.jsonl
  gdbstub replay session.jsonl
      0 if everything happens again, instruction for instruction, 1 with the first difference
""",
    "demo": """\
examples:
  gdbstub demo
""",
}

MONITOR_EXAMPLES: Final = {
    "echo": """\
  The files are those of /sys/kernel/tracing; `ls` shows them. > begins a file anew, >> adds to it.

  an event and its records; '-:open' to kprobe_events takes it away when it is disabled and has no triggers
    echo 'p:open do_sys_openat2 file=+0($arg2):ustring flags=+0($arg3):x64' > kprobe_events
    echo 1 > events/kprobes/open/enable
    cat trace

  a filter, for fewer records: == != < <= > >= & of numbers, == != ~ (a glob) of strings, && || ! ( ); 0 for none
    echo 'file ~ "/etc/*" && common_pid > 1' > events/kprobes/open/filter

  triggers, what else a hit does: COMMAND[:COUNT] [if FILTER]; '!COMMAND' takes one away
    traceon  traceoff  snapshot  stacktrace  enable_event:GROUP:EVENT  disable_event:GROUP:EVENT
    echo 'stacktrace:5 if file == "/etc/passwd"' > events/kprobes/open/trigger
    echo '!stacktrace' > events/kprobes/open/trigger

  a histogram: hist:keys=FIELD[.MODIFIER],...[:vals=FIELD,...][:sort=FIELD[.descending],...][:size=N][:pause|cont|clear]
    of keys .hex .sym .sym-offset .execname .syscall .log2 .buckets=N; of values .hex .percent .graph; > ends older ones
    echo 'hist:keys=common_pid.execname,file:sort=hitcount.descending' > events/kprobes/open/trigger
    echo 'hist:keys=common_stacktrace if file ~ "/etc/*"' >> events/kprobes/open/trigger
    cat events/kprobes/open/hist

  actions that no kernel has: stop the debugger; memory into the trace; set a register or memory; leave with a value
    echo 'stop:1 if file == "/etc/shadow"' >> events/kprobes/open/trigger
    echo 'dump:+0($arg2),32 if comm == "sh"' >> events/kprobes/open/trigger
    echo 'set:+0($arg3):u64=0 if file ~ "/etc/*"' >> events/kprobes/open/trigger
    echo 'set:%si=0 if common_pid == 4000' >> events/kprobes/open/trigger
    echo 'return:-EACCES if file ~ "*/secret"' >> events/kprobes/open/trigger
""",
}
