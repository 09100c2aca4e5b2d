"""Inserts that are called at the same time share a transaction: a group commit.

While one transaction is written, those that arrive gather for the next. Nobody waits for others to
arrive, and each caller returns only when its own rows are committed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from dgx_music.errors import DatabaseUnavailableError
from dgx_music.storage.connection.sessions import finish, start_to_finish
from dgx_music.storage.generation import Generation
from dgx_music.storage.insertion import Row, insert_generations, is_single

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

T = TypeVar("T")

Transact = Callable[..., Awaitable[list[Generation]]]
"""``Database.transact``."""

_MOST_ROWS = 1_000


@dataclass(eq=False)
class _Insert:
    """The rows of one call, and what becomes of them."""

    rows: Sequence[Row]
    clips: Mapping[str, tuple[bytes, float]]
    done: asyncio.Future[list[Generation]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Gathering:
    """The inserts of one event loop into one database."""

    def __init__(self, transact: Transact) -> None:
        self._transact = transact
        self._waiting: list[_Insert] = []
        self._writing: asyncio.Task[None] | None = None

    async def insert(
        self, rows: Sequence[Row], clips: Mapping[str, tuple[bytes, float]]
    ) -> list[Generation]:
        """Return the generations of these rows, all committed; raises what ``transact`` raises.

        A call that is cancelled before its transaction begins leaves nothing. After that the
        cancellation is raised when the transaction has ended.
        """
        insert = _Insert(rows, clips)
        self._waiting.append(insert)
        if self._writing is None:
            self._writing = start_to_finish(self._write_all())
        try:
            await asyncio.wait([insert.done])
        except asyncio.CancelledError as cancelled:
            if insert in self._waiting:
                self._waiting.remove(insert)
                raise
            await finish(_end_of(insert.done))
            raise cancelled from insert.done.exception()
        return insert.done.result()

    async def _write_all(self) -> None:
        try:
            while self._waiting:
                await self._write(self._take())
        finally:
            self._writing = None

    def _take(self) -> list[_Insert]:
        """Return the next ones that may share a transaction: at least one."""
        count, rows = 0, 0
        for insert in self._waiting:
            rows += len(insert.rows)
            if count and rows > _MOST_ROWS:
                break
            count += 1
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return taken

    async def _write(self, inserts: list[_Insert]) -> None:
        """Write them together; if one of them cannot be stored, each alone."""
        try:
            made = await self._insert(inserts)
        except DatabaseUnavailableError as error:
            for insert in inserts:
                insert.done.set_exception(_copy(error))
        except Exception as error:
            if len(inserts) == 1:
                inserts[0].done.set_exception(error)
                return
            for insert in inserts:
                await self._write([insert])
        else:
            for insert in inserts:
                insert.done.set_result(made[: len(insert.rows)])
                made = made[len(insert.rows) :]

    async def _insert(self, inserts: Sequence[_Insert]) -> list[Generation]:
        rows = [row for insert in inserts for row in insert.rows]
        clips = {sha256: clip for insert in inserts for sha256, clip in insert.clips.items()}
        work = partial(insert_all, rows, clips)
        return await self._transact(work, is_single=is_single(rows))


async def insert_all(
    rows: Sequence[Row], clips: Mapping[str, tuple[bytes, float]], session: AsyncSession
) -> list[Generation]:
    """Do ``insert_generations`` as the work of a transaction."""
    return await insert_generations(session, rows, clips)


async def _end_of(done: asyncio.Future[T]) -> None:
    await asyncio.wait([done])


def _copy(error: DatabaseUnavailableError) -> DatabaseUnavailableError:
    """Return the same error for another caller: each adds its own traceback."""
    same = DatabaseUnavailableError(error.url, error.why)
    same.__cause__ = error.__cause__
    return same
