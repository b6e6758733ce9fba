"""Snapshots: a restored machine goes on as the one that never stopped, and a bad file is one line."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from emu import GuestMachine, boot_embedded, restore
from emu.hostfile import read_file
from emu.iface import BackEnd, ImageError, MachineError
from emu.snapshot import CHUNK, Header, Snapshot
from emu.stops import Breakpoint, GuestExit, Halted
from tests.support.tiny import CODE, Tiny

WORKLOAD = "calls=3 sleep=2 faults=1 opens=3 exit=5"
ENOUGH = 2_000_000


@pytest.fixture(params=[32, 64])
def bits(request: pytest.FixtureRequest) -> int:
    size: int = request.param
    return size


def end_of(machine: GuestMachine) -> tuple[object, ...]:
    """Run to the end. -> everything that two equal runs share."""
    return (machine.run(ENOUGH), machine.instructions, machine.clock.now_ns, machine.ram_sha256(), machine.console.text)


# --------------------------------------------------------------------------------------------------------- equal runs


@pytest.mark.parametrize("at", [1, 12_345, 40_000])
def test_restored_machine_ends_as_the_one_that_went_on(bits: int, at: int) -> None:
    """In place, and in a new machine; the time between is that of the workload, sleeping and paging included."""
    machine = boot_embedded(bits, WORKLOAD)
    machine.run(at)
    snapshot = machine.snapshot()
    reference = end_of(machine)
    assert reference[0] == GuestExit(5)
    machine.restore(snapshot)
    assert end_of(machine) == reference
    assert end_of(restore(snapshot)) == reference


def test_another_process_goes_on_from_the_file(bits: int, tmp_path: Path) -> None:
    machine = boot_embedded(bits, WORKLOAD)
    machine.run(12_345)
    path = tmp_path / "machine.snap"
    machine.save(path)
    reference = end_of(machine)
    program = "import sys, emu; m = emu.restore(sys.argv[1]); print(m.run(), m.instructions, m.ram_sha256())"
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{reference[0]} {reference[1]} {reference[3]}"


def test_restored_machine_knows_what_it_runs(bits: int, tmp_path: Path) -> None:
    """Title, word size and symbols are in the file."""
    machine = boot_embedded(bits, "idle")
    machine.run(5_000)
    machine.save(tmp_path / "s")
    again = restore(tmp_path / "s")
    assert (again.guest.title, again.guest.bits) == (machine.guest.title, bits)
    assert again.symbols.lookup("start_kernel")[0] == machine.symbols.lookup("start_kernel")[0]


def test_taking_a_snapshot_changes_nothing(bits: int) -> None:
    bare, watched = boot_embedded(bits, WORKLOAD), boot_embedded(bits, WORKLOAD)
    for _ in range(5):
        watched.run(4_321)
        watched.snapshot()
    assert end_of(watched) == end_of(bare)


def test_halted_processor_stays_halted(bits: int) -> None:
    """A snapshot taken in HLT sleeps on: the interrupt that ends it comes at the same time."""
    machine = boot_embedded(bits, "idle")
    while not machine.halted:
        machine.run(1)
    snapshot = machine.snapshot()
    again = restore(snapshot)
    assert again.halted
    machine.run(1_000)
    again.run(1_000)
    assert (again.clock.now_ns, again.ram_sha256()) == (machine.clock.now_ns, machine.ram_sha256())


# ------------------------------------------------------------------------------------------------------- armed places


def test_debug_registers_of_the_guest_go_with_it(bits: int) -> None:
    """Set before the snapshot and cleared after it: the engine holds pointers meanwhile, which no other may follow."""
    source = (
        f"lea xax, [{CODE}]; mov dr0, xax; mov eax, 0x401; mov dr7, xax; nop;"
        "xor eax, eax; mov dr7, xax; mov eax, 0x402; mov dr7, xax; hlt"
    )
    first, second = Tiny(bits, source).machine, Tiny(bits, source).machine
    first.run(5)
    second.run(5)
    snapshot = first.snapshot()
    assert snapshot.cpu == second.snapshot().cpu
    assert isinstance(first.run(100), Halted)
    for machine in (first, Tiny(bits, source).machine):
        machine.restore(snapshot)
        assert machine.cpu.debug_register(7) & 0xFF == 1
        assert isinstance(machine.run(100), Halted)
        assert machine.cpu.debug_register(7) & 0xFF == 2


def test_snapshot_with_breakpoints_is_the_one_without() -> None:
    """Int3 bytes are ours, not the guest's: RAM in the snapshot has none."""
    bare, armed = boot_embedded(64, WORKLOAD), boot_embedded(64, WORKLOAD)
    for machine in (bare, armed):
        machine.run(10_000)
    armed.insert_breakpoint(armed.symbols.lookup("do_exit")[0].address)
    assert armed.snapshot().ram == bare.snapshot().ram


