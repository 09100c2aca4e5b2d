"""Retention: finished generations that are older than somebody wants to keep, gone with their audio."""

from __future__ import annotations

from collections.abc import Mapping

from dgx_music.artifacts import Artifacts
from dgx_music.errors import ArtifactError
from dgx_music.storage import queue
from dgx_music.storage.database import Database
from dgx_music.storage.queue import Lease

CHUNK = 200
_ALL = 2**31 - 1


async def prune(
    database: Database, artifacts: Artifacts, keep: Mapping[str, float], *, dry_run: bool = False
) -> dict[str, int]:
    """Delete generations that finished longer ago than ``keep`` says, and return how many of each status.

    ``keep`` gives seconds for each status; one that it leaves out is kept for ever. With ``dry_run`` nothing is deleted.
    Raises ``ArtifactError`` on meeting audio in another place than ``artifacts``: without its row nobody would find it.
    The file goes first, then the row: a crash between the two leaves a row to prune again, never a file that nobody knows.
    """
    work = _count if dry_run else _prune_status
    return {status: await work(database, artifacts, status, seconds) for status, seconds in keep.items()}


async def _check_place(database: Database, artifacts: Artifacts, leases: list[Lease]) -> None:
    async with database.session(read_only=True) as session:
        files = await queue.find_files(session, leases)
    elsewhere = [file for file in files if not artifacts.holds(file)]
    if elsewhere:
        raise ArtifactError(
            f"The audio {elsewhere[0]} is not in the output folder; nothing more is pruned. Set DGX_MUSIC_OUTPUT to its folder."
        )


async def _count(database: Database, _artifacts: Artifacts, status: str, seconds: float) -> int:
    return len(await _find(database, status, seconds, _ALL))


async def _prune_status(database: Database, artifacts: Artifacts, status: str, seconds: float) -> int:
    """Prune in short transactions, so that producers and workers are never kept waiting."""
    count = 0
    while leases := await _find(database, status, seconds, CHUNK):
        await _check_place(database, artifacts, leases)
        for lease in leases:
            await artifacts.delete(lease.generation_id, range(1, lease.attempt + 1))
        async with database.session() as session:
            count += await queue.prune(session, leases)
    return count


async def _find(database: Database, status: str, seconds: float, limit: int) -> list[Lease]:
    async with database.session(read_only=True) as session:
        return await queue.find_prunable(session, status=status, older_than_seconds=seconds, limit=limit)
