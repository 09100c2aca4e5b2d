"""What producers call: enqueue, wait, watch, cancel, retry. Never imports torch.

Each coroutine opens a session of its own on the default database (made from the settings if ``init_db`` was not called),
or works in the caller's: then nothing is committed, rolled back or closed by us.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, cast, get_type_hints

import anyio
import anyio.to_thread
from typing_extensions import Unpack

from dgx_music import validation
from dgx_music.catalog import ModelInfo
from dgx_music.config import check_variables, default_model, load_settings
from dgx_music.errors import GenerationNotFoundError, InvalidRequestError, WaitTimeoutError
from dgx_music.inference.engine import GenerationRequest
from dgx_music.storage import due, queue, repository
from dgx_music.storage.connection.changes import Topic
from dgx_music.storage.connection.sessions import check_session, finish
from dgx_music.storage.database import Database, ensure_database
from dgx_music.storage.insertion import insert_generations
from dgx_music.storage.models import Generation
from dgx_music.storage.queue import AUDIO_KEY
from dgx_music.storage.schema import DEFAULT_MAX_ATTEMPTS, new_id

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

T = TypeVar("T")

DEFAULT_DURATION_SECONDS = 10.0
MAX_BATCH = 10_000
_POLL_SECONDS = 1.0


class RequestOptions(TypedDict, total=False):
    """What may be said of a generation besides its prompt; every field has a default."""

    duration: float
    """Seconds of audio; 10 where not given, at most what the model can do."""
    model: str
    """A name from the catalogue or a local folder's absolute path; ``DGX_MUSIC_MODEL`` where not given."""
    channels: int
    """1 or 2 in the file; where not given the model's own, or 1 for a local folder."""
    sample_rate: int
    """Of the file, in Hz; where not given the model's own, or 32,000 for a local folder."""
    guidance_scale: float
    temperature: float
    top_k: int
    top_p: float | None
    seed: int | None
    """The same seed, model and settings make the same audio; where not given it follows from the row's id."""
    negative_prompt: str | None
    """What the music must not be like; of no use without guidance."""
    continuation: str | os.PathLike[str] | bytes | None
    """What the music starts with and goes on from: an audio file's path or its bytes, 0.08 to 30 s, from whose start the
    duration counts. A path is read here and now, with your rights: never take one from a stranger, take the bytes."""
    melody: str | os.PathLike[str] | bytes | None
    """The tune to follow, given likewise, of which the first 30 s count; for models that hear one."""
    priority: int
    """Higher goes first, a point being worth a minute of waiting; 0 where not given."""
    tenant: str | None
    """For whom it is made: a worker's ``tenant_limit`` says how many of one tenant's run at a time."""
    run_at: Any
    """A datetime with a zone, or ISO 8601 text: not claimed before; at once where not given."""
    max_attempts: int
    """Failures that it takes to give up, lost workers included; 10 where not given."""
    idempotency_key: str | None
    """A repeated request with this key gets the existing row; another request with it is refused."""
    metadata: dict[str, Any] | None
    """The caller's own JSON, kept with the row."""


_OPTIONS = frozenset(get_type_hints(RequestOptions))
_SAMPLING = ("guidance_scale", "temperature", "top_k", "top_p", "seed", "negative_prompt")
_AUDIO = ("channels", "sample_rate")
_CLIPS = ("continuation", "melody")


@dataclass(frozen=True)
class Plan:
    """What a request becomes, once its clips are read: all of its row but what depends on them."""

    row: dict[str, Any]
    """The columns that identify the request; its hash is of them."""
    rest: dict[str, Any]
    """The other columns."""
    model: ModelInfo
    sources: Mapping[str, Any]
    """Where the clips come from, by the names of the fields."""
    name: str = ""
    """What a refusal calls the request, where it is one of many."""


@dataclass(frozen=True)
class Batch:
    """Checked requests: the rows to insert, and the clips that they refer to: content and seconds, by ``sha256``."""

    rows: list[dict[str, Any]]
    clips: Mapping[str, tuple[bytes, float]]


async def enqueue(prompt: str, *, session: AsyncSession | None = None, **options: Unpack[RequestOptions]) -> Generation:
    """Add one generation to the queue and return its row. An empty prompt asks for unconditional music.

    Raises ``InvalidRequestError`` before anything is stored, and ``IdempotencyConflictError`` if the key belongs to a
    different request. With the caller's ``session`` the row is part of the caller's transaction: workers see it
    once that is committed, and it is gone if that is rolled back.
    """
    batch = await _read_clips([plan(prompt, cast("Mapping[str, Any]", options))])
    return (await store(batch, session=session))[0]