def test_masked_bytes_are_in_no_snapshot_and_no_hash() -> None:
    """What somebody has put into RAM, for the guest to see, as long as he says so; RAM itself keeps it."""
    machine = boot_embedded(64, WORKLOAD)
    machine.run(12_345)
    bare, place = machine.ram_sha256(), machine.memory.size - 4096
    own = machine.memory.read_physical(place, 2)
    machine.memory.write_physical(place, b"\x01\x02")
    end = machine.mask(lambda: {place: own})
    assert machine.ram_sha256() == bare
    assert restore(machine.snapshot()).memory.read_physical(place, 2) == own
    assert machine.memory.read_physical(place, 2) == b"\x01\x02"
    end()
    assert machine.ram_sha256() != bare


def test_restoring_arms_what_is_armed_now(bits: int) -> None:
    """A breakpoint set after the snapshot stands after restoring, and the bytes under it are the snapshot's."""
    machine = boot_embedded(bits, WORKLOAD)
    machine.run(10_000)
    snapshot, digest = machine.snapshot(), machine.ram_sha256()
    at = machine.symbols.lookup("sys_open")[0].address
    machine.insert_breakpoint(at)
    machine.run(3_000)
    machine.restore(snapshot)
    assert machine.ram_sha256() == digest
    assert machine.run(ENOUGH) == Breakpoint(at)
    machine.remove_breakpoint(at)
    assert machine.run(ENOUGH) == GuestExit(5)


def test_place_that_the_snapshot_does_not_map_waits_for_it(bits: int) -> None:
    """Armed in kernel text, restored to before paging: it fires when the guest gets there."""
    machine = boot_embedded(bits, WORKLOAD)
    start = machine.snapshot()
    machine.run(10_000)
    at = machine.symbols.lookup("sys_open")[0].address
    machine.insert_breakpoint(at)
    machine.restore(start)
    assert machine.run(ENOUGH) == Breakpoint(at)


def test_place_whose_page_is_beyond_ram_waits_too() -> None:
    """The restored tables map an armed address to where no RAM is: nothing is lost, nothing raised."""
    guest = Tiny(64, "nop; nop; hlt")
    guest.map(0x90000, 0x500000 | 7)
    snapshot = guest.machine.snapshot()
    guest.map(0x90000, CODE | 7)
    owner = object()
    guest.machine.text.arm(0x90001, owner, BackEnd.INT3)
    guest.machine.restore(snapshot)
    assert guest.machine.text.owners(0x90001) == [owner]
    assert isinstance(guest.run(), Halted)


# ---------------------------------------------------------------------------------------------------------- bad files


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    machine = boot_embedded(64, "idle")
    machine.run(5_000)
    path = tmp_path_factory.mktemp("snapshots") / "good"
    machine.save(path)
    return path.read_bytes()


