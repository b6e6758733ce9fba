"""Relocatable objects: the kernel's samples as guest handlers, gcc's conventions, and what hostile files are told."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu.images.embedded import embedded_guest
from emu.machine import Machine
from emu.paging import walk
from emu.symbols import SymbolTable
from probes import Jprobe, Kprobe, Kretprobe, Manager, ProbeError, Regs
from probes.abi import ABIS, prototype, s8, s32, u64, ulong
from probes.abi import struct as returned_struct
from probes.objects import parse
from tests.support.compile import compile_c, compile_sample
from tests.support.embedded import Guest, power_on

BOOTED, ROUNDS = 30_000, 400_000


class Lab:
    """The embedded guest amid its exercises, with a manager and one object."""

    def __init__(self, bits: int, sample: str | None = None) -> None:
        self.bits = bits
        self.machine = power_on(bits, "calls=1000 idle")
        self.machine.run(BOOTED)
        self.guest = Guest(self.machine, bits)
        self.probes = Manager(self.machine)
        if sample is not None:
            self.names = self.probes.load_object(compile_sample(sample, bits), f"{sample}.o")

    def run(self) -> None:
        self.machine.run(ROUNDS)

    def words(self, name: str, count: int = 1) -> list[int]:
        """Variables of the object, as the guest reads them: through the data half of the window."""
        size = self.bits // 8
        address = self.probes.objects.address(name)
        page = walk(self.machine.ram, self.machine.cpu.tables(), address)
        data = self.machine.ram.map[page.paddr : page.paddr + size * count]
        return list(struct.unpack(f"<{count}{'Q' if size == 8 else 'I'}", data))


@pytest.fixture(params=[64, 32])
def bits(request: pytest.FixtureRequest) -> int:
    return int(request.param)


# ------------------------------------------------------------------------------------------------------- the samples


def test_kprobe_example(bits: int) -> None:
    """Its handlers see address, ip, flags and argument as a kernel's would, and call a function of the guest."""
    lab = Lab(bits, "kprobe_example")
    seen: list[tuple[int, int, int, int]] = []
    after: list[int] = []

    def pre(kp: Kprobe, regs: Regs) -> None:
        seen.append((regs.ip, regs.flags, regs.sp, regs.arg(1)))

    probe = Kprobe(symbol="target", pre_handler=lab.probes.guest.pre("handler_pre"))
    probe.post_handler = lab.probes.guest.post("handler_post")
    check = Kprobe(symbol="target", pre_handler=pre, post_handler=lambda kp, regs: after.append(regs.ip))
    lab.probes.register_many([check, probe])
    lab.run()
    ip, flags, sp, argument = seen[-1]
    address = lab.guest.address("target")
    assert lab.words("before", 7) == [address, ip, flags, sp, argument, len("target"), probe.hits]
    assert lab.words("after", 2) == [address, after[-1]]
    assert lab.words("after", 7)[6] == probe.hits > 100
    assert lab.words("misses") == [0]
    assert ip == address + 1


def test_what_a_guest_handler_sets_is_taken_over(bits: int) -> None:
    """A true pre_handler that returns from the function: the callers get its result."""
    lab = Lab(bits, "kprobe_example")
    results: list[int] = []
    lab.probes.register(
        Kretprobe(kp=Kprobe(symbol="nested_target"), handler=lambda ri, regs: results.append(regs.retval), maxactive=10)
    )
    lab.probes.register(Kprobe(symbol="inner_target", pre_handler=lab.probes.guest.pre("handler_override")))
    lab.run()
    assert set(results) == {4243}


def test_a_guest_handler_that_does_not_return_is_taken_out_of_service(bits: int) -> None:
    """The probe is disabled and says why; the guest ends up where the bare one does."""
    lab, bare = Lab(bits, "kprobe_example"), Lab(bits)
    probe = Kprobe(symbol="target", pre_handler=lab.probes.guest.pre("handler_spin"))
    lab.probes.register(probe)
    lab.run()
    bare.run()
    assert (probe.hits, probe.disabled) == (1, True)
    assert "handler_spin failed" in probe.notes[-1]
    assert lab.guest.value("checksum") == bare.guest.value("checksum")
    assert lab.machine.instructions == bare.machine.instructions


