"""What all answers share that go on for long."""

from __future__ import annotations

import anyio
from starlette.types import Receive


async def cancel_when_left(receive: Receive, scope: anyio.CancelScope) -> None:
    """Cancel when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
