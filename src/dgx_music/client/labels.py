"""What a program says about a generation after enqueue: title, notes, tags and star."""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType
from typing import TYPE_CHECKING

from dgx_music import validation
from dgx_music.client.transactions import transact
from dgx_music.storage.labels import checked_labels, label
from dgx_music.storage.models import Generation

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession


async def label_generation(
    generation_id: str,
    *,
    title: str | EllipsisType | None = ...,
    notes: str | EllipsisType | None = ...,
    tags: str | Sequence[str] | EllipsisType | None = ...,
    add_tags: str | Sequence[str] = (),
    remove_tags: str | Sequence[str] = (),
    starred: bool | EllipsisType | None = ...,
    session: AsyncSession | None = None,
) -> Generation:
    """Change what is said about a generation, whatever its status, and return its row.

    ``...`` leaves a label as it is, and ``None`` takes it away. ``tags`` replaces all tags;
    ``add_tags`` and ``remove_tags`` change some. A running attempt goes on undisturbed, and two
    calls at a time both take effect. Raises ``GenerationNotFoundError`` and
    ``InvalidRequestError``.
    """
    validation.check_name("generation_id", generation_id)
    given = {"title": title, "notes": notes, "tags": tags, "starred": starred}
    labels = checked_labels({name: value for name, value in given.items() if value is not ...})
    more = validation.check_tags(add_tags, "add_tags")
    less = validation.check_tags(remove_tags, "remove_tags")
    return await transact(
        session,
        lambda current: label(current, generation_id, labels, add_tags=more, remove_tags=less),
    )
