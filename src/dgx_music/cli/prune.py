"""``dgx-music prune``: deletes old generations with their audio, and files that belong to none."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from dgx_music.cli.options import AsJson, DatabaseUrl, Output, Yes, given
from dgx_music.cli.output import confirm, print_json, tell
from dgx_music.config import load_settings
from dgx_music.errors import InvalidRequestError
from dgx_music.validation import check_between

if TYPE_CHECKING:
    from dgx_music.artifacts import Artifacts
    from dgx_music.storage import Database

_DAY_SECONDS = 86_400
_LONGEST_DAYS = 36_500

Orphans = Annotated[
    bool,
    typer.Option(
        "--orphans",
        help="Delete files older than a day that belong to no generation, or to an attempt that "
        "never completed. Not for two databases that share one output.",
    ),
]


def prune(
    completed_days: Annotated[
        float | None, typer.Option(help="Days to keep completed generations.")
    ] = None,
    failed_days: Annotated[float | None, typer.Option(help="Days to keep failed ones.")] = None,
    cancelled_days: Annotated[
        float | None, typer.Option(help="Days to keep cancelled ones.")
    ] = None,
    orphans: Orphans = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only count what would be deleted.")
    ] = False,
    yes: Yes = False,
    output: Output = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Delete old generations and their audio, and clips that nobody uses.

    A finished generation is kept for the days given for its status, or for ever if none are given;
    a clip for a day after its last use; an upload for a day; a batch while it has a generation. On a terminal it asks
    first; elsewhere it needs --yes if there is something to delete.
    """
    from dgx_music.artifacts import open_output

    days = given(completed=completed_days, failed=failed_days, cancelled=cancelled_days)
    if not days and not orphans:
        remedy = "say how long to keep what, such as --completed-days 30 --failed-days 7"
        raise InvalidRequestError("a number of days", "is missing", remedy)
    keep = {
        status: check_between(f"--{status}-days", count, 0, _LONGEST_DAYS) * _DAY_SECONDS
        for status, count in days.items()
    }
    artifacts = open_output(load_settings(**given(output=output)).output)
    plan = _Plan(artifacts, keep, has_orphans=orphans)
    counts = asyncio.run(_prune(database_url, plan, dry_run=dry_run, is_agreed=yes))
    if as_json:
        print_json(counts)
    else:
        tell(f"{'Would delete' if dry_run else 'Deleted'} {_in_words(counts)}.")


@dataclass(frozen=True)
class _Plan:
    """What to delete, and from which output."""

    artifacts: Artifacts
    keep: dict[str, float]
    has_orphans: bool

    async def carry_out(self, database: Database, *, dry_run: bool) -> dict[str, int]:
        """Delete, or only count, and return the numbers."""
        from dgx_music.client.prune import (
            prune,
            prune_batches,
            prune_clips,
            prune_orphans,
            prune_uploads,
        )

        counts = await prune(database, self.artifacts, self.keep, dry_run=dry_run)
        if self.has_orphans:
            counts["orphans"] = await prune_orphans(database, self.artifacts, dry_run=dry_run)
        counts["uploads"] = await prune_uploads(database, dry_run=dry_run)
        counts["clips"] = await prune_clips(database, dry_run=dry_run)
        counts["batches"] = await prune_batches(database, dry_run=dry_run)
        return counts


async def _prune(
    database_url: str | None,
    plan: _Plan,
    *,
    dry_run: bool,
    is_agreed: bool,
) -> dict[str, int]:
    from dgx_music.cli.opening import opened

    async with opened(database_url) as database:
        counts = await plan.carry_out(database, dry_run=True)
        if dry_run or not any(counts.values()):
            return counts
        question = (
            f"Delete {_in_words(counts)} from {database}, with their audio in {plan.artifacts}?"
        )
        confirm(question, is_agreed=is_agreed)
        return await plan.carry_out(database, dry_run=False)


def _in_words(counts: dict[str, int]) -> str:
    return ", ".join(
        f"{count:,} {what}"
        for what, count in counts.items()
        if count or what not in ("uploads", "clips", "batches")
    )
