"""The page: made whole for each URL, so that it works without scripts and is live with them."""

from __future__ import annotations

import secrets
from typing import Any
from urllib.parse import urlencode

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from dgx_music.client.content import writable_formats
from dgx_music.config import default_model
from dgx_music.errors import DgxMusicError, GenerationNotFoundError, InvalidRequestError
from dgx_music.roles import Role
from dgx_music.storage import get_database_stats
from dgx_music.storage.database import ensure_database
from dgx_music.validation import check_name
from dgx_music.web.access import Access, MayEnqueue, MayRead, login_of
from dgx_music.web.drawer import read_drawer
from dgx_music.web.enqueue import enqueue_one
from dgx_music.web.filters import read_integer, read_number
from dgx_music.web.fleet import read_workers
from dgx_music.web.lists import kept_of, link_to, read_list, read_news
from dgx_music.web.overview import read_models
from dgx_music.web.problems import ProblemError, problem_of
from dgx_music.web.requests import check_only, prepared
from dgx_music.web.shell import PageRoute, read_form, render, root_of
from dgx_music.web.wording import KEYS, curl_of

router = APIRouter(route_class=PageRoute, include_in_schema=False)

_TEXTS = ("prompt", "model", "seed", "negative_prompt", "idempotency_key")
_FIELDS = (*_TEXTS, "duration", "variations")
_EXAMPLES = (
    "lofi rain, vinyl crackle, slow piano",
    "trap beat 140 BPM, deep bass",
    "warm analogue synth pads, dawn over the sea",
    "bluegrass banjo and fiddle, fast",
)


@router.get("/")
async def get_page(request: Request, access: MayRead) -> Response:
    """Show what the URL asks for; fields of a form that are empty leave the URL.

    With ``ids`` it is only what may have changed of a page that is open, for its scripts.
    """
    pairs = request.query_params.multi_items()
    if any(text == "" for _, text in pairs):
        kept = urlencode([pair for pair in pairs if pair[1] != ""])
        return RedirectResponse(f"{root_of(request)}/{kept and '?'}{kept}", 303)
    return await _show(request, access)


@router.post("/")
async def post_prompt(request: Request, access: MayEnqueue) -> Response:
    """Enqueue what a form without scripts sends, and lead back to the list."""
    form = await read_form(request)
    try:
        await enqueue_one(await prepared(_options(form), access), access)
    except (DgxMusicError, ProblemError) as error:
        problem = problem_of(request, error)
        if problem is None:
            raise
        return await _show(request, access, form, problem)
    return RedirectResponse(f"{root_of(request)}/", 303)


def _options(form: dict[str, str]) -> dict[str, Any]:
    """Return the options of a form; raises ``InvalidRequestError``."""
    fields = {name: text for name, text in form.items() if text != "" or name == "prompt"}
    check_only(fields, *_FIELDS)
    options: dict[str, Any] = {"prompt": "", **fields}
    if "duration" in options:
        options["duration"] = read_number("duration", options["duration"])
    if "variations" in options:
        options["variations"] = read_integer("variations", options["variations"])
    return options


async def _show(
    request: Request,
    access: Access,
    form: dict[str, str] | None = None,
    problem: ProblemError | None = None,
) -> Response:
    read = read_news if "ids" in request.query_params else read_list
    values: dict[str, Any] = {
        **_visitor(request, access),
        **await _fleet(request, access),
        **await read(request, access, root_of(request)),
        "counts": await _count(access),
        "form": form or {},
        "problem": problem,
        "key": secrets.token_urlsafe(16),
        "examples": _EXAMPLES,
        "keys": KEYS,
    }
    values["chosen_model"] = values["form"].get("model") or _first_choice(values["models"])
    status = problem.kind.status if problem else 422 if values["reason"] else 200
    if shown := request.query_params.get("show"):
        status = await _add_detail(values, shown, access, request) or status
    return render(request, "page.html", values, status)


async def _fleet(request: Request, access: Access) -> dict[str, Any]:
    """Return the models, and the workers if they are shown and the list is not."""
    models = await read_models()
    is_away = request.query_params.get("view") == "workers"
    return {
        "is_away": is_away,
        "models": models,
        "is_served": any(model["is_served"] for model in models),
        "is_paused": all(model["is_paused"] for model in models),
        "workers": await read_workers(access) if is_away else None,
    }


async def _count(access: Access) -> dict[str, int] | None:
    """Return the counts of all generations; ``None`` for a tenant, which may not know them."""
    if access.tenant is not None:
        return None
    return await (await ensure_database()).transact(get_database_stats, read_only=True)


def _visitor(request: Request, access: Access) -> dict[str, Any]:
    """Return who looks at the page, and how its links keep the list that is shown."""
    kept = kept_of(request)
    return {
        "role": access.role,
        "sees_all": access.tenant is None,
        "may_enqueue": access.may(Role.ENQUEUE),
        "may_operate": access.may(Role.OPERATE),
        "is_logged_in": login_of(request) is not None,
        "here": link_to(root_of(request), kept),
        "kept": f"{urlencode(kept)}&" if kept else "",
    }


async def _add_detail(
    values: dict[str, Any], shown: str, access: Access, request: Request
) -> int | None:
    """Add the generation that is shown, or why it cannot be; return the status for that."""
    try:
        values["detail"] = await read_drawer(check_name("show", shown), access, root_of(request))
        values["curl"] = curl_of(values["detail"], str(request.url))
        values["formats"] = writable_formats()
    except (GenerationNotFoundError, InvalidRequestError) as error:
        values["absent"] = str(error)
        return 404
    return None


def _first_choice(models: list[dict[str, Any]]) -> str:
    """Return the default model, or another one if that one is served and the default is not."""
    default = default_model()
    served = [model["name"] for model in models if model["is_served"]]
    return default if default in served or not served else str(served[0])
