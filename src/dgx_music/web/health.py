"""``/healthz`` and ``/readyz``: whether this process lives, and whether it can be of use."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from dgx_music.errors import DatabaseError, DatabaseNotMigratedError, DatabaseUnavailableError
from dgx_music.storage.database import ensure_database
from dgx_music.web import documents
from dgx_music.web.route import MusicRoute

router = APIRouter(route_class=MusicRoute, tags=["health"])

_OK = {"status": "ok"}
_NOT_READY = {"status": "not ready", "reasons": ["database: it cannot be reached"]}


@router.get("/healthz", responses={200: {"content": {"application/json": {"example": _OK}}}})
async def get_health() -> Response:
    """Answer, which shows that the process lives; asks nobody."""
    return JSONResponse(_OK)


@router.get(
    "/readyz",
    responses={
        200: {"content": {"application/json": {"example": _OK}}},
        503: {
            "description": "Requests would fail.",
            "content": {"application/json": documents.example(_NOT_READY)},
        },
    },
)
async def get_readiness() -> Response:
    """Say whether requests can be answered, or why not."""
    reason = await _find_reason()
    if reason is None:
        return JSONResponse(_OK)
    return JSONResponse({**_NOT_READY, "reasons": [reason]}, 503, {"Retry-After": "5"})


async def _find_reason() -> str | None:
    """Return why the database cannot be used, without its name: anybody may ask."""
    try:
        database = await ensure_database()
        database.check_file()
        await database.check_migrated()
    except DatabaseNotMigratedError as error:
        found = error.found or "none"
        return f"schema: it is at revision {found}, and this version needs {error.needed}"
    except DatabaseUnavailableError:
        return "database: it cannot be reached"
    except DatabaseError as error:
        return f"database: {error}"
    return None
