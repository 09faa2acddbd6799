"""The user's line: where a node is declared, or `compile` is called."""

from __future__ import annotations

import contextlib
import contextvars
import os
import sys
from collections.abc import Iterator
from types import FrameType

from graphc.types import Origin

_PACKAGE = os.path.dirname(os.path.abspath(__file__))
_PASSES = os.path.join(os.path.dirname(_PACKAGE), "passes")
_PINNED: contextvars.ContextVar[Origin | None] = contextvars.ContextVar("origin", default=None)


@contextlib.contextmanager
def called_from(origin: Origin) -> Iterator[None]:
    """Nodes that have no other origin take this one, wherever the code inside is called from."""
    token = _PINNED.set(origin)
    try:
        yield
    finally:
        _PINNED.reset(token)


def caller() -> Origin:
    """The first stack frame outside graphc and passes: the user's line."""
    pinned = _PINNED.get()
    if pinned is not None:
        return pinned
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((_PACKAGE, _PASSES)) and "contextlib" not in file:
            return Origin("", file, frame.f_lineno)
        frame = frame.f_back
    return Origin()
