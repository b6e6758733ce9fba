"""README says what the program does."""

from tests.support.readme import README, rewritten


def test_generated_blocks_are_what_the_program_prints() -> None:
    """The reference in README cannot drift from --help and `monitor help`."""
    text = README.read_text()
    assert "<!-- made by: gdbstub boot --help -->" in text
    assert rewritten(text) == text, "run `python -m tests.support.readme`"
