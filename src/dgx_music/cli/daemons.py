"""How a command runs that goes on until a signal ends it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from dgx_music.early import ignore_stop_signals


def run_daemon(work: Coroutine[Any, Any, None]) -> None:
    """Run it to its end; a signal that comes later does not change the exit code."""
    asyncio.run(_run_then_ignore_signals(work))


async def _run_then_ignore_signals(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    finally:
        ignore_stop_signals()
