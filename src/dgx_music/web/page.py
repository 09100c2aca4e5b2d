"""The page: a list that works without scripts, and the frame of one that is live with them."""

from __future__ import annotations

import secrets
from typing import Any
from urllib.parse import urlencode

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from dgx_music.config import default_model
from dgx_music.errors import DgxMusicError, InvalidRequestError
from dgx_music.roles import Role
from dgx_music.web.access import Access, MayEnqueue, MayRead, login_of
from dgx_music.web.enqueue import enqueue_one
from dgx_music.web.filters import read_integer, read_number
from dgx_music.web.generations import read_page
from dgx_music.web.overview import read_models
from dgx_music.web.problems import ProblemError, problem_of
from dgx_music.web.requests import check_only, prepared
from dgx_music.web.shell import PageRoute, read_form, render, root_of

router = APIRouter(route_class=PageRoute, include_in_schema=False)

_OWN = ("show", "view")
"""The parameters of the page's URL that are not those of the list."""
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
    """Show the list that the URL asks for; fields of a form that are empty leave the URL."""
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
    reason, status = None, 200
    try:
        page = await read_page(request, access, root_of(request), ignored=_OWN)
    except InvalidRequestError as error:
        page, reason, status = {"generations": [], "next": None}, str(error), 422
    models = await read_models()
    values = {
        "rows": page["generations"],
        "older": _older(request, page["next"]),
        "reason": reason,
        "models": models,
        "is_served": any(model["is_served"] for model in models),
        "chosen_model": (form or {}).get("model") or _first_choice(models),
        "form": form or {},
        "problem": problem,
        "filters": request.query_params,
        "key": secrets.token_urlsafe(16),
        "examples": _EXAMPLES,
        "role": access.role,
        "sees_all": access.tenant is None,
        "may_enqueue": access.may(Role.ENQUEUE),
        "is_logged_in": login_of(request) is not None,
    }
    return render(request, "page.html", values, problem.kind.status if problem else status)


def _first_choice(models: list[dict[str, Any]]) -> str:
    """Return the default model, or another one if that one is served and the default is not."""
    default = default_model()
    served = [model["name"] for model in models if model["is_served"]]
    return default if default in served or not served else str(served[0])


def _older(request: Request, after: str | None) -> str | None:
    """Return the link to the next page of the same list, or ``None``."""
    if after is None:
        return None
    kept = [pair for pair in request.query_params.multi_items() if pair[0] not in ("after", *_OWN)]
    return f"?{urlencode([*kept, ('after', after)])}"
