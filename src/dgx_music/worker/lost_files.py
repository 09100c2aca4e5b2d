"""The files of attempts that can never complete."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from dgx_music.artifacts import Artifacts
from dgx_music.errors import ArtifactError
from dgx_music.storage.queue import Lease

logger = logging.getLogger(__name__)


async def drop_files(artifacts: Artifacts, lease: Lease, attempts: Iterable[int]) -> None:
    """Delete the files of attempts that can never complete.

    Raises nothing: a file that stays is deleted by the next attempt or by pruning, and so is what
    stays of a completed attempt's preview.
    """
    try:
        await artifacts.delete(lease.generation_id, attempts)
    # Python raises RuntimeError for a thread that it cannot start.
    except (ArtifactError, MemoryError, RuntimeError) as error:
        logger.warning("%s: %s", lease, error)
