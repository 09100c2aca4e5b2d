"""The engines that one process has in memory.

Engines stay loaded side by side while there is room. The least recently used one is unloaded first.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from dgx_music.catalog import find_model
from dgx_music.errors import EngineReplacedError, EngineUnavailableError
from dgx_music.inference.checkpoint import check_obtainable
from dgx_music.inference.engine import Engine, EngineSettings, EstimateBytes, LoadEngine
from dgx_music.inference.trouble import (
    MEMORY_REMEDY,
    first_line,
    give_back_memory,
    is_out_of_memory,
)

ENGINES = {"musicgen": "dgx_music.inference.musicgen.engine", "tone": "dgx_music.inference.tone"}


class Residents:
    """Engines by model. Only one thread at a time may call ``load``; the rest is thread-safe.

    An engine in which a generation runs is never unloaded. ``on_unload`` is called with a model
    when no generation of it can begin any more.
    """

    def __init__(
        self,
        load: LoadEngine,
        estimate_bytes: EstimateBytes,
        free_bytes: Callable[[], int | None],
        on_unload: Callable[[str], None],
    ) -> None:
        self._load = load
        self._estimate_bytes = estimate_bytes
        self._free_bytes = free_bytes
        self._on_unload = on_unload
        self._engines: dict[str, Engine] = {}  # the least recently used first
        self._users: dict[str, int] = {}
        self._lock = threading.Lock()  # for the two above; never held while an engine loads
        self._sizes: dict[tuple[str, int | None], int] = {}  # measured, by model and slots

    @contextmanager
    def load(self, settings: EngineSettings) -> Iterator[Engine]:
        """Return the engine of ``settings.model`` for the block; load it if it is not resident.

        Idle engines are unloaded to make room. Raises ``EngineUnavailableError`` if it does not
        fit even so, and what the engine's own loading raises.
        """
        engine = self._take(settings.model)
        if engine is None:
            self._make_room_for(settings)
            fresh = self._load_with_all_slots(settings)
            engine = self._take(settings.model, fresh) or fresh
        try:
            yield engine
        finally:
            self._leave(settings.model)

    @contextmanager
    def use(self, model: str) -> Iterator[Engine]:
        """Return the model's engine and keep it resident for the block.

        Raises ``EngineReplacedError`` if it was unloaded.
        """
        engine = self._take(model)
        if engine is None:
            message = f"The model {model} was unloaded to make room for another one."
            raise EngineReplacedError(message)
        try:
            yield engine
        finally:
            self._leave(model)

    def _take(self, model: str, fresh: Engine | None = None) -> Engine | None:
        """Return the model's engine with one more user, as the most recently used one.

        Returns ``None`` if the model is not resident. ``fresh`` becomes its engine.
        """
        with self._lock:
            engine = fresh or self._engines.pop(model, None)
            if engine is not None:
                self._engines[model] = engine
                self._users[model] = self._users.get(model, 0) + 1
            return engine

    def _leave(self, model: str) -> None:
        with self._lock:
            self._users[model] -= 1

    def unload_idle(self, *, at_most: int | None = None) -> bool:
        """Unload the engines in which nothing runs; return whether there were any.

        The least recently used ones come first.
        """
        with self._lock:
            idle = [model for model in self._engines if not self._users.get(model)][:at_most]
            engines = [self._engines.pop(model) for model in idle]
        for model in idle:
            self._on_unload(model)
        while engines:
            _close(engines.pop())
        give_back_memory()
        return bool(idle)

    def _make_room_for(self, settings: EngineSettings) -> None:
        """Unload one idle engine after another until there is room.

        If it is not known how much memory is needed or free, unload all of them.
        """
        needed = self._needed_bytes(settings)
        while self._engines and not _fits(needed, self._free_bytes()):
            if not self.unload_idle(at_most=1):
                return

    def _needed_bytes(self, settings: EngineSettings) -> int | None:
        """Return how much memory the engine will need, or ``None`` if nobody knows.

        If there is no measure and no estimate, it is as much as the largest resident engine holds.
        """
        needed = self._sizes.get((settings.model, settings.slots)) if settings.slots else None
        if needed is None:
            needed = self._estimate_bytes(settings)
        if needed is not None:
            return needed
        with self._lock:
            return max(map(_memory_bytes, self._engines.values()), default=0) or None

    def _load_with_all_slots(self, settings: EngineSettings) -> Engine:
        """Load the engine; if it got fewer slots than asked, unload idle ones and load it again."""
        engine = self._load_making_room(settings)
        if settings.slots and engine.slots < settings.slots and self.unload_idle():
            _close(engine)
            del engine
            give_back_memory()
            engine = self._load_making_room(settings)
        self._sizes[settings.model, settings.slots] = _memory_bytes(engine)
        return engine

    def _load_making_room(self, settings: EngineSettings) -> Engine:
        while True:
            try:
                return self._load(settings)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                give_back_memory(error)
                if not self.unload_idle():
                    raise _does_not_fit(settings.model, error) from error


def load_engine(settings: EngineSettings) -> Engine:
    """Import the engine's module and build the engine.

    Raises ``EngineUnavailableError`` if the engine's name is unknown, or if it cannot be loaded.
    """
    if settings.engine not in ENGINES:
        names = " or ".join(ENGINES)
        raise EngineUnavailableError(f"The engine {settings.engine!r} is not known; use {names}.")
    if settings.engine == "musicgen":
        _check_obtainable(settings)
    load: LoadEngine = importlib.import_module(ENGINES[settings.engine]).load
    return load(settings)


def _check_obtainable(settings: EngineSettings) -> None:
    """Check that the model's files can be had, before importing torch takes seconds."""
    info = find_model(settings.model)
    if info is not None and all(map(find_spec, ("torch", "transformers", "huggingface_hub"))):
        check_obtainable(info, settings.revision)


def estimate_bytes(settings: EngineSettings) -> int | None:
    """Return how much memory the engine would hold; ``None`` if its module does not estimate it.

    A module that is not imported yet does not estimate either.
    """
    module = sys.modules.get(ENGINES.get(settings.engine, ""))
    estimate: EstimateBytes | None = getattr(module, "estimate_bytes", None)
    return None if estimate is None else estimate(settings)


def free_bytes(device: str) -> int | None:
    """Return how much memory the device has free, or ``None`` if that is not known.

    ``auto`` is CUDA if torch uses it, else the host.
    """
    torch = sys.modules.get("torch")
    if device != "cpu" and torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.mem_get_info(None if device in ("auto", "cuda") else device)[0])
    return _free_host_bytes(Path("/proc/meminfo"))


def _free_host_bytes(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    available = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return next((int(kibibytes) * 1024 for kibibytes in available), None)


def _memory_bytes(engine: Engine) -> int:
    return int(getattr(engine, "memory_bytes", 0))


def _close(engine: Engine) -> None:
    close = getattr(engine, "close", None)
    if close is not None:
        close()


def _fits(needed: int | None, free: int | None) -> bool:
    return needed is not None and free is not None and needed <= free


def _does_not_fit(model: str, error: Exception) -> EngineUnavailableError:
    reason = f"The model {model} does not fit into memory ({first_line(error)})"
    return EngineUnavailableError(f"{reason}; {MEMORY_REMEDY}.")
