"""Calls into the guest from a handler: names and values in, a value out.

Rules: the engine's thread, inside a handler. The machine makes the call (`emu.iface.Machine.call`); here are symbols,
conventions and the refusals. Probes on the callee's way are met inside a handler, so `probes.core` executes them
without theirs and counts them as missed; `nested` lets it forget those that a call given up leaves half done.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Final

from emu.iface import CallAborted, Machine
from probes.abi import WORD, Abi, Scalar, abi_for, encode, scalar_of
from probes.errors import CallError
from probes.lookup import resolve

BUDGET: Final = 1_000_000  # instructions; some tens of milliseconds here, a millisecond there


class Calls:
    """Makes the calls of one machine's handlers."""

    def __init__(self, machine: Machine, word: int, nested: Callable[[], AbstractContextManager[None]]) -> None:
        self._machine = machine
        self._word = word
        self._nested = nested

    def call(
        self,
        target: str | int,
        *values: int,
        types: Sequence[object] | None = None,
        returns: object = int,
        abi: str | None = None,
        budget: int = BUDGET,
    ) -> int:
        """See Regs.call."""
        convention = abi_for(self._word, abi)
        scalars = [WORD] * len(values) if types is None else [scalar_of(annotation) for annotation in types]
        if len(scalars) != len(values):
            raise CallError(errno.EINVAL, f"{len(values)} arguments for {len(scalars)} types")
        result = scalar_of(returns)
        gpr, stack = encode(convention, scalars, values)
        returned = self.run(resolve(self._machine, target), gpr, stack, budget)
        return self._result(returned, convention, result)

    def run(self, address: int, gpr: Mapping[int, int], stack: bytes, budget: int = BUDGET) -> Sequence[int]:
        """The bare call: registers and stack in, the registers at its return out."""
        try:
            with self._nested():
                return self._machine.call(address, gpr, stack, budget)
        except CallAborted as error:
            raise CallError(errno.ECANCELED, str(error)) from error

    @staticmethod
    def _result(gpr: Sequence[int], abi: Abi, scalar: Scalar) -> int:
        words = max(1, -(-scalar.bits // (8 * abi.word)))
        mask = (1 << 8 * abi.word) - 1
        raw = sum((gpr[register] & mask) << 8 * abi.word * index for index, register in enumerate(abi.result[:words]))
        return scalar.read(raw, abi.word)
