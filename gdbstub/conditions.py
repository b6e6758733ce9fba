"""What the stub itself does at a debugger's breakpoint: ask conditions and run commands, so that gdb need not.

Rules: the machine's thread; knows agent expressions and the option fields of a Z packet, no other packet. Source: GDB
manual, "Packets" (Z0); gdbserver's mem-break.cc for what the manual leaves open.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from gdbstub.agent import Agent, BadExpression, Expression, Failure
from gdbstub.packets import PacketError, expression

MAX_EXPRESSIONS: Final = 256  # conditions and commands of one breakpoint


class Decision:
    """Asked at each hit of one breakpoint: whether the guest stops there.

    It does where one of the conditions is true or cannot be computed, or there is none; but a breakpoint with commands
    (gdb's dprintf) runs these instead of stopping. `complain` gets a line for each failure. `persistent`: commands go
    on when the debugger has left.
    """

    def __init__(
        self,
        vaddr: int,
        conditions: list[Expression],
        commands: list[Expression],
        persistent: bool,
        complain: Callable[[str], None],
    ) -> None:
        self.persistent = persistent
        self._vaddr = vaddr
        self._conditions = conditions
        self._commands = commands
        self._complain = complain

    def __call__(self) -> bool:
        if self._conditions and not any(map(self._is_true, self._conditions)):
            return False
        for command in self._commands:
            outcome = command.evaluate()
            if isinstance(outcome, Failure):
                self._complain(f"Breakpoint command at {self._vaddr:#x} failed: {outcome.text}.")
        return not self._commands

    def _is_true(self, condition: Expression) -> bool:
        outcome = condition.evaluate()
        if isinstance(outcome, int):
            return outcome != 0
        reason = "it has no value" if outcome is None else outcome.text
        self._complain(f"Stopped at {self._vaddr:#x}, as the breakpoint's condition failed: {reason}.")
        return True


def decision(vaddr: int, options: bytes, agent: Agent, complain: Callable[[str], None]) -> Decision | None:
    """What the options behind `Z0,addr,kind;` ask for; None where there are none.

    `X len,code` is a condition, several follow one another; `cmds:persist,` is followed by commands of the same form.
    PacketError for what cannot be read or run.
    """
    if not options:
        return None
    conditions: list[Expression] = []
    commands: list[Expression] = []
    persistent = False
    for field in options.split(b";"):
        where, rest = conditions, field
        if field.startswith(b"cmds:"):
            where = commands
            flag, _, rest = field.removeprefix(b"cmds:").partition(b",")
            persistent = flag == b"1"
        while rest:
            code, rest = expression(rest)
            rest = rest.removeprefix(b",")
            if len(conditions) + len(commands) >= MAX_EXPRESSIONS:
                raise PacketError(f"no more than {MAX_EXPRESSIONS} conditions and commands at one place")
            try:
                where.append(agent.compile(code))
            except BadExpression as error:
                raise PacketError(str(error)) from error
    return Decision(vaddr, conditions, commands, persistent, complain)
