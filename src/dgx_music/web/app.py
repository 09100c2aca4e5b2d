"""The API as an application of its own, and as a router for another one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from dgx_music import __version__
from dgx_music.config import Settings
from dgx_music.errors import DatabaseNotInitializedError
from dgx_music.storage import close_db, get_database, init_db
from dgx_music.storage.database import ensure_database
from dgx_music.web import (
    again,
    audio,
    bulk,
    enqueue,
    events,
    fleet,
    generations,
    health,
    labels,
    login,
    overview,
    page,
    preview,
    transitions,
    uploads,
)
from dgx_music.web.access import TokenScheme, entrance, identification
from dgx_music.web.compat import elevenlabs, replicate, replicate_files, vllm_omni
from dgx_music.web.direct import direct_enqueue
from dgx_music.web.guard import Guard
from dgx_music.web.options import WebOptions
from dgx_music.web.problems import NO_METHOD, internal_problem, problem_of
from dgx_music.web.site import Site

ROUTERS = (
    *(enqueue, generations, events, audio, preview, labels, transitions, again, bulk),
    *(uploads, overview, fleet),
    *(replicate, replicate_files, elevenlabs, vllm_omni),
)
"""The modules with the routes under ``/v1``."""


def create_app(
    settings: Settings | None = None, options: WebOptions | None = None, *, site: Site | None = None
) -> FastAPI:
    """Return the API as an application.

    ``settings`` are the environment's if not given. The application opens the database when it
    starts, unless the program did before.
    """
    options = options or WebOptions()
    app = FastAPI(
        title="dgx-music",
        version=__version__,
        summary="A durable queue for AI music generation.",
        lifespan=_opening(settings),
        docs_url=None,  # these pages load scripts of other sites
        redoc_url=None,
        telemetry={"metrics": False, "logs": False},
    )
    _include(app, site or Site(settings, options), None, has_page=True)
    for kind in (HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _answer_known)
    app.add_exception_handler(Exception, _answer_unknown)
    app.add_middleware(Guard, allowed_hosts=options.allowed_hosts)
    return app


def music_router(
    authorize: Callable[..., Any] | None = None,
    *,
    settings: Settings | None = None,
    options: WebOptions | None = None,
    has_page: bool = True,
) -> APIRouter:
    """Return the routes, for an application that includes them under any prefix.

    ``authorize`` is a dependency of FastAPI that returns an ``Access``, or raises. Without one our
    own tokens are needed. The application needs ``music_lifespan``, or calls ``init_db`` itself.
    The page is at the prefix with a slash; with ``has_page=False`` there is the API only.
    """
    router = APIRouter()
    _include(router, Site(settings, options or WebOptions()), authorize, has_page=has_page)
    return router


@asynccontextmanager
async def music_lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the default database for the time that the application runs.

    If the program has called ``init_db``, this changes nothing.
    """
    async with _opening(None)(app):
        yield


def _include(
    target: FastAPI | APIRouter,
    site: Site,
    authorize: Callable[..., Any] | None,
    *,
    has_page: bool,
) -> None:
    """Add all routes, each router for itself: every level of routers costs every request."""
    identify = identification(site, authorize)
    known = [Depends(identify)]
    if isinstance(identify, TokenScheme):
        way = direct_enqueue(identify)
        target.add_route("/v1/generations", way, methods=["POST"], include_in_schema=False)
    for module in ROUTERS:
        target.include_router(module.router, prefix="/v1", dependencies=known)
    target.include_router(health.router)
    if has_page:
        target.include_router(page.router, dependencies=known)
        target.include_router(login.router, dependencies=[Depends(entrance(site))])


def _opening(settings: Settings | None) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        is_open = _is_open()
        if not is_open and settings is not None:
            await init_db(settings.database_url)
        await ensure_database()
        try:
            yield
        finally:
            if not is_open:
                await close_db()

    return lifespan


def _is_open() -> bool:
    try:
        get_database()
    except DatabaseNotInitializedError:
        return False
    return True


async def _answer_known(request: Request, error: Exception) -> Response:
    problem = problem_of(request, error) or internal_problem()
    if problem.kind is NO_METHOD:
        problem.headers["Allow"] = ", ".join(sorted(_methods_of(request.url.path)))
    return problem.response()


def _methods_of(path: str) -> set[str]:
    """Return all methods of a path; the framework names those of the first route only.

    A path without parameters goes before one with them: ``generations/cancel`` is no id.
    """
    places = [(module.router, "/v1") for module in ROUTERS] + [(health.router, "")]
    found = [
        (route.path.count("{"), route.methods)
        for router, prefix in places
        for route in router.routes
        if isinstance(route, APIRoute) and route.path_regex.match(path.removeprefix(prefix))
    ]
    fewest = min((count for count, _ in found), default=0)
    return {method for count, methods in found if count == fewest for method in methods or ()}


async def _answer_unknown(_request: Request, _error: Exception) -> Response:
    return internal_problem().response()
