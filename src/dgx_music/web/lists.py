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
from dgx_music.storage.watching import find_news
from dgx_music.validation import check_name
from dgx_music.web.access import Access
from dgx_music.web.filters import (
    FILTERS,
    PAGING,
    SORTING,
    read_parameters,
    split_ids,
    within_tenant,
)
from dgx_music.web.generations import read_page
from dgx_music.web.rows import as_list_row

OWN = ("show", "view", "ids", "since")
"""The parameters of the page's URL that are not those of the list."""
_CHIPS: Sequence[tuple[str, dict[str, str]]] = (
    ("All", {}),
    ("Waiting", {"status": "pending"}),
    ("Running", {"status": "processing"}),
    ("Done", {"status": "completed"}),
    ("Failed", {"status": "failed"}),
    ("Starred", {"starred": "1"}),
)
_FILTERS = frozenset(each.name for each in FILTERS)
_IN_ORDER = frozenset({"q", "sort", "reverse"})
"""With these, only the whole list tells which rows are in it."""
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
        "new_count": _count_newer(request, page["generations"]),
    }


async def read_news(request: Request, access: Access, root: str) -> dict[str, Any]:
    """Return what the list's template needs to show what has changed; raises as ``read_page`` does.

    The URL names the rows that may have changed (``ids``) and the newest one that is shown
    (``since``). Only those of them that still fit the filters are returned.
    """
    values = read_parameters(request, *FILTERS, *SORTING, *PAGING, ignored=OWN)
    if not _IN_ORDER.isdisjoint(values):
        return await read_list(request, access, root)
    filters: Any = within_tenant(
        {name: values[name] for name in values if name in _FILTERS}, access
    )
    ids = split_ids(request.query_params.getlist("ids"))
    since = check_name("since", request.query_params.get("since", ""))
    find = partial(find_news, ids=ids, since=since, filters=filters)
    rows, newer = await (await ensure_database()).transact(find, read_only=True)
    return {
        "is_news": True,
        "rows": [as_list_row(row, access, root) for row in rows],
        "reason": None,
        "bulk": await _find_bulk(request, access, None),
        "new_count": 0 if "after" in values else newer,
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
    request: Request, access: Access, page: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Return the filters of what waits in this list, and its number; ``None`` if nothing is offered.

    Those on the ``page`` are all, if it is known and has all of the list.
    """
    values = read_parameters(request, *FILTERS, *SORTING, *PAGING, ignored=OWN)
    is_open = {PENDING, PROCESSING}.issuperset(values.get("status", ()))
    if not (is_open and access.may(Role.OPERATE)) or "q" in values:
        return None
    filters = {name: value for name, value in values.items() if name in _FILTERS}
    filters["status"] = [PENDING]
    rows = [] if page is None else page["generations"]
    waiting = sum(row["status"] == PENDING for row in rows)
    if page is None or (waiting and (page["next"] or "after" in values)):
        waiting = await _count(filters, access)
    return {"count": waiting, "filters": json.dumps(filters)} if waiting > 1 else None


def _count_newer(request: Request, rows: list[dict[str, Any]]) -> int:
    """Return how many of the rows are newer than the newest one that is shown, if the URL names it."""
    since = request.query_params.get("since")
    return sum(row["id"] > since for row in rows) if since else 0


async def _count(filters: dict[str, Any], access: Access) -> int:
    database = await ensure_database()
    wanted: Any = within_tenant(filters, access)
    if len(wanted) == 1:
        return await database.transact(partial(count_generations, status=PENDING), read_only=True)
    find = partial(find_ids, ids=None, filters=wanted)
    return len(await database.transact(find, read_only=True))
