"""When a generation will be made: a range, from its place, the living workers and their speeds."""

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
from dgx_music.statuses import PENDING, PROCESSING, GenerationStatus, WorkerState
from dgx_music.storage.due import CLAIM_ORDER, find_waits, is_paused
from dgx_music.storage.generation import g
from dgx_music.storage.models import Speed, WorkerInfo
from dgx_music.storage.schema import dialect_of, insert, now, unindexed, written
from dgx_music.storage.workers import IS_LIVING, served_models

_ROUNDS = 4
_FAR_SECONDS = 1e9
_UNKNOWN = Range(0.0, math.inf)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """When a generation starts and is done, in seconds from now, as far as it is known."""

    status: GenerationStatus
    position: int | None = None
    """Its place in the queue of its model; 1 is the next."""
    starts_in: Range | None = None
    """``None`` if it does not wait, or if it is unknown."""
    done_in: Range | None = None
    unknown_because: str | None = None
    """The reason, in a few words; ``None`` if the ranges are known, or if it is finished."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; a range is an object with ``low`` and ``high``."""
        names = {"starts_in": "starts_in_seconds", "done_in": "done_in_seconds"}
        return {names.get(name, name): value for name, value in asdict(self).items()}


class _UnknownError(Exception):
    """Nothing is known that an estimate could use; the message says why."""


class _Server(NamedTuple):
    """A living worker, and the time since its last heartbeat."""

    id: str
    device: str
    slots: int
    loaded: str
    """The model that is loaded; empty while the worker loads one."""
    models: frozenset[str]
    silent_seconds: float


_Speeds = dict[tuple[str, str], Range | int]
"""By model and device; a number if too few were measured for a range."""


async def record_speed(
    session: AsyncSession,
    model_name: str,
    device: str,
    low: float,
    typical: float,
    high: float,
    measured_count: int,
) -> None:
    """Store what a worker has measured, instead of what this kind of device measured before.

    In seconds for one second of the model's audio; ``low`` and ``high`` are the 10th and the 90th
    percentile. Fewer measurements than an estimate needs never replace enough of them: a worker
    that has just started must not make a known speed unknown.
    """
    measured = {
        "low": low,
        "typical": typical,
        "high": high,
        "measured_count": measured_count,
        "measured_at": now(),
    }
    keys = {"model_name": model_name, "device": device}
    statement = insert(dialect_of(session), Speed).values(**keys, **measured)
    is_better = Speed.measured_count < LEAST_MEASURED if measured_count < LEAST_MEASURED else None
    upsert = statement.on_conflict_do_update(index_elements=[*keys], set_=measured, where=is_better)
    await session.execute(upsert)


async def estimate(session: AsyncSession, generation_id: str) -> Estimate:
    """Return when the generation starts and is done, or why that is unknown.

    In a reading session all of it is read at one moment. The ranges span the 10th to the 90th
    percentile of the speeds that the workers' own devices had with this model lately; measurements
    of another kind of device are not used. The formulas are ``forecast.earliest_start`` and
    ``latest_start``.

    The estimate looks at the queue as it is now. It leaves out later generations of higher
    priority, failures, workers that come and go, the storing of the audio, and limits of tenants;
    each may make the true time fall outside the range. It also leaves out the loading of models: it
    counts on the workers that have the model loaded, and assumes that they share their time evenly
    among the models that are due. Raises ``GenerationNotFoundError``.
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
    speed = _span(slots)
    least, most = speed.low * own.duration_seconds, speed.high * own.duration_seconds
    done_in = Range(starts_in.low + least, starts_in.high + most)
    return replace(told, starts_in=starts_in, done_in=done_in)


def _span(slots: list[Slot]) -> Range:
    """Return the speeds from the fastest slot's low to the slowest one's high."""
    return Range(min(slot.speed.low for slot in slots), max(slot.speed.high for slot in slots))


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
    """Return the living workers."""
    w = WorkerInfo
    columns = (w.id, w.device, w.slots, w.model_name, w.models, w.state, w.heartbeat_at)
    query = select(*columns, now().label("now"))
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
    few = f"{found} of the {LEAST_MEASURED} measurements needed were made"
    count = few if found else "nothing was measured yet"
    raise _UnknownError(f"{count} for {model_name} on {device}")


async def _slots(session: AsyncSession, model_name: str) -> list[Slot]:
    """Return the slots that serve the model, when each is free, and how many models share it.

    A worker that loads its model is one more slot, free at an unknown time, and as fast as the
    others.
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
        free = _free(server, model_name, speed, running[server.id])
        slots += [Slot(speed, free_in, sharers) for free_in in free]
    likely = _span(slots)
    return slots + [Slot(likely, _UNKNOWN, 1 + len(rivals & server.models)) for server in coming]