def refusal(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(MachineError) as caught:
        restore(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "not a snapshot"), (b"gdbstub\0", "not a snapshot"), (b"\x7fELF" + bytes(100), "not a snapshot")],
)
def test_foreign_file_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    text = refusal(tmp_path / "f", data)
    assert reason in text
    assert "offset" not in text


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"(?i)no such file"):
        restore(tmp_path / "none")


def test_later_format_is_named(tmp_path: Path, saved: bytes) -> None:
    assert "format 99" in refusal(tmp_path / "f", saved[:8] + b"\x63\0\0\0" + saved[12:])


@given(cut=st.floats(0, 0.999))
def test_truncated_file_is_refused(tmp_path_factory: pytest.TempPathFactory, saved: bytes, cut: float) -> None:
    """Wherever it ends."""
    refusal(tmp_path_factory.getbasetemp() / "truncated", saved[: int(len(saved) * cut)])


def test_end_of_the_checksum_is_missed(tmp_path: Path, saved: bytes) -> None:
    """The memory is whole, but nothing says so: with the last bytes gone it is refused too."""
    for missing in (1, 2, 3, 4):
        assert "memory is damaged" in refusal(tmp_path / "f", saved[:-missing])


@given(where=st.floats(0, 0.9999), bit=st.integers(0, 7))
def test_flipped_bit_is_noticed(tmp_path_factory: pytest.TempPathFactory, saved: bytes, where: float, bit: int) -> None:
    """Any bit of the file: in the header, the description or the memory."""
    data = bytearray(saved)
    data[int(len(data) * where)] ^= 1 << bit
    refusal(tmp_path_factory.getbasetemp() / "flipped", bytes(data))


def rewritten(saved: bytes, change: Callable[[Any], Any]) -> bytes:
    """The file with another description, its hash right: made by somebody who means it."""
    header, at = Header.parse(saved), Header.sizeof()
    described = json.loads(zstandard.ZstdDecompressor().decompress(saved[at : at + header.description_size]))
    return with_description(saved, zstandard.ZstdCompressor().compress(json.dumps(change(described)).encode()))


def without(name: str) -> Callable[[Any], Any]:
    return lambda described: {key: value for key, value in described.items() if key != name}


def state_with(**values: object) -> Callable[[Any], Any]:
    return lambda described: {**described, "state": {**described["state"], **values}}


def with_values(**values: object) -> Callable[[Any], Any]:
    return lambda described: {**described, **values}


