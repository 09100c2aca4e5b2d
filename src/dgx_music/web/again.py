"""``POST generations/{id}/again`` and ``…/continue``: new generations from old ones."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dgx_music.artifacts import open_place_of
from dgx_music.client.again import again_generation, continue_generation
from dgx_music.client.content import path_of
from dgx_music.errors import ArtifactError, InvalidRequestError
from dgx_music.storage import Generation
from dgx_music.web import documents
from dgx_music.web.access import Access, MayEnqueue
from dgx_music.web.problems import GONE, ProblemError
from dgx_music.web.requests import CHANGES, ChangeRequest, check_only, given, prepared
from dgx_music.web.route import MusicRoute
from dgx_music.web.rows import as_row, base_of, find_row, url_of

router = APIRouter(
    prefix="/generations/{generation_id}", route_class=MusicRoute, tags=["generations"]
)

_MADE = {202: ("The new generation waits in the queue.", documents.ONE)}


@router.post("/again", status_code=202, responses=documents.answers(_MADE, errors=[404]))
async def make_again(
    generation_id: str, request: Request, access: MayEnqueue, body: ChangeRequest | None = None
) -> Response:
    """Repeat a request with some changes: a `seed` of `same`, of `new`, or of its own."""
    row = await find_row(generation_id, access)
    (made,) = await again_generation(row.id, **await _changes(body, access))
    return _answer(made, request, access)


@router.post(
    "/continue",
    status_code=202,
    responses=documents.answers(_MADE, errors=[404, 409, 410]),
)
async def go_on(
    generation_id: str, body: ChangeRequest, request: Request, access: MayEnqueue
) -> Response:
    """Go on from a generation's audio: `duration` counts from the start of its last 30 s."""
    row = await find_row(generation_id, access)
    changes = await _changes(body, access)
    if "duration" not in changes:
        remedy = "say how long the music is, with the audio that it starts with"
        raise InvalidRequestError("duration", "is missing", remedy)
    try:
        made = await continue_generation(row.id, **changes)
    except ArtifactError:
        if await _is_gone(row):
            raise ProblemError(GONE, "The audio was deleted or moved.") from None
        raise
    return _answer(made.generations[0], request, access)


async def _is_gone(row: Generation) -> bool:
    """Return True if the row has no audio that a worker made, or its file is no longer there."""
    try:
        path = path_of(row)
    except ArtifactError:
        return True
    return not await open_place_of(path).exists(path)


async def _changes(body: ChangeRequest | None, access: Access) -> dict[str, Any]:
    changes = {} if body is None else given(body)
    check_only(changes, *CHANGES)
    return await prepared(changes, access)


def _answer(row: Generation, request: Request, access: Access) -> Response:
    base = base_of(request)
    return JSONResponse(as_row(row, access, base), 202, {"Location": url_of(row, base)})