async def enqueue_many(
    requests: Iterable[str | Mapping[str, Any]],
    *,
    session: AsyncSession | None = None,
    **defaults: Unpack[RequestOptions],
) -> list[Generation]:
    """Add many generations in one transaction, all or none, and return their rows in the same order.

    Each request is a prompt, or a mapping with ``prompt`` and any of the options of ``enqueue``; ``defaults`` fill in what
    it leaves out. An ``InvalidRequestError`` names the request by its place, from 1.
    """
    if isinstance(requests, str | bytes | Mapping) or not isinstance(requests, Iterable):
        raise InvalidRequestError("requests", "are not a list", "send a list of prompts, or call enqueue for one")
    plans = [_plan_numbered(number, request, defaults) for number, request in enumerate(requests, 1)]
    return await store(await _read_clips(plans), session=session)


async def store(batch: Batch, *, session: AsyncSession | None = None) -> list[Generation]:
    """Add the generations of a batch in one transaction, all or none, and return their rows in the same order."""
    return await _transact(session, lambda current: insert_generations(current, batch.rows, batch.clips))


def enqueue_sync(prompt: str, **options: Unpack[RequestOptions]) -> Generation:
    """Add one generation from code that has no event loop, on a connection of its own, and return its row.

    Raises ``RuntimeError`` inside an event loop: await ``enqueue`` there.
    """
    if _is_in_event_loop():
        raise RuntimeError("enqueue_sync would block the event loop that runs here; await enqueue(...) instead.")
    batch = read_clips([plan(prompt, cast("Mapping[str, Any]", options))])

    async def run() -> Generation:
        database = Database.from_settings(load_settings())
        try:
            await database.prepare()
            rows = await database.transact(lambda session: insert_generations(session, batch.rows, batch.clips))
            return rows[0]
        finally:
            await database.dispose()

    return asyncio.run(run())


def _is_in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def cancel_generation(generation_id: str, *, session: AsyncSession | None = None) -> str:
    """Cancel a generation and return the status it has now.

    ``cancelled``, or ``processing`` while its worker stops it: such a row ends cancelled, never completed. Raises
    ``GenerationNotFoundError``, or ``IllegalTransitionError`` where it has already completed or failed.
    """
    validation.check_name("generation_id", generation_id)
    return await _transact(session, lambda current: queue.cancel(current, generation_id))


async def retry_generation(generation_id: str, *, session: AsyncSession | None = None) -> None:
    """Make a failed or cancelled generation pending again with a fresh budget.

    Raises ``GenerationNotFoundError``, or ``IllegalTransitionError`` where it is pending, running or completed.
    """
    validation.check_name("generation_id", generation_id)
    await _transact(session, lambda current: queue.retry(current, generation_id))


async def queue_position(generation_id: str, *, session: AsyncSession | None = None) -> int | None:
    """Return the place of a pending generation among those of its model, from 1; ``None`` where it does not wait."""
    validation.check_name("generation_id", generation_id)
    return await _transact(session, lambda current: due.queue_position(current, generation_id), read_only=True)


async def wait_for_generation(generation_id: str, *, timeout: float | None = None) -> Generation:
    """Wait until the generation is completed, failed or cancelled, and return its row.

    Raises ``WaitTimeoutError`` after ``timeout`` seconds; the generation goes on. Raises ``GenerationNotFoundError``.
    """
    if timeout is not None:
        validation.check_between("timeout", timeout, 0, 1e9)
    with anyio.move_on_after(timeout):
        async with aclosing(watch_generation(generation_id)) as rows:
            async for latest in rows:
                if latest.is_finished:
                    return latest
    latest = await _read(await ensure_database(), generation_id)
    if latest.is_finished:
        return latest
    raise WaitTimeoutError(generation_id, latest.status, timeout or 0.0)


async def watch_generation(generation_id: str) -> AsyncGenerator[Generation, None]:
    """Yield the generation's row now and whenever its status, attempt or progress changes, up to its end.

    Raises ``GenerationNotFoundError``, also where the row is deleted meanwhile.
    """
    validation.check_name("generation_id", generation_id)
    database = await ensure_database()
    seen: tuple[Any, ...] | None = None
    # What has become of it before this moment is found by the first read.
    with database.changes.subscribe(Topic.DONE, [generation_id]) as changes:
        while True:
            generation = await _read(database, generation_id)
            state = (generation.status, generation.attempt, generation.progress, generation.cancel_requested)
            if state != seen:
                seen = state
                yield generation
            if generation.is_finished:
                return
            await changes.wait(_POLL_SECONDS)


