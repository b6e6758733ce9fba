"""The embedded guest on the machine: it boots, does each workload, and its own counts add up."""

from __future__ import annotations

from itertools import pairwise

import pytest

from emu.iface import ImageError
from emu.images.embedded import embedded_guest, embedded_kernel, embedded_program, layout
from emu.machine import Machine
from emu.stops import Breakpoint, Budget, GuestExit, Halted, PowerOff, Reset, Stop, TripleFault
from tests.support.embedded import Guest, power_on

ENOUGH = 1_000_000
"""Instructions: several times what any workload below takes."""
TICK_NS = 1_000_000_000 // layout.HZ
VARIANTS = [(64, False), (32, False), (32, True)]


def finish(bits: int, append: str, pae: bool = False) -> Guest:
    """The guest after `append` and a debug exit."""
    machine = power_on(bits, f"{append} exit=0", pae=pae)
    assert machine.run(ENOUGH) == GuestExit(0)
    return Guest(machine, bits)


def stop_at(machine: Machine, guest: Guest, name: str) -> None:
    """Run to the function `name`."""
    machine.insert_breakpoint(guest.address(name))
    assert machine.run(ENOUGH) == Breakpoint(guest.address(name))
    machine.remove_breakpoint(guest.address(name))


def arguments(machine: Machine, bits: int) -> tuple[int, int, int]:
    """The first three arguments at a function's entry, by the guest's convention."""
    names = ("rdi", "rsi", "rdx") if bits == 64 else ("eax", "edx", "ecx")
    first, second, third = (machine.registers.read(name) for name in names)
    return first, second, third


# ------------------------------------------------------------------------------------------------------------ booting


@pytest.mark.parametrize(("bits", "pae"), VARIANTS)
def test_boot_prints_lines_up_to_ready(bits: int, pae: bool) -> None:
    """The console holds exactly the boot lines when the command line's first word ends the run."""
    guest = finish(bits, "", pae)
    assert guest.machine.console.text.splitlines() == [
        f"embedded: {bits}-bit kernel",
        "embedded: command line:  exit=0",
        "embedded: ready",
    ]


@pytest.mark.parametrize(("bits", "pae"), VARIANTS)
def test_kernel_runs_in_the_upper_half_and_a_null_pointer_is_unmapped(bits: int, pae: bool) -> None:
    """Paging is the guest's own: the image at its linked address, nothing at 0."""
    guest = finish(bits, "", pae)
    memory = guest.machine.memory
    assert memory.translate(guest.address("start_kernel")) == guest.address("start_kernel") - layout.KERNEL_OFFSET[bits]
    assert memory.translate(0) is None


@pytest.mark.parametrize(("bits", "pae"), VARIANTS)
def test_two_runs_end_at_the_same_instruction_with_the_same_memory(bits: int, pae: bool) -> None:
    """A run with interrupts, sleeping and paging in it is repeatable to the instruction."""
    first, second = (finish(bits, "calls=2 sleep=2 faults=1", pae).machine for _ in range(2))
    assert first.clock.instructions == second.clock.instructions
    assert first.ram_sha256() == second.ram_sha256()


def test_current_points_to_the_task_that_runs() -> None:
    """The pointer `current` and struct task are what `layout` says."""
    guest = finish(64, "")
    assert guest.string(guest.member(guest.value("current"), "TASK", "comm")) == "init"


@pytest.mark.parametrize(("bits", "pae"), VARIANTS)
def test_functions_have_sizes_and_do_not_overlap(bits: int, pae: bool) -> None:
    """Symbols cover their functions, so that an address finds the one it is in."""
    functions = sorted(
        (symbol.address, symbol.size) for symbol in embedded_guest(bits, pae=pae).symbols if symbol.kind == "T"
    )
    assert all(size > 0 for _, size in functions)
    assert all(start + size <= after for (start, size), (after, _) in pairwise(functions))


