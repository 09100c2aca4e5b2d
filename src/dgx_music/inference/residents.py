"""The engines that one process has in memory: loaded side by side while there is room, the least recently used gives way."""

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
from dgx_music.inference.trouble import MEMORY_REMEDY, first_line, give_back_memory, is_out_of_memory

ENGINES = {"musicgen": "dgx_music.inference.musicgen.engine", "tone": "dgx_music.inference.tone"}


class Residents:
    """Engines by model. ``load`` is for one thread at a time, everything else for any.

    An engine in which a generation runs is never unloaded. ``on_unload`` hears of a model once no generation of it can
    begin any more.
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
        self._sizes: dict[tuple[str, int | None], int] = {}  # by model and slots, as they were once they were loaded
        self._lock = threading.Lock()  # for the two above; never held while an engine loads

    @contextmanager
    def load(self, settings: EngineSettings) -> Iterator[Engine]:
        """Have the engine of ``settings.model`` for the block, loaded now where it is not resident.

        Idle others make room for it. Raises ``EngineUnavailableError`` where it does not fit even so, and what the
        engine's own loading raises.
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
        """Keep the model's engine resident for the block. Raises ``EngineReplacedError`` where it was unloaded."""
        engine = self._take(model)
        if engine is None:
            raise EngineReplacedError(f"The model {model} was unloaded to make room for another one.")
        try:
            yield engine
        finally:
            self._leave(model)

    def _take(self, model: str, fresh: Engine | None = None) -> Engine | None:
        """Count one more user of the model's engine, which is now the most recently used; ``None`` where there is none."""
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
        """Unload the engines that nothing runs in, the least recently used first; return whether there were any."""
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
        """Unload one idle engine after another until there is room, or all of them where that cannot be told."""
        needed = self._needed_bytes(settings)
        while self._engines and not _fits(needed, self._free_bytes()) and self.unload_idle(at_most=1):
            pass

    def _needed_bytes(self, settings: EngineSettings) -> int | None:
        """Return what the engine will need; of one that nothing is known of, as much as the largest that is resident."""
        needed = self._sizes.get((settings.model, settings.slots)) if settings.slots else None
        if needed is None:
            needed = self._estimate_bytes(settings)
        if needed is not None:
            return needed
        with self._lock:
            return max(map(_memory_bytes, self._engines.values()), default=0) or None

    def _load_with_all_slots(self, settings: EngineSettings) -> Engine:
        """Return the loaded engine; before it makes do with fewer slots than were asked for, idle others give way."""
        engine = self._load_where_it_fits(settings)
        if settings.slots and engine.slots < settings.slots and self.unload_idle():
            _close(engine)
            del engine
            give_back_memory()
            engine = self._load_where_it_fits(settings)
        self._sizes[settings.model, settings.slots] = _memory_bytes(engine)
        return engine

    def _load_where_it_fits(self, settings: EngineSettings) -> Engine:
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
    """Import the engine's module and build it. Raises ``EngineUnavailableError`` for a name that is not known."""
    if settings.engine not in ENGINES:
        raise EngineUnavailableError(f"The engine {settings.engine!r} is not known; use {' or '.join(ENGINES)}.")
    if settings.engine == "musicgen":
        _check_obtainable(settings)
    load: LoadEngine = importlib.import_module(ENGINES[settings.engine]).load
    return load(settings)


def _check_obtainable(settings: EngineSettings) -> None:
    """Find out whether the model's files can be had before torch is imported, which takes seconds."""
    info = find_model(settings.model)
    if info is not None and all(map(find_spec, ("torch", "transformers", "huggingface_hub"))):
        check_obtainable(info, settings.revision)


def estimate_bytes(settings: EngineSettings) -> int | None:
    """Return how much memory the engine would hold, as its module estimates it, or ``None`` where it does not."""
    module = sys.modules.get(ENGINES.get(settings.engine, ""))
    estimate: EstimateBytes | None = getattr(module, "estimate_bytes", None)
    return None if estimate is None else estimate(settings)


def free_bytes(device: str) -> int | None:
    """Return how much memory the device has free, or ``None`` where nobody says; ``auto`` is CUDA where torch has it."""
    torch = sys.modules.get("torch")
    if device != "cpu" and torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.mem_get_info(None if device in ("auto", "cuda") else device)[0])
    return _free_host_bytes(Path("/proc/meminfo"))


def _free_host_bytes(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _memory_bytes(engine: Engine) -> int:
    return int(getattr(engine, "memory_bytes", 0))


def _close(engine: Engine) -> None:
    close = getattr(engine, "close", None)
    if close is not None:
        close()


def _fits(needed: int | None, free: int | None) -> bool:
    return needed is not None and free is not None and needed <= free


def _does_not_fit(model: str, error: Exception) -> EngineUnavailableError:
    return EngineUnavailableError(f"The model {model} does not fit into memory ({first_line(error)}); {MEMORY_REMEDY}.")
