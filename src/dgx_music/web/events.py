"""``GET events`` and ``GET generations/{id}/events``: what happens, as server-sent events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import anyio
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from dgx_music.errors import GenerationNotFoundError
from dgx_music.web import documents
from dgx_music.web.access import Access, MayRead
from dgx_music.web.filters import IDS, read_parameters, split_ids
from dgx_music.web.hub import Hub
from dgx_music.web.route import MusicRoute
from dgx_music.web.rows import as_list_row, base_of
from dgx_music.web.site import site_of
from dgx_music.web.stops import Stops
from dgx_music.web.streams import cancel_when_left
from dgx_music.web.viewers import View, Viewer

BEGINNING = b"retry: 2000\n\n"
"""A client comes again two seconds after its stream has ended."""
PING = b": ping\n\n"
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_END_SECONDS = 1.0
_LAST_ID = documents.headers(
    {"Last-Event-ID": "The id of the last event that the client has; browsers send it."}
)


def _example(kind: str, number: int, data: Mapping[str, Any]) -> str:
    return f"id: 5f0c2a91-{number}\nevent: {kind}\ndata: {json.dumps(data)}\n\n"


_NO_MORE: Mapping[str, Any] = {"gone": [], "queue": None, "stale": False}
_ONE = _example("snapshot", 40, {"generations": [documents.ROW], **_NO_MORE})
_QUEUE = {"newest_id": documents.ROW["id"], "counts": {"pending": 12, "processing": 1}}
_OF_ONE = documents.answers(
    {200: ("Its events.", None), 204: ("The client has them all.", None)}, errors=[404]
)
_OF_ONE[200]["content"] = documents.stream(_ONE)
_OF_MANY = documents.answers({200: ("The events.", None)})
_OF_MANY[200]["content"] = documents.stream(_ONE + _example("queue", 41, _QUEUE))

router = APIRouter(route_class=MusicRoute, tags=["events"])


@router.get(
    "/generations/{generation_id}/events",
    response_class=StreamingResponse,
    responses=_OF_ONE,
    openapi_extra=_LAST_ID,
)
async def watch_one(generation_id: str, request: Request, access: MayRead) -> Response:
    """Send the generation now and after each change, until it has finished or is deleted."""
    viewer = Viewer(
        _view(request, access),
        [generation_id],
        last_id=request.headers.get("last-event-id"),
        is_until_end=True,
    )
    hub = await _joined(request, viewer)
    if not (viewer.waiting or hub.finds(viewer, generation_id)):
        hub.leave(viewer)
        raise GenerationNotFoundError(generation_id)
    if hub.is_over(viewer):
        hub.leave(viewer)
        return Response(status_code=204)  # which a browser takes as the end
    return EventStream(hub, viewer, site_of(request).stops)


@router.get(
    "/events",
    response_class=StreamingResponse,
    responses=_OF_MANY,
    openapi_extra={"parameters": [IDS.described, *_LAST_ID["parameters"]]},
)
async def watch_many(request: Request, access: MayRead) -> Response:
    """Send the generations now, each of them after each change, and the queue's counts."""
    viewer = Viewer(
        _view(request, access),
        split_ids(read_parameters(request, IDS).get(IDS.name, [])),
        last_id=request.headers.get("last-event-id"),
        has_queue=True,
    )
    hub = await _joined(request, viewer)
    return EventStream(hub, viewer, site_of(request).stops)


class EventStream(Response):
    """Sends a viewer its events until the client leaves, the server stops, or it is time."""

    media_type = "text/event-stream"

    def __init__(self, hub: Hub, viewer: Viewer, stops: Stops) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(_HEADERS)
        self._hub = hub
        self._viewer = viewer
        self._stops = stops

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send all of it; the viewer leaves in the end."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            with self._stops.waiting(self._hub.pace.stream_seconds):
                await send(start)
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(cancel_when_left, receive, tasks.cancel_scope)
                    await self._send_events(partial(_send_part, send))
                    tasks.cancel_scope.cancel()
        finally:
            self._hub.leave(self._viewer)
        with anyio.move_on_after(_END_SECONDS):  # a client that reads nothing is not waited for
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_events(self, send_part: Any) -> None:
        await send_part(BEGINNING)
        while not self._hub.is_over(self._viewer):
            await self._viewer.wait()
            await send_part(self._hub.take(self._viewer) or PING)


def _view(request: Request, access: Access) -> View:
    base = base_of(request)

    def show(row: Any) -> dict[str, Any]:
        return as_list_row(row, access, base)

    return View((base, access.is_operator), access.tenant, show)


async def _joined(request: Request, viewer: Viewer) -> Hub:
    """Let the viewer join, and return when its first events wait; raises as the hub does."""
    hub = site_of(request).hub
    hub.join(viewer)
    try:
        await viewer.opened
    except BaseException:
        hub.leave(viewer)
        raise
    return hub


async def _send_part(send: Send, part: bytes) -> None:
    await send({"type": "http.response.body", "body": part, "more_body": True})
