"""What a session asks its owner to do about a packet.

Rules: frozen values only; carried out by `server`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Send:
    """Send these payloads, one packet each. With `start_no_ack` nothing is acknowledged from the next packet on."""

    payloads: tuple[bytes, ...]
    start_no_ack: bool = False


@dataclass(frozen=True, slots=True)
class Resume:
    """Let the guest run through `Session.advance`; the reply is what `Session.stopped` says of the stop.

    `step` is one instruction, or with `stop_range` (first, end) as many as stay inside it; of `task`, where it is a
    task of the guest's that does not run: the guest runs until it does.
    """

    step: bool = False
    stop_range: tuple[int, int] | None = None
    task: int | None = None


@dataclass(frozen=True, slots=True)
class Interrupt:
    """Send `payload`, and end the guest's run: its stop is told as always."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Detach:
    """The debugger lets the guest go on; then `payload` is sent."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Kill:
    """The debugger ends the machine; `payload` is sent first where it isn't None."""

    payload: bytes | None


Action: TypeAlias = Send | Resume | Interrupt | Detach | Kill
