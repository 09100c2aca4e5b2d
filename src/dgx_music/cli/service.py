"""Says which workers serve the generations that somebody waits for, after each change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

import anyio

from dgx_music.cli.output import distance, tell
from dgx_music.errors import DatabaseUnavailableError
from dgx_music.storage import Database, Generation
from dgx_music.storage.models import ALL_MODELS
from dgx_music.storage.pauses import get_pauses
from dgx_music.storage.workers import Service, find_service

_LOOK_SECONDS = 1.0


class _State(NamedTuple):
    """What is worth a line when it changes: not times, and not counts."""

    is_served: bool
    is_loading: bool
    last_id: str | None
    is_paused: bool


_AS_HOPED = _State(is_served=True, is_loading=False, last_id=None, is_paused=False)


class ServiceTeller:
    """Says which of these generations' models no worker serves, and why, once for each change."""

    def __init__(self, database: Database, generations: Sequence[Generation]) -> None:
        self._database = database
        self._waiting = {row.id: row.model_name for row in generations if not row.is_finished}
        self._told: dict[str, _State] = {}

    def note(self, generation: Generation) -> None:
        """Forget a finished generation: it needs no worker any more."""
        if generation.is_finished:
            self._waiting.pop(generation.id, None)

    async def tell(self) -> None:
        """Say what has changed since the last call; at first, what a generation waits for."""
        models = sorted(set(self._waiting.values()))
        async with self._database.session(read_only=True) as session:
            services = {model: await find_service(session, model) for model in models}
            paused = {item.model_name for item in await get_pauses(session)}
        for model, service in services.items():
            state = _state_of(service, is_paused=bool(paused & {model, ALL_MODELS}))
            for line in _changes(model, self._told.get(model, _AS_HOPED), state, service):
                tell(line)
            self._told[model] = state

    async def keep_telling(self) -> None:
        """Look every second until cancelled; skips a look while the database cannot be reached."""
        while True:
            with suppress(DatabaseUnavailableError):
                await self.tell()
            await anyio.sleep(_LOOK_SECONDS)


def _state_of(service: Service, *, is_paused: bool) -> _State:
    is_served = service.serving_count > 0
    is_loading = service.loading_count > 0 and not is_served
    return _State(
        is_served, is_loading, None if is_served or is_loading else service.last_id, is_paused
    )


def _changes(model: str, former: _State, state: _State, service: Service) -> Iterable[str]:
    if state[:3] != former[:3]:
        yield _service_in_words(model, service)
    if state.is_paused and not former.is_paused:
        yield f"{model} is paused; it goes on after: dgx-music resume"
    if former.is_paused and not state.is_paused:
        yield f"{model} is no longer paused."


def _service_in_words(model: str, service: Service) -> str:
    if service.serving_count:
        return f"A worker serves {model} now."
    if service.loading_count:
        return f"A worker is loading {model}, and serves it when that is done."
    how = f"start one with: dgx-music worker --model {model}"
    return f"No worker serves {model} now{_last_in_words(service)}; {how}"


def _last_in_words(service: Service) -> str:
    if service.gone_since is None:
        return ""
    since = distance(service.gone_since)
    if service.end_reason is None:
        return f" (the last one was heard of {since}, and did not say that it ends)"
    return f" (the last one ended {since}: {service.end_reason.rstrip('.')})"
