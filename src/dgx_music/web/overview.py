"""``GET models``, ``prompts`` and ``stats``: what there is to ask for, and what was asked for."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dgx_music.catalog import MODELS, ModelInfo
from dgx_music.config import default_model
from dgx_music.storage import get_database_stats, get_most_used_prompts
from dgx_music.storage.database import ensure_database
from dgx_music.storage.models import ALL_MODELS
from dgx_music.storage.pauses import get_pauses
from dgx_music.storage.workers import get_workers
from dgx_music.web import documents
from dgx_music.web.access import MayRead, check_sees_all
from dgx_music.web.compat.hosted_models import as_listed, as_openai_model
from dgx_music.web.compat.outputs import root_of
from dgx_music.web.filters import PAGING, read_limit, read_parameters
from dgx_music.web.route import MusicRoute

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

router = APIRouter(route_class=MusicRoute, tags=["overview"])

_LIMIT = next(each for each in PAGING if each.name == "limit")
_MODEL = {
    "name": "musicgen-small",
    "channels": 1,
    "sample_rate": 32_000,
    "max_duration_seconds": 300.0,
    "hears_melody": False,
    "is_untrained": False,
    "licence": "CC-BY-NC 4.0",
    "is_default": True,
    "is_served": True,
    "is_paused": False,
}
_MODELS = {
    "models": [_MODEL],
    "object": "list",
    "data": [as_openai_model("musicgen-small")],
    "previous": None,
    "next": None,
    "results": [as_listed("musicgen-small", "http://127.0.0.1:8321/v1/")],
}
_PROMPT = {
    "id": 1,
    "text": "lofi rain",
    "used_count": 3,
    "first_used_at": "2026-11-26T09:32:50.185000+00:00",
    "last_used_at": "2026-11-26T10:02:11.034000+00:00",
}
_STATS = {"total_generations": 40, "pending_generations": 12, "total_prompts": 17}


@router.get(
    "/models",
    responses=documents.answers({200: ("The models.", documents.example(_MODELS))}),
)
async def get_models(request: Request, access: MayRead) -> Response:
    """List the models that can be asked for, and which of them a worker serves now.

    `results` and `data` are the same models as clients of Replicate and of OpenAI read them.
    """
    models = await read_models()
    root = root_of(request)
    results = [as_listed(each["name"], root) for each in models]
    data = [as_openai_model(each["name"]) for each in models]
    page = {"previous": None, "next": None, "results": results}
    return JSONResponse({"models": models, "object": "list", "data": data, **page})


async def read_models() -> list[dict[str, Any]]:
    """Return the models of the catalogue, each with whether a worker serves it now."""

    async def read(session: AsyncSession) -> tuple[set[str], set[str]]:
        workers = [each for each in await get_workers(session) if each["is_alive"]]
        served = {name for each in workers for name in [*each["models"], each["model_name"]]}
        return served, {pause.model_name for pause in await get_pauses(session)}

    served, paused = await (await ensure_database()).transact(read, read_only=True, may_lag=True)
    return [_as_dict(model, served, paused) for model in MODELS.values()]


@router.get(
    "/prompts",
    responses=documents.answers(
        {200: ("The prompts, most used first.", documents.example({"prompts": [_PROMPT]}))}
    ),
    openapi_extra=documents.parameters(_LIMIT),
)
async def get_prompts(request: Request, access: MayRead) -> Response:
    """List the prompts that are used most."""
    limit = read_limit(read_parameters(request, _LIMIT))
    check_sees_all(access)
    read = partial(get_most_used_prompts, limit=limit)
    rows = await (await ensure_database()).transact(read, read_only=True, may_lag=True)
    prompts = [
        {name: value for name, value in row.to_dict().items() if name in _PROMPT} for row in rows
    ]
    return JSONResponse({"prompts": prompts})


@router.get(
    "/stats",
    responses=documents.answers({200: ("The counts.", documents.example(_STATS))}),
)
async def get_stats(access: MayRead) -> Response:
    """Count generations by status, and distinct prompts."""
    check_sees_all(access)
    database = await ensure_database()
    counts = await database.transact(get_database_stats, read_only=True, may_lag=True)
    return JSONResponse(counts)


def _as_dict(model: ModelInfo, served: set[str], paused: set[str]) -> dict[str, Any]:
    return {
        "name": model.name,
        "channels": model.channels,
        "sample_rate": model.sample_rate,
        "max_duration_seconds": model.max_duration_seconds,
        "hears_melody": model.hears_melody,
        "is_untrained": model.is_untrained,
        "licence": model.licence,
        "is_default": model.name == default_model(),
        "is_served": model.name in served,
        "is_paused": bool(paused & {model.name, ALL_MODELS}),
    }
