"""All that the page shows of one generation: its attempts, what it was made from, and its takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dgx_music.storage import get_generation, list_generations
from dgx_music.storage.database import ensure_database
from dgx_music.web.access import Access
from dgx_music.web.filters import within_tenant
from dgx_music.web.generations import read_detail
from dgx_music.web.rows import as_list_row

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

_MOST = 50


async def read_drawer(generation_id: str, access: Access, base: str) -> dict[str, Any]:
    """Return the row as the API sends it, and with its ``family``: names and lists of rows.

    Raises ``GenerationNotFoundError``.
    """
    row = await read_detail(generation_id, access, base)

    async def read(session: AsyncSession) -> list[tuple[str, list[Any]]]:
        async def find(**filters: Any) -> list[Any]:
            page = await list_generations(session, limit=_MOST, **within_tenant(filters, access))
            return [each for each in page.generations if each.id != row["id"]]

        parent = await get_generation(session, row["parent_id"]) if row["parent_id"] else None
        is_seen = parent is not None and access.tenant in (None, parent.tenant)
        takes = await find(batch=row["batch_id"]) if row["take"] else []
        return [
            ("Made from", [parent] if is_seen else []),
            ("Made from this", await find(parent=row["id"])),
            ("Takes", takes),
        ]

    found = await (await ensure_database()).transact(read, read_only=True)
    family = [
        (name, [as_list_row(each, access, base) for each in rows]) for name, rows in found if rows
    ]
    return {**row, "family": family}
