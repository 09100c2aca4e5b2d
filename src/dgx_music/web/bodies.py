"""The limit on what a client sends: counted as it arrives, whatever its headers say."""

from __future__ import annotations

from fastapi import HTTPException
from starlette.requests import Request
from starlette.types import Message

from dgx_music.web.options import JSON_BYTES


def limited(request: Request, most_bytes: int = JSON_BYTES) -> Request:
    """Return the same request, which raises ``HTTPException`` when its body becomes too long."""
    count = 0

    async def receive() -> Message:
        nonlocal count
        message = await request.receive()
        count += len(message.get("body", b""))
        if count > most_bytes:
            raise _too_large(most_bytes)
        return message

    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most_bytes:
        raise _too_large(most_bytes)
    return Request(request.scope, receive)


def _too_large(most_bytes: int) -> HTTPException:
    # Any other error would count as a body that cannot be parsed.
    detail = f"The body has more than {most_bytes:,} bytes; send less at a time."
    return HTTPException(413, detail, {"Connection": "close"})
