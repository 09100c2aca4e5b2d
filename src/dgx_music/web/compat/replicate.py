"""What the ``replicate`` package calls: predictions, which are generations, and the models."""

from __future__ import annotations

import re
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlencode

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dgx_music.client.generations import cancel_generation
from dgx_music.errors import IllegalTransitionError
from dgx_music.storage import list_generations
from dgx_music.storage.database import ensure_database
from dgx_music.validation import check_name
from dgx_music.web import documents
from dgx_music.web.access import Access, MayEnqueue, MayRead
from dgx_music.web.compat.fields import body_of, check_absent, check_given, given, renaming
from dgx_music.web.compat.holding import enqueue_as, hold
from dgx_music.web.compat.hosted_models import (
    ANY_MODEL,
    as_hosted,
    as_version,
    check_version,
    find_hosted,
    read_version,
    reference_of,
    version_id,
)
from dgx_music.web.compat.inputs import INPUTS, NAMES, read_input
from dgx_music.web.compat.outputs import METADATA_KEY, as_list_prediction, as_prediction, root_of
from dgx_music.web.enqueue import LONGEST_WAIT_SECONDS, wait_seconds
from dgx_music.web.filters import Parameter, read_parameters, within_tenant
from dgx_music.web.route import MusicRoute
from dgx_music.web.rows import find_row

_ROWS = 100
_CURSOR = Parameter("cursor", {"type": "string", "minLength": 1}, "As `next` of a page has it.")
_WAIT_ALONE = re.compile(r"(?:^|[,;\s])wait\s*(?:$|[,;])", re.IGNORECASE)
_MARGIN, _LONGEST_MARGIN = 0.1, 1.0
_NO_WEBHOOKS = "cannot be called from here"
_IMPOSSIBLE = dict.fromkeys(("webhook", "webhook_completed", "webhook_events_filter"), _NO_WEBHOOKS)
_INPUT = {
    "type": "object",
    "additionalProperties": False,
    "properties": {name: {"anyOf": [schema, {"type": "null"}]} for name, schema in INPUTS.items()},
}
_FIELDS: dict[str, dict[str, Any]] = {
    "input": _INPUT,
    "stream": {"type": ["boolean", "null"], "description": "Changes nothing."},
    **{name: {"type": "null", "description": "Not possible here."} for name in _IMPOSSIBLE},
}
_EXAMPLE = {"input": {"prompt": "lofi rain", "duration": 8}}
_ID = documents.ROW["id"]
_VERSION = version_id(ANY_MODEL)
_PREDICTION = documents.example(
    {
        "id": _ID,
        "model": "meta/musicgen",
        "version": _VERSION,
        "status": "processing",
        "input": {"prompt": "lofi rain", "duration": 8.0},
        "output": None,
        "logs": " 42%|████      | 168/400\n",
        "error": None,
        "metrics": {},
        "created_at": "2026-11-26T09:32:50.185000+00:00",
        "started_at": "2026-11-26T09:32:51.020000+00:00",
        "completed_at": None,
        "urls": {
            "get": f"http://127.0.0.1:8321/v1/predictions/{_ID}",
            "cancel": f"http://127.0.0.1:8321/v1/predictions/{_ID}/cancel",
        },
    }
)
_PAGE = documents.example({"previous": None, "next": None, "results": []})
_MODEL = documents.example(as_hosted(ANY_MODEL, "http://127.0.0.1:8321/v1/"))
_MADE = documents.answers({201: ("The prediction.", _PREDICTION)}, errors=[404])
_READ_HEADERS = documents.headers(
    {
        "Prefer": "`wait` waits up to a minute, and `wait=30` up to so many seconds.",
        "Idempotency-Key": "The same request again gets the prediction that is there.",
    }
)

if TYPE_CHECKING:
    PredictionRequest: TypeAlias = BaseModel
    ModelPredictionRequest: TypeAlias = BaseModel
else:
    PredictionRequest = body_of(
        "PredictionRequest",
        {"version": _VERSION, **_EXAMPLE},
        required=["version", "input"],
        version={"type": "string", "description": "The id of a version, or `owner/name`."},
        **_FIELDS,
    )
    ModelPredictionRequest = body_of(
        "ModelPredictionRequest", _EXAMPLE, required=["input"], **_FIELDS
    )


class PredictionRoute(MusicRoute):
    """A route whose body may have audio in it, as a ``data:`` URI."""

    most_bytes = 2**23
    """Room for 30 s of stereo WAV."""


router = APIRouter(route_class=PredictionRoute, tags=["for clients of Replicate"])


@router.post("/predictions", status_code=201, responses=_MADE, openapi_extra=_READ_HEADERS)
async def predict(body: PredictionRequest, request: Request, access: MayEnqueue) -> Response:
    """Enqueue a prediction of a version, and answer with it."""
    fields = given(body)
    check_given(fields, "version")
    name, version = read_version(fields.pop("version"))
    asked = {"model": "/".join(reference_of(name)), "version": version}
    return await _predict(fields, name, asked, request, access)


