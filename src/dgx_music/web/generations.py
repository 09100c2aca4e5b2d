"""``GET generations``: pages, searches, and all of one generation."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dgx_music.errors import InvalidRequestError
from dgx_music.storage import Page, get_generation, list_generations, search_generations
from dgx_music.storage.database import ensure_database
from dgx_music.storage.estimates import estimate
from dgx_music.storage.repository import get_attempts
from dgx_music.web import documents
from dgx_music.web.access import Access, MayRead
from dgx_music.web.filters import (
    FILTERS,
    PAGING,
    SORTING,
    read_limit,
    read_parameters,
    within_tenant,
)
from dgx_music.web.route import MusicRoute
from dgx_music.web.rows import as_attempt, as_list_row, as_row, base_of, check_visible

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

router = APIRouter(route_class=MusicRoute, tags=["generations"])

_OF_PAGE = (*FILTERS, *SORTING, *PAGING)


@router.get(
    "/generations",
    responses=documents.answers({200: ("A page, newest first.", documents.PAGE)}),
    openapi_extra=documents.parameters(*_OF_PAGE),
)
async def get_page(request: Request, access: MayRead) -> Response:
    """List generations, newest first, or search their prompts."""
    return JSONResponse(await read_page(request, access, base_of(request)))


@router.get(
    "/generations/{generation_id}",
    responses=documents.answers({200: ("All of it.", documents.DETAIL)}, errors=[404]),
)
async def get_one(generation_id: str, request: Request, access: MayRead) -> Response:
    """Show one generation with its attempts, and when it is likely to be done."""
    base = base_of(request)
    return JSONResponse(await read_detail(generation_id, access, base))


async def read_page(
    request: Request, access: Access, base: str, *, ignored: Collection[str] = ()
) -> dict[str, Any]:
    """Return the page that the URL asks for; parameters that are ``ignored`` may be there too."""
    values = read_parameters(request, *_OF_PAGE, ignored=ignored)
    limit, words, after = read_limit(values), values.pop("q", None), values.pop("after", None)
    order = {name: values.pop(name) for name in ("sort", "reverse") if name in values}
    filters = within_tenant(values, access)
    if words is not None and (after is not None or order):
        field = "after" if after is not None else min(order)
        problem = "is given for a search, which has one page, best first"
        raise InvalidRequestError(field, problem, "leave it out")

    async def read(session: AsyncSession) -> Page:
        if words is None:
            return await list_generations(session, limit=limit, after=after, **order, **filters)
        hits = await search_generations(session, words, limit=limit, **filters)
        return Page([hit.generation for hit in hits], None)

    with _naming_words():
        page = await (await ensure_database()).transact(read, read_only=True, may_lag=True)
    rows = [as_list_row(row, access, base) for row in page.generations]
    return {"generations": rows, "next": page.next}


@contextmanager
def _naming_words() -> Iterator[None]:
    """Call the words of a search in an error what they are called in the URL."""
    try:
        yield
    except InvalidRequestError as error:
        if error.field != "words":
            raise
        raise InvalidRequestError("q", error.problem, error.remedy) from None


async def read_detail(generation_id: str, access: Access, base: str) -> dict[str, Any]:
    """Return one generation with its attempts, and when it is likely to be done."""

    async def read(session: AsyncSession) -> dict[str, Any]:
        row = check_visible(await get_generation(session, generation_id), generation_id, access)
        attempts = await get_attempts(session, row.id)
        outlook = (await estimate(session, row.id)).to_dict()
        told = [as_attempt(each, access) for each in attempts]
        return {**as_row(row, access, base), "attempts": told, "estimate": outlook}

    return await (await ensure_database()).transact(read, read_only=True)