def test_jprobe_example(bits: int) -> None:
    """Eight arguments, in registers and on the stack; nothing after jprobe_return() runs; edits are undone."""
    lab, bare = Lab(bits, "jprobe_example"), Lab(bits)
    last: list[list[int]] = []
    lab.probes.register(
        Kprobe(symbol="sum8", pre_handler=lambda kp, regs: last.append([regs.arg(i) for i in range(1, 9)]))
    )
    probe = Jprobe(kp=Kprobe(symbol="sum8"), entry="jsum8")
    lab.probes.register(probe)
    lab.run()
    bare.run()
    assert lab.words("arguments", 8) == last[-1]
    assert lab.words("calls") == [probe.kp.hits]
    assert lab.words("came_back") == [0]
    assert lab.guest.value("checksum") == bare.guest.value("checksum")


def test_kretprobe_example(bits: int) -> None:
    """Each instance's data travels from entry to return; every third call is declined."""
    lab = Lab(bits, "kretprobe_example")
    kp = Kprobe(symbol="target")
    guest = lab.probes.guest
    probe = Kretprobe(
        kp=kp,
        handler=guest.returned(kp, "ret_handler"),
        entry_handler=guest.returned(kp, "entry_handler"),
        maxactive=20,
        data_size=8,
    )
    results: list[tuple[int, int]] = []
    lab.probes.register(probe)
    lab.probes.register(
        Kretprobe(
            kp=Kprobe(symbol="target"),
            handler=lambda ri, regs: results.append((regs.retval, ri.ret_addr)),
            maxactive=20,
        )
    )
    lab.run()
    (entered,), (declined,), (returned,) = (lab.words(name) for name in ("entered", "declined", "returned"))
    assert (entered, declined, returned) == (kp.hits, probe.declined, probe.returned)
    assert declined == entered // 3 > 30
    value, address = results[-1] if entered % 3 else results[-2]
    assert lab.words("last_value") + lab.words("last_return") == [value, address]
    assert lab.words("last_stamp") == [1000 + entered - (0 if entered % 3 else 1)]


def test_events_run_guest_handlers(bits: int) -> None:
    """--pre, --post and --entry of a definition: the record is made and the function called."""
    lab = Lab(bits, "kprobe_example")
    lab.probes.load_object(compile_sample("jprobe_example", bits), "jprobe_example.o")
    lab.probes.add("kprobe", "p:one target", {"pre": "handler_pre", "post": "handler_post"})
    lab.probes.add("jprobe", "p:two sum8", {"entry": "jsum8"})
    lab.run()
    one, two = lab.probes.status()
    assert (one.kind, two.kind) == ("kprobe", "jprobe")
    assert lab.words("before", 7)[6] == lab.words("after", 7)[6] == one.hits > 100
    assert lab.words("calls") == [two.hits]


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("kprobe", {"pre": "no_such"}, "no symbol no_such"),
        ("kprobe", {"entry": "target2"}, "--entry is not available"),
        ("jprobe", {}, "needs --entry"),
        ("jprobe", {"entry": "no_such"}, "no symbol no_such"),
        ("jprobe", {"pre": "target2", "entry": "target2"}, "--pre is not available"),
    ],
)
def test_options_that_do_not_fit_are_refused(kind: str, options: dict[str, str], reason: str) -> None:
    """Each with its name; nothing is armed."""
    lab = Lab(64)
    with pytest.raises(ProbeError, match=reason):
        lab.probes.add(kind, "p:one target", options)
    assert not lab.probes.status()


# ------------------------------------------------------------------------------------------------------ gcc's own word


