"""The one exception of the probe engine: the kernel's errno, its reason, and where in a definition it lies.

Rules: standard library only. Every refusal in `probes` is a `ProbeError`; the rooms above turn it into a monitor reply
or an exit status and never look at its type again.
"""

from __future__ import annotations

import errno as errno_module
from collections.abc import Mapping
from typing import Final

ENOTSUPP: Final = 524  # include/linux/errno.h: kernel-internal, but uprobes leak it to user space
_EXTRA_NAMES: Final[Mapping[int, str]] = {
    ENOTSUPP: "ENOTSUPP",
    errno_module.EOPNOTSUPP: "EOPNOTSUPP",  # ENOTSUP has the same number and comes first in errno.errorcode
}


def errno_name(number: int) -> str:
    """ "EINVAL" for 22; "E<number>" for one nobody has named."""
    return _EXTRA_NAMES.get(number) or errno_module.errorcode.get(number) or f"E{number}"


class ProbeError(Exception):
    """A probe, or a definition of one, that is refused.

    `errno` is positive. `definition` is the line as the kernel's error log prints it (words joined by one space) and
    `column` the 0-based place of the caret under it; both are None where no line is at fault. `token` is the kernel's
    TP_ERR_ name where the text is the kernel's own (kernel/trace/trace_probe.h). `hint` is a further line for a person.
    As text it is the reason, then the definition with its caret and the hint where there are such.
    """

    def __init__(
        self,
        errno: int,
        reason: str,
        *,
        definition: str | None = None,
        column: int | None = None,
        token: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(reason)
        self.errno = errno
        self.reason = reason
        self.definition = definition
        self.column = column
        self.token = token
        self.hint = hint

    @property
    def name(self) -> str:
        """The errno's name, "EINVAL"."""
        return errno_name(self.errno)

    def at(self, definition: str, column: int) -> ProbeError:
        """The same refusal, pointing into a definition."""
        return ProbeError(
            self.errno, self.reason, definition=definition, column=column, token=self.token, hint=self.hint
        )

    def __str__(self) -> str:
        return "\n".join((self.reason, *self._details()))

    def lines(self) -> list[str]:
        """What a person is shown: as text, but the reason has its errno with it."""
        return [f"{self.reason} ({self.name})", *self._details()]

    def _details(self) -> list[str]:
        shown = []
        if self.definition is not None:
            shown.append(f"  {self.definition}")
            if self.column is not None:
                shown.append(f"  {' ' * self.column}^")
        if self.hint is not None:
            shown.append(self.hint)
        return shown


class CallError(ProbeError):
    """A call into the guest that was refused or given up; see `Regs.call`."""
