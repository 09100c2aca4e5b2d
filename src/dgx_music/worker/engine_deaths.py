"""What a worker does when the engine's process dies.

1. ``ChildCalls.on_child_death`` fails what ran in the process, with ``EngineCrashedError``.
2. ``Performing.run`` counts a failure of each of these generations, and tells ``EngineDeaths``.
3. ``EngineDeaths`` stops the worker if the engine is at fault; else the whole queue would fail.
4. ``LiveEngine.start`` starts a fresh process before the next claim.
"""

from __future__ import annotations

from dgx_music.errors import EngineCrashedError
from dgx_music.worker.stopping import Stopping

BROKEN_AFTER = 4
"""After so many deaths with as many different victims and no success, the engine is at fault."""


class EngineDeaths:
    """The deaths of one worker's engine since the last success, and the generations they cost."""

    def __init__(self, stopping: Stopping) -> None:
        self._stopping = stopping
        self._count = 0
        self._victims: set[str] = set()

    def on_engine_death(self, generation_id: str, error: EngineCrashedError) -> None:
        """Note a generation that ran when the engine died; stop the worker if the engine is broken.

        The death itself is counted when the next process has started: it may have many victims.
        """
        self._victims.add(generation_id)
        if self._is_engine_broken:
            self._stopping.give_up(error)

    def note_replacement(self) -> None:
        """Count a death: a fresh process has replaced the former one."""
        self._count += 1

    def note_success(self) -> None:
        """Count the deaths from here on: a generation was completed."""
        self._victims.clear()
        self._count = 0

    @property
    def _is_engine_broken(self) -> bool:
        """True if the engine died of one generation after another.

        One death may have many victims, and one prompt may cause many deaths: neither alone says
        much.
        """
        return min(self._count, len(self._victims)) >= BROKEN_AFTER
