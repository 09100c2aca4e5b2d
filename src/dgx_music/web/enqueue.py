"""``POST generations``: one, or many in one transaction."""

from __future__ import annotations

import re
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dgx_music.client.enqueue import check_many, read_clips_beside, store
from dgx_music.client.generations import watch_generation
from dgx_music.client.requests import CheckedRequests, plan
from dgx_music.errors import IdempotencyConflictError, InvalidRequestError
from dgx_music.storage import Generation
from dgx_music.web import documents
from dgx_music.web.access import Access, MayEnqueue
from dgx_music.web.problems import KEY_CONFLICT, ProblemError
from dgx_music.web.requests import (
    BatchRequest,
    GenerationRequest,
    given,
    prepared,
    prepared_batch,
)
from dgx_music.web.route import MusicRoute
from dgx_music.web.rows import as_row, base_of, url_of
from dgx_music.web.site import site_of

LONGEST_WAIT_SECONDS = 60
_WAIT = re.compile(r"""(?:^|[,;\s])wait\s*=\s*"?(\d{1,6})""", re.IGNORECASE | re.ASCII)

router = APIRouter(route_class=MusicRoute, tags=["generations"])

_ONE_MADE = {
    202: ("It waits in the queue.", documents.ONE),
    200: ("It is finished, or the key had this request already.", documents.ONE),
}


@router.post(
    "/generations",
    status_code=202,
    responses=documents.answers(_ONE_MADE, errors=[404]),
    openapi_extra=documents.headers(
        {
            "Idempotency-Key": "The same request again gets the row that is there.",
            "Prefer": "`wait=30` waits up to so many seconds, 1 to 60.",
        }
    ),
)
async def enqueue_generation(
    body: GenerationRequest, request: Request, access: MayEnqueue
) -> Response:
    """Add one generation to the queue; of several `variations`, the answer is the first take."""
    return await enqueue_options(given(body), request, access)


async def enqueue_options(wanted: dict[str, Any], request: Request, access: Access) -> Response:
    """Add what these fields of a body ask for, and return the answer."""
    key = request.headers.get("idempotency-key")
    options = _with_key(await prepared(wanted, access), key)
    row, is_new = await enqueue_one(options, access)
    seconds = wait_seconds(request.headers.get("prefer"))
    if seconds:
        row = await _wait(request, row, seconds)
    return _answer(row, request, access, is_done=row.is_finished or not is_new, waited=seconds)


@router.post(
    "/generations/batch",
    status_code=202,
    responses=documents.answers({202: ("They wait in the queue.", documents.MANY)}, errors=[404]),
)
async def enqueue_batch(body: BatchRequest, request: Request, access: MayEnqueue) -> Response:
    """Add many generations to the queue, all or none."""
    requests, name, options = await prepared_batch(body, access)
    rows = await _store((await check_many(requests, options)).in_batch(name), access)
    base = base_of(request)
    return JSONResponse({"generations": [as_row(row, access, base) for row in rows]}, 202)


async def enqueue_one(options: dict[str, Any], access: Access) -> tuple[Generation, bool]:
    """Add what these options ask for; return the first take, and whether it is new."""
    checked = await read_clips_beside([plan(options.pop("prompt"), options)])
    row, *_ = await _store(checked.in_batch_if_many(), access)
    return row, row.id == checked.rows[0]["id"]


async def _store(checked: CheckedRequests, access: Access) -> list[Generation]:
    try:
        return await store(checked)
    except IdempotencyConflictError as error:
        raise _hidden_from_tenant(error, access) from None


def wait_seconds(prefer: str | None) -> int:
    """Return how long a client prefers to wait (RFC 7240), at most a minute; 0 is not at all."""
    found = _WAIT.search(prefer or "")
    return min(int(found[1]), LONGEST_WAIT_SECONDS) if found else 0


def _with_key(options: dict[str, Any], key: str | None) -> dict[str, Any]:
    """Return the options with the key of the header; raises if the body has another one."""
    if key is None:
        return options
    if options.get("idempotency_key", key) not in (key, None):
        problem = "differs from the header Idempotency-Key"
        raise InvalidRequestError("idempotency_key", problem, "give one of them")
    return {**options, "idempotency_key": key}


async def _wait(request: Request, row: Generation, seconds: float) -> Generation:
    """Return the latest row: when it is finished, when the time is up, or when the server stops."""
    with site_of(request).stops.waiting(seconds):
        async for latest in watch_generation(row.id):
            row = latest
    return row


def _answer(
    row: Generation, request: Request, access: Access, *, is_done: bool, waited: int
) -> Response:
    base = base_of(request)
    headers = {"Location": url_of(row, base)}
    if waited:
        headers["Preference-Applied"] = f"wait={waited}"
    return JSONResponse(as_row(row, access, base), 200 if is_done else 202, headers)


def _hidden_from_tenant(error: IdempotencyConflictError, access: Access) -> Exception:
    """Return an error that tells a tenant nothing of the row, which may be another tenant's."""
    if access.tenant is None:
        return error
    detail = f"idempotency_key {error.key!r} belongs to another request; choose another key."
    return ProblemError(KEY_CONFLICT, detail)