@pytest.mark.parametrize(
    ("name", "types", "values", "expected"),
    [
        ("long_first", (u64, s32, s32), (1 << 32 | 2, 3, 4), [2, 1, 3, 4]),
        ("long_second", (s32, u64, s32), (1, 2 << 32 | 3, 4), [1, 3, 2, 4]),
        ("long_third", (s32, s32, u64, s32), (1, 2, 3 << 32 | 4, 5), [1, 2, 4, 3, 5]),
        ("two_longs", (u64, u64, s8), (1 << 32 | 2, 3 << 32 | 4, 5), [2, 1, 4, 3, 5]),
    ],
)
def test_arguments_lie_where_gcc_puts_them(
    name: str, types: tuple[object, ...], values: tuple[int, ...], expected: list[int]
) -> None:
    """regs.call writes them, gcc -m32 -mregparm=3 reads them; a jprobe on the function reads them too."""
    lab = Lab(32, "layouts")
    seen: list[tuple[int, ...]] = []

    def call(kp: Kprobe, regs: Regs) -> None:
        if not seen:
            regs.call(lab.probes.objects.address(name), *values, types=types)
            seen.append(values)

    lab.probes.register(Kprobe(symbol="target", pre_handler=call))
    lab.run()
    assert lab.words("found", len(expected)) == expected


def test_a_variadic_function_of_gccs_finds_its_arguments() -> None:
    """All of them on the stack: cdecl."""
    lab = Lab(32, "layouts")
    lab.probes.register(
        Kprobe(
            symbol="target",
            pre_handler=lambda kp, r: r.call(lab.probes.objects.address("variadic"), 1, 2, 3, abi="cdecl") and None,
        )
    )
    lab.run()
    assert lab.words("found", 3) == [1, 2, 3]


def test_results_of_gccs_are_read(bits: int) -> None:
    """unsigned long long: eax and edx on i386."""
    lab = Lab(bits, "layouts")
    results: list[int] = []

    def call(kp: Kprobe, regs: Regs) -> None:
        results.append(regs.call(lab.probes.objects.address("long_result"), 7, returns=u64))

    lab.probes.register(Kprobe(symbol="target", pre_handler=call))
    lab.run()
    assert set(results) == {7 << 32 | 5}


def test_a_structure_is_returned_through_a_hidden_argument(bits: int) -> None:
    """What `-> struct` says: the caller's buffer comes first, the declared argument second."""
    lab = Lab(bits, "layouts")

    def declared(a: ulong) -> returned_struct: ...

    abi = ABIS["sysv" if bits == 64 else "regparm3"]
    (slot,) = prototype(declared).slots(abi)

    def call(kp: Kprobe, regs: Regs) -> None:
        regs.cpu.gpr[slot.registers[0]] = 99
        buffer = regs.sp - 4096
        first = abi.registers[0]
        kept = regs.cpu.gpr[first]
        regs.call(lab.probes.objects.address("triple"), buffer, 99)
        regs.cpu.gpr[first] = kept

    lab.probes.register(Kprobe(symbol="port_target", pre_handler=call))
    lab.run()
    assert lab.words("found") == [99]


# ---------------------------------------------------------------------------------------------------------- the window


def test_code_is_read_only_and_data_never_executed(bits: int) -> None:
    """The pages' rights; i386 without PAE has no bit for the second."""
    lab = Lab(bits, "kprobe_example")
    tables, ram = lab.machine.cpu.tables(), lab.machine.ram
    code = walk(ram, tables, lab.probes.objects.address("handler_pre"))
    data = walk(ram, tables, lab.probes.objects.address("before"))
    assert (code.writable, code.executable, code.user) == (False, True, False)
    assert (data.writable, data.user) == (True, False)
    if bits == 64 and tables.efer & 0x800:
        assert not data.executable


def test_neither_hash_nor_snapshot_knows_of_an_object(bits: int) -> None:
    """The RAM is the bare machine's."""
    lab, bare = Lab(bits, "kprobe_example"), Lab(bits)
    lab.probes.guest.pre("handler_pre")
    assert lab.machine.ram_sha256() == bare.machine.ram_sha256()


