"""A durable, asynchronous job queue for AI music generation.

``await enqueue("lofi rain", duration=16)`` adds a generation; ``dgx-music worker`` makes it; ``wait_for_generation`` waits.
Importing this imports nothing heavy: no torch, no Alembic, no SciPy.
"""

import dgx_music.early  # noqa: F401 - first: the others take a second
from dgx_music.client.enqueue import enqueue, enqueue_many, enqueue_sync
from dgx_music.client.fleet import pause, resume
from dgx_music.client.generations import (
    cancel_generation,
    estimate_generation,
    queue_position,
    retry_generation,
    wait_for_generation,
    watch_generation,
)
from dgx_music.client.requests import RequestOptions
from dgx_music.errors import DgxMusicError
from dgx_music.storage import (
    Database,
    Generation,
    GenerationStatus,
    close_db,
    configure_sqlite,
    get_session,
    init_db,
)

__version__ = "0.1.0"

__all__ = [
    "Database",
    "DgxMusicError",
    "Generation",
    "GenerationStatus",
    "RequestOptions",
    "cancel_generation",
    "close_db",
    "configure_sqlite",
    "enqueue",
    "enqueue_many",
    "enqueue_sync",
    "estimate_generation",
    "get_session",
    "init_db",
    "pause",
    "queue_position",
    "resume",
    "retry_generation",
    "wait_for_generation",
    "watch_generation",
]
