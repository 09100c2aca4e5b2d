"""Read a collection while other threads change it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def snapshot(items: Iterable[T]) -> list[T]:
    """Return the items of a set or of a dictionary's view, all at one moment.

    Python's weak collections have no such read. Nothing is locked: a lock that another thread holds
    during a fork would stay locked in the child.
    """
    while True:
        try:
            return list(items)
        except RuntimeError:  # its size has changed during the iteration
            continue