# ---------------------------------------------------------------------------------------------------------- workloads


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize(
    ("append", "expected"),
    [
        ("exit=3", GuestExit(3)),
        ("reset", Reset()),
        ("poweroff", PowerOff()),
    ],
)
def test_word_ends_the_machine(bits: int, append: str, expected: Stop) -> None:
    """Each way of asking the hardware to end is seen as that stop."""
    assert power_on(bits, append).run(ENOUGH) == expected


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize(
    ("append", "said"),
    [
        ("halt", "embedded: ready"),
        ("panic", "embedded: panic: asked for by the command line"),
        ("doublefault", "embedded: panic: double fault"),
    ],
)
def test_word_halts_for_good(bits: int, append: str, said: str) -> None:
    """HLT with interrupts off ends the run, after the guest has said why."""
    machine = power_on(bits, append)
    assert isinstance(machine.run(ENOUGH), Halted)
    assert machine.console.text.splitlines()[-1] == said


@pytest.mark.parametrize("bits", [64, 32])
def test_triple_fault_names_the_first_vector(bits: int) -> None:
    """Without an IDT, ud2 is a triple fault."""
    stop = power_on(bits, "triple").run(ENOUGH)
    assert isinstance(stop, TripleFault)
    assert stop.vector == 6


@pytest.mark.parametrize("bits", [64, 32])
def test_idle_lets_time_pass_in_hlt(bits: int) -> None:
    """An idle guest executes little: most of its time is skipped."""
    machine = power_on(bits, "idle")
    assert machine.run(20_000) == Budget(20_000)
    assert machine.clock.now_ns > 10 * TICK_NS


