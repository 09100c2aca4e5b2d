"""Retention: delete old generations with their audio, orphaned files, unused clips, uploads, empty batches."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import UUID

from dgx_music.artifacts import Artifacts, StoredFile
from dgx_music.errors import ArtifactError
from dgx_music.storage import batches, clips, retention, uploads
from dgx_music.storage.database import Database
from dgx_music.storage.queue import Lease
from dgx_music.storage.retention import Owner, find_owners

CHUNK = 200
ORPHAN_SECONDS = 86_400.0
"""An orphan must be older than this: no publication takes so long to reach its row."""
_ALL = 2**31 - 1


async def prune(
    database: Database, artifacts: Artifacts, keep: Mapping[str, float], *, dry_run: bool = False
) -> dict[str, int]:
    """Delete generations that finished longer ago than ``keep`` says; count them by status.

    ``keep`` gives seconds for each status; a status that is missing is kept. With ``dry_run``
    nothing is deleted. Raises ``ArtifactError`` at audio in another place than ``artifacts``:
    without its row nothing would lead to it. The file goes first, then the row: a crash between the
    two leaves a row to prune again, never a file without a row.
    """
    work = _count if dry_run else _prune_status
    return {
        status: await work(database, artifacts, status, seconds) for status, seconds in keep.items()
    }


async def prune_orphans(
    database: Database,
    artifacts: Artifacts,
    *,
    older_than_seconds: float = ORPHAN_SECONDS,
    dry_run: bool = False,
) -> int:
    """Delete the files that no generation has or can get, if they are older; return how many.

    They belong to generations that are gone, and to attempts that can never complete: a crash at
    the wrong moment leaves them. Of attempts that are over, previews are deleted too. With
    ``dry_run`` nothing is deleted. Raises ``ArtifactError`` if the database knows none of the files
    that are here: they are then probably another database's. Two databases must never share one
    output.
    """
    orphans = await _find_orphans(database, artifacts, timedelta(seconds=older_than_seconds))
    if not dry_run:
        for lease in _leases_of(orphans, of_previews=False):
            await artifacts.delete(lease.generation_id, [lease.attempt])
        for lease in _leases_of(orphans, of_previews=True):
            await artifacts.delete_preview(lease.generation_id, lease.attempt)
    return len(orphans)


async def prune_uploads(database: Database, *, dry_run: bool = False) -> int:
    """Delete uploads that have expired, and their clips if nothing needs them; return how many."""
    if dry_run:
        return await database.transact(uploads.count_expired_uploads, read_only=True)
    prune = partial(uploads.prune_uploads, limit=CHUNK)
    count = 0
    while gone := await database.transact(prune):
        count += gone
    return count


async def prune_clips(database: Database, *, dry_run: bool = False) -> int:
    """Delete clips that nothing refers to and that were last used over a day ago; return how many.

    With ``dry_run`` nothing is deleted, and the clips of generations that would be pruned do not
    count.
    """
    if dry_run:
        return await database.transact(clips.count_unused_clips, read_only=True)
    count = 0
    while gone := await database.transact(lambda session: clips.prune_clips(session, limit=CHUNK)):
        count += gone
    return count


async def prune_batches(database: Database, *, dry_run: bool = False) -> int:
    """Delete batches that have no generation left; return how many.

    With ``dry_run`` nothing is deleted, and the batches of generations that would be pruned do not
    count.
    """
    if dry_run:
        return await database.transact(batches.count_empty_batches, read_only=True)
    prune = partial(batches.prune_batches, limit=CHUNK)
    count = 0
    while gone := await database.transact(prune):
        count += gone
    return count


async def _find_orphans(
    database: Database, artifacts: Artifacts, safe_age: timedelta
) -> list[StoredFile]:
    """List first, then read the rows: so no file is of a later attempt than its row.

    A dead file stays dead, however long the deletion takes: an attempt that is over never
    completes.
    """
    now, orphans, is_known = datetime.now(UTC), list[StoredFile](), False
    async for files in _chunks(artifacts):
        async with database.session(read_only=True) as session:
            owners = await find_owners(session, {file.generation_id for file in files})
        is_known = is_known or bool(owners)
        orphans += [
            file
            for file in files
            if now - file.modified_at >= safe_age and _is_dead(file, owners.get(file.generation_id))
        ]
    if orphans and not is_known:
        raise ArtifactError(
            f"{database} knows none of the files in {artifacts}, so they may be another database's; "
            "nothing is deleted. Set DGX_MUSIC_DATABASE_URL to theirs, or delete them yourself."
        )
    return orphans


def _is_dead(file: StoredFile, owner: Owner | None) -> bool:
    if owner is None:
        return True
    if file.is_preview:
        return not owner.may_have_preview(file.attempt)
    return not owner.may_have(file.attempt, file.path)


def _leases_of(files: list[StoredFile], *, of_previews: bool) -> list[Lease]:
    """Return whose files these are, or whose previews, each attempt once."""
    found = (file for file in files if file.is_preview is of_previews)
    return [*dict.fromkeys(Lease(file.generation_id, file.attempt) for file in found)]


async def _chunks(artifacts: Artifacts) -> AsyncIterator[list[StoredFile]]:
    """Yield the files that are named by one of our ids; ``my-song-1.wav`` belongs to the user."""
    chunk: list[StoredFile] = []
    async for file in artifacts.list_files():
        if _is_our_id(file.generation_id):
            chunk.append(file)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _is_our_id(text: str) -> bool:
    try:
        return str(UUID(text)) == text
    except ValueError:
        return False


async def _check_place(database: Database, artifacts: Artifacts, leases: list[Lease]) -> None:
    async with database.session(read_only=True) as session:
        files = await retention.find_files(session, leases)
    elsewhere = [file for file in files if not artifacts.holds(file)]
    if elsewhere:
        raise ArtifactError(
            f"The audio {elsewhere[0]} is not in {artifacts}; nothing more is pruned. "
            "Set DGX_MUSIC_OUTPUT to where it is."
        )


async def _count(database: Database, _artifacts: Artifacts, status: str, seconds: float) -> int:
    return len(await _find(database, status, seconds, _ALL))


async def _prune_status(
    database: Database, artifacts: Artifacts, status: str, seconds: float
) -> int:
    """Prune in short transactions, so that producers and workers never wait long."""
    count = 0
    while leases := await _find(database, status, seconds, CHUNK):
        await _check_place(database, artifacts, leases)
        for lease in leases:
            await artifacts.delete(lease.generation_id, range(1, lease.attempt + 1))
        async with database.session() as session:
            count += await retention.prune(session, leases)
    return count


async def _find(database: Database, status: str, seconds: float, limit: int) -> list[Lease]:
    async with database.session(read_only=True) as session:
        return await retention.find_prunable(
            session, status=status, older_than_seconds=seconds, limit=limit
        )
