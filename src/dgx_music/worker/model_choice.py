"""Which of its models a worker claims next."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from dgx_music.config import Settings
from dgx_music.storage import due, queue
from dgx_music.storage.database import Database
from dgx_music.worker.live_engine import LiveEngine

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

_SKIP_SECONDS = 1.0


class ModelChoice:
    """Chooses among the models that one worker serves; loads none."""

    def __init__(self, database: Database, settings: Settings, engine: LiveEngine) -> None:
        self._database = database
        self._settings = settings
        self._engine = engine
        self._skip_until: dict[str, float] = {}

    async def find_waits(self) -> dict[str, float]:
        """Return for how many seconds each model with due rows has waited, without the skipped."""
        waits = await self._database.transact(self._read_waits, read_only=True)
        return {model: wait for model, wait in waits.items() if not self._seconds_to_skip(model)}

    def choose(self, waits: Mapping[str, float]) -> str | None:
        """Return the model to claim next, given for how many seconds each has waited.

        That is the loaded one, unless it has nothing due or another has waited too long. A model
        just loaded is served for as long as another may have to wait, or a worker with two backlogs
        would do nothing but load.
        """
        if not waits:
            return None
        loaded, bound = self._engine.model, self._settings.model_switch_seconds
        overdue = [model for model, wait in waits.items() if model != loaded and wait > bound]
        if overdue and time.monotonic() - self._engine.loaded_at > bound:
            return max(overdue, key=lambda model: waits[model])
        return loaded if loaded in waits else max(waits, key=lambda model: waits[model])

    def note_claim(self, model: str, *, is_empty: bool) -> None:
        """Skip this model for a moment if a claim of it was empty, and there are others."""
        if len(self._engine.models) > 1:
            self._skip_until[model] = time.monotonic() + _SKIP_SECONDS if is_empty else -math.inf

    def shortest_skip(self) -> float:
        """Return in how many seconds a skipped model has its turn again; infinity without one."""
        skips = map(self._seconds_to_skip, self._engine.models)
        return min(filter(None, skips), default=math.inf)

    async def _read_waits(self, session: AsyncSession) -> dict[str, float]:
        # An idle worker may not claim for days, and is counted on meanwhile.
        await queue.check_schema(session)
        return await due.find_waits(session, self._engine.models)

    def _seconds_to_skip(self, model: str) -> float:
        """Return for how many seconds the other models go first.

        This one has due rows, and a claim found none to take: its tenants may have reached their
        limits, or somebody has the rows locked.
        """
        return max(0.0, self._skip_until.get(model, -math.inf) - time.monotonic())
