"""Other Python queues on the same databases, each in its own module, with its quick settings.

A module can be imported only if its library is installed.
"""

from __future__ import annotations

from importlib import import_module

from benchmarks.contestants import Queue

ON_POSTGRES = ("pgqueuer", "procrastinate", "saq")
ON_SQLITE = ("huey", "litequeue", "persist_queue")


def find(name: str) -> type[Queue] | None:
    """Return the queue of a library, or None if the library is not installed."""
    try:
        module = import_module(f"{__name__}.{name}")
    except ModuleNotFoundError:
        return None
    peer: type[Queue] = module.Peer
    return peer
