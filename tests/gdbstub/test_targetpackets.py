"""What the packets about registers, memory and their description answer, byte by byte: fake machine and real one."""

from __future__ import annotations

import zlib
from xml.etree import ElementTree

import pytest

from emu import boot_embedded
from emu.arch import I386, I8086, X86_64, Arch, target_xml
from emu.machine import Machine
from emu.stops import Step
from gdbstub.actions import Resume
from gdbstub.session import Session
from tests.support.asking import ask, little, make_session
from tests.support.fake_machine import CODE, DATA, PAGE, PROGRAM, STACK, FakeMachine
from tests.support.tiny import UNMAPPED, Tiny

PAGED = 0x80000011


def served(machine: Machine) -> Session:
    return Session(machine, machine.registers.arch)


# -------------------------------------------------------------------------------------------------------- description


def test_the_description_is_that_of_the_moment_it_is_read(machine: FakeMachine, session: Session):
    """A bare image that has entered another mode: registers, numbers and stop replies follow the description."""
    machine.registers.arch = I386
    machine.registers.values |= dict.fromkeys(I386.names, 0) | {"eip": CODE + 3}
    assert ask(session, b"p10") == little(CODE, 8), "until it is read again, register 16 is rip"
    assert b"<architecture>i386</architecture>" in ask(session, b"qXfer:features:read:target.xml:0,1000")
    assert ask(session, b"p8") == little(CODE + 3, 4)
    assert b"08:" + little(CODE + 3, 4) + b";" in ask(session, b"?")
    assert len(ask(session, b"g")) == 2 * I386.packet_size


def test_a_change_of_mode_is_told_once(machine: FakeMachine, session: Session):
    """gdb cannot take another description in mid-session, but its user can connect again."""
    machine.registers.arch = I8086
    said, _ = session.stopped(Step(CODE))
    assert "an i8086 now, and was an i386:x86-64" in bytes.fromhex(said[1:].decode()).decode()
    assert len(session.stopped(Step(CODE))) == 1
    machine.registers.arch = X86_64
    assert len(session.stopped(Step(CODE))) == 1


