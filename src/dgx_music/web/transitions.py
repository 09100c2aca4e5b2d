"""``POST generations/{id}/cancel`` and ``…/retry``."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dgx_music.client.generations import cancel_generation, retry_generation
from dgx_music.web import documents
from dgx_music.web.access import Access, MayEnqueue
from dgx_music.web.route import MusicRoute
from dgx_music.web.rows import as_row, base_of, find_row

router = APIRouter(
    prefix="/generations/{generation_id}", route_class=MusicRoute, tags=["generations"]
)


@router.post(
    "/cancel",
    responses=documents.answers(
        {200: ("It is cancelled, or its worker stops it now.", documents.ONE)}, errors=[404, 409]
    ),
)
async def cancel(generation_id: str, request: Request, access: MayEnqueue) -> Response:
    """Cancel a generation: one that waits at once, one that runs as soon as its worker hears."""
    row = await find_row(generation_id, access)
    await cancel_generation(row.id)
    return await _latest(row.id, request, access, 200)


@router.post(
    "/retry",
    status_code=202,
    responses=documents.answers(
        {202: ("It waits in the queue again.", documents.ONE)}, errors=[404, 409]
    ),
)
async def retry(generation_id: str, request: Request, access: MayEnqueue) -> Response:
    """Put a failed or cancelled generation back into the queue."""
    row = await find_row(generation_id, access)
    await retry_generation(row.id)
    return await _latest(row.id, request, access, 202)


async def _latest(generation_id: str, request: Request, access: Access, status: int) -> Response:
    row = await find_row(generation_id, access)
    return JSONResponse(as_row(row, access, base_of(request)), status)
