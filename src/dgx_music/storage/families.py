"""Which generations were made from which: a parent, and those that repeat or continue it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.errors import GenerationNotFoundError
from dgx_music.storage.generation import Generation
from dgx_music.storage.repository import get_generation

MOST_CHILDREN = 100


@dataclass(frozen=True)
class Family:
    """The generation that one was made from, and those that were made from it."""

    parent_id: str | None
    """``None`` if it was made from none."""
    parent: Generation | None
    """``None`` also if it is deleted."""
    children: list[Generation]
    """Oldest first; of more than 100 the newest."""

    @property
    def is_parent_deleted(self) -> bool:
        """True if it was made from a generation that is no longer there."""
        return self.parent_id is not None and self.parent is None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: of each relative its id, status, prompt, duration and seed."""
        return {
            "parent_id": self.parent_id,
            "is_parent_deleted": self.is_parent_deleted,
            "parent": None if self.parent is None else _brief(self.parent),
            "children": [_brief(child) for child in self.children],
        }


async def get_family(session: AsyncSession, generation_id: str) -> Family:
    """Return the parent and the children of a generation; raises ``GenerationNotFoundError``."""
    own = await get_generation(session, generation_id)
    if own is None:
        raise GenerationNotFoundError(generation_id)
    parent = None if own.parent_id is None else await get_generation(session, own.parent_id)
    query = select(Generation).where(Generation.parent_id == own.id)
    newest = query.order_by(Generation.id.desc()).limit(MOST_CHILDREN)
    return Family(own.parent_id, parent, [*await session.scalars(newest)][::-1])


def _brief(row: Generation) -> dict[str, Any]:
    names = ("id", "status", "prompt", "duration_seconds")
    return {name: getattr(row, name) for name in names} | {"seed": (row.sampling or {}).get("seed")}
