"""``GET workers``, and ``POST pause`` and ``resume``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from dgx_music.client import fleet
from dgx_music.storage import Pause
from dgx_music.storage.database import ensure_database
from dgx_music.storage.workers import get_workers
from dgx_music.web import documents
from dgx_music.web.access import Access, MayOperate, MayRead, check_sees_all
from dgx_music.web.requests import ModelRequest, check_only, given
from dgx_music.web.route import MusicRoute

router = APIRouter(route_class=MusicRoute, tags=["workers"])

_FOR_OPERATORS = ("id", "host", "pid", "end_reason")
_WORKER = {
    "state": "serving",
    "model_name": "musicgen-small",
    "models": ["musicgen-small"],
    "device": "cpu",
    "slots": 2,
    "running_count": 1,
    "started_at": "2026-11-26T09:00:00.000000+00:00",
    "heartbeat_at": "2026-11-26T09:32:50.185000+00:00",
    "is_alive": True,
}
_PAUSES = {
    "pauses": [{"model_name": "musicgen-small", "paused_at": "2026-11-26T09:32:50.185000+00:00"}]
}
_PAUSES_NOW = documents.answers({200: ("All pauses that hold now.", documents.example(_PAUSES))})


@router.get(
    "/workers",
    responses=documents.answers(
        {
            200: (
                "The workers, also those that ended within a day; operators see which and where.",
                documents.example({"workers": [_WORKER]}),
            )
        }
    ),
)
async def get_all_workers(access: MayRead) -> Response:
    """List the workers: which are alive, on which device, and what they run."""
    return JSONResponse({"workers": await read_workers(access)})


async def read_workers(access: Access) -> list[dict[str, Any]]:
    """Return the workers, oldest first, each with what this client may see of it."""
    database = await ensure_database()
    rows = await database.transact(get_workers, read_only=True, may_lag=True)
    return [_as_dict(row, access) for row in rows]


@router.post("/pause", responses=_PAUSES_NOW)
async def pause(access: MayOperate, body: ModelRequest | None = None) -> Response:
    """Let no worker claim anything, or anything of one model; what runs goes on."""
    return _told(await fleet.pause(_model_of(body, access)))


@router.post("/resume", responses=_PAUSES_NOW)
async def resume(access: MayOperate, body: ModelRequest | None = None) -> Response:
    """Let workers claim again: everything, or what one model has waiting."""
    return _told(await fleet.resume(_model_of(body, access)))


def _model_of(body: ModelRequest | None, access: Access) -> str | None:
    check_sees_all(access)
    fields = {} if body is None else given(body)
    check_only(fields, "model")
    return fields.get("model")


def _told(pauses: Sequence[Pause]) -> Response:
    return JSONResponse({"pauses": [pause.to_dict() for pause in pauses]})


def _as_dict(row: dict[str, Any], access: Access) -> dict[str, Any]:
    """Return the worker; only those who see all rows see what it runs."""
    hidden: tuple[str, ...] = () if access.is_operator else _FOR_OPERATORS
    if access.tenant is not None:
        hidden = (*_FOR_OPERATORS, "running")
    return {name: value for name, value in row.items() if name not in hidden}
