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
from dgx_music.client.bulk import choose, chunks_of
from dgx_music.config import load_settings
from dgx_music.errors import GenerationNotFoundError, IllegalTransitionError, PartlyDoneError
from dgx_music.statuses import CANCELLED, PROCESSING
from dgx_music.storage import bulk, queue, retention
from dgx_music.storage.bulk import BulkResult, Refusal
from dgx_music.storage.connection.changes import Topic
from dgx_music.storage.database import Database, ensure_database
from dgx_music.storage.filters import Filters, check_filters
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
    groups of 16. Broken off at any point and repeated, it leaves nothing behind. One that no longer
    fits the filters just before its audio would be deleted is refused.

    A running one is refused. With ``force`` it is cancelled, deleted when its worker has stopped
    it, or has lost it, and refused if that takes longer than ``timeout`` seconds. Also refused is
    one whose folder is not on this machine. Raises ``InvalidRequestError``, ``CountDiffersError``,
    ``BatchNotFoundError``, ``ArtifactError``, and ``PartlyDoneError``, which also names those that
    were cancelled and not deleted.
    """
    validation.check_boolean("force", force)
    validation.check_between("timeout", timeout, 0, 86_400)
    chosen = await choose(ids, expected, None, filters)
    places = _Places(artifacts or open_output(load_settings().output))
    deadline = anyio.current_time() + timeout if force else None
    deletion = _Deletion(await ensure_database(), places, filters, deadline)
    for chunk in chunks_of(chosen, CHUNK):
        try:
            await deletion.delete(chunk)
        except Exception as error:
            if deletion.done.changed or deletion.cancelled:
                raise PartlyDoneError(
                    deletion.done, len(chosen), error, deletion.cancelled
                ) from error
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
        """Return why the row's file cannot be deleted from this machine; ``None`` if it can.

        An empty folder is taken for one whose files are gone, so that a deletion can be repeated;
        it may also be a mount point without its disk.
        """
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
        self.cancelled: list[str] = []
        """Running ones that were cancelled and are not yet deleted or refused."""
        self._database = database
        self._places = places
        self._filters = filters
        self._deadline = deadline
        """Until when running ones are waited for; ``None`` if they are refused."""

    async def delete(self, ids: Sequence[str]) -> None:
        """Delete these generations, if they fit the filters, and add to ``done``."""
        busy = await self._delete_free(ids, self._filters)
        if busy and self._deadline is not None:
            ids = [refusal.generation_id for refusal in busy]
            filters = _with_cancelled(self._filters)
            await self._stop(ids, filters, self._deadline)
            busy = await self._delete_free(ids, filters)
            self.cancelled = []
        self.done += bulk.refusals(busy)

    async def _delete_free(self, ids: Sequence[str], filters: Filters) -> list[Refusal]:
        """Delete those that no worker holds; return those that one holds, or claimed meanwhile.

        Each group is read just before its files are deleted, so that one that no longer fits the
        filters keeps them.
        """
        busy: list[Refusal] = []
        for some in chunks_of(ids, _AT_ONCE):
            rows = await self._read(some, filters)
            await self._refuse_missing(some, rows, filters)
            held = [row for row in rows if self._is_held(row)]
            busy += [self._refusal_of_held(row) for row in held]
            free = [row for row in rows if row not in held and await self._is_here(row)]
            busy += await self._delete_group(free)
        return busy

    async def _read(self, ids: Collection[str], filters: Filters) -> list[Deletable]:
        return await self._database.transact(
            lambda session: retention.find_deletable(session, ids, filters), read_only=True
        )

    async def _refuse_missing(
        self, ids: Sequence[str], rows: Sequence[Deletable], filters: Filters
    ) -> None:
        found = {row.lease.generation_id for row in rows}
        rest = [each for each in ids if each not in found]
        if rest:
            self.done += await self._database.transact(
                lambda session: bulk.explain(session, None, rest, filters), read_only=True
            )

    def _is_held(self, row: Deletable) -> bool:
        """Return True if the row must not be deleted as it is: with force, if a worker has it."""
        if self._deadline is not None:
            return row.worker_id is not None
        return row.status == PROCESSING

    def _refusal_of_held(self, row: Deletable) -> Refusal:
        return _refusal(row, _RUNS if self._deadline is None else _STILL_RUNS)

    async def _is_here(self, row: Deletable) -> bool:
        """Return True if the row's file can be deleted from here; else refuse the row."""
        reason = await self._places.find_absence(row)
        if reason is not None:
            self.done += bulk.refusals([_refusal(row, reason)])
        return reason is None

    async def _stop(self, ids: Collection[str], filters: Filters, deadline: float) -> None:
        """Cancel those of these generations that fit the filters, and wait until none is held.

        Only what a worker has is cancelled, since whatever waits is deleted as it is.
        """
        held = [
            row.lease.generation_id for row in await self._read(ids, self._filters) if row.worker_id
        ]
        cancel = partial(bulk.make_change, change=bulk.cancels(), ids=held, filters=self._filters)
        await self._database.transact(cancel)
        self.cancelled = held
        changes = self._database.changes.subscribe(Topic.DONE, ids)
        with changes as changed, anyio.CancelScope(deadline=deadline):
            while leases := [row.lease for row in await self._read(ids, filters) if row.worker_id]:
                await self._rescue(leases)
                await changed.wait(_LOOK_SECONDS)

    async def _rescue(self, held: Collection[Lease]) -> None:
        """End those of these leases that have lapsed: maybe no worker lives that does it."""

        async def find(session: AsyncSession) -> dict[Lease, datetime]:
            now, leases = await queue.read_clock(session), await queue.find_leases(session)
            ends = {lease: leases[lease].expires_at for lease in held if lease in leases}
            return {lease: end for lease, end in ends.items() if end < now}

        lapsed = await self._database.transact(find, read_only=True)
        if lapsed:
            await self._database.transact(lambda session: queue.rescue(session, lapsed))

    async def _delete_group(self, rows: Sequence[Deletable]) -> list[Refusal]:
        """Delete these rows after their files; return those that moved meanwhile.

        If a file cannot be deleted, raises the error once the rows of the others are gone.
        """
        work = (self._places.delete_files(row) for row in rows)
        errors = await asyncio.gather(*work, return_exceptions=True)
        gone = [row for row, error in zip(rows, errors, strict=True) if error is None]
        moved = await self._delete_rows(gone)
        for error in errors:
            if error is not None:
                raise error
        return moved

    async def _delete_rows(self, rows: Sequence[Deletable]) -> list[Refusal]:
        if not rows:
            return []
        deleted = await self._database.transact(
            lambda session: retention.delete_rows(session, rows)
        )
        self.done += BulkResult(changed=len(deleted))
        self.cancelled = [each for each in self.cancelled if each not in deleted]
        return [_refusal(row, _MOVED) for row in rows if row.lease.generation_id not in deleted]


def _with_cancelled(filters: Filters) -> Filters:
    """Return the filters that a row fits also once it is cancelled, if it fitted them before."""
    statuses = check_filters(filters).statuses
    return {**filters, "status": [*statuses, CANCELLED]} if statuses else filters


def _refusal(row: Deletable, reason: str) -> Refusal:
    return Refusal(row.lease.generation_id, row.status, reason)
