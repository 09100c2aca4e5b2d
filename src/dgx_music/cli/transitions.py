"""``dgx-music cancel`` and ``retry``: the changes of status that a person can ask for."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from dgx_music.cli.options import AsJson, DatabaseUrl, GenerationId
from dgx_music.cli.output import print_json, tell

if TYPE_CHECKING:
    from dgx_music.storage import Generation


def cancel(
    generation_id: GenerationId,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Cancel a generation.

    A generation that waits is cancelled at once. One that runs is cancelled as soon as its worker
    has stopped it.
    """
    generation = asyncio.run(_cancel(generation_id, database_url))
    if as_json:
        print_json(generation.to_dict())
    elif generation.is_processing:
        tell(f"Generation {generation.id} is running; its worker has been asked to stop it.")
    else:
        tell(f"Generation {generation.id} is {generation.status}.")


def retry(
    generation_id: GenerationId,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Put a failed or cancelled generation back into the queue.

    Its failures count from 0 again; its attempts keep counting. A completed generation never runs
    again.
    """
    row = asyncio.run(_retry(generation_id, database_url))
    if as_json:
        print_json(row.to_dict())
    else:
        tell(f"Generation {row.id} is {row.status} again; follow it with: dgx-music watch {row.id}")


async def _cancel(wanted: str, database_url: str | None) -> Generation:
    from dgx_music.cli.opening import find_generation, opened
    from dgx_music.client.generations import cancel_generation

    async with opened(database_url) as database:
        generation = await find_generation(database, wanted)
        await cancel_generation(generation.id)
        return await find_generation(database, generation.id)


async def _retry(wanted: str, database_url: str | None) -> Generation:
    from dgx_music.cli.opening import find_generation, opened
    from dgx_music.client.generations import retry_generation

    async with opened(database_url) as database:
        generation = await find_generation(database, wanted)
        await retry_generation(generation.id)
        return await find_generation(database, generation.id)
