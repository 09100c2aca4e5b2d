"""Delete generations with all that belongs to them: the audio first, then the row.

Broken off at any point and repeated, nothing is left: a row goes after its files, so whatever is
not yet deleted still has the row that leads to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Unpack

import anyio

from dgx_music import validation
from dgx_music.artifacts import Artifacts, LocalArtifacts, open_output, open_place_of
from dgx_music.client.bulk import choose, chunks_of, raise_partly_done
from dgx_music.config import load_settings
from dgx_music.errors import GenerationNotFoundError, IllegalTransitionError
from dgx_music.statuses import PROCESSING
from dgx_music.storage import bulk, queue, retention
from dgx_music.storage.bulk import BulkResult, Refusal
from dgx_music.storage.connection.changes import Topic
from dgx_music.storage.database import Database, ensure_database
from dgx_music.storage.filters import Filters
from dgx_music.storage.queue import Lease
from dgx_music.storage.retention import Deletable

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

CHUNK = 200
TIMEOUT_SECONDS = 60.0
"""How long a running generation may take to stop: a lost worker's lease ends in half of that."""

_AT_ONCE = 16
_LOOK_SECONDS = 0.5
_RUNS = "it is running; cancel it first, or delete it with force"
_STILL_RUNS = "it still runs; its worker has been asked to stop it, so delete it again later"
_MOVED = "it was claimed or changed in the meantime"


async def delete_generations(
    *,
    ids: Iterable[str] | None = None,
    expected: int | None = None,
    force: bool = False,
    timeout: float = TIMEOUT_SECONDS,
    artifacts: Artifacts | None = None,
    **filters: Unpack[Filters],
) -> BulkResult:
    """Delete many generations with their audio, attempts and tags; return what was done.

    Which are meant: see ``cancel_generations``. The audio is deleted first, from where each row
    says that it is and from ``artifacts`` (``DGX_MUSIC_OUTPUT`` if not given), then the row, in
    chunks of 200. Broken off at any point and repeated, it leaves nothing behind.

    A running one is refused. With ``force`` all are cancelled first; of those that run, each is
    deleted when its worker has stopped it, or has lost it, and refused if that takes longer than
    ``timeout`` seconds. Also refused is one whose folder is not on this machine. Raises
    ``InvalidRequestError``, ``CountDiffersError``, ``ArtifactError``, and ``PartlyDoneError``.
    """
    validation.check_between("timeout", timeout, 0, 86_400)
    chosen = await choose(ids, expected, None, filters)
    places = _Places(artifacts or open_output(load_settings().output))
    deadline = anyio.current_time() + timeout if force else None
    deletion = _Deletion(await ensure_database(), places, filters, deadline)
    for chunk in chunks_of(chosen, CHUNK):
        try:
            await deletion.delete(chunk)
        except Exception as error:
            raise_partly_done(deletion.done, len(chosen), error, is_kept=True)
            raise
    return deletion.done


async def delete_generation_and_audio(
    generation_id: str,
    *,
    force: bool = False,
    timeout: float = TIMEOUT_SECONDS,
    artifacts: Artifacts | None = None,
) -> None:
    """Delete one generation with its audio, attempts and tags, as ``delete_generations`` does.

    Raises ``GenerationNotFoundError``, ``IllegalTransitionError`` if it is refused, and
    ``ArtifactError`` if its audio cannot be deleted.
    """
    done = await delete_generations(
        ids=[generation_id], force=force, timeout=timeout, artifacts=artifacts
    )
    for refusal in done.refused:
        if refusal.status is None:
            raise GenerationNotFoundError(generation_id)
        raise IllegalTransitionError(generation_id, refusal.status, "deleted", refusal.reason)


class _Places:
    """Where the files of a row may be: in the output, and in the place that the row names."""

    def __init__(self, output: Artifacts) -> None:
        self._output = output
        self._named: dict[str, Artifacts] = {}

    async def find_absence(self, row: Deletable) -> str | None:
        """Return why the row's file cannot be deleted from this machine; ``None`` if it can."""
        place = self._of(row)[-1]
        if row.file_path is None or not isinstance(place, LocalArtifacts):
            return None
        if await anyio.Path(place.root).is_dir():
            return None
        return (
            f"its audio is in {place.root}, which is not on this machine; mount it there, or make "
            "the folder if its audio is gone for good"
        )

    async def delete_files(self, row: Deletable) -> None:
        """Delete all files of all attempts of the row."""
        for place in self._of(row):
            await place.delete(row.lease.generation_id, range(1, row.lease.attempt + 1))

    def _of(self, row: Deletable) -> list[Artifacts]:
        path = row.file_path
        if path is None or self._output.holds(path):
            return [self._output]
        folder = path.rpartition("/")[0]
        if folder not in self._named:
            self._named[folder] = open_place_of(path)
        return [self._output, self._named[folder]]


