"""The worker's own row: who the worker is, what it serves, and that it is alive."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

from dgx_music.config import Settings
from dgx_music.errors import DgxMusicError, unwrap
from dgx_music.storage import workers
from dgx_music.validation import tidy_text
from dgx_music.worker.live_engine import LiveEngine

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

_MAX_REASON_LENGTH = 500


class Presence:
    """What the other workers and the command line learn of this worker.

    Each coroutine writes or reads in the session that it is given.
    """

    def __init__(self, worker_id: str, settings: Settings, engine: LiveEngine) -> None:
        self.id = worker_id
        self.free_workers = 1
        """How many workers, this one included, would claim what is due now: as last counted."""
        self._settings = settings
        self._engine = engine

    async def register(self, session: AsyncSession) -> None:
        """Add the row of this worker."""
        await workers.register_worker(session, **self.describe())

    async def renew(self, session: AsyncSession, running_count: int) -> None:
        """Record that the worker is alive, and what it is now."""
        await workers.heartbeat_worker(session, **self.describe(), running_count=running_count)

    async def count_free_workers(self, session: AsyncSession) -> None:
        """Count who else would claim what is due of the loaded model."""
        self.free_workers = await workers.count_free_workers(session, self._engine.model)

    async def end(self, session: AsyncSession, reason: str) -> None:
        """Record that the worker has ended, and why."""
        await workers.end_worker(session, **self.describe(), reason=reason)

    def describe(self) -> dict[str, Any]:
        """Return the columns of the row that say who the worker is and what it serves."""
        return {
            "id": self.id,
            "host": socket.gethostname()[:200],
            "pid": os.getpid(),
            "state": self._engine.state.value,
            "model_name": self._engine.model,
            "models": self._engine.models,
            "device": self._engine.info.device,
            "slots": self._engine.info.slots,
            "lease_seconds": self._settings.lease_seconds,
        }


def end_reason(error: Exception) -> str:
    """Return what others are told of this error, in one short line; of a group, what it wraps."""
    alone = unwrap(error)
    told = str(alone) if isinstance(alone, DgxMusicError) else f"{type(alone).__name__}: {alone}"
    return " ".join(tidy_text(told).split())[:_MAX_REASON_LENGTH]
