"""The statuses of generations and their legal changes, states of workers, ends of attempts."""

from __future__ import annotations

from enum import StrEnum


class GenerationStatus(StrEnum):
    """The place of a generation in its life."""

    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


PENDING, PROCESSING, COMPLETED, FAILED, CANCELLED = (status.value for status in GenerationStatus)
FINISHED = (COMPLETED, FAILED, CANCELLED)

LEGAL_TRANSITIONS: dict[str, frozenset[str]] = {
    PENDING: frozenset({PROCESSING, CANCELLED}),
    PROCESSING: frozenset({COMPLETED, FAILED, CANCELLED, PENDING}),
    COMPLETED: frozenset(),
    FAILED: frozenset({PENDING}),
    CANCELLED: frozenset({PENDING}),
}


def sources_of(status: str) -> list[str]:
    """Return the statuses that may change into this one."""
    return [source for source, targets in LEGAL_TRANSITIONS.items() if status in targets]


class WorkerState(StrEnum):
    """What a worker says of itself in its row; a silent worker keeps its last state."""

    LOADING = "loading"
    SERVING = "serving"
    ENDED = "ended"


class AttemptOutcome(StrEnum):
    """How an attempt ended; a running attempt has no outcome."""

    COMPLETED = "completed"
    FAILED = "failed"
    RELEASED = "released"
    CANCELLED = "cancelled"
    LOST = "lost"
