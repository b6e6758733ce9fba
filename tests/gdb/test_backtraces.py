"""`bt` in a running kernel, judged by the kernel: its own unwinder is called at the stop, on its registers."""

from __future__ import annotations

from gdbstub.automation import Frame, GdbSession, gdb_session
from gdbstub.serving import Served

BUSY = "while true; do ls /proc/1; echo x > /tmp/f; cat /tmp/f | wc; sleep 0.01; done"
COMMON = [
    "do_sys_openat2", "path_openat", "vfs_write", "vfs_read", "pipe_read", "iterate_dir", "handle_mm_fault",
    "exc_page_fault", "wp_page_copy", "kmem_cache_alloc", "kmem_cache_free", "__schedule", "wake_up_new_task",
    "begin_new_exec", "do_exit", "hrtimer_interrupt", "tick_program_event", "scheduler_tick", "serial8250_handle_irq",
    "handle_softirqs",
]  # fmt: skip
"""System calls, page faults, interrupts on top of either and of the idle loop, the ends and beginnings of tasks."""
PLACES = {64: [*COMMON, "do_syscall_64"], 32: [*COMMON, "__do_fast_syscall_32"]}
SYSTEM_CALL_ENTRY = {64: "entry_SYSCALL_64", 32: "entry_SYSENTER_32"}
KERNEL = {64: 1 << 63, 32: 0xC0000000}
"""Lowest address."""
SIGNAL_FRAME = "<signal handler called>"
"""gdb's name of a frame that the processor made."""
STRUCT_PT_REGS = {
    64: ("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi",
         "orig_ax", "rip", "cs", "eflags", "rsp", "ss"),
    32: ("ebx", "ecx", "edx", "esi", "edi", "ebp", "eax", "ds", "es", "fs", "gs", "orig_ax", "eip", "cs", "eflags",
         "esp", "ss"),
}  # fmt: skip
"""arch/x86/include/asm/ptrace.h"""
LONGEST = 64
"""Entries; a backtrace of the idle loop through two interrupts has 40."""


def guests_own(session: GdbSession, bits: int) -> list[int]:
    """What stack_trace_save_regs() in the guest finds, called on the registers as they are: addresses, inside out."""
    word = bits // 8
    names = STRUCT_PT_REGS[bits]
    values = session.registers(*(name for name in names if name != "orig_ax"))
    regs = b"".join(values.get(name, 0).to_bytes(word, "little") for name in names)
    sp = values["rsp" if bits == 64 else "esp"]
    at, found = sp - 0x700, sp - 0x600
    session.write_memory(at, regs)
    session.execute(f"set $sp={sp - 0x780}")
    if bits == 64:
        count = session.evaluate(
            f"((unsigned (*)(long, long, int, int))stack_trace_save_regs)({at}, {found}, {LONGEST}, 0)"
        )
    else:  # the kernel is built with -mregparm=3
        for register, value in (("eax", at), ("edx", found), ("ecx", LONGEST)):
            session.execute(f"set ${register}={value}")
        count = session.evaluate("((unsigned (*)(int))stack_trace_save_regs)(0)")
        for register in ("eax", "edx", "ecx"):
            session.execute(f"set ${register}={values[register]}")
    session.execute(f"set $sp={sp}")
    data = session.read_memory(found, int(count) * word)
    return [int.from_bytes(data[place : place + word], "little") for place in range(0, len(data), word)]


def frame_is_made(session: GdbSession) -> None:
    """Step to where a function has its frame pointer, by which the i386 kernel unwinds."""
    while len(set(session.registers("ebp", "esp").values())) == 2:
        session.resume("stepi")
        session.wait_stop()


def assert_is_true(frames: list[Frame], own: list[int], bits: int) -> None:
    """`frames` are those of the guest's `own` trace, and then the interrupted program's, which is gdb's to guess at.

    By frame pointers the guest misses one caller of a function that was interrupted before it had made its frame; gdb
    does not. Frames the processor made have no name in gdb's lists.
    """
    pcs = [frame.pc for frame in frames]
    ours = 0
    for place, pc in enumerate(own):
        just_interrupted = ours > 1 and frames[ours - 2].function == SIGNAL_FRAME
        if pcs[ours] != pc and bits == 32 and just_interrupted:
            ours += 1
        assert pcs[ours] == pc, (place, [hex(pc) for pc in own], [(hex(frame.pc), frame.function) for frame in frames])
        ours += 1
    assert all(pc < KERNEL[bits] for pc in pcs[ours : ours + 1]), frames[ours:]


def stop_in(session: GdbSession, place: str, bits: int) -> None:
    """At the beginning of that function, or on i386 where it has made its frame."""
    session.break_at(f"*{place}", temporary=True)
    session.resume()
    assert session.wait_stop().function == place
    if bits == 32:
        frame_is_made(session)


def test_backtraces_are_those_of_the_guests_own_unwinder(new_gdb: str, bits: int, linux: Served):
    """In twenty places: every frame's address, through interrupts and system-call entry, down to the program or the
    bottom of the stack."""
    linux.type(BUSY)
    with gdb_session(linux.address, gdb=new_gdb) as session:
        for place in PLACES[bits]:
            stop_in(session, place, bits)
            frames = session.backtrace(LONGEST)
            assert_is_true(frames, guests_own(session, bits), bits)


def test_callers_of_return_probed_kernel_functions(new_gdb: str, linux: Served):
    """A chain of callers is the same with two of them return-probed, whichever way their returns are followed."""
    linux.type(BUSY)
    with gdb_session(linux.address, gdb=new_gdb) as session:
        session.break_at("rw_verify_area")

        def callers() -> list[str | None]:
            while True:
                session.resume()
                session.wait_stop()
                found = [frame.function for frame in session.backtrace(LONGEST)]
                if "ksys_read" in found:
                    return found[: found.index(SIGNAL_FRAME)]

        bare = callers()
        for way in ("--trampoline", "--shadow"):
            for function in ("vfs_read", "ksys_read"):
                session.monitor(f"kretprobe add {way} r:{function[0]} {function}")
            callers()  # of a call that may be older than the probes
            assert callers() == bare
            assert "0 live" not in session.monitor("kretprobe info v")
            session.monitor("kretprobe del v")
            session.monitor("kretprobe del k")


def test_entry_code_leads_to_what_was_interrupted_or_ends(new_gdb: str, bits: int, linux: Served):
    """At the kernel's first instructions: where the processor has pushed a frame, to its pc, and else nowhere."""
    linux.type(BUSY)
    word = bits // 8
    with gdb_session(linux.address, gdb=new_gdb) as session:
        for place in (SYSTEM_CALL_ENTRY[bits], "asm_exc_page_fault", "asm_common_interrupt"):
            session.break_at(f"*{place}", temporary=True)
            session.resume()
            session.wait_stop()
            frames = session.backtrace(LONGEST)
            if place == SYSTEM_CALL_ENTRY[bits]:
                assert len(frames) == 1
            else:  # above the error code or the interrupt's number
                sp = session.registers("rsp" if bits == 64 else "esp").popitem()[1]
                assert frames[1].pc == int.from_bytes(session.read_memory(sp + word, word), "little")
