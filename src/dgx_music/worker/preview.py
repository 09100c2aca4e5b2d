"""What listeners hear of a generation while it is made: its audio so far, published in parts.

A part is raw 16-bit samples in the channels and at the rate that the row asks for. The parts are
owned by the attempt, as its file is, and deleted when it ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
import numpy as np

from dgx_music.artifacts import Artifacts
from dgx_music.audio.conversion import ResampledStream, match_channels
from dgx_music.audio.samples import Audio
from dgx_music.audio.wav import to_pcm
from dgx_music.errors import ArtifactError
from dgx_music.storage.queue import Lease

logger = logging.getLogger(__name__)

_PAUSE_SECONDS = 0.5
"""Between two parts: a fast engine makes many seconds of music in that time."""


class Preview:
    """One attempt's preview: ``hear`` takes the engine's parts, ``publish`` stores them."""

    def __init__(
        self, artifacts: Artifacts, lease: Lease, *, sample_rate: int, channels: int
    ) -> None:
        self._artifacts = artifacts
        self._lease = lease
        self._channels = channels
        self._resampled = ResampledStream(sample_rate, channels)
        self._heard = 0
        self._waiting: list[Audio] = []
        self._has_news = asyncio.Event()
        self._is_over = False
        self.on_first: Callable[[], None] | None = None
        """Called once, when the first part is heard."""

    def hear(self, audio: Audio, start: int) -> None:
        """Take a part of the engine's audio; ``start`` is the place of its first sample.

        An engine that had to begin again hands out the same audio again: that is left out.
        """
        if start == self._heard and not self._is_over:
            self._heard += audio.samples.shape[1]
            self._waiting.append(audio)
            self._has_news.set()
            on_first, self.on_first = self.on_first, None
            if on_first is not None:
                on_first()

    async def publish(self) -> None:
        """Publish what was heard, until cancelled; if that fails, publish nothing more."""
        number = 0
        try:
            while True:
                await self._has_news.wait()
                self._has_news.clear()
                heard, self._waiting = self._waiting, []
                data = await anyio.to_thread.run_sync(self._convert, heard)
                if not data:  # the resampler keeps what is too short
                    continue
                lease = self._lease
                await self._artifacts.publish_preview(
                    lease.generation_id, lease.attempt, number, data
                )
                number += 1
                await anyio.sleep(_PAUSE_SECONDS)
        except (ArtifactError, MemoryError, RuntimeError) as error:
            self._is_over = True
            self._waiting.clear()
            logger.warning("%s: its preview ends: %s", self._lease, error)

    def _convert(self, heard: list[Audio]) -> bytes:
        samples = np.concatenate([audio.samples for audio in heard], axis=1)
        rate = heard[0].sample_rate
        return to_pcm(self._resampled.add(match_channels(samples, self._channels, rate), rate))


@asynccontextmanager
async def publishing(preview: Preview) -> AsyncIterator[None]:
    """Publish the preview while the block runs; nothing more is written when this has ended.

    The task starts with the first part: most short generations have none.
    """
    started: list[tuple[anyio.CancelScope, asyncio.Task[None]]] = []

    def start() -> None:
        scope = anyio.CancelScope()
        # Not in a task group, which would wrap the block's own errors.
        started.append((scope, asyncio.create_task(publish_in(scope), name="preview")))

    async def publish_in(scope: anyio.CancelScope) -> None:
        with scope:
            await preview.publish()

    preview.on_first = start
    try:
        yield
    finally:
        preview.on_first = None
        for scope, task in started:
            scope.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait((task,))
