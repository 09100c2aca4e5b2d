"""``DELETE generations/{id}``, and ``POST generations/cancel``: what only operators do."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from dgx_music.client.bulk import cancel_generations
from dgx_music.client.delete import delete_generation_and_audio
from dgx_music.errors import InvalidRequestError
from dgx_music.validation import check_integer
from dgx_music.web import documents
from dgx_music.web.access import Access, MayOperate
from dgx_music.web.filters import FILTERS, within_tenant
from dgx_music.web.requests import BulkRequest, check_only, given
from dgx_music.web.route import MusicRoute
from dgx_music.web.rows import find_row

router = APIRouter(prefix="/generations", route_class=MusicRoute, tags=["generations"])

_MOST = 2**31 - 1
_DONE = {"changed": 12, "unchanged": 0, "running": 1, "refused_count": 0, "refused": []}


@router.delete(
    "/{generation_id}",
    status_code=204,
    responses=documents.answers({204: ("It is gone.", None)}, errors=[404, 409]),
)
async def delete(generation_id: str, access: MayOperate) -> Response:
    """Delete a generation with its audio; one that runs has to be cancelled first."""
    row = await find_row(generation_id, access)
    await delete_generation_and_audio(row.id)
    return Response(status_code=204)


@router.post(
    "/cancel",
    responses=documents.answers(
        {200: ("What was done.", documents.example(_DONE))}, errors=[404, 409]
    ),
)
async def cancel_many(body: BulkRequest, access: MayOperate) -> Response:
    """Cancel all generations that fit the filters, if there are as many as expected."""
    fields = given(body)
    check_only(fields, "filters", "expected")
    filters = _filters_of(fields["filters"], access)
    expected = check_integer("expected", fields["expected"], 0, _MOST)
    done = await cancel_generations(expected=expected, **filters)
    return JSONResponse(done.to_dict())


def _filters_of(filters: object, access: Access) -> Any:
    if not isinstance(filters, dict) or all(value is None for value in filters.values()):
        problem = "is no object with a filter"
        raise InvalidRequestError("filters", problem, "say which generations are meant")
    check_only(filters, *(each.name for each in FILTERS))
    return within_tenant(filters, access)
