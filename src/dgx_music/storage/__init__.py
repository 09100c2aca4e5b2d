"""The storage service: sessions, generations, prompts, statistics. Only this package knows SQL."""

from dgx_music.statuses import AttemptOutcome, GenerationStatus
from dgx_music.storage.by_hand import complete_generation, update_generation_status
from dgx_music.storage.connection.sqlite import configure_sqlite
from dgx_music.storage.database import (
    Database,
    close_db,
    get_database,
    get_session,
    init_db,
    reset_database,
)
from dgx_music.storage.families import Family, get_family
from dgx_music.storage.filters import Filters
from dgx_music.storage.listing import Page, list_generations
from dgx_music.storage.models import (
    Attempt,
    Base,
    Clip,
    Generation,
    Pause,
    Prompt,
    Speed,
    WorkerInfo,
)
from dgx_music.storage.prompts import (
    get_most_used_prompts,
    get_prompt_by_text,
    track_prompt_usage,
)
from dgx_music.storage.repository import (
    create_generation,
    delete_generation,
    get_all_generations,
    get_generation,
    get_pending_generations,
)
from dgx_music.storage.search import SearchHit, search_generations
from dgx_music.storage.statistics import count_generations, get_database_stats

__all__ = [
    "Attempt",
    "AttemptOutcome",
    "Base",
    "Clip",
    "Database",
    "Family",
    "Filters",
    "Generation",
    "GenerationStatus",
    "Page",
    "Pause",
    "Prompt",
    "SearchHit",
    "Speed",
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
    "get_family",
    "get_generation",
    "get_most_used_prompts",
    "get_pending_generations",
    "get_prompt_by_text",
    "get_session",
    "init_db",
    "list_generations",
    "reset_database",
    "search_generations",
    "track_prompt_usage",
    "update_generation_status",
]
