"""An engine without a process or a GPU, driven from the test: events instead of sleeps."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import numpy as np

from dgx_music.audio.samples import Audio
from dgx_music.errors import EngineCrashedError, EngineUnavailableError
from dgx_music.inference.messages import EngineInfo


class FakeEngine:
    """Makes 0.08 s of silence at once, or what ``script[prompt]`` says: an exception to raise, or an event to wait for.

    ``parts[prompt]`` is handed out at the start, and ``made[prompt]`` is the whole audio.
    A prompt in ``sounding`` frees its slot at once, and its audio is made when that event is set.
    """

    def __init__(self, slots=1):
        self.slots = slots
        self.script = {}
        self.sounding = {}
        self.progress = {}
        self.facts = {}
        self.parts = {}
        self.made = {}
        self.dies_at_once = False
        self.started = defaultdict(asyncio.Event)
        self.stopped = defaultdict(asyncio.Event)
        self.running = 0
        self.most_running = 0
        self.in_slots = 0
        self.most_in_slots = 0
        self.start_errors = []
        self.pid = 1
        self.model = None
        self.loaded = []
        self.unloadable = set()
        self.is_closed = False
        self.requests = []
        self.loading = asyncio.Event()
        self.loaded_event = None
        self.on_start = None

    async def start(self, model):
        if self.start_errors:
            raise self.start_errors.pop(0)
        if model in self.unloadable:
            raise EngineUnavailableError(f"{model} is not here.")
        self.loading.set()
        if self.loaded_event is not None:
            await self.loaded_event.wait()
        if self.on_start is not None:
            await self.on_start()
        if model != self.model:
            assert not self.running, "the engine was replaced while a generation ran"
            self.model, self.pid = model, self.pid + 1
            self.loaded.append(model)
        return EngineInfo(
            slots=self.slots, device="cpu", model_version="fake", notice=None, pid=self.pid
        )

    async def generate(self, request, on_progress, on_slot_free, on_part):
        self.requests.append(request)
        for part in self.parts.get(request.prompt, ()):
            on_part(*part)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.started[request.prompt].set()
        try:
            await self._decode(request, on_progress)
            if request.prompt in self.sounding:
                on_slot_free()
                await self.sounding[request.prompt].wait()
        finally:
            self.running -= 1
            self.stopped[request.prompt].set()
        made = self.made.get(request.prompt, np.zeros((1, 2560), dtype=np.float32))
        # A copy: audio from a process belongs to whoever asked for it.
        return Audio(made.copy(), 32_000, self.facts.get(request.prompt, {}))

    async def _decode(self, request, on_progress):
        self.in_slots += 1
        self.most_in_slots = max(self.most_in_slots, self.in_slots)
        try:
            on_progress(self.progress.get(request.prompt, 0.0))
            await asyncio.sleep(0)  # let the others start
            await self._act(self.script.get(request.prompt))
        finally:
            self.in_slots -= 1

    async def _act(self, what):
        if isinstance(what, list):
            what = what.pop(0) if what else None
        if isinstance(what, EngineCrashedError) and not (self.dies_at_once and self.pid > 2):
            self.pid += 1  # the next one is a fresh process
        if isinstance(what, Exception):
            raise what
        if callable(what):
            what()
        if isinstance(what, asyncio.Event):
            await what.wait()

    def hold(self, prompt):
        """Make this prompt's generation last until the returned event is set."""
        self.script[prompt] = asyncio.Event()
        return self.script[prompt]

    def hold_load(self):
        """Make the loading of a model last until the returned event is set."""
        self.loaded_event = asyncio.Event()
        return self.loaded_event

    async def close(self):
        self.is_closed = True
