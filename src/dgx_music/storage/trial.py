"""Try whether a worker can use a database, and undo it."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import cast

from sqlalchemy import Table, false, text, update

from dgx_music.storage.database import Database
from dgx_music.storage.models import Attempt, Generation
from dgx_music.storage.schema import dialect_of, new_id
from dgx_music.storage.workers import heartbeat_worker

_NOBODY = {
    "host": "",
    "pid": 0,
    "model_name": "",
    "models": [],
    "device": "",
    "slots": 1,
    "lease_seconds": 1.0,
}
_NO_GENERATION = update(cast("Table", Generation.__table__)).where(false()).values(progress=0.0)
_NO_ATTEMPT = update(cast("Table", Attempt.__table__)).where(false()).values(device_seconds=0.0)


class _UndoneError(Exception):
    """Rolls the trial back."""


async def check_writable(database: Database) -> None:
    """Raise ``DatabaseUnavailableError`` if nothing can be written, for example without rights.

    A PostgreSQL database has to be migrated; a SQLite file may be any.
    """
    with suppress(_UndoneError):
        async with database.session() as session:
            if dialect_of(session) == "postgresql":
                await heartbeat_worker(session, id=new_id(), **_NOBODY)
                await session.execute(_NO_GENERATION)
                await session.execute(_NO_ATTEMPT)
            else:
                await session.execute(text("CREATE TABLE dgx_music_trial (id INTEGER)"))
            raise _UndoneError


def find_folder_problem(folder: Path) -> str | None:
    """Return why nothing can be created in this folder, or ``None``; it may not exist yet."""
    candidates = (folder.absolute(), *folder.absolute().parents)
    existing = next(path for path in candidates if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return f"nothing can be created in {existing}, {(error.strerror or str(error)).lower()}"
