"""A session on the fake machine, asked packet by packet, in-process."""

from __future__ import annotations

from emu.arch import X86_64, Arch
from gdbstub.actions import Send
from gdbstub.files import FileTree
from gdbstub.monitor import Monitor
from gdbstub.monitorservices import Services
from gdbstub.session import Session
from tests.support.fake_machine import FakeMachine

KERNEL = bytes(range(256)) * 40
"""What is served as /vmlinux."""

GDB_13 = (
    b"qSupported:multiprocess+;swbreak+;hwbreak+;qRelocInsn+;fork-events+;vfork-events+;exec-events+;vContSupported+;"
    b"QThreadEvents+;no-resumed+;memory-tagging+;xmlRegisters=i386"
)
"""What gdb 13.1 says when it connects."""


def make_session(arch: Arch = X86_64, packet_size: int = 0x1000, machine: FakeMachine | None = None) -> Session:
    """With files and monitor, on `machine` or one of its own."""
    machine = machine or FakeMachine(arch)
    return Session(
        machine,
        arch,
        files=FileTree({"/vmlinux": lambda: KERNEL, "/sys/notes": b"note"}, exec_file="/vmlinux"),
        monitor=Monitor(Services(machine)),
        packet_size=packet_size,
    )


def ask(session: Session, payload: bytes) -> bytes:
    """The payload that answers; what comes before it is console text."""
    action = session.handle(payload)
    assert isinstance(action, Send), action
    assert all(text.startswith(b"O") for text in action.payloads[:-1])
    return action.payloads[-1]


def little(value: int, size: int = 8) -> bytes:
    """As in register packets."""
    return value.to_bytes(size, "little").hex().encode()
