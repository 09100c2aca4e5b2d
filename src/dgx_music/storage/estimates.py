"""When a generation will be made: its place, the workers alive, what they have measured, and a range that follows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any, NamedTuple

from sqlalchemy import Row, and_, func, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.errors import GenerationNotFoundError
from dgx_music.forecast import LEAST_MEASURED, Ahead, Range, Slot, earliest_start, latest_start
from dgx_music.storage.due import CLAIM_ORDER, find_waits, is_paused
from dgx_music.storage.generation import g
from dgx_music.storage.models import Speed, WorkerInfo
from dgx_music.storage.schema import PENDING, PROCESSING, WorkerState, dialect_of, insert, now, unindexed, written
from dgx_music.storage.workers import IS_LIVING, served_models

_ROUNDS = 4
_FAR_SECONDS = 1e9
_UNKNOWN = Range(0.0, math.inf)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """When a generation starts and is done, in seconds from now, as far as anybody can say."""

    status: str
    position: int | None = None
    """The place among those of its model that wait, from 1 for the next."""
    starts_in: Range | None = None
    """``None`` where it does not wait, or nobody knows."""
    done_in: Range | None = None
    unknown_because: str | None = None
    """Why nobody knows, in a few words; ``None`` where the ranges are there, and for what is finished."""

    def to_dict(self) -> dict[str, Any]:
        """Return the estimate as plain JSON values; a range is an object with ``low`` and ``high``."""
        names = {"starts_in": "starts_in_seconds", "done_in": "done_in_seconds"}
        return {names.get(name, name): value for name, value in asdict(self).items()}


class _UnknownError(Exception):
    """There is nothing to go by; says why."""


class _Server(NamedTuple):
    """A worker that is alive, and when it was last heard of."""

    id: str
    device: str
    slots: int
    loaded: str
    """The model that is ready; empty while the worker loads one."""
    models: frozenset[str]
    silent_seconds: float


_Speeds = dict[tuple[str, str], Range | int]
"""By model and device; a number where so few were measured that no range follows."""


async def record_speed(
    session: AsyncSession,
    model_name: str,
    device: str,
    low: float,
    typical: float,
    high: float,
    measured_count: int,
) -> None:
    """Keep what a worker has measured, in place of what this kind of device had measured before; of a few, only their number.

    Few take the place of few only: a worker that has just started must not make unknown what is known.
    In seconds for one second of the model's audio; ``low`` and ``high`` are the 10th and the 90th percentile.
    """
    measured = {"low": low, "typical": typical, "high": high, "measured_count": measured_count, "measured_at": now()}
    statement = insert(dialect_of(session), Speed).values(model_name=model_name, device=device, **measured)
    is_better = Speed.measured_count < LEAST_MEASURED if measured_count < LEAST_MEASURED else None
    keys = ["model_name", "device"]
    await session.execute(statement.on_conflict_do_update(index_elements=keys, set_=measured, where=is_better))


async def estimate(session: AsyncSession, generation_id: str) -> Estimate:
    """Return when the generation starts and is done, or why nobody knows. Raises ``GenerationNotFoundError``.

    In a reading session all of it is one moment's truth. The ranges span the 10th to the 90th percentile of the speeds that
    the workers' own devices have shown with this model lately; measured on another device is nothing to go by. The formulas
    are those of ``forecast.earliest_start`` and ``latest_start``.

    It is the queue as it is now. What comes in later with a higher priority, failures, workers that come and go, the storing
    of the audio, and limits on a tenant's share are not in it, and may put the truth outside. Nor is the loading of a model:
    a worker is counted on where the model is loaded already, and then to share its time evenly with others that are due.
    """
    own = (await session.execute(_OWN.where(g.id == generation_id))).one_or_none()
    if own is None:
        raise GenerationNotFoundError(generation_id)
    if own.status == PENDING:
        return await _estimate_waiting(session, own)
    if own.status == PROCESSING:
        return await _estimate_running(session, own)
    return Estimate(status=own.status)


async def _estimate_waiting(session: AsyncSession, own: Row[Any]) -> Estimate:
    ahead = await _ahead(session, own, 0.0)
    told = Estimate(status=own.status, position=ahead.count + 1)
    try:
        slots = await _slots(session, own.model_name)
        starts_in = await _start(session, own, slots, ahead)
    except _UnknownError as unknown:
        return replace(told, unknown_because=str(unknown))
    fastest, slowest = min(slot.speed.low for slot in slots), max(slot.speed.high for slot in slots)
    least, most = fastest * own.duration_seconds, slowest * own.duration_seconds
    return replace(told, starts_in=starts_in, done_in=Range(starts_in.low + least, starts_in.high + most))


async def _estimate_running(session: AsyncSession, own: Row[Any]) -> Estimate:
    try:
        return Estimate(status=own.status, done_in=await _rest_of_running(session, own))
    except _UnknownError as unknown:
        return Estimate(status=own.status, unknown_because=str(unknown))


async def _rest_of_running(session: AsyncSession, own: Row[Any]) -> Range:
    if own.worker_id is None:
        raise _UnknownError("it was taken by hand")
    if own.cancel_requested:
        raise _UnknownError("it is being cancelled")
    servers = [server for server in await _living(session) if server.id == own.worker_id]
    if not servers:
        raise _UnknownError("its worker has fallen silent")
    speeds = await _speeds(session, servers)
    return _rest(own, _speed(speeds, own.model_name, servers[0].device), servers[0])


async def _living(session: AsyncSession) -> list[_Server]:
    """Return the workers that are alive."""
    w = WorkerInfo
    query = select(w.id, w.device, w.slots, w.model_name, w.models, w.state, w.heartbeat_at, now().label("now"))
    rows = await session.execute(query.where(IS_LIVING))
    return [
        _Server(
            row.id,
            row.device,
            row.slots,
            "" if row.state == WorkerState.LOADING.value else row.model_name,
            served_models(row),
            (row.now - row.heartbeat_at).total_seconds(),
        )
        for row in rows
    ]


async def _speeds(session: AsyncSession, servers: Iterable[_Server]) -> _Speeds:
    devices = {server.device for server in servers}
    rows = await session.execute(select(Speed).where(Speed.device.in_(devices)))
    return {(speed.model_name, speed.device): _range_of(speed) for speed in rows.scalars()}


def _range_of(speed: Speed) -> Range | int:
    is_enough = speed.measured_count >= LEAST_MEASURED
    return Range(speed.low, speed.high) if is_enough else speed.measured_count


def _speed(speeds: _Speeds, model_name: str, device: str) -> Range:
    found = speeds.get((model_name, device), 0)
    if isinstance(found, Range):
        return found
    count = f"{found} of the {LEAST_MEASURED} measurements needed were made" if found else "nothing was measured yet"
    raise _UnknownError(f"{count} for {model_name} on {device}")


async def _slots(session: AsyncSession, model_name: str) -> list[Slot]:
    """Return the slots that serve the model, when each is free, and how many models share it.

    A worker that loads its model is one slot more, free nobody knows when, and taken for as quick as the others.
    """
    if await session.scalar(select(is_paused(model_name))):
        raise _UnknownError(f"{model_name} is paused")
    servers = [server for server in await _living(session) if model_name in server.models]
    if not servers:
        raise _UnknownError(f"no worker serves {model_name}")
    coming = [server for server in servers if not server.loaded]
    servers = [server for server in servers if server.loaded]
    if not servers:
        raise _UnknownError(f"a worker is still loading {model_name}")
    speeds, running = await _speeds(session, servers), await _running(session, servers)
    others = frozenset[str]().union(*(server.models for server in servers)) - {model_name}
    rivals = (await find_waits(session, others)).keys()
    slots: list[Slot] = []
    for server in servers:
        speed, sharers = _speed(speeds, model_name, server.device), 1 + len(rivals & server.models)
        slots += [Slot(speed, free_in, sharers) for free_in in _free(server, model_name, speed, running[server.id])]
    known = [slot.speed for slot in slots]
    likely = Range(min(speed.low for speed in known), max(speed.high for speed in known))
    return slots + [Slot(likely, _UNKNOWN, 1 + len(rivals & server.models)) for server in coming]


async def _running(session: AsyncSession, servers: Iterable[_Server]) -> dict[str, list[Any]]:
    """Return what each of these workers has in hand."""
    query = select(g.worker_id, g.model_name, g.duration_seconds, g.progress, g.cancel_requested)
    is_theirs = and_(g.status == written(PROCESSING), g.worker_id.in_([server.id for server in servers]))
    running: dict[str, list[Any]] = defaultdict(list)
    for row in await session.execute(query.where(is_theirs)):
        running[row.worker_id].append(row)
    return running


def _free(server: _Server, model_name: str, speed: Range, running: list[Any]) -> list[Range]:
    """Return when each slot is free for this model: nobody knows where another one is loaded, and this one has to be first.

    More may be in hand than there are slots: those nearest their end only wait to be stored.
    """
    if server.loaded != model_name:
        return [_UNKNOWN] * server.slots
    rests = [_rest(row, speed, server) if row.model_name == model_name else _UNKNOWN for row in running]
    rests += [Range(0.0, 0.0)] * server.slots
    return sorted(rests, key=lambda rest: (rest.high, rest.low), reverse=True)[: server.slots]


def _rest(row: Row[Any], speed: Range, server: _Server) -> Range:
    """Return how long a running one still takes: its progress is as old as its worker's last heartbeat."""
    audio = row.duration_seconds * (1 - row.progress)
    least = 0.0 if row.cancel_requested else max(0.0, speed.low * audio - server.silent_seconds)
    return Range(least, speed.high * audio)


