"""The class of our routes: also in another application their errors are problems."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from dgx_music.client.room import own_limits
from dgx_music.web.bodies import limited
from dgx_music.web.guard import secure
from dgx_music.web.options import JSON_BYTES
from dgx_music.web.problems import problem_of

Handle: TypeAlias = Callable[[Request], Coroutine[Any, Any, Response]]


def answering(
    handle: Handle,
    receive: Callable[[Request], Request],
    refuse: Callable[[Request, Exception], Response | None],
) -> Handle:
    """Return what answers a request: limited, with known errors as problems, and secured."""

    async def answer(request: Request) -> Response:
        try:
            with own_limits():
                response = await handle(receive(request))
        except Exception as error:
            if (refused := refuse(request, error)) is None:
                raise
            response = refused
        secure(response.raw_headers)
        return response

    return answer


class MusicRoute(APIRoute):
    """Limits the body, turns known errors into problems, and secures the answer."""

    is_limited = True
    """Whether the body is limited as JSON is; otherwise the route limits it."""
    most_bytes = JSON_BYTES
    """The largest body that is limited here."""

    def get_route_handler(self) -> Handle:
        """Return what answers a request."""
        return answering(super().get_route_handler(), self._received, self.answer_problem)

    def _received(self, request: Request) -> Request:
        return limited(request, self.most_bytes) if self.is_limited else request

    def answer_problem(self, request: Request, error: Exception) -> Response | None:
        """Return the answer to a known error, or ``None``."""
        problem = problem_of(request, error)
        return None if problem is None else problem.response()