def test_handlers_work_in_a_restored_machine(bits: int) -> None:
    """The window is mapped anew and the object is where its code says."""
    lab = Lab(bits, "kprobe_example")
    state = lab.machine.snapshot()
    probe = Kprobe(symbol="target", pre_handler=lab.probes.guest.pre("handler_pre"))
    lab.probes.register(probe)
    lab.run()
    lab.machine.restore(state)
    before = probe.hits
    lab.run()
    assert probe.hits > before
    assert not probe.disabled
    assert lab.words("before", 7)[6] >= probe.hits - before


@pytest.mark.parametrize("options", [(), ("-fPIC",), ("-mcmodel=large", "-fno-pic"), ("-mcmodel=kernel", "-fno-pic")])
def test_every_code_model_of_amd64_is_linked(options: tuple[str, ...]) -> None:
    """Direct, through a GOT, with 64-bit addresses; a common symbol, a weak one nobody has, and a pointer in data."""
    source = """
        extern unsigned long strlen(const char *);
        extern void nobody(void) __attribute__((weak));
        int shared __attribute__((common));
        static char text[] = "five!";
        char *pointer = text;
        long probe_me(void) { shared += 2; return nobody ? -1 : shared + (long)strlen(pointer); }
    """
    lab = Lab(64)
    lab.probes.load_object(compile_c(source, 64, "-fcommon", *options), "model.o")
    results: list[int] = []
    lab.probes.register(
        Kprobe(
            symbol="port_target",
            pre_handler=lambda kp, r: results.append(r.call(lab.probes.objects.address("probe_me"))),
        )
    )
    lab.run()
    assert results[:3] == [7, 9, 11]


# -------------------------------------------------------------------------------------------------------- refused files


def test_an_undefined_symbol_is_named_with_a_suggestion() -> None:
    """And nothing of the object is kept."""
    lab = Lab(64)
    with pytest.raises(ProbeError, match="no symbol strlenn") as refusal:
        lab.probes.load_object(compile_c("extern void strlenn(void); void f(void) { strlenn(); }", 64), "bad.o")
    assert refusal.value.errno == errno.ENOENT
    assert "strlen" in str(refusal.value.hint)
    with pytest.raises(ProbeError):
        lab.probes.objects.check("f")


def test_the_other_word_size_is_refused() -> None:
    """By the class byte of its header."""
    with pytest.raises(ProbeError, match="not a 64-bit little-endian object, at offset 0x4") as refusal:
        parse(compile_sample("kprobe_example", 32), "wrong.o", 8)
    assert refusal.value.errno == errno.ENOEXEC


def test_too_large_an_object_is_refused() -> None:
    """Data beyond the window's room: ENOMEM."""
    lab = Lab(64)
    with pytest.raises(ProbeError, match="no room for data") as refusal:
        lab.probes.load_object(compile_c("char big[3 << 20];", 64), "big.o")
    assert refusal.value.errno == errno.ENOMEM


def _patched(at: int, layout: str, value: int) -> bytes:
    data = bytearray(compile_sample("kprobe_example", 64))
    struct.pack_into(layout, data, at, value)
    return bytes(data)


def _headers() -> list[tuple[int, tuple[int, ...]]]:
    """(offset, fields) of each section header of the sample."""
    data = compile_sample("kprobe_example", 64)
    (table,), (count,) = struct.unpack_from("<Q", data, 40), struct.unpack_from("<H", data, 60)
    return [(table + 64 * i, struct.unpack_from("<2I4Q2I2Q", data, table + 64 * i)) for i in range(count)]


def _header(kind: int) -> tuple[int, tuple[int, ...]]:
    return next((offset, row) for offset, row in _headers() if row[1] == kind)


