"""The list of the page: its rows, the links to other lists, and what can be cancelled at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request

from dgx_music.errors import InvalidRequestError
from dgx_music.roles import Role
from dgx_music.statuses import PENDING, PROCESSING
from dgx_music.storage import count_generations
from dgx_music.storage.bulk import find_ids
from dgx_music.storage.database import ensure_database
from dgx_music.web.access import Access
from dgx_music.web.filters import FILTERS, PAGING, SORTING, read_parameters, within_tenant
from dgx_music.web.generations import read_page

OWN = ("show", "view")
"""The parameters of the page's URL that are not those of the list."""
_CHIPS: Sequence[tuple[str, dict[str, str]]] = (
    ("All", {}),
    ("Waiting", {"status": "pending"}),
    ("Running", {"status": "processing"}),
    ("Done", {"status": "completed"}),
    ("Failed", {"status": "failed"}),
    ("Starred", {"starred": "1"}),
)
_FINER = ("key", "bpm_from", "bpm_to", "tag", "model")


async def read_list(request: Request, access: Access, root: str) -> dict[str, Any]:
    """Return what the template of the list needs; a wrong filter is its ``reason``."""
    reason = None
    try:
        page = await read_page(request, access, root, ignored=OWN)
        bulk = await _find_bulk(request, access, page)
    except InvalidRequestError as error:
        page, bulk, reason = {"generations": [], "next": None}, None, str(error)
    kept = [pair for pair in kept_of(request) if pair[0] != "after"]
    return {
        "rows": page["generations"],
        "older": page["next"] and link_to(root, [*kept, ("after", page["next"])]),
        "reason": reason,
        "bulk": bulk,
        "chips": _chips(root, kept),
        "filters": dict(kept),
        "is_finer": any(name in _FINER for name, _ in kept),
    }


def kept_of(request: Request) -> list[tuple[str, str]]:
    """Return the parameters of the list in the URL, without how long it is."""
    pairs = request.query_params.multi_items()
    return [pair for pair in pairs if pair[0] not in (*OWN, "limit")]


def link_to(root: str, kept: list[tuple[str, str]]) -> str:
    """Return the URL of a list."""
    return f"{root}/?{urlencode(kept)}" if kept else f"{root}/"


def _chips(root: str, kept: list[tuple[str, str]]) -> list[tuple[str, str, bool]]:
    """Return the word of each chip, its link, and whether the list is what it leads to."""
    others = [(name, text) for name, text in kept if name not in ("status", "starred")]
    now = {name: text for name, text in kept if name in ("status", "starred")}
    return [
        (word, link_to(root, [*others, *chosen.items()]), chosen == now) for word, chosen in _CHIPS
    ]


async def _find_bulk(
    request: Request, access: Access, page: dict[str, Any]
) -> dict[str, Any] | None:
    """Return the filters of what waits in this list, and its number; ``None`` if nothing is offered."""
    values = read_parameters(request, *FILTERS, *SORTING, *PAGING, ignored=OWN)
    waiting = sum(row["status"] == PENDING for row in page["generations"])
    is_open = {PENDING, PROCESSING}.issuperset(values.get("status", ()))
    if not (waiting and is_open and access.may(Role.OPERATE)) or "q" in values:
        return None
    names = {each.name for each in FILTERS}
    filters = {name: value for name, value in values.items() if name in names}
    filters["status"] = [PENDING]
    if page["next"] or "after" in values:
        waiting = await _count(filters, access)
    return {"count": waiting, "filters": json.dumps(filters)} if waiting > 1 else None


async def _count(filters: dict[str, Any], access: Access) -> int:
    database = await ensure_database()
    wanted: Any = within_tenant(filters, access)
    if len(wanted) == 1:
        return await database.transact(partial(count_generations, status=PENDING), read_only=True)
    find = partial(find_ids, ids=None, filters=wanted)
    return len(await database.transact(find, read_only=True))