class _Deletion:
    """One call's deletion, chunk by chunk; ``done`` is what it did so far."""

    def __init__(
        self, database: Database, places: _Places, filters: Filters, deadline: float | None
    ) -> None:
        self.done = BulkResult()
        self._database = database
        self._places = places
        self._filters = filters
        self._deadline = deadline
        """Until when running ones are waited for; ``None`` if they are refused."""

    async def delete(self, ids: Sequence[str]) -> None:
        """Delete these generations, if they fit the filters, and add to ``done``."""
        rows = await self._read(ids, self._filters)
        await self._refuse_missing(ids, rows)
        if self._deadline is not None:
            meant = [row.lease.generation_id for row in rows]
            rows = await self._stop(meant, self._deadline)
            await self._refuse_missing(meant, rows)
        free = [row for row in rows if await self._may_go(row)]
        gone, error = await self._delete_files(free)
        await self._delete_rows(gone)
        if error is not None:
            raise error

    async def _read(self, ids: Collection[str], filters: Filters) -> list[Deletable]:
        return await self._database.transact(
            lambda session: retention.find_deletable(session, ids, filters), read_only=True
        )

    async def _refuse_missing(self, ids: Sequence[str], rows: Sequence[Deletable]) -> None:
        found = {row.lease.generation_id for row in rows}
        rest = [each for each in ids if each not in found]
        if rest:
            self.done += await self._database.transact(
                lambda session: bulk.explain(session, None, rest, self._filters), read_only=True
            )

    async def _stop(self, ids: Collection[str], deadline: float) -> list[Deletable]:
        """Cancel these generations, wait until no worker holds one, and return their rows."""
        cancel = partial(bulk.make_change, change=bulk.cancels(), ids=ids, filters={})
        await self._database.transact(cancel)
        changes = self._database.changes.subscribe(Topic.DONE, ids)
        with changes as changed, anyio.CancelScope(deadline=deadline):
            while held := [row.lease for row in await self._read(ids, {}) if row.worker_id]:
                await self._rescue(held)
                await changed.wait(_LOOK_SECONDS)
        return await self._read(ids, {})

    async def _rescue(self, held: Collection[Lease]) -> None:
        """End those of these leases that have lapsed: maybe no worker lives that does it."""

        async def find(session: AsyncSession) -> dict[Lease, datetime]:
            now, leases = await queue.read_clock(session), await queue.find_leases(session)
            ends = {lease: leases[lease].expires_at for lease in held if lease in leases}
            return {lease: end for lease, end in ends.items() if end < now}

        lapsed = await self._database.transact(find, read_only=True)
        if lapsed:
            await self._database.transact(lambda session: queue.rescue(session, lapsed))

    async def _may_go(self, row: Deletable) -> bool:
        """Return True if the row may be deleted; else add the reason to ``done``."""
        reason = await self._places.find_absence(row)
        if row.worker_id is not None and self._deadline is not None:
            reason = _STILL_RUNS
        elif row.status == PROCESSING and self._deadline is None:
            reason = _RUNS
        if reason is not None:
            self._refuse(row, reason)
        return reason is None

    async def _delete_files(
        self, rows: Sequence[Deletable]
    ) -> tuple[list[Deletable], BaseException | None]:
        """Delete files until one cannot be; return the rows whose files are gone, and the error."""
        gone: list[Deletable] = []
        for start in range(0, len(rows), _AT_ONCE):
            some = rows[start : start + _AT_ONCE]
            work = (self._places.delete_files(row) for row in some)
            errors = await asyncio.gather(*work, return_exceptions=True)
            gone += [row for row, error in zip(some, errors, strict=True) if error is None]
            for error in errors:
                if error is not None:
                    return gone, error
        return gone, None

    async def _delete_rows(self, rows: Sequence[Deletable]) -> None:
        if not rows:
            return
        deleted = await self._database.transact(
            lambda session: retention.delete_rows(session, rows)
        )
        self.done += BulkResult(changed=len(deleted))
        for row in rows:
            if row.lease.generation_id not in deleted:
                self._refuse(row, _MOVED)

    def _refuse(self, row: Deletable, reason: str) -> None:
        refusal = Refusal(row.lease.generation_id, row.status, reason)
        self.done += bulk.refusals([refusal])