@pytest.mark.parametrize("bits", [64, 32])
def test_loop_is_preempted_so_that_both_tasks_compute(bits: int) -> None:
    """Two tasks that never give up the processor both get it, by the timer alone."""
    machine = power_on(bits, "loop")
    machine.run(3 * TICK_NS)
    guest = Guest(machine, bits)
    counts = guest.address("busy_counts")
    assert guest.word(counts) > 100_000
    assert guest.word(counts + bits // 8) > 100_000


def test_unknown_word_is_named() -> None:
    """A mistyped workload is reported on the console, with what follows it."""
    machine = power_on(64, "opns=3 exit=0")
    machine.run(20_000)
    assert "embedded: unknown workload: opns=3 exit=0\nembedded: done\n" in machine.console.text


@pytest.mark.parametrize("bits", [64, 32])
def test_typed_line_is_echoed_and_answered(bits: int) -> None:
    """Receive interrupts bring a line in; the idle guest wakes for it."""
    machine = power_on(bits)
    machine.run(20_000)
    machine.devices.uart.receive(b"hello\r")
    machine.run(20_000)
    assert machine.console.text.endswith("embedded: done\nhello\necho: hello\n")


# ----------------------------------------------------------------------------------------------------------- counters

ONCE = (
    *("exercise", "target2", "recursed_target", "nested_target", "testprobe", "sum8", "copy_bytes", "strlen", "strcmp"),
    *("memcpy", "loop_target", "branch_target", "indirect_target", "jump_table_target", "ret_imm_target"),
    *("flags_target", "skip_frames", "atomic_target", "sse_target", "x87_target", "endbr_target", "tail_target"),
    *("stack_segment_target", "port_target", "straddling_target", "fixup_exception"),
)
"""Called once by each exercise(i), and by nobody else before the first tick."""


@pytest.mark.parametrize(("bits", "pae"), VARIANTS)
def test_calls_count_what_exercise_calls(bits: int, pae: bool) -> None:
    """calls=3 calls everything three times, some functions more often by way of others."""
    counters = finish(bits, "calls=3", pae).counters
    more = {"target": 9, "inner_target": 6, "fib": 75, "skipped_target": 9, "probe_read": 6}
    expected = dict.fromkeys(ONCE, 3) | more
    assert {name: counters.get(name, 0) for name in expected} == expected


def test_results_are_the_same_on_both_word_sizes() -> None:
    """What the functions return does not depend on the word size: sums modulo 2**32 are equal."""
    sums = [finish(bits, "calls=5 patch=2").value("checksum") & 0xFFFF_FFFF for bits in (64, 32)]
    assert sums[0] == sums[1]


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize(
    ("append", "expected"),
    [
        ("sleep=3", {"sleeping_target": 6}),
        ("deaths=4", {"dying_target": 4, "do_exit": 4}),
        ("traps=2", {"int3": 2, "traps": 6, "fixup_exception": 6}),
        ("patch=2", {"patched_target": 4}),
        ("opens=12", {"sys_open": 12, "strncpy_from_user": 12, "do_open": 12, "strcmp": 36}),
        ("getpids=5", {"sys_getpid": 5}),
        ("crash", {"kill_current": 1, "do_exit": 1}),
        # the program's pages 0 and 1, the data's 0 .. 4, and after the eviction of those seven 0 and 1 again
        ("faults=1", {"end_page_read": 9, "drop_pages": 2, "unmap_page": 7, "disk_readpages": 4, "disk_readpage": 1}),
        # one page a read: the data's 0 .. 3 each give up their neighbour, and so does the program's 0, twice; the
        # data's 4 has none. Out of the cache go the six given up and the six evicted
        ("partial faults=1", {"end_page_read": 7, "disk_readpages_partial": 6, "remove_from_page_cache": 12}),
        ("sum=2", {"sum_file": 2, "end_page_read": 3}),
        # in page 1 of /big, its neighbour with it, and in a page beyond 4 GiB
        ("big=3", {"disk_readpages": 2, "disk_readpage": 1, "end_page_read": 5}),
        # the fault of page 0 finds its read failed and asks again, once for each page
        ("ioerrors=2 user=1", {"end_page_read": 5, "remove_from_page_cache": 2}),
        ("drop user=1 drop user=1", {"end_page_read": 6, "drop_pages": 4, "unmap_page": 3}),
        ("cow=1 user=2", {"break_cow": 1, "do_anonymous_page": 2}),
        ("both=2", {"sum_file": 2, "sys_write": 2}),
        ("user=2", {"sys_write": 1, "disk_readpages": 1, "disk_readpage": 1, "end_page_read": 3}),
    ],
)
def test_workload_counts(bits: int, append: str, expected: dict[str, int]) -> None:
    """Each workload calls what it says as often as it says."""
    counters = finish(bits, append).counters
    assert {name: counters.get(name, 0) for name in expected} == expected


@pytest.mark.parametrize("bits", [64, 32])
def test_two_tasks_sleep_in_one_function_at_a_time(bits: int) -> None:
    """In sleep=1 the helper enters sleeping_target before init has left it: both return a tick or two later."""
    machine = power_on(bits, "sleep=1 exit=0")
    guest = Guest(machine, bits)
    stop_at(machine, guest, "sleeping_target")
    stop_at(machine, guest, "sleeping_target")
    assert guest.value("count_sleeping_target") == 1
    assert guest.member(guest.address("init_task"), "TASK", "state") == 2


@pytest.mark.parametrize("bits", [64, 32])
def test_ring_3_results_arrive(bits: int) -> None:
    """faults=1 adds up the first byte of each page through both mappings; the pages hold 'A' to 'E'."""
    assert finish(bits, "faults=1").value("work_result") == 2 * sum(b"ABCDE")


@pytest.mark.parametrize("bits", [64, 32])
def test_file_reads_back_as_it_was_put_there(bits: int) -> None:
    """sum=1 reads /bin/program through the page cache: every byte is the assembled program's."""
    assert finish(bits, "sum=1").value("work_result") == sum(embedded_program(bits).code)


@pytest.mark.parametrize("bits", [64, 32])
def test_writer_is_counted_and_can_be_denied(bits: int) -> None:
    """write=N changes the disk; with a negative i_writecount it is told ETXTBSY and changes nothing."""
    wrote = finish(bits, "write=7 sum=1")
    assert wrote.value("work_result") == sum(embedded_program(bits).code) + 7
    machine = power_on(bits, "write=7 exit=0")
    guest = Guest(machine, bits)
    stop_at(machine, guest, "do_write")
    count = guest.address("program_inode") + layout.offset(bits, "INODE", "i_writecount")
    machine.memory.write(count, (-1 & (1 << bits) - 1).to_bytes(bits // 8, "little"))
    assert machine.run(ENOUGH) == GuestExit(0)
    assert guest.value("work_result") == -26 & (1 << bits) - 1
    assert machine.memory.read(guest.address("disk_program") + 8191, 1) == b"\0"


# ------------------------------------------------------------------------------------------------- worth probing: how


@pytest.mark.parametrize("bits", [64, 32])
def test_frame_pointers_lead_back_to_the_start(bits: int) -> None:
    """At inner_target's entry the chain of frame pointers names every caller up to the task's first function."""
    machine = power_on(bits, "calls=1")
    guest = Guest(machine, bits)
    stop_at(machine, guest, "inner_target")
    stack, frame = (machine.registers.read(name) for name in (("rsp", "rbp") if bits == 64 else ("esp", "ebp")))
    callers = [guest.word(stack)]
    while frame:
        callers.append(guest.word(frame + bits // 8))
        frame = guest.word(frame)
    found = [machine.symbols.find(address) for address in callers]
    names = [place[0].name for place in found if place is not None]
    assert names == ["nested_target", "exercise", "do_calls", "run_workloads", "ret_from_fork"]


@pytest.mark.parametrize("bits", [64, 32])
def test_do_open_gets_name_and_flags_by_the_c_convention(bits: int) -> None:
    """At its entry the second do_open of opens=2 has "/file/001" and 1 in the argument registers."""
    machine = power_on(bits, "opens=2 exit=0")
    guest = Guest(machine, bits)
    stop_at(machine, guest, "do_open")
    stop_at(machine, guest, "do_open")
    name, flags, _ = arguments(machine, bits)
    assert (guest.string(name), flags) == ("/file/001", 1)


@pytest.mark.parametrize(("bits", "pae"), VARIANTS)
def test_page_has_no_data_until_its_read_completes(bits: int, pae: bool) -> None:
    """At end_page_read's entry the page is locked and empty; when it goes into the page table it holds the file's."""
    machine = power_on(bits, "faults=1 exit=0", pae=pae)
    guest = Guest(machine, bits)
    stop_at(machine, guest, "disk_readpages")
    stop_at(machine, guest, "end_page_read")
    page = arguments(machine, bits)[0]
    frame = guest.member(page, "PAGE", "frame")
    assert guest.member(page, "PAGE", "flags") == 0x3
    assert not any(machine.memory.read_physical(frame, 4096))
    stop_at(machine, guest, "do_set_pte")
    assert guest.member(page, "PAGE", "flags") == 0x5
    assert machine.memory.read_physical(frame, 4096) == embedded_program(bits).code[:4096]


@pytest.mark.parametrize("bits", [64, 32])
def test_pages_are_read_through_the_operations_table(bits: int) -> None:
    """A replaced readpages entry in disk_aops is what gets called: here, a function that panics."""
    machine = power_on(bits, "faults=1 exit=0")
    guest = Guest(machine, bits)
    stop_at(machine, guest, "run_workloads")
    entry = guest.address("disk_aops") + layout.offset(bits, "AOPS", "readpages")
    machine.memory.write(entry, guest.address("do_panic").to_bytes(bits // 8, "little"))
    assert isinstance(machine.run(ENOUGH), Halted)


@pytest.mark.parametrize("bits", [64, 32])
def test_straddling_instruction_crosses_a_page(bits: int) -> None:
    """The `add` of straddling_target starts three bytes before a page boundary."""
    kernel = embedded_kernel(bits)
    start = kernel.offset("straddling_target")
    boundary = (start // 4096 + 1) * 4096
    opcode = b"\x48\x05" if bits == 64 else b"\x05"
    assert kernel.code[boundary - 3 :].startswith(opcode + (0x12345678).to_bytes(4, "little"))


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("append", ["x" * 256, "caf\u00e9", "a\0b"])
def test_bad_command_line_is_refused(append: str) -> None:
    """Too long, not ASCII, or with a NUL: one line."""
    with pytest.raises(ImageError, match="command line must be at most 255 ASCII characters"):
        embedded_guest(64, append)


def test_longest_command_line_fits() -> None:
    """255 characters reach the guest whole."""
    words = "exit=5".rjust(255)
    assert power_on(64, words).run(ENOUGH) == GuestExit(5)


@pytest.mark.parametrize(("bits", "pae"), [(16, False), (64, True)])
def test_variant_that_does_not_exist_is_an_error(bits: int, pae: bool) -> None:
    """There is no 16-bit guest and no 64-bit one with PAE tables."""
    with pytest.raises(ValueError, match="no embedded kernel"):
        embedded_guest(bits, pae=pae)
