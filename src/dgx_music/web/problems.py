"""Errors as answers: RFC 9457 problems, one kind for each cause, with our own sentence."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from dgx_music.errors import (
    ArtifactError,
    BatchNotFoundError,
    CountDiffersError,
    DatabaseError,
    DgxMusicError,
    GenerationNotFoundError,
    IdempotencyConflictError,
    IllegalTransitionError,
    InvalidRequestError,
    NoAudioError,
    PartlyDoneError,
    QueueFullError,
)

MEDIA_TYPE = "application/problem+json"
RETRY_SECONDS = 5
"""After how long a client may try again what failed because something was away."""
FULL_SECONDS = 10
"""After how long a client may try again what the full queue had no room for."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """A kind of problem: its name in ``type``, its status, and its title."""

    name: str
    status: int
    title: str


MALFORMED = Kind("malformed-request", 400, "The request cannot be read.")
NO_TOKEN = Kind("token-needed", 401, "A valid token is needed.")
FORBIDDEN = Kind("forbidden", 403, "The token does not allow this.")
CROSS_SITE = Kind("cross-site", 403, "Another site's page sent the request.")
NOT_FOUND = Kind("not-found", 404, "There is nothing here.")
NO_METHOD = Kind("method-not-allowed", 405, "The method is not allowed here.")
WRONG_STATUS = Kind("wrong-status", 409, "The generation's status does not allow this.")
COUNT_DIFFERS = Kind("count-differs", 409, "Another number of generations is meant.")
GONE = Kind("gone", 410, "The audio is no longer there.")
TOO_LARGE = Kind("too-large", 413, "The body is too large.")
NOT_AUDIO = Kind("not-audio", 415, "This is no audio that can be read.")
NO_SUCH_RANGE = Kind("no-such-range", 416, "The file has no such range.")
WRONG_HOST = Kind("wrong-host", 421, "This server is not known by this name.")
INVALID = Kind("invalid-request", 422, "The request cannot be accepted.")
KEY_CONFLICT = Kind("idempotency-conflict", 422, "The key belongs to another request.")
TOO_FAST = Kind("too-fast", 429, "There are too many requests.")
QUEUE_FULL = Kind("queue-full", 429, "Too many generations wait.")
GENERATION_FAILED = Kind("generation-failed", 502, "The generation has failed.")
NOT_FINISHED = Kind("not-finished", 504, "The generation is not finished yet.")
INTERNAL = Kind("internal-error", 500, "The server made a mistake.")
DATABASE_AWAY = Kind("database-away", 503, "The database cannot be used now.")
PARTLY_DONE = Kind("partly-done", 503, "Only some generations were changed.")
TOO_MANY_STREAMS = Kind("too-many-streams", 503, "Too much is watched at a time.")
STORAGE_AWAY = Kind("storage-away", 503, "The audio cannot be read now.")

KINDS: Mapping[int, Kind] = {
    each.status: each
    for each in (
        *(MALFORMED, NO_TOKEN, FORBIDDEN, NOT_FOUND, NO_METHOD, WRONG_STATUS, GONE, TOO_LARGE),
        *(NOT_AUDIO, NO_SUCH_RANGE, WRONG_HOST, INVALID, TOO_FAST, INTERNAL, DATABASE_AWAY),
        *(GENERATION_FAILED, NOT_FINISHED),
    )
}
"""The usual kind of each status."""

_OURS: Sequence[tuple[type[DgxMusicError], Kind]] = (
    (InvalidRequestError, INVALID),
    (IdempotencyConflictError, KEY_CONFLICT),
    (GenerationNotFoundError, NOT_FOUND),
    (BatchNotFoundError, NOT_FOUND),
    (IllegalTransitionError, WRONG_STATUS),
    (CountDiffersError, COUNT_DIFFERS),
    (QueueFullError, QUEUE_FULL),
    (PartlyDoneError, PARTLY_DONE),
    (NoAudioError, WRONG_STATUS),
    (DatabaseError, DATABASE_AWAY),
    (ArtifactError, STORAGE_AWAY),
)
_AWAY = {
    DATABASE_AWAY: "The database cannot be used now; try again in some seconds.",
    PARTLY_DONE: "Some generations were changed, and then something was away; do it again.",
    STORAGE_AWAY: "The storage of the audio cannot be used now; try again in some seconds.",
}
"""What a client reads instead of the error's sentence, which names servers and folders."""


class ProblemError(Exception):
    """Ends a request with a problem; raised by the web itself."""

    def __init__(
        self,
        kind: Kind,
        detail: str,
        *,
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.field = field
        self.headers = dict(headers or {})

    def response(self) -> Response:
        """Return the answer."""
        content = {
            "type": f"urn:dgx-music:{self.kind.name}",
            "title": self.kind.title,
            "status": self.kind.status,
            "detail": self.detail,
        }
        if self.field is not None:
            content["field"] = self.field
        # In ASCII: a field that a client made up may be no text that can be encoded.
        body = json.dumps(content).encode()
        return Response(body, self.kind.status, self.headers, MEDIA_TYPE)


def problem_of(request: Request, error: Exception) -> ProblemError | None:
    """Return the problem that an error means, or ``None`` if it is a mistake of ours."""
    match error:
        case ProblemError():
            return error
        case DgxMusicError():
            return _of_ours(error)
        case RequestValidationError():
            return _of_validation(error.errors()[0])
        case HTTPException():
            return _of_http(request, error)
    return None


def internal_problem() -> ProblemError:
    """Return the problem of a mistake of ours; its cause is in the log only."""
    return ProblemError(INTERNAL, "The server made a mistake; its log says more.")


def _of_ours(error: DgxMusicError) -> ProblemError | None:
    kind = next((kind for kinds, kind in _OURS if isinstance(error, kinds)), None)
    if kind is None:
        return None
    if kind in _AWAY:
        logger.warning("web: %s", error)
        return ProblemError(kind, _AWAY[kind], headers={"Retry-After": str(RETRY_SECONDS)})
    headers = {"Retry-After": str(FULL_SECONDS)} if kind is QUEUE_FULL else {}
    return ProblemError(kind, str(error), field=getattr(error, "field", None), headers=headers)


def _of_validation(found: Mapping[str, Any]) -> ProblemError:
    """Return what the framework refuses: a body that is no JSON object, or lacks a field."""
    place = [str(part) for part in found["loc"][1:] if isinstance(part, str)]
    field = ".".join(place) or str(found["loc"][0])
    if found["type"] == "json_invalid":
        return ProblemError(INVALID, "body is not JSON; send a JSON object.", field="body")
    if found["type"] == "missing":
        return ProblemError(INVALID, f"{field} is missing; add it.", field=field)
    if field == "body" and found["type"].startswith("model_"):
        detail = "body is not a JSON object; send one, with the content type application/json."
        return ProblemError(INVALID, detail, field="body")
    reason = str(found["msg"]).replace("Input should be", "must be")
    return ProblemError(INVALID, f"{field} cannot be accepted: {reason}.", field=field)


def _of_http(request: Request, error: HTTPException) -> ProblemError:
    kind = KINDS.get(error.status_code) or Kind("http-error", error.status_code, "No success.")
    detail = {
        NOT_FOUND: f"There is nothing at {request.url.path}.",
        NO_METHOD: f"{request.method} is not allowed at {request.url.path}.",
        MALFORMED: "The body cannot be read.",
    }.get(kind, str(error.detail))
    return ProblemError(kind, detail, headers=error.headers)