@router.post(
    "/models/{owner}/{name}/predictions",
    status_code=201,
    responses=_MADE,
    openapi_extra=_READ_HEADERS,
)
async def predict_with_model(
    owner: str, name: str, body: ModelPredictionRequest, request: Request, access: MayEnqueue
) -> Response:
    """Enqueue a prediction of a model, and answer with it."""
    found = find_hosted(check_name("owner", owner), name)
    asked = {"model": f"{owner}/{name}", "version": version_id(found)}
    return await _predict(given(body), found, asked, request, access)


@router.get(
    "/predictions",
    responses=documents.answers({200: ("A page, newest first.", _PAGE)}),
    openapi_extra=documents.parameters(_CURSOR),
)
async def get_predictions(request: Request, access: MayRead) -> Response:
    """List all generations as predictions, newest first."""
    cursor = read_parameters(request, _CURSOR).get("cursor")
    read = partial(list_generations, limit=_ROWS, after=cursor, **within_tenant({}, access))
    with renaming({"after": "cursor"}):
        page = await (await ensure_database()).transact(read, read_only=True, may_lag=True)
    following = None
    if page.next is not None:
        following = f"{root_of(request)}predictions?{urlencode({'cursor': page.next})}"
    results = [as_list_prediction(row, request) for row in page.generations]
    return JSONResponse({"previous": None, "next": following, "results": results})


@router.get(
    "/predictions/{prediction_id}",
    responses=documents.answers({200: ("The prediction.", _PREDICTION)}, errors=[404]),
)
async def get_prediction(prediction_id: str, request: Request, access: MayRead) -> Response:
    """Show a generation as a prediction."""
    return JSONResponse(await as_prediction(await find_row(prediction_id, access), request))


@router.post(
    "/predictions/{prediction_id}/cancel",
    responses=documents.answers({200: ("The prediction after it.", _PREDICTION)}, errors=[404]),
)
async def cancel_prediction(prediction_id: str, request: Request, access: MayEnqueue) -> Response:
    """Cancel a prediction; one that has finished stays as it is."""
    row = await find_row(prediction_id, access)
    with suppress(IllegalTransitionError):
        await cancel_generation(row.id)
    return JSONResponse(await as_prediction(await find_row(row.id, access), request))


@router.get(
    "/models/{owner}/{name}",
    responses=documents.answers({200: ("The model.", _MODEL)}, errors=[404]),
)
async def get_model(owner: str, name: str, request: Request, access: MayRead) -> Response:
    """Show a model; `meta/musicgen` is any of them, by its input `model_version`."""
    return JSONResponse(as_hosted(find_hosted(owner, name), root_of(request)))


@router.get(
    "/models/{owner}/{name}/versions",
    responses=documents.answers({200: ("The only version.", _PAGE)}, errors=[404]),
)
async def get_versions(owner: str, name: str, access: MayRead) -> Response:
    """List the only version of a model."""
    version = as_version(version_id(find_hosted(owner, name)))
    return JSONResponse({"previous": None, "next": None, "results": [version]})


@router.get(
    "/models/{owner}/{name}/versions/{version}",
    responses=documents.answers(
        {200: ("The version.", documents.example(as_version(_VERSION)))}, errors=[404]
    ),
)
async def get_version(owner: str, name: str, version: str, access: MayRead) -> Response:
    """Show a version of a model; of `meta/musicgen` any id is one."""
    check_version(find_hosted(owner, name), version)
    return JSONResponse(as_version(version))


async def _predict(
    fields: dict[str, Any], name: str, asked: dict[str, Any], request: Request, access: Access
) -> Response:
    """Enqueue, wait if the client prefers to, and return the answer."""
    check_absent(fields, _IMPOSSIBLE)
    check_given(fields, "input")
    model = None if name == ANY_MODEL else name
    options = await read_input(fields["input"], model, request, access)
    seconds = held_seconds(request.headers.get("prefer"))
    if seconds:
        asked = {**asked, "wait": True}
    options["metadata"] = {METADATA_KEY: asked}
    row = await enqueue_as(options, request, access, NAMES)
    if seconds:
        row = await hold(request, row, seconds)
    told = await as_prediction(row, request, held=seconds > 0)
    return JSONResponse(told, 201, {"Location": told["urls"]["get"]})


def held_seconds(prefer: str | None) -> float:
    """Return how long to hold the answer: what the client prefers, less a margin.

    The client gives up half a second after that time.
    """
    seconds = wait_seconds(prefer)
    if not seconds and _WAIT_ALONE.search(prefer or ""):
        seconds = LONGEST_WAIT_SECONDS
    return seconds - min(seconds * _MARGIN, _LONGEST_MARGIN)
