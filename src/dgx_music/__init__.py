"""A durable, asynchronous job queue for AI music generation.

``await enqueue("lofi rain", duration=16)`` adds a generation, ``dgx-music worker`` makes it, and
``await wait_for_generation(id)`` waits for it. ``docs/api.md`` describes each name.

Each name is imported when it is first used: importing this package alone costs next to nothing.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

import dgx_music.early  # noqa: F401 - handles signals while the slow imports run

if TYPE_CHECKING:
    from dgx_music.artifacts import Artifacts, open_output, open_place_of
    from dgx_music.audio.facts import AudioFacts
    from dgx_music.client.again import Continuation, again_generation, continue_generation
    from dgx_music.client.audio_out import save_audio, stream_audio
    from dgx_music.client.batches import get_batch, list_batches, watch_batch
    from dgx_music.client.bulk import (
        cancel_generations,
        retry_generations,
        star_generations,
        tag_generations,
    )
    from dgx_music.client.delete import delete_generation_and_audio, delete_generations
    from dgx_music.client.enqueue import enqueue, enqueue_many, enqueue_sync
    from dgx_music.client.fleet import pause, queue_overview, resume
    from dgx_music.client.generations import (
        audio_facts,
        cancel_generation,
        estimate_generation,
        queue_position,
        retry_generation,
        wait_for_generation,
        watch_generation,
    )
    from dgx_music.client.labels import label_generation
    from dgx_music.client.listening import AudioPart, watch_audio
    from dgx_music.client.requests import RequestOptions
    from dgx_music.errors import (
        ArtifactError,
        BatchNotFoundError,
        ConfigurationError,
        CountDiffersError,
        DatabaseError,
        DatabaseNotInitializedError,
        DatabaseNotMigratedError,
        DatabaseUnavailableError,
        DgxMusicError,
        GenerationNotFoundError,
        IdempotencyConflictError,
        IllegalTransitionError,
        InvalidRequestError,
        NoAudioError,
        PartlyDoneError,
        QueueFullError,
        WaitTimeoutError,
    )
    from dgx_music.storage import (
        Database,
        Family,
        Filters,
        Generation,
        GenerationStatus,
        Page,
        Pause,
        SearchHit,
        close_db,
        configure_sqlite,
        count_generations,
        get_database_stats,
        get_family,
        get_generation,
        get_session,
        init_db,
        list_generations,
        search_generations,
    )
    from dgx_music.storage.batch_progress import BatchPage, BatchProgress
    from dgx_music.storage.bulk import BulkResult, Refusal
    from dgx_music.storage.estimates import Estimate
    from dgx_music.storage.overview import (
        ModelQueue,
        QueueEntry,
        QueueOverview,
        QueueRates,
        WorkerOverview,
    )

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "Artifacts",
    "AudioFacts",
    "AudioPart",
    "BatchNotFoundError",
    "BatchPage",
    "BatchProgress",
    "BulkResult",
    "ConfigurationError",
    "Continuation",
    "CountDiffersError",
    "Database",
    "DatabaseError",
    "DatabaseNotInitializedError",
    "DatabaseNotMigratedError",
    "DatabaseUnavailableError",
    "DgxMusicError",
    "Estimate",
    "Family",
    "Filters",
    "Generation",
    "GenerationNotFoundError",
    "GenerationStatus",
    "IdempotencyConflictError",
    "IllegalTransitionError",
    "InvalidRequestError",
    "ModelQueue",
    "NoAudioError",
    "Page",
    "PartlyDoneError",
    "Pause",
    "QueueEntry",
    "QueueFullError",
    "QueueOverview",
    "QueueRates",
    "Refusal",
    "RequestOptions",
    "SearchHit",
    "WaitTimeoutError",
    "WorkerOverview",
    "again_generation",
    "audio_facts",
    "cancel_generation",
    "cancel_generations",
    "close_db",
    "configure_sqlite",
    "continue_generation",
    "count_generations",
    "delete_generation_and_audio",
    "delete_generations",
    "enqueue",
    "enqueue_many",
    "enqueue_sync",
    "estimate_generation",
    "get_batch",
    "get_database_stats",
    "get_family",
    "get_generation",
    "get_session",
    "init_db",
    "label_generation",
    "list_batches",
    "list_generations",
    "open_output",
    "open_place_of",
    "pause",
    "queue_overview",
    "queue_position",
    "resume",
    "retry_generation",
    "retry_generations",
    "save_audio",
    "search_generations",
    "star_generations",
    "stream_audio",
    "tag_generations",
    "wait_for_generation",
    "watch_audio",
    "watch_batch",
    "watch_generation",
]

_MODULES = {
    "artifacts": "Artifacts open_output open_place_of",
    "audio.facts": "AudioFacts",
    "client.again": "Continuation again_generation continue_generation",
    "client.audio_out": "save_audio stream_audio",
    "client.batches": "get_batch list_batches watch_batch",
    "client.bulk": "cancel_generations retry_generations star_generations tag_generations",
    "client.delete": "delete_generation_and_audio delete_generations",
    "client.enqueue": "enqueue enqueue_many enqueue_sync",
    "client.fleet": "pause queue_overview resume",
    "client.generations": "audio_facts cancel_generation estimate_generation queue_position "
    "retry_generation wait_for_generation watch_generation",
    "client.labels": "label_generation",
    "client.listening": "AudioPart watch_audio",
    "client.requests": "RequestOptions",
    "errors": "ArtifactError BatchNotFoundError ConfigurationError CountDiffersError DatabaseError "
    "DatabaseNotInitializedError DatabaseNotMigratedError DatabaseUnavailableError DgxMusicError "
    "GenerationNotFoundError IdempotencyConflictError IllegalTransitionError InvalidRequestError "
    "NoAudioError PartlyDoneError QueueFullError WaitTimeoutError",
    "storage": "Database Family Filters Generation GenerationStatus Page Pause SearchHit close_db "
    "configure_sqlite count_generations get_database_stats get_family get_generation get_session "
    "init_db list_generations search_generations",
    "storage.batch_progress": "BatchPage BatchProgress",
    "storage.bulk": "BulkResult Refusal",
    "storage.estimates": "Estimate",
    "storage.overview": "ModelQueue QueueEntry QueueOverview QueueRates WorkerOverview",
}
_MODULE_OF = {
    name: f"dgx_music.{module}" for module, names in _MODULES.items() for name in names.split()
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used, and keep it."""
    if name in _MODULE_OF:
        value: object = getattr(import_module(_MODULE_OF[name]), name)
    elif not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")  # such as dgx_music.errors
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
