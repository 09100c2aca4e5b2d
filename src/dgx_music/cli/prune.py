"""``dgx-music prune``: forget finished generations, and their audio, after some days."""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated

import typer

from dgx_music.artifacts import LocalArtifacts
from dgx_music.cli.database import confirm, opened
from dgx_music.cli.options import AsJson, DatabaseUrl, Output, Yes, given
from dgx_music.cli.output import print_json, tell
from dgx_music.config import load_settings
from dgx_music.errors import InvalidRequestError
from dgx_music.prune import prune as prune_generations
from dgx_music.validation import check_between

_DAY_SECONDS = 86_400
_LONGEST_DAYS = 36_500


def prune(
    completed_days: Annotated[float | None, typer.Option(help="Days to keep completed generations.")] = None,
    failed_days: Annotated[float | None, typer.Option(help="Days to keep failed ones.")] = None,
    cancelled_days: Annotated[float | None, typer.Option(help="Days to keep cancelled ones.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count what would be deleted.")] = False,
    yes: Yes = False,
    output: Output = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Delete old finished generations and their audio.

    A status for which no days are given is kept for ever. On a terminal it asks first.
    """
    days = given(completed=completed_days, failed=failed_days, cancelled=cancelled_days)
    if not days:
        raise InvalidRequestError(
            "a number of days", "is missing", "say how long to keep what, such as --completed-days 30 --failed-days 7"
        )
    keep = {
        status: check_between(f"--{status}-days", count, 0, _LONGEST_DAYS) * _DAY_SECONDS
        for status, count in days.items()
    }
    artifacts = LocalArtifacts(load_settings(**given(output=output)).output)
    is_agreed = yes or not sys.stdin.isatty()
    counts = asyncio.run(_prune(database_url, artifacts, keep, dry_run=dry_run, is_agreed=is_agreed))
    if as_json:
        print_json(counts)
    else:
        tell(f"{'Would delete' if dry_run else 'Deleted'} {_in_words(counts)}.")


async def _prune(
    database_url: str | None, artifacts: LocalArtifacts, keep: dict[str, float], *, dry_run: bool, is_agreed: bool
) -> dict[str, int]:
    async with opened(database_url) as database:
        counts = await prune_generations(database, artifacts, keep, dry_run=True)
        if dry_run or not any(counts.values()):
            return counts
        confirm(
            f"Delete {_in_words(counts)} from {database}, with their audio in {artifacts.root}?", is_agreed=is_agreed
        )
        return await prune_generations(database, artifacts, keep)


def _in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {status}" for status, count in counts.items())
