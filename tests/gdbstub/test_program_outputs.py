"""Outputs: nothing that happens to a descriptor may disturb the guest's run."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gdbstub.outputs import Output, open_output, reader_is_gone


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """(reading end, writing end)."""
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:  # the test closed it
            continue


def test_each_line_is_in_the_file_at_once(tmp_path: Path):
    """Whoever follows the file sees a hit when it happens."""
    output = open_output(tmp_path / "trace.txt", pytest.fail)
    output.write_line("caf\u00e9 \udc80")
    assert (tmp_path / "trace.txt").read_bytes() == "caf\u00e9 \\udc80\n".encode()
    output.close()


def test_a_full_device_fails_once_and_raises_nothing(tmp_path: Path):
    """The reason is told; later lines are dropped."""
    failures: list[OSError] = []
    output = open_output(Path("/dev/full"), failures.append)
    output.write(b"one")
    output.write(b"two")
    output.close()
    assert [(error.errno, reader_is_gone(error)) for error in failures] == [(errno.ENOSPC, False)]


def test_a_reader_that_left_is_told_from_a_failure(pipe: tuple[int, int]):
    """`| head -1` is nobody's fault."""
    reading, writing = pipe
    failures: list[OSError] = []
    os.close(reading)
    Output(writing, failures.append).write(b"text")
    assert [reader_is_gone(error) for error in failures] == [True]


def test_a_slow_reader_gets_everything(pipe: tuple[int, int]):
    """More than a pipe holds, in order."""
    reading, writing = pipe
    data = os.urandom(300_000)
    output = Output(writing, pytest.fail)
    thread = threading.Thread(target=output.write, args=(data,))
    thread.start()
    got = b""
    while len(got) < len(data):
        got += os.read(reading, 0x10000)
    thread.join()
    assert got == data


@pytest.mark.parametrize("blocking", [True, False])
def test_a_reader_that_stopped_reading_can_be_given_up(pipe: tuple[int, int], blocking: bool):
    """A write that waits ends; a descriptor that somebody made non-blocking is waited for all the same."""
    _, writing = pipe
    os.set_blocking(writing, blocking)
    output = Output(writing, pytest.fail)
    thread = threading.Thread(target=output.write, args=(bytes(1 << 20),))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    output.give_up()
    thread.join(10)
    assert not thread.is_alive()
