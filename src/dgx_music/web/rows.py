"""A generation as clients see it: its row without what is ours, and links to what can be done."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from starlette.requests import Request

from dgx_music.errors import GenerationNotFoundError
from dgx_music.statuses import CANCELLED, FAILED, PROCESSING
from dgx_music.storage import Attempt, Generation, get_generation
from dgx_music.storage.database import ensure_database
from dgx_music.web.access import Access

ROOT = "/v1/"
_HIDDEN = ("file_path", "lease_expires_at")
_FOR_OPERATORS = "worker_id"


def base_of(request: Request) -> str:
    """Return the path under which the API is mounted, wherever that is, without ``/v1``."""
    path: str = request.scope["path"]
    return quote(path[: path.rindex(ROOT)])


async def find_row(generation_id: str, access: Access) -> Generation:
    """Return the row; raises ``GenerationNotFoundError`` also if it is another tenant's."""
    database = await ensure_database()
    row = await database.transact(
        lambda session: get_generation(session, generation_id), read_only=True
    )
    return check_visible(row, generation_id, access)


def check_visible(row: Generation | None, generation_id: str, access: Access) -> Generation:
    """Return the row if there is one that may be seen, else raise ``GenerationNotFoundError``."""
    if row is None or access.tenant not in (None, row.tenant):
        raise GenerationNotFoundError(generation_id)
    return row


def as_row(row: Generation, access: Access, base: str) -> dict[str, Any]:
    """Return the row as JSON values."""
    return _as_seen(row, row.to_dict(), access, base)


def as_list_row(row: Generation, access: Access, base: str) -> dict[str, Any]:
    """Return the row as JSON values for a list: without what only a look at one row needs.

    So a page of 50 rows is about 55 kB.
    """
    return _as_seen(row, row.to_summary(), access, base)


def _as_seen(row: Generation, told: dict[str, Any], access: Access, base: str) -> dict[str, Any]:
    """Return these values of the row without what is hidden from the client, and with links."""
    hidden = _HIDDEN if access.is_operator else (*_HIDDEN, _FOR_OPERATORS)
    return {
        **{name: value for name, value in told.items() if name not in hidden},
        "sampling": _with_text_seed(told["sampling"]),
        "urls": _urls(row, base),
    }


def as_attempt(attempt: Attempt, access: Access) -> dict[str, Any]:
    """Return the attempt as JSON values."""
    told = attempt.to_dict()
    del told["generation_id"]
    if not access.is_operator:
        del told[_FOR_OPERATORS]
    return told


def url_of(row: Generation, base: str) -> str:
    """Return the path of the row."""
    return f"{base}{ROOT}generations/{row.id}"


def has_audio(row: Generation) -> bool:
    """Return True if a worker stored audio for the row; it may be deleted by now."""
    return row.is_complete and row.sha256 is not None and row.file_size_bytes is not None


def _urls(row: Generation, base: str) -> dict[str, str | None]:
    own = url_of(row, base)
    return {
        "self": own,
        "audio": f"{own}/audio" if has_audio(row) else None,
        "waveform": f"{own}/waveform" if has_audio(row) else None,
        "preview": f"{own}/preview" if row.status == PROCESSING else None,
        "events": None if row.is_finished else f"{own}/events",
        "cancel": None if row.is_finished else f"{own}/cancel",
        "retry": f"{own}/retry" if row.status in (FAILED, CANCELLED) else None,
    }


def _with_text_seed(sampling: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the fields with the seed as text: a browser rounds numbers of more than 53 bits."""
    if sampling is None or sampling.get("seed") is None:
        return sampling
    return {**sampling, "seed": str(sampling["seed"])}