async def _running(session: AsyncSession, servers: Iterable[_Server]) -> dict[str, list[Any]]:
    """Return the rows that each of these workers holds."""
    query = select(g.worker_id, g.model_name, g.duration_seconds, g.progress, g.cancel_requested)
    ids = [server.id for server in servers]
    is_theirs = and_(g.status == written(PROCESSING), g.worker_id.in_(ids))
    running: dict[str, list[Any]] = defaultdict(list)
    for row in await session.execute(query.where(is_theirs)):
        running[row.worker_id].append(row)
    return running


def _free(server: _Server, model_name: str, speed: Range, running: list[Any]) -> list[Range]:
    """Return when each slot is free for this model; unknown if the worker has another one loaded.

    The worker may hold more generations than it has slots: those nearest their end only wait to be
    stored.
    """
    if server.loaded != model_name:
        return [_UNKNOWN] * server.slots
    rests = [
        _rest(row, speed, server) if row.model_name == model_name else _UNKNOWN for row in running
    ]
    rests += [Range(0.0, 0.0)] * server.slots
    return sorted(rests, key=lambda rest: (rest.high, rest.low), reverse=True)[: server.slots]


def _rest(row: Row[Any], speed: Range, server: _Server) -> Range:
    """Return how long a running generation still takes; its progress is of the last heartbeat."""
    audio = row.duration_seconds * (1 - row.progress)
    least = 0.0 if row.cancel_requested else max(0.0, speed.low * audio - server.silent_seconds)
    return Range(least, speed.high * audio)


async def _start(session: AsyncSession, own: Row[Any], slots: list[Slot], ahead: Ahead) -> Range:
    """Return the range of its start: after what is due then and comes before it.

    ``ahead`` is what is due now. A scheduled generation may find the slots taken by all that is due
    by its own time.
    """
    wait = max(0.0, (own.run_at - own.now).total_seconds())
    soonest = await _ahead(session, own, wait) if wait else ahead
    high = await _latest(session, own, slots, ahead, wait)
    if high == math.inf:
        raise _UnknownError(f"no worker has {own.model_name} loaded now")
    return Range(max(wait, earliest_start(slots, soonest)), high)


async def _latest(
    session: AsyncSession, own: Row[Any], slots: list[Slot], ahead: Ahead, wait: float
) -> float:
    """Return the seconds within which it starts, ``wait`` included.

    More may become due in this time and go first: so it looks again until it finds no more, and
    after some rounds counts all that wait.
    """
    for _ in range(_ROUNDS):
        high = wait + latest_start(slots, ahead)
        more = await _ahead(session, own, high, is_overtaken=wait > 0)
        if more == ahead:
            return high
        ahead = more
    return wait + latest_start(
        slots, await _ahead(session, own, _FAR_SECONDS, is_overtaken=wait > 0)
    )


async def _ahead(
    session: AsyncSession, own: Row[Any], within: float, *, is_overtaken: bool = False
) -> Ahead:
    """Return what waits of its model, is due within so many seconds, and comes before it.

    If it ``is_overtaken``, also what is due by its own time, whatever its place in the order of
    claims.
    """
    is_first = and_(
        own.claim_order >= CLAIM_ORDER, or_(own.claim_order > CLAIM_ORDER, g.id < own.id)
    )
    if is_overtaken:
        is_first = or_(is_first, g.run_at <= own.run_at)
    due_by = own.now + timedelta(seconds=min(within, _FAR_SECONDS))
    is_same = and_(g.status == written(PENDING), g.model_name == own.model_name)
    is_counted = and_(is_same, unindexed(g.run_at) <= due_by)
    total, longest = (func.coalesce(each(g.duration_seconds), 0.0) for each in (func.sum, func.max))
    query = select(func.count(), total, longest).where(is_counted, is_first, g.id != own.id)
    return Ahead(*(await session.execute(query)).one())


_OWN = select(
    *(g.id, g.status, g.model_name, g.duration_seconds),
    *(g.run_at, g.worker_id, g.progress, g.cancel_requested),
    CLAIM_ORDER.label("claim_order"),
    now().label("now"),
)
