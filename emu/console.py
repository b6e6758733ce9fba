"""What the guest prints: kept as text, cut into lines, matched against what somebody waits for.

Rules: the machine's thread. A match is looked for after each byte, so that a run ends at the same instruction every
time; the current line counts too, because a prompt has no newline.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from emu.stops import Stop

KEEP = 1 << 20  # characters of console text kept for those who ask later
LONGEST_LINE = 4096  # characters; a longer line is matched in pieces, for matching looks at all of it each time

Reaction = Callable[[re.Match[str]], Stop | None]


class Console:
    """`on_stop` is given the Stop that a reaction returns."""

    def __init__(self, on_stop: Callable[[Stop], None]) -> None:
        self._on_stop = on_stop
        self._expected: list[tuple[re.Pattern[str], Reaction]] = []
        self._line: list[str] = []
        self._text: list[str] = []
        self._size = 0
        self.sinks: list[Callable[[bytes], None]] = []

    def expect(self, pattern: str, react: Reaction) -> Callable[[], None]:
        """Call `react` when `pattern` (a regular expression) matches in the current line; -> a call that withdraws it.

        It is called once a line at most.
        """
        entry = (re.compile(pattern), react)
        self._expected.append(entry)
        return lambda: self._expected.remove(entry) if entry in self._expected else None

    def feed(self, data: bytes) -> None:
        """Bytes from the guest."""
        for sink in self.sinks:
            sink(data)
        for character in data.decode("latin-1"):
            self._keep(character)

    def _keep(self, character: str) -> None:
        self._text.append(character)
        self._size += 1
        if self._size > 2 * KEEP:
            self._text = ["".join(self._text)[-KEEP:]]
            self._size = KEEP
        if character == "\n":
            self._line.clear()
            return
        if character == "\r":
            return
        if len(self._line) >= LONGEST_LINE:
            self._line.clear()
        self._line.append(character)
        if not self._expected:
            return
        line = "".join(self._line)
        before = len(line) - 1
        for pattern, react in list(self._expected):
            match = pattern.search(line)
            if match is not None and pattern.search(line, 0, before) is None:
                stop = react(match)
                if stop is not None:
                    self._on_stop(stop)

    def reset(self, text: str) -> None:
        """The console of a restored machine: `text` was printed before, and nothing in it is awaited any more."""
        self._text, self._size = [text], len(text)
        self._line = [c for c in text.rpartition("\n")[2] if c != "\r"]

    @property
    def text(self) -> str:
        """The last KEEP characters or more."""
        return "".join(self._text)