async def _start(session: AsyncSession, own: Row[Any], slots: list[Slot], ahead: Ahead) -> Range:
    """Return from when to when it starts: after what comes before it in the order of claims and is due by then.

    ``ahead`` is what is due now. A generation that is scheduled may find the slots taken by all that is due by its own time.
    """
    wait = max(0.0, (own.run_at - own.now).total_seconds())
    soonest = await _ahead(session, own, wait) if wait else ahead
    high = await _latest(session, own, slots, ahead, wait)
    if high == math.inf:
        raise _UnknownError(f"no worker has {own.model_name} loaded now")
    return Range(max(wait, earliest_start(slots, soonest)), high)


async def _latest(session: AsyncSession, own: Row[Any], slots: list[Slot], ahead: Ahead, wait: float) -> float:
    """Return the seconds within which it starts, ``wait`` included.

    More may become due meanwhile and go first: looked for again until no more are found, or else all are counted.
    """
    for _ in range(_ROUNDS):
        high = wait + latest_start(slots, ahead)
        more = await _ahead(session, own, high, is_overtaken=wait > 0)
        if more == ahead:
            return high
        ahead = more
    return wait + latest_start(slots, await _ahead(session, own, _FAR_SECONDS, is_overtaken=wait > 0))


async def _ahead(session: AsyncSession, own: Row[Any], within: float, *, is_overtaken: bool = False) -> Ahead:
    """Return what waits of the same model, is due within so many seconds, and comes before it in the order of claims.

    Where it ``is_overtaken``, also what is due by its own time, whatever its place.
    """
    is_first = and_(own.claim_order >= CLAIM_ORDER, or_(own.claim_order > CLAIM_ORDER, g.id < own.id))
    if is_overtaken:
        is_first = or_(is_first, g.run_at <= own.run_at)
    due_by = own.now + timedelta(seconds=min(within, _FAR_SECONDS))
    is_counted = and_(g.status == written(PENDING), g.model_name == own.model_name, unindexed(g.run_at) <= due_by)
    total, longest = (func.coalesce(each(g.duration_seconds), 0.0) for each in (func.sum, func.max))
    query = select(func.count(), total, longest).where(is_counted, is_first, g.id != own.id)
    return Ahead(*(await session.execute(query)).one())


_OWN = select(
    *(g.id, g.status, g.model_name, g.duration_seconds, g.run_at, g.worker_id, g.progress, g.cancel_requested),
    CLAIM_ORDER.label("claim_order"),
    now().label("now"),
)
