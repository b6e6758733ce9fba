"""README blocks that are made from the code: `python -m tests.support.readme` rewrites them, a test compares them.

A block is a fenced text after a comment `<!-- made by: COMMAND -->`, where COMMAND is `gdbstub ... --help` or
`monitor help`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from unittest import mock

from emu.boot import boot_embedded
from gdbstub import options
from gdbstub.monitor import Monitor
from gdbstub.monitorservices import Services

README = Path(__file__).parents[2] / "README.md"
_BLOCK = re.compile(r"(<!-- made by: (?P<command>.+?) -->\n```text\n)(?P<text>.*?)(```\n)", re.DOTALL)


def output_of(command: str) -> str:
    """What the command prints, for a terminal 100 columns wide."""
    if command == "monitor help":
        return "\n".join(Monitor(Services(machine=boot_embedded())).execute("help").lines) + "\n"
    parser = options.parser()
    words = command.removesuffix(" --help").split()[1:]
    with mock.patch.dict(os.environ, {"COLUMNS": "100"}):
        if words:
            parser = next(iter(parser._subparsers._group_actions)).choices[words[0]]
        return parser.format_help()


def rewritten(text: str) -> str:
    """README's text with every made block made anew."""
    return _BLOCK.sub(lambda match: match[1] + output_of(match["command"]) + match[4], text)


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text()))
