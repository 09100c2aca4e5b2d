"""The storage service: sessions, generations, prompts, statistics. The only package that knows SQL."""

from dgx_music.storage.database import (
    Database,
    close_db,
    configure_sqlite,
    get_database,
    get_session,
    init_db,
    reset_database,
)
from dgx_music.storage.models import Attempt, Base, Generation, Prompt, WorkerInfo
from dgx_music.storage.repository import (
    complete_generation,
    count_generations,
    create_generation,
    delete_generation,
    get_all_generations,
    get_database_stats,
    get_generation,
    get_most_used_prompts,
    get_pending_generations,
    get_prompt_by_text,
    track_prompt_usage,
    update_generation_status,
)
from dgx_music.storage.schema import AttemptOutcome, GenerationStatus

__all__ = [
    "Attempt",
    "AttemptOutcome",
    "Base",
    "Database",
    "Generation",
    "GenerationStatus",
    "Prompt",
    "WorkerInfo",
    "close_db",
    "complete_generation",
    "configure_sqlite",
    "count_generations",
    "create_generation",
    "delete_generation",
    "get_all_generations",
    "get_database",
    "get_database_stats",
    "get_generation",
    "get_most_used_prompts",
    "get_pending_generations",
    "get_prompt_by_text",
    "get_session",
    "init_db",
    "reset_database",
    "track_prompt_usage",
    "update_generation_status",
]
