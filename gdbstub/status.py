"""Exit statuses, and the error that ends with the second of them.

Rules: imports nothing, so that what is refused at once is refused in a moment. What each means stands in
`options.EXIT_STATUS`.
"""

from __future__ import annotations

from typing import Final

SUCCESS: Final = 0
NOT_REACHED: Final = 1
USAGE: Final = 2
CRASHED: Final = 3
DEFECT: Final = 4


class UsageError(Exception):
    """What the user asked for cannot be done; a line, for a probe definition with more below it. Status 2."""