def plan(prompt: object, options: Mapping[str, Any]) -> Plan:
    """Return what this request becomes; raises ``InvalidRequestError`` on the first unacceptable field.

    Its clips are not looked at yet: that takes a while.
    """
    for name in cast("Mapping[Any, Any]", options):
        if name not in _OPTIONS:
            called = name[:40] if isinstance(name, str) else validation.shown(name)
            raise InvalidRequestError(called, "is not an option", f"use {', '.join(sorted(_OPTIONS))}")
    wanted = options.get("model")
    model = validation.check_model(default_model() if wanted is None else wanted)
    audio = {"channels": model.channels, "sample_rate": model.sample_rate} | _given(options, _AUDIO)
    request = GenerationRequest(
        generation_id=new_id(),
        prompt=cast("str", prompt),
        duration=options.get("duration", DEFAULT_DURATION_SECONDS),
        model=model.name,
        **audio,
        **_given(options, _SAMPLING),
    )
    if options.get("melody") is not None:
        validation.check_hears_melody(model)
    metadata, key, run_at = options.get("metadata"), options.get("idempotency_key"), options.get("run_at")
    tenant = {} if options.get("tenant") is None else {"tenant": validation.check_name("tenant", options["tenant"])}
    if isinstance(metadata, dict) and AUDIO_KEY in metadata:
        raise InvalidRequestError("metadata", f"has the key {AUDIO_KEY!r}, which completion writes", "use another key")
    row = {
        "prompt": request.prompt,
        "model_name": request.model,
        "duration_seconds": request.duration,
        "sample_rate": request.sample_rate,
        "channels": request.channels,
        "sampling": request.sampling,
        "metadata_": None if metadata is None else validation.check_metadata(metadata),
        **tenant,
    }
    rest = {
        "tenant": row.get("tenant", ""),
        "id": request.generation_id,
        "idempotency_key": None if key is None else validation.check_name("idempotency_key", key),
        "priority": validation.check_integer(
            "priority", options.get("priority", 0), -validation.PRIORITY_LIMIT, validation.PRIORITY_LIMIT
        ),
        "max_attempts": validation.check_integer(
            "max_attempts", options.get("max_attempts", DEFAULT_MAX_ATTEMPTS), 1, validation.MAX_ATTEMPTS_LIMIT
        ),
        "wanted_run_at": None if run_at is None else validation.check_run_at(run_at),
    }
    return Plan(row, rest, model, _given(options, _CLIPS))


def read_clips(plans: Sequence[Plan]) -> Batch:
    """Return the batch of these plans, with their clips read.

    Raises ``InvalidRequestError`` if there are too many, or for the first whose clips cannot be read. Takes a while if there
    are clips: call it in a thread.
    """
    if len(plans) > MAX_BATCH:
        raise InvalidRequestError("requests", f"are {len(plans):,}", f"send at most {MAX_BATCH:,} at a time")
    if not any(plan.sources for plan in plans):
        return Batch([_row(plan) for plan in plans], {})
    from dgx_music.audio.clips import Reader  # NumPy comes with it

    reader = Reader()

    def read(plan: Plan) -> dict[str, Any]:
        try:
            clips = reader.read(plan.sources, plan.model, plan.row["duration_seconds"]) if plan.sources else {}
        except InvalidRequestError as error:
            raise _named(plan.name, error) from None
        sources = {name: clip.source_sha256 for name, clip in clips.items()}
        return _row(plan, sources, {f"{name}_sha256": clip.sha256 for name, clip in clips.items()})

    return Batch([read(plan) for plan in plans], reader.data)


async def _read_clips(plans: Sequence[Plan]) -> Batch:
    read = partial(read_clips, plans)
    return await anyio.to_thread.run_sync(read) if any(plan.sources for plan in plans) else read()


def _row(plan: Plan, sources: Mapping[str, str] = {}, clips: Mapping[str, str] = {}) -> dict[str, Any]:
    """Return the columns of a row, given the hashes of what its clips came from and of themselves."""
    columns = {f"{name}_sha256": clips.get(f"{name}_sha256") for name in _CLIPS}
    return plan.row | plan.rest | columns | {"request_hash": _hash({**plan.row, **sources})}


def _named(name: str, error: InvalidRequestError) -> InvalidRequestError:
    return InvalidRequestError(f"{name}: {error.field}", error.problem, error.remedy) if name else error


def _given(options: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: options[name] for name in names if options.get(name) is not None}


def _plan_numbered(number: int, request: str | Mapping[str, Any], defaults: RequestOptions) -> Plan:
    name = f"request {number}"
    options = {"prompt": request} if isinstance(request, str) else request
    try:
        if not isinstance(options, Mapping):
            raise InvalidRequestError("request", "is not an object", "use a prompt, or an object with one")
        if "prompt" not in options:
            raise InvalidRequestError("prompt", "is missing", "describe the music")
        planned = plan(options["prompt"], {**defaults, **{k: v for k, v in options.items() if k != "prompt"}})
    except InvalidRequestError as error:
        raise _named(name, error) from None
    return replace(planned, name=name)


def _hash(row: Mapping[str, Any]) -> str:
    """Identify what was asked for, not when or how urgently: the SHA-256 of its canonical JSON."""
    return hashlib.sha256(json.dumps(row, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


async def _transact(
    session: AsyncSession | None, work: Callable[[AsyncSession], Coroutine[Any, Any, T]], *, read_only: bool = False
) -> T:
    """Return what the work returns, done in the caller's session as it is, else in a transaction of our own."""
    if session is not None:
        check_session(session)
        check_variables()
        return await finish(work(session))
    return await (await ensure_database()).transact(work, read_only=read_only)


async def _read(database: Database, generation_id: str) -> Generation:
    generation = await database.transact(
        lambda session: repository.get_generation(session, generation_id), read_only=True
    )
    if generation is None:
        raise GenerationNotFoundError(generation_id)
    return generation
