"""Progress without coupling: long work tells how far it is, a listener (the command line) may show it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
Listener = Callable[[str, int, int | None, str], None]
"""Called with (what, done, total or None, note)."""

_listener: ContextVar[Listener | None] = ContextVar("flpriv_progress", default=None)


def tell(what: str, done: int, total: int | None = None, note: str = "") -> None:
    """Say that ``done`` of ``total`` steps of ``what`` are finished; free of cost when nobody listens."""
    listener = _listener.get()
    if listener is not None:
        listener(what, done, total, note)


def track(items: Iterable[T], what: str) -> Iterator[T]:
    """Yield ``items`` and tell the progress after each."""
    total = len(items) if isinstance(items, Sized) else None
    for done, item in enumerate(items):
        yield item
        tell(what, done + 1, total)


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Send everything told within the block to ``listener``."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