PROGBITS, SYMTAB, RELA = 1, 2, 4


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no ELF file"),
        (b"\x7fELF", "the header lies outside"),
        (_patched(16, "<H", 2), "not a relocatable object"),
        (_patched(18, "<H", 40), "for machine 40"),
        (_patched(40, "<Q", 1 << 60), "a section header lies outside"),
        (_patched(60, "<H", 0), "0 section headers"),
        (_patched(62, "<H", 0xFFFF), "names in 65535"),
        (_patched(_header(PROGBITS)[0] + 24, "<Q", 1 << 63), "lies outside the file"),
        (_patched(_header(PROGBITS)[0] + 48, "<Q", 3), "an alignment of 3"),
        (_patched(_header(PROGBITS)[0] + 8, "<Q", 0x406), "thread-local"),
        (_patched(_header(SYMTAB)[0] + 40, "<I", 999), "names in section 999"),
        (_patched(_header(SYMTAB)[0] + 56, "<Q", 7), "entries of 7"),
        (_patched(_header(SYMTAB)[1][4] + 24 + 6, "<H", 200), "a symbol in section 200"),
        (_patched(_header(SYMTAB)[1][4] + 24 + 0, "<I", 1 << 30), "a name lies outside"),
        (_patched(_header(RELA)[1][4] + 8, "<Q", 77), "relocation type 77"),
        (_patched(_header(RELA)[1][4] + 8, "<Q", 999 << 32 | 2), "symbol 999 of"),
        (_patched(_header(RELA)[1][4], "<Q", 1 << 40), "outside its section"),
        (_patched(_header(RELA)[0] + 40, "<I", 1), "relocations for the symbols in section 1"),
    ],
)
def test_a_hostile_object_is_refused_with_the_offset(data: bytes, reason: str) -> None:
    """One line that names what is wrong and where."""
    with pytest.raises(ProbeError, match=reason) as refusal:
        parse(data, "hostile.o", 8)
    assert refusal.value.errno == errno.ENOEXEC
    assert "at offset 0x" in refusal.value.reason


@settings(max_examples=300)
@given(
    st.sampled_from([("kprobe_example", 64), ("kprobe_example", 32)]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=12),
    st.floats(0, 1),
)
def test_a_damaged_object_is_parsed_or_refused(
    sample: tuple[str, int], damage: list[tuple[float, int]], kept: float
) -> None:
    """Whatever the bytes: a ProbeError or an object, no other exception."""
    data = bytearray(compile_sample(*sample))
    for place, value in damage:
        data[int(place * len(data))] = value
    try:
        parse(bytes(data[: int(kept * len(data)) if kept < 0.5 else len(data)]), "damaged.o", sample[1] // 8)
    except ProbeError as error:
        refused = error.errno
        assert refused == errno.ENOEXEC


@pytest.mark.parametrize("memory", [32 << 20, 34 << 20])
@pytest.mark.parametrize(("bits", "pae"), [(64, False), (32, False), (32, True)])
def test_the_window_is_found_behind_any_amount_of_memory(memory: int, bits: int, pae: bool) -> None:
    """Also where RAM ends inside a 4 MiB page of i386: slots, calls and both halves of an object work."""
    image = embedded_guest(bits, "calls=1000 idle", pae=pae)
    machine = Machine(memory, symbols=SymbolTable(image.symbols), long_mode=bits == 64)
    machine.power_on(image)
    machine.run(BOOTED)
    probes = Manager(machine)
    probes.load_object(compile_sample("jprobe_example", bits), "jprobe_example.o")
    lengths: list[int] = []
    probe = Kprobe(symbol="target", pre_handler=lambda kp, regs: lengths.append(regs.call("recursed_target", 9)))
    entry = Jprobe(kp=Kprobe(symbol="sum8"), entry="jsum8")
    probes.register_many([probe, entry])
    machine.run(ROUNDS)
    assert set(lengths) == {3}
    assert entry.kp.hits > 100
    assert not entry.kp.disabled


def test_an_object_can_be_loaded_before_the_guest_starts(bits: int) -> None:
    """It is linked when it is first used: at power-on none of the guest's functions is mapped."""
    machine = power_on(bits, "calls=300 idle")
    probes = Manager(machine)
    probes.load_object(compile_sample("kprobe_example", bits), "kprobe_example.o")
    probe = Kprobe(symbol="target", pre_handler=probes.guest.pre("handler_pre"))
    probes.register(probe)
    machine.run(BOOTED)
    assert probe.hits > 10
    assert not probe.disabled
