"""What people say about a generation: title, notes, tags and star; changed whatever its status.

No attempt is disturbed: ``attempt``, by which the ORM and the workers fence their writes, stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music import validation
from dgx_music.errors import GenerationNotFoundError
from dgx_music.storage.generation import Generation, g, words_of_labels

_CHECKS = {
    "title": validation.check_title,
    "notes": validation.check_notes,
    "tags": validation.check_tags,
}


def checked_labels(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of the labels among these; ``None`` is none of that label.

    Raises ``InvalidRequestError``.
    """
    found: dict[str, Any] = {
        name: None if given[name] is None else check(given[name])
        for name, check in _CHECKS.items()
        if name in given
    }
    if not found.get("tags", True):
        found["tags"] = None
    if "starred" in given:
        found["is_starred"] = validation.check_boolean("starred", given["starred"] or False)
    return found


async def label(
    session: AsyncSession,
    generation_id: str,
    labels: Mapping[str, Any],
    *,
    add_tags: Iterable[str] = (),
    remove_tags: Iterable[str] = (),
) -> Generation:
    """Change the columns that ``checked_labels`` gave, and the tags; return the row.

    Two calls at a time both take effect: the row is locked until the transaction ends. Raises
    ``GenerationNotFoundError``, and ``InvalidRequestError`` if there would be too many tags.
    """
    changes = dict(labels)
    if changes.keys() - {"is_starred"} or add_tags or remove_tags:
        stored = await _lock(session, generation_id)
        after = {name: changes.get(name, stored[name]) for name in stored}
        if add_tags or remove_tags:
            tags = {*validation.check_tags(after["tags"] or ()), *add_tags} - {*remove_tags}
            after["tags"] = changes["tags"] = validation.check_tags(tags) or None
        changes["search_text"] = words_of_labels(**after)
    if not changes:
        return await _read(session, generation_id)
    statement = (
        update(Generation)
        .where(Generation.id == generation_id)
        .values(changes)
        .returning(Generation)
    )
    options = {"populate_existing": True}
    changed: Generation | None = await session.scalar(statement, execution_options=options)
    if changed is None:
        raise GenerationNotFoundError(generation_id)
    return changed


async def _lock(session: AsyncSession, generation_id: str) -> Mapping[str, Any]:
    """Return the stored title, notes and tags, and keep others from changing them meanwhile.

    SQLite needs no lock of the row: there, only one transaction writes at a time.
    """
    query = select(g.title, g.notes, g.tags).where(g.id == generation_id)
    stored = (await session.execute(query.with_for_update(key_share=True))).one_or_none()
    if stored is None:
        raise GenerationNotFoundError(generation_id)
    return dict(stored._mapping)


async def _read(session: AsyncSession, generation_id: str) -> Generation:
    generation = await session.get(Generation, generation_id)
    if generation is None:
        raise GenerationNotFoundError(generation_id)
    return generation
