"""A worker in a process of its own that is killed, by a real SIGKILL, at a named point of a generation's life.

The points are set from outside: the product's functions and the system's calls are wrapped in that process alone. A point is
``statement 2`` of a step, before it is sent; ``the commit``, before or after it; or a moment in the life of a file.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
from sqlalchemy import Engine, event

from dgx_music import artifacts, delete_generations, init_db
from dgx_music.config import Settings, load_settings
from dgx_music.errors import EngineError, EngineReplacedError
from dgx_music.storage import bulk, queue, retention
from dgx_music.storage.connection import sessions
from dgx_music.storage.connection.direct import AsyncpgSession
from dgx_music.storage.connection.sqlite_thread import ThreadSession
from dgx_music.storage.database import Database
from dgx_music.worker import worker
from tests.fakes import FakeEngine
from tests.forks import CONTEXT

PROMPT = "lofi rain"
STEPS = ("claim", "complete", "fail", "release", "rescue", "renew")
_SECONDS = 60.0

_point = ""
_step: ContextVar[list[str] | None] = ContextVar("step", default=None)
"""The step whose statements are being sent, and how many times it was sent one."""


async def die_at(point: str, url: str, folder: Path) -> int | None:
    """Run a worker that is to die at this point, and return how its process ended: ``-SIGKILL`` if it got there."""
    return await _die(_live, point, url, folder)


async def die_deleting(point: str, url: str, folder: Path, ids: list[str]) -> int | None:
    """Delete these generations in a process that is to die at this point; return as ``die_at`` does."""
    return await _die(_delete, point, url, folder, ids)


async def _die(target: Callable[..., None], *arguments: Any) -> int | None:
    process = CONTEXT.Process(target=target, args=arguments, daemon=True)
    process.start()
    await anyio.to_thread.run_sync(process.join, _SECONDS)
    process.kill()
    return process.exitcode


def make_worker(database: Database, folder: Path) -> worker.Worker:
    """Return a worker with an imitated engine, which at the first attempt does what leads to the step of the point."""
    engine = FakeEngine()
    step = _point.split(":")[0]
    if step in _TROUBLES:
        engine.script[PROMPT] = [_TROUBLES[step]]
    return worker.Worker(database, engine, artifacts.LocalArtifacts(folder), settings())


def settings() -> Settings:
    chosen = load_settings(
        lease_seconds=30.0, heartbeat_seconds=0.05, poll_seconds=0.1, loudness="none"
    )
    return replace(chosen, backoff_base_seconds=0.01)


_TROUBLES: dict[str, Any] = {
    "fail": EngineError("bad luck"),
    "release": EngineReplacedError("not its fault"),
    "renew": asyncio.Event(),  # never set
}


def _live(point: str, url: str, folder: Path) -> None:
    for step in STEPS:
        setattr(queue, step, _watched(step, getattr(queue, step)))
    _watch(point)
    asyncio.run(_serve(url, folder))


def _delete(point: str, url: str, folder: Path, ids: list[str]) -> None:
    bulk.make_change = _watched("cancel", bulk.make_change)
    retention.delete_rows = _watched("rows", retention.delete_rows)
    _watch(point)
    Path.unlink = _watched_removal(Path.unlink)  # type: ignore[method-assign]
    asyncio.run(_delete_all(url, folder, ids))


async def _delete_all(url: str, folder: Path, ids: list[str]) -> None:
    await init_db(url)
    event.listen(Engine, "before_cursor_execute", _note_statement)
    await delete_generations(ids=ids, force=True, artifacts=artifacts.LocalArtifacts(folder))


def _watch(point: str) -> None:
    global _point
    _point = point
    sessions.Session.commit = _watched_commit(sessions.Session.commit)  # type: ignore[method-assign]
    ThreadSession.commit_now = _watched_end(ThreadSession.commit_now)  # type: ignore[method-assign]
    for kind in (ThreadSession, AsyncpgSession):
        for name in ("fetch", "fetch_none"):
            setattr(kind, name, _watched_fetch(getattr(kind, name)))
    FakeEngine.generate = _watched_call("infer", FakeEngine.generate)  # type: ignore[method-assign]
    artifacts.LocalArtifacts.publish = _watched_call("store", artifacts.LocalArtifacts.publish)  # type: ignore[method-assign]
    artifacts.LocalArtifacts.delete = _watched_call("delete", artifacts.LocalArtifacts.delete)  # type: ignore[method-assign]
    os.write, os.fsync, os.link = (
        _half_a_write(os.write),
        _watched_flush(os.fsync),
        _watched_link(os.link),
    )


async def _serve(url: str, folder: Path) -> None:
    database = Database(url)
    event.listen(Engine, "before_cursor_execute", _note_statement)
    await make_worker(database, folder).run()


def _reach(point: str) -> None:
    if point == _point:
        os.kill(os.getpid(), signal.SIGKILL)


def _note_statement(*_arguments: Any) -> None:
    if (sent := _step.get()) is not None:
        sent.append("statement")
        _reach(f"{sent[0]}: before statement {len(sent) - 1}")


def _watched(step: str, function: Callable[..., Any]) -> Callable[..., Any]:
    async def call(session: Any, *arguments: Any, **options: Any) -> Any:
        token = _step.set([step])
        try:
            answer = await function(session, *arguments, **options)
        finally:
            _step.reset(token)
        if answer:  # it has changed something
            session.info["step"] = step
            _reach(f"{step}: before the commit")
        return answer

    return call


def _watched_commit(commit: Callable[..., Any]) -> Callable[..., Any]:
    async def call(session: Any) -> None:
        await commit(session)
        _reach(f"{session.info.get('step')}: after the commit")

    return call


def _watched_end(commit: Callable[..., None]) -> Callable[..., None]:
    def call(session: Any) -> None:
        commit(session)
        _reach(f"{session.info.get('step')}: after the commit")

    return call


def _watched_fetch(fetch: Callable[..., Any]) -> Callable[..., Any]:
    async def call(*arguments: Any) -> Any:
        _note_statement()
        return await fetch(*arguments)

    return call


def _watched_call(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    async def call(*arguments: Any, **options: Any) -> Any:
        _reach(f"{name}: before")
        answer = await function(*arguments, **options)
        _reach(f"{name}: after")
        return answer

    return call


def _half_a_write(write: Callable[..., int]) -> Callable[..., int]:
    def call(descriptor: int, data: Any) -> int:
        # the event loop writes bytes to itself
        if _point == "store: in the middle of the write" and len(data) > 1_000:
            write(descriptor, data[: len(data) // 2])
            _reach(_point)
        return write(descriptor, data)

    return call


def _watched_flush(flush: Callable[[int], None]) -> Callable[[int], None]:
    def call(descriptor: int) -> None:
        _reach("store: before the flush")
        flush(descriptor)
        _reach("store: after the flush")

    return call


def _watched_removal(remove: Callable[..., None]) -> Callable[..., None]:
    def call(file: Path, **options: Any) -> None:
        remove(file, **options)
        _reach("delete: after the first file")

    return call


def _watched_link(link: Callable[..., None]) -> Callable[..., None]:
    def call(*arguments: Any, **options: Any) -> None:
        link(*arguments, **options)
        _reach("store: after the link")

    return call
