"""The packets that lldb adds to the protocol, as a part of `Session`.

Rules: as in `session`. Source: lldb's docs/resources/lldbgdbremote.md. lldb numbers registers as `p` does; it finds the
frame's own by their generic names.
"""

from __future__ import annotations

import json
from typing import Final

from emu.arch import Arch
from emu.iface import Machine
from gdbstub.packets import number, packet
from gdbstub.runpackets import PROCESS
from gdbstub.threads import CPU, CPU_NAME

_TRIPLES: Final = {8: "x86_64-unknown-none", 4: "i386-unknown-none"}
_GENERIC: Final = {
    **dict.fromkeys(("rip", "eip"), "pc"),
    **dict.fromkeys(("rsp", "esp"), "sp"),
    **dict.fromkeys(("rbp", "ebp"), "fp"),
    "eflags": "flags",
    **dict(zip(("rdi", "rsi", "rdx", "rcx", "r8", "r9"), (f"arg{index}" for index in range(1, 7)), strict=True)),
}
_REGISTER_INFO: Final = b"qRegisterInfo"
_SETS: Final = {
    "org.gnu.gdb.i386.core": "General Purpose Registers",
    "org.gnu.gdb.i386.sse": "SSE Registers",
    "org.gnu.gdb.i386.segments": "Segment Bases",
    "org.gnu.gdb.i386.sys": "System Registers",
}


class LldbPackets:
    """What `Session` answers to lldb about host, process, registers, memory and threads."""

    _machine: Machine
    _arch: Arch

    def __init__(self) -> None:
        self._thread_suffix = False

    @packet("qHostInfo", anytime=True)
    def _host(self, _rest: bytes) -> bytes:
        return self._about(f"triple:{self._triple.hex()};vm-page-size:4096;")

    @packet("qProcessInfo")
    def _process(self, _rest: bytes) -> bytes:
        return self._about(f"pid:{PROCESS:x};triple:{self._triple.hex()};ostype:unknown;")

    def _about(self, more: str) -> bytes:
        return f"{more}endian:little;ptrsize:{self._arch.word_size};".encode()

    @property
    def _triple(self) -> bytes:
        return _TRIPLES[self._arch.word_size].encode()

    @packet("QThreadSuffixSupported", anytime=True)
    def _suffix(self, _rest: bytes) -> bytes:
        """Register packets then end in `;thread:ID;`, in place of an `Hg` before."""
        self._thread_suffix = True
        return b"OK"

    def _plain(self, payload: bytes) -> bytes:
        """A packet in the form that all others have: without the suffix, its name ending where its fields begin."""
        if payload.startswith(_REGISTER_INFO):
            return _REGISTER_INFO + b":" + payload[len(_REGISTER_INFO) :]
        if self._thread_suffix and payload[:1] in (b"g", b"G", b"p", b"P"):
            return payload.partition(b";thread:")[0]
        return payload

    @packet("qRegisterInfo")
    def _register_info(self, rest: bytes) -> bytes:
        """A register in lldb's words; E45 ends its enumeration."""
        arch, index = self._arch, number(rest)
        if index >= len(arch.registers):
            return b"E45"
        register = arch.registers[index]
        feature = next(feature for feature in arch.features if register in feature.registers)
        kind = {"vec128": ("vector", "vector-uint8"), "i387_ext": ("vector", "vector-uint8")}
        encoding, form = kind.get(register.type or "", ("uint", "hex"))
        words = {
            "name": register.name,
            "bitsize": register.bits,
            "offset": sum(earlier.size for earlier in arch.registers[:index]),
            "encoding": encoding,
            "format": form,
            "set": _SETS[feature.name],
            **({"generic": _GENERIC[register.name]} if register.name in _GENERIC else {}),
        }
        return "".join(f"{key}:{value};" for key, value in words.items()).encode()

    @packet("qMemoryRegionInfo")
    def _region(self, rest: bytes) -> bytes:
        """The range of equal mapping around an address, unmapped ones too, so that lldb can walk the address space."""
        start, size, rights = self._machine.memory.region(number(rest))
        permissions = f"permissions:{rights};" if rights else ""
        return f"start:{start:x};size:{size:x};{permissions}".encode()

    @packet("jThreadsInfo")
    def _threads_info(self, _rest: bytes) -> bytes:
        return json.dumps([{"tid": CPU, "name": CPU_NAME}]).encode()
