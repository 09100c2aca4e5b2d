"""The page's frame: templates, style sheet and scripts, read once and told apart by their hash."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote

from jinja2 import Environment, FileSystemLoader
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from dgx_music.catalog import is_untrained
from dgx_music.errors import InvalidRequestError
from dgx_music.web import wording
from dgx_music.web.access import login_of
from dgx_music.web.problems import NO_TOKEN, ProblemError, problem_of
from dgx_music.web.route import MusicRoute

_HERE = Path(__file__).parent
_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
FILES: Mapping[str, tuple[bytes, str]] = {
    path.name: (gzip.compress(path.read_bytes(), mtime=0), _TYPES[path.suffix])
    for path in sorted((_HERE / "static").iterdir())
    if path.suffix in _TYPES
}
"""What the page loads: the bytes, compressed by gzip, and the media type of each name."""
VERSION = hashlib.sha256(b"".join(content for content, _ in FILES.values())).hexdigest()[:12]
"""Part of each file's URL, so that browsers keep a file until another version is installed."""


_templates = Environment(
    loader=FileSystemLoader(_HERE / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=lambda value: "" if value is None else value,
)
_templates.filters |= {
    "moment": wording.moment,
    "seconds": wording.seconds,
    "title_of": wording.title_of,
    "status_of": wording.status_of,
    "facts_of": wording.facts_of,
    "problem_of": wording.problem_of_row,
    "outlook_of": wording.outlook_of,
    "sounds_of": wording.sounds_of,
    "request_of": wording.request_of,
    "worker_facts": wording.worker_facts,
    "model_facts": wording.model_facts,
}
_templates.tests["untrained"] = is_untrained


class PageRoute(MusicRoute):
    """A route whose errors are pages: the log-in if that is what is missing."""

    def answer_problem(self, request: Request, error: Exception) -> Response | None:
        """Return the answer to a known error, or ``None``."""
        problem = problem_of(request, error)
        if problem is None:
            return None
        # If the application around us asks for its own log-in, our tokens are of no use there.
        is_foreign = isinstance(error, HTTPException)
        return refusal(request, problem, may_log_in=not is_foreign)


async def read_form(request: Request) -> dict[str, str]:
    """Return the fields of a form without files; raises ``InvalidRequestError``."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise InvalidRequestError("form", "is not one without files", "send the page's own form")
    text = (await request.body()).decode(errors="replace")
    return dict(parse_qsl(text, keep_blank_values=True))


def root_of(request: Request) -> str:
    """Return the path under which the page is mounted, without the slash at its end."""
    path: str = request.scope["path"]
    return quote(path[: path.rindex("/")])


def render(
    request: Request, template: str, values: Mapping[str, Any], status: int = 200
) -> Response:
    """Return a page."""
    root = root_of(request)
    frame = {"root": root, "files": f"{root}/page/{VERSION}"}
    return HTMLResponse(_templates.get_template(template).render(**frame, **values), status)


def login_page(request: Request, reason: str | None, status: int) -> Response:
    """Return the form that takes a token, with the reason why the last one was refused."""
    values = {"title": "Log in", "reason": reason, "is_login": True}
    return render(request, "alone.html", values, status)


def refusal(request: Request, problem: ProblemError, *, may_log_in: bool = True) -> Response:
    """Return the page that a problem leads to: if a token is missing, the form for one."""
    if problem.kind is NO_TOKEN and may_log_in:
        reason = problem.detail if login_of(request) else None
        page = login_page(request, reason, problem.kind.status)
    else:
        values = {"title": problem.kind.title, "reason": problem.detail}
        page = render(request, "alone.html", values, problem.kind.status)
    page.headers.update(problem.headers)
    return page
