"""A fetch argument, understood: a small tree of where its value comes from, and its type.

Rules: values only. Made by `expr`, evaluated by `fetch`; events, layouts and triggers read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from probes.fetchtypes import FetchType


@dataclass(frozen=True, slots=True)
class Register:
    name: str


@dataclass(frozen=True, slots=True)
class StackPointer:
    pass


@dataclass(frozen=True, slots=True)
class StackWord:
    number: int


@dataclass(frozen=True, slots=True)
class Argument:
    """`$argN`, from 1; `saved`: of a return probe, which keeps it from the entry."""

    number: int
    saved: bool = False


@dataclass(frozen=True, slots=True)
class ReturnValue:
    pass


@dataclass(frozen=True, slots=True)
class Comm:
    pass


@dataclass(frozen=True, slots=True)
class Immediate:
    value: int


@dataclass(frozen=True, slots=True)
class ImmediateText:
    text: str


@dataclass(frozen=True, slots=True)
class SymbolAddress:
    """Where `symbol` lies, plus an offset; memory is read through a Deref around it.

    `offset` is None where the text behind the name is no number: the kernel finds out when it looks the symbol up.
    """

    symbol: str
    offset: int | None


@dataclass(frozen=True, slots=True)
class FileOffset:
    """Of a uprobe: where the probed file's byte `offset` is mapped; memory is read through a Deref around it."""

    offset: int


@dataclass(frozen=True, slots=True)
class Deref:
    """The memory at `inner` + `offset`; `user`: it must be the program's (+u), which a kernel probe can ask for."""

    inner: Node
    offset: int
    user: bool


Node: TypeAlias = (
    Register
    | StackPointer
    | StackWord
    | Argument
    | ReturnValue
    | Comm
    | Immediate
    | ImmediateText
    | SymbolAddress
    | FileOffset
    | Deref
)


@dataclass(frozen=True, slots=True)
class FetchArg:
    """One argument: its name, its text after `NAME=`, its tree and its type."""

    name: str
    text: str
    node: Node
    type: FetchType

    @property
    def leaf(self) -> Node:
        """What its dereferences start from."""
        node = self.node
        while isinstance(node, Deref):
            node = node.inner
        return node

    @property
    def symbol(self) -> SymbolAddress | None:
        """The data symbol it needs."""
        leaf = self.leaf
        return leaf if isinstance(leaf, SymbolAddress) else None

    @property
    def saved_argument(self) -> int | None:
        """The number of the function's argument that is to be kept at the entry for it."""
        leaf = self.leaf
        return leaf.number if isinstance(leaf, Argument) and leaf.saved else None