HOSTILE: dict[str, Callable[[Any], Any]] = {
    "a list": lambda described: [1, 2],
    "a number": lambda described: 7,
    **{f"no {name}": without(name) for name in ("memory", "long_mode", "cpu", "chunks", "state")},
    "memory is text": with_values(memory="much"),
    "memory is huge": with_values(memory=1 << 50),
    "memory is negative": with_values(memory=-4096),
    "chunks are text": with_values(chunks="abc"),
    "chunk beyond memory": lambda d: {**d, "chunks": [*d["chunks"][:-1], d["memory"] // CHUNK]},
    "chunk twice": lambda d: {**d, "chunks": [d["chunks"][0]] * len(d["chunks"])},
    "negative chunk": lambda d: {**d, "chunks": [-1, *d["chunks"][1:]]},
    "cpu is no hex": with_values(cpu="zz"),
    "cpu is short": with_values(cpu="00"),
    "cpu is a number": with_values(cpu=5),
    "long_mode is text": with_values(long_mode="yes"),
    "state is a list": with_values(state=[]),
    "state is empty": with_values(state={}),
    "instructions are text": state_with(instructions="many"),
    "instructions are negative": state_with(instructions=-1),
    "instructions are huge": state_with(instructions=1 << 80),
    "poll_at is text": state_with(poll_at="soon"),
    "held is text": state_with(held="x"),
    "held is short": state_with(held=[14, 0, False, 0, 0]),
    "held has a huge code": state_with(held=[14, 1 << 40, False, 0, 0, 0]),
    "held has a negative pc": state_with(held=[14, 0, False, 0, -1, 0]),
    "halted is text": state_with(halted="no"),
    "console is a number": state_with(console=1),
    "clock is a list": state_with(clock=[]),
    "devices is a list": state_with(devices=[]),
    "about is text": state_with(about="x"),
    "about has a bad symbol table": lambda d: state_with(about={**d["state"]["about"], "symbols": "AAAA"})(d),
    "about has bad sections": lambda d: state_with(about={**d["state"]["about"], "sections": [[1]]})(d),
    "about has a section of text": lambda d: state_with(
        about={**d["state"]["about"], "sections": [["a", "b", "c", "d", "e"]]}
    )(d),
    "about has a number for a title": lambda d: state_with(about={**d["state"]["about"], "title": 1})(d),
    "about has a bad build-id": lambda d: state_with(about={**d["state"]["about"], "build_id": "xyz"})(d),
}


def with_description(saved: bytes, small: bytes) -> bytes:
    """The file with `small` for its compressed description, its hash right."""
    header = Header.parse(saved)
    fields = {"format": header.format, "description_size": len(small)}
    head = Header.build({**fields, "description_sha256": hashlib.sha256(small).digest()})
    return bytes(head + small + saved[Header.sizeof() + header.description_size :])


def test_bottomless_description_is_refused(tmp_path: Path, saved: bytes) -> None:
    """Brackets within brackets, and a frame that says it holds 32 TiB: neither recursion nor memory runs out."""
    nested = zstandard.ZstdCompressor().compress(b"[" * 200_000)
    assert "description is wrong" in refusal(tmp_path / "f", with_description(saved, nested))
    # RFC 8878, 3.1.1: magic, a single segment with 8 bytes of content size, an empty last block
    large = b"\x28\xb5\x2f\xfd\xe0" + (1 << 45).to_bytes(8, "little") + b"\x01\0\0"
    assert "description is wrong" in refusal(tmp_path / "f", with_description(saved, large))


def test_a_device_for_a_file_is_refused() -> None:
    """It has no end: no more than the largest snapshot is read of it, and here not as much."""
    with pytest.raises(ImageError, match="larger than 1 MiB"):
        read_file(Path("/dev/zero"), 1 << 20)


@pytest.mark.parametrize("key", ["../../../../etc/passwd", "\0", "\ud800", "0" * 63])
def test_snapshot_names_no_file_of_the_host(tmp_path: Path, saved: bytes, key: str) -> None:
    """The key of a kernel's facts is a hash; another one finds nothing, and is no error."""
    path = tmp_path / "f"
    path.write_bytes(rewritten(saved, lambda d: state_with(about={**d["state"]["about"], "facts_key": key})(d)))
    guest = restore(path).guest
    assert (guest.frames(), guest.btf()) == (b"", b"")


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_description_is_refused(tmp_path: Path, saved: bytes, what: str) -> None:
    """Well-formed where it is checked by hash, and wrong in one value: one line that names the file."""
    refusal(tmp_path / "f", rewritten(saved, HOSTILE[what]))


def test_snapshot_of_another_size_is_refused() -> None:
    snapshot = boot_embedded(64, "idle").snapshot()
    with pytest.raises(MachineError, match="with 32 MiB and a 64-bit processor, this has 64 MiB"):
        boot_embedded(64, "idle", memory=64 << 20).restore(snapshot)


def test_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    """Another snapshot at the path is whole or replaced, and no partial file stays."""
    machine = boot_embedded(64, "idle")
    path = tmp_path / "s"
    machine.save(path)
    before = path.read_bytes()
    broken = machine.snapshot()
    with pytest.raises(TypeError):
        Snapshot(broken.memory, True, {0: b"x", 1: None}, broken.cpu, broken.state).save(path)  # type: ignore[dict-item]
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]
