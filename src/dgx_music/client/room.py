"""How many generations may wait before ``enqueue`` refuses more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from dgx_music.config import queue_settings
from dgx_music.storage.room import QueueLimits

_of_context: ContextVar[QueueLimits | None] = ContextVar("dgx_music_queue_limits", default=None)


@contextmanager
def own_limits() -> Iterator[None]:
    """Let ``limit_queue`` apply to what is enqueued inside of this, and to nothing after it."""
    token = _of_context.set(None)
    try:
        yield
    finally:
        _of_context.reset(token)


def limit_queue(limits: QueueLimits) -> None:
    """Have these limits apply inside of ``own_limits``, and not those of the environment.

    So a web server has limits of its own, also in a program that enqueues without any.
    """
    _of_context.set(limits)


def queue_limits() -> QueueLimits | None:
    """Return the limits that apply here; ``None`` if there are none, so that nothing is counted."""
    limits = _of_context.get()
    if limits is None and (settings := queue_settings()):
        limits = limits_of(**settings)
    return None if limits == QueueLimits() else limits


def limits_of(
    max_pending: int | None = None, max_pending_per_tenant: int | None = None
) -> QueueLimits:
    """Return the limits that these settings mean; 0 is any number, as ``None`` is."""
    return QueueLimits(max_pending or None, max_pending_per_tenant or None)
