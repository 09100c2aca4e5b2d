"""Reading a collection that other threads change meanwhile."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def snapshot(items: Iterable[T]) -> list[T]:
    """Return what is in a set, or what it gives of a dictionary, at one moment; Python's weak ones cannot be read at once.

    Nothing is locked: a lock that another thread holds during a fork would be held for ever in the child.
    """
    while True:
        try:
            return list(items)
        except RuntimeError:  # its size has changed during the iteration
            continue