@pytest.mark.parametrize("arch", [I386, X86_64], ids=lambda arch: arch.name)
@pytest.mark.parametrize("paged", [False, True])
def test_the_memory_map_covers_every_address_once(arch: Arch, paged: bool):
    """In order, without holes: gdb reads it once, and refuses what is not in it. RAM comes first without paging.

    In 32 bits the upper half is there once more, sign-extended: so gdb looks up an address that it took for an int. Its
    last byte is left out, for gdb shows an end of 2^64 as 2^32.
    """
    machine = FakeMachine(arch)
    machine.registers.values["cr0"] = PAGED if paged else 0x11
    reply = ask(Session(machine, arch), b"qXfer:memory-map:read::0,1000")
    regions = [
        (region.get("type"), int(region.get("start", ""), 16), int(region.get("length", ""), 16))
        for region in ElementTree.fromstring(reply.removeprefix(b"l").decode())
    ]
    if arch is I386:
        assert regions.pop() == ("ram", (1 << 64) - (1 << 31), (1 << 31) - 1)
    end = 0
    for kind, start, length in regions:
        assert (kind, start) == ("ram", end)
        end += length
    assert end == 1 << (8 * arch.word_size)
    assert regions[0][2] == (end // 2 if paged else machine.memory.size)
    assert all(length < 1 << 64 for _, _, length in regions), "gdb reads 64 bits"


@pytest.mark.parametrize("arch", [I386, X86_64], ids=lambda arch: arch.name)
def test_description_is_served_in_parts(arch: Arch):
    """Read in small windows it is the generated document."""
    session = make_session(arch, packet_size=0x100)
    document = b""
    while True:
        part = ask(session, b"qXfer:features:read:target.xml:%x,200" % len(document))
        document += part[1:]
        if part[:1] == b"l":
            break
    assert document.decode() == target_xml(arch)
    assert b"<osabi>none</osabi>" in document, "else gdb takes a kernel for a Linux program"
    assert ElementTree.fromstring(document).tag == "target"


def test_description_has_one_annex(session: Session):
    """E00 for another, as the manual says; E01 beyond the end."""
    assert ask(session, b"qXfer:features:read:other.xml:0,100") == b"E00"
    assert ask(session, b"qXfer:features:read:target.xml:fffff,100") == b"E01"


# ----------------------------------------------------------------------------------------------------------- registers


@pytest.mark.parametrize("arch", [I386, X86_64], ids=lambda arch: arch.name)
def test_all_registers_are_read_in_order(arch: Arch):
    """`g` is every register's bytes, at the place its number says."""
    session = make_session(arch)
    for index, name in enumerate(arch.names):
        session._machine.registers.write(name, index + 1)
    expected = b"".join(little(index + 1, register.size) for index, register in enumerate(arch.registers))
    assert ask(session, b"g") == expected


def test_all_registers_are_written(session: Session, machine: FakeMachine):
    """`G` is the inverse of `g`."""
    values = {name: index + 7 for index, name in enumerate(X86_64.names)}
    packet = b"G" + X86_64.pack(list(values.values())).hex().encode()
    assert ask(session, packet) == b"OK"
    assert machine.registers.values == values


def test_one_register_is_read_and_written(session: Session, machine: FakeMachine):
    """By number, in its own size: rip is 0x10, xmm0 0x28."""
    assert ask(session, b"p10") == little(CODE)
    assert ask(session, b"P28=" + b"0102" + b"00" * 14) == b"OK"
    assert machine.registers.values["xmm0"] == 0x0201
    assert ask(session, b"p28") == b"0102" + b"00" * 14


@pytest.mark.parametrize("payload", [b"p", b"pzz", b"p999", b"P10", b"P10=00", b"P10=zz", b"G00", b"Gq", b"G"])
def test_malformed_register_packets_change_nothing(session: Session, machine: FakeMachine, payload: bytes):
    """E01, and the registers are as before."""
    before = dict(machine.registers.values)
    assert ask(session, payload) == b"E01"
    assert machine.registers.values == before


# ------------------------------------------------------------------------------------------------------------- memory


def test_memory_is_read_in_hex_and_binary(session: Session):
    """`m` in digits, `x` with its leading `b`."""
    assert ask(session, b"m%x,4" % DATA) == b"64617461"
    assert ask(session, b"x%x,4" % DATA) == b"bdata"
    assert ask(session, b"x%x,0" % DATA) == b"b"


def test_memory_is_written_in_hex_and_binary(session: Session, machine: FakeMachine):
    """`M` and `X`; gdb probes `X` with no bytes."""
    assert ask(session, b"M%x,2:4142" % DATA) == b"OK"
    assert ask(session, b"X%x,2:CD" % (DATA + 2)) == b"OK"
    assert ask(session, b"X%x,0:" % DATA) == b"OK"
    assert machine.memory.read(DATA, 4) == b"ABCD"


def test_reading_ends_where_memory_ends(session: Session):
    """A prefix is a right answer; nothing at all is EFAULT, never zeros."""
    last = STACK + PAGE - 2
    assert ask(session, b"m%x,4" % last) == b"0000"
    assert ask(session, b"x%x,4" % last) == b"b\0\0"
    assert ask(session, b"m%x,4" % (STACK + PAGE)) == b"E14"
    assert ask(session, b"x%x,4" % (STACK + PAGE)) == b"E14"


def test_writing_over_the_end_writes_nothing(session: Session, machine: FakeMachine):
    """All or nothing."""
    last = STACK + PAGE - 1
    assert ask(session, b"M%x,2:ffff" % last) == b"E14"
    assert machine.memory.read(last, 1) == b"\0"


def test_a_read_is_cut_to_the_packet_size():
    """The client asks for more than was announced; the reply still fits."""
    session = make_session(packet_size=0x100)
    assert len(ask(session, b"m%x,ffffffffffff" % CODE)) == 0x100
    session._machine.memory.write(CODE, b"#" * 0x200)
    assert ask(session, b"x%x,200" % CODE) == b"b" + b"#" * 127


@pytest.mark.parametrize(
    "payload",
    b"m|m0|m,|m0,|m-1,4|m 1,4|m1_0,4|m11111111111111111,1|m1,1,1|x1|M20000,1|M20000,2:41|M20000,1:4|X,0:".split(b"|"),
)
def test_malformed_memory_packets_are_refused(session: Session, payload: bytes):
    """One error for all of them."""
    assert ask(session, payload) == b"E01"


@pytest.mark.parametrize("bits", [32, 64])
def test_reads_end_where_the_mapped_pages_do(bits: int):
    """In hex and binary, up to the last byte; from the first one that is missing, E14."""
    session = served(Tiny(bits, "hlt").machine)
    last = UNMAPPED - 6
    assert ask(session, b"m%x,10" % last) == b"00" * 6
    assert ask(session, b"x%x,10" % last) == b"b" + bytes(6)
    for payload in (b"m%x,4", b"x%x,4", b"M%x,1:00", b"X%x,1:0"):
        assert ask(session, payload % UNMAPPED) == b"E14"


@pytest.mark.parametrize("address", [DATA, DATA + PAGE, (1 << 64) - 1])
def test_no_bytes_can_be_read_anywhere(session: Session, address: int):
    """As of QEMU's stub, `m` and `x` alike: nothing is asked of an address that is not there either."""
    assert ask(session, b"m%x,0" % address) == b""
    assert ask(session, b"x%x,0" % address) == b"b"


def test_x_begins_with_b_and_is_shortened_to_the_packet():
    """gdb (not lldb) wants the letter, also before nothing: `x addr,0` asks whether the packet is known."""
    machine = FakeMachine(X86_64)
    machine.memory.map(DATA, b"}#$*" * 64)
    session = Session(machine, X86_64, packet_size=0x100)
    assert ask(session, b"x%x,0" % DATA) == b"b"
    reply = ask(session, b"x%x,100" % DATA)
    data = reply.removeprefix(b"b")
    assert 0 < len(data) <= 0x7F
    assert (b"}#$*" * 64).startswith(data)


def test_a_pattern_is_found_across_portions(machine: FakeMachine, session: Session):
    """Every start of every place it may have around the borders of what is read at once."""
    for page in range(0x100000 // PAGE, 0x100000 // PAGE + 0x21):
        machine.memory.map(page * PAGE)
    for at in (0x100000, 0x10FFFD, 0x10FFFF, 0x110000, 0x120FFC):
        machine.memory.write(at, b"#;:}")
        assert ask(session, b"qSearch:memory:100000;21000;#;:}") == b"1,%x" % at
        machine.memory.write(at, bytes(4))
    assert ask(session, b"qSearch:memory:100000;21000;#;:}") == b"0"


@pytest.mark.parametrize(
    ("payload", "reply"),
    [
        (b"qSearch:memory:20000;12;guest", b"1,2000c"),
        (b"qSearch:memory:20000;10;guest", b"0"),  # it ends behind the range
        (b"qSearch:memory:20fff;10;x", b"E14"),
        (b"qSearch:memory:20000;10;", b"E01"),
        (b"qSearch:memory:20000;fffffffffff;x", b"E01"),
        (b"qSearch:memory:20000", b"E01"),
        (b"qCRC:20fff,10", b"E14"),
        (b"qCRC:20000,fffffffffff", b"E01"),
        (b"qCRC:20000", b"E01"),
    ],
)
def test_search_and_checksum_know_their_bounds(session: Session, payload: bytes, reply: bytes):
    """Of the range, of memory and of what is reasonable."""
    assert ask(session, payload) == reply


def test_the_checksum_is_gdbs(machine: FakeMachine, session: Session):
    """Against gdb's own way of computing it (gdbsupport: xcrc32), over more than is read at once."""
    crc = 0xFFFFFFFF
    for byte in PROGRAM + bytes(PAGE - len(PROGRAM)):
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ 0x04C11DB7 if crc & 1 << 31 else crc << 1) & 0xFFFFFFFF
    assert ask(session, b"qCRC:%x,%x" % (CODE, PAGE)) == b"C%x" % crc
    assert ask(session, b"qCRC:10000,0") == b"Cffffffff"
    assert zlib.crc32(b"123456789") != crc


# ----------------------------------------------------------------------------------------------------- QEMU's packets


def test_physical_memory_mode_goes_past_the_page_tables():
    """Reads, writes and searches; until it is switched off."""
    guest = Tiny(64, "hlt")
    session, beyond = served(guest.machine), UNMAPPED + 0x1000
    guest.machine.ram.write(beyond, b"physical")
    assert (ask(session, b"qqemu.PhyMemMode"), ask(session, b"m%x,8" % beyond)) == (b"0", b"E14")
    assert ask(session, b"Qqemu.PhyMemMode:1") == b"OK"
    assert ask(session, b"qqemu.PhyMemMode") == b"1"
    assert bytes.fromhex(ask(session, b"m%x,8" % beyond).decode()) == b"physical"
    assert ask(session, b"X%x,2:PH" % beyond) == b"OK"
    assert ask(session, b"qSearch:memory:0;400000;PHys") == b"1,%x" % beyond
    assert ask(session, b"m%x,10" % (guest.machine.ram.size - 4)) == b"00" * 4
    assert ask(session, b"m%x,4" % guest.machine.ram.size) == b"E14"
    assert ask(session, b"Qqemu.PhyMemMode:0") == b"OK"
    assert ask(session, b"m%x,8" % beyond) == b"E14"


def test_a_step_enters_an_interrupt_only_when_it_may():
    """QEMU's NOIRQ, on by default; the bits are read back as they were set."""
    session = Session(machine := FakeMachine(X86_64), X86_64)
    assert ask(session, b"qqemu.sstepbits") == b"ENABLE=1,NOIRQ=2,NOTIMER=4"
    assert ask(session, b"qqemu.sstep") == b"0x7"
    session.advance(Resume(step=True))
    assert not machine.stepped_into_interrupts
    for payload in (b"Qqemu.sstep=0x5", b"Qqemu.sstep:5"):
        assert ask(session, payload) == b"OK"
    assert ask(session, b"qqemu.sstep") == b"0x5"
    session.advance(Resume(step=True))
    assert machine.stepped_into_interrupts
    for wrong in (b"Qqemu.sstep=0", b"Qqemu.sstep=6", b"Qqemu.sstep=8", b"Qqemu.sstep=", b"Qqemu.sstep=-1"):
        assert ask(session, wrong) == b"E01", wrong
    assert ask(session, b"qqemu.Supported") == b"sstepbits;sstep;PhyMemMode"


@pytest.mark.parametrize("bits", [32, 64])
def test_a_step_into_an_interrupt_stands_at_its_handler(bits: int):
    """With nothing executed; the default step from there goes on with the handler, one without is past both."""
    machine = boot_embedded(bits, "loop")
    machine.run(2_000_000)
    deadline = machine.clock.next_deadline_ns()
    assert deadline is not None
    machine.run(deadline - machine.clock.now_ns)
    moment, start, done = machine.snapshot(), machine.cpu.pc, machine.instructions
    assert machine.step(into_interrupts=True) == Step(machine.cpu.pc)
    assert machine.instructions == done
    handler = machine.symbols.find(machine.cpu.pc)
    assert handler is not None
    assert machine.cpu.gpr[4] != 0
    frame = int.from_bytes(machine.memory.read(machine.cpu.gpr[4], bits // 8), "little")
    assert frame == start
    machine.restore(moment)
    machine.step()
    assert machine.instructions > done + 1, "the handler has run"
    found = machine.symbols.find(machine.cpu.pc)
    assert found is not None
    assert found[0] != handler[0]
