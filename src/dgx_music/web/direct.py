"""``POST generations`` without the framework's search for dependencies, which takes a third of its time.

It answers as the route of ``enqueue.py`` does, which describes it; that one is used if another
application says who asks.
"""

from __future__ import annotations

from json import JSONDecodeError
from typing import Any

from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from dgx_music.roles import Role
from dgx_music.web.access import TokenScheme, access_of
from dgx_music.web.bodies import limited
from dgx_music.web.enqueue import enqueue_options
from dgx_music.web.problems import problem_of
from dgx_music.web.requests import GenerationRequest, given
from dgx_music.web.route import Handle, answering


def direct_enqueue(scheme: TokenScheme) -> Handle:
    """Return what answers a request by our own tokens."""

    async def handle(request: Request) -> Response:
        await scheme(request)
        access = access_of(request, Role.ENQUEUE)
        body = await _read_body(request)
        return await enqueue_options(given(body), request, access)

    def refuse(request: Request, error: Exception) -> Response | None:
        problem = problem_of(request, error)
        return None if problem is None else problem.response()

    return answering(handle, limited, refuse)


async def _read_body(request: Request) -> GenerationRequest:
    """Return what the body asks for; raises as the framework does."""
    value = await _read_json(request)
    try:
        return GenerationRequest.model_validate(value)
    except ValidationError as error:
        found = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        raise RequestValidationError(found) from error


async def _read_json(request: Request) -> Any:
    """Return the value in the body, or its bytes if they are not said to be JSON."""
    try:
        body = await request.body()
        if body and _is_json(request.headers.get("content-type", "")):
            return await request.json()
    except JSONDecodeError as error:
        raise _invalid("json_invalid") from error
    except HTTPException:
        raise
    except Exception as error:  # not UTF-8, nested too deeply, or broken off
        raise HTTPException(400) from error
    if not body:
        raise _invalid("missing")
    return body


def _is_json(content_type: str) -> bool:
    kind, _, subtype = content_type.partition(";")[0].strip().lower().partition("/")
    return kind == "application" and (subtype == "json" or subtype.endswith("+json"))


def _invalid(kind: str) -> RequestValidationError:
    return RequestValidationError([{"type": kind, "loc": ("body",), "msg": ""}])
