"""What people say about a generation: ``PUT`` and ``DELETE …/star``, and ``PATCH generations/{id}``."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dgx_music.client.labels import label_generation
from dgx_music.web import documents
from dgx_music.web.access import Access, MayEnqueue
from dgx_music.web.requests import LABELS, LabelRequest, check_only, given
from dgx_music.web.route import MusicRoute
from dgx_music.web.rows import as_row, base_of, find_row

router = APIRouter(
    prefix="/generations/{generation_id}", route_class=MusicRoute, tags=["generations"]
)

_STARRED = documents.answers({204: ("It is so now.", None)}, errors=[404])


@router.put("/star", status_code=204, responses=_STARRED)
async def add_star(generation_id: str, access: MayEnqueue) -> Response:
    """Give the generation a star."""
    return await _star(generation_id, access, is_starred=True)


@router.delete("/star", status_code=204, responses=_STARRED)
async def remove_star(generation_id: str, access: MayEnqueue) -> Response:
    """Take the star away."""
    return await _star(generation_id, access, is_starred=False)


@router.patch(
    "", responses=documents.answers({200: ("The row after it.", documents.ONE)}, errors=[404])
)
async def change_labels(
    generation_id: str, body: LabelRequest, request: Request, access: MayEnqueue
) -> Response:
    """Change title, notes, tags or star, whatever the status; null takes a label away."""
    labels = given(body)
    check_only(labels, *LABELS)
    row = await find_row(generation_id, access)
    row = await label_generation(row.id, **labels)
    return JSONResponse(as_row(row, access, base_of(request)))


async def _star(generation_id: str, access: Access, *, is_starred: bool) -> Response:
    row = await find_row(generation_id, access)
    await label_generation(row.id, starred=is_starred)
    return Response(status_code=204)
