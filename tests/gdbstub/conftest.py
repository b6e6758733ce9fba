"""A session on the fake machine, for tests that need no other."""

from __future__ import annotations

import pytest

from emu.arch import X86_64
from gdbstub.session import Session
from tests.support.asking import make_session
from tests.support.fake_machine import FakeMachine


@pytest.fixture
def machine() -> FakeMachine:
    return FakeMachine(X86_64)


@pytest.fixture
def session(machine: FakeMachine) -> Session:
    return make_session(machine=machine)
