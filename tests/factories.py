"""Rows for tests: whatever is not said has a plain default, and any column can be said."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from sqlalchemy import Select, update
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.artifacts.interface import Artifact, describe
from dgx_music.statuses import COMPLETED, FINISHED, PENDING, PROCESSING
from dgx_music.storage import queue
from dgx_music.storage.database import Database
from dgx_music.storage.models import Attempt, Generation
from dgx_music.storage.queue import Claim, Completion, Lease
from dgx_music.storage.schema import now, now_plus

SQLITE, *POSTGRES = DATABASE_KINDS = ["sqlite", "asyncpg", "psycopg"]
MODEL = "musicgen-small"
ROOT = Path(__file__).parents[1]


def on(*kinds: str) -> pytest.MarkDecorator:
    """Run a test on these kinds of database only, since it is about them, or since it is not about databases."""
    return pytest.mark.parametrize("database_url", kinds, indirect=True)


def with_driver(url: str, driver: str) -> str:
    """Return the URL of a PostgreSQL database with this driver."""
    return url.replace("postgresql://", f"postgresql+{driver}://")


def audio_file(
    seconds: float = 1.0,
    rate: int = 32_000,
    channels: int = 1,
    kind: str = "WAV",
    hertz: float = 440.0,
) -> bytes:
    """Return a file of so many seconds of a sine wave, a different one in each channel."""
    time = np.arange(round(seconds * rate)) / rate
    samples = np.stack(
        [0.5 * np.sin(2 * np.pi * hertz * (1 + channel) * time) for channel in range(channels)],
        axis=1,
    )
    buffer = io.BytesIO()
    soundfile.write(buffer, np.rint(samples * 32_767).astype(np.int16), rate, format=kind)
    return buffer.getvalue()


def completed(artifact: Artifact) -> Generation:
    """Return a completed row, stored nowhere, whose audio is this."""
    return Generation(
        prompt="lofi rain",
        model_name=MODEL,
        sample_rate=32_000,
        channels=1,
        status=COMPLETED,
        completed_at=datetime.now(UTC),
        file_path=artifact.path,
        sha256=artifact.sha256,
    )


def made_of(content: bytes, file: Path = Path("made-1.wav")) -> Generation:
    """Return a completed row, stored nowhere, whose audio is this; writes the file."""
    file.write_bytes(content)
    return completed(describe(str(file), content))


async def add_generation(session: AsyncSession, **overrides: Any) -> Generation:
    """Add a row; one with a ``worker_id`` is processing under its first attempt, with half a minute of lease left.

    A finished status brings its ``completed_at``. The rest is as said, past every check but the database's own.
    """
    values: dict[str, Any] = {
        "prompt": "lofi rain",
        "model_name": MODEL,
        "duration_seconds": 8.0,
        "sample_rate": 32_000,
        "channels": 1,
    }
    if overrides.get("worker_id") is not None:
        values |= {
            "status": PROCESSING,
            "attempt": 1,
            "started_at": now(),
            "lease_expires_at": now_plus(30.0),
        }
    if overrides.get("status", PENDING) in FINISHED:
        values["completed_at"] = now()
    generation = Generation(**values | overrides)
    session.add(generation)
    await session.flush()
    if generation.worker_id is not None:
        attempt = Attempt(
            generation_id=generation.id, attempt=generation.attempt, worker_id=generation.worker_id
        )
        session.add(attempt)
        await session.flush()
    await session.refresh(generation)
    return generation


async def back_date(session: AsyncSession, generation_id: str, **seconds_ago: float) -> None:
    """Set these times of a row to so many seconds ago on the database's clock; negative is in the future."""
    values = {column: now_plus(-float(seconds)) for column, seconds in seconds_ago.items()}
    await session.execute(update(Generation).where(Generation.id == generation_id).values(values))


async def claim_up_to(
    session: AsyncSession, limit: int, worker_id: str = "worker-1", **options: Any
) -> list[Claim]:
    options = {"model_name": MODEL, "lease_seconds": 30.0} | options
    return await queue.claim(session, worker_id=worker_id, limit=limit, **options)


async def claim_one(session: AsyncSession, worker_id: str = "worker-1", **options: Any) -> Lease:
    """Claim the one generation that is due."""
    (claimed,) = await claim_up_to(session, 2, worker_id, **options)
    return claimed.lease


async def start_one(database: Database, **overrides: Any) -> Lease:
    """Add a generation and claim it, committed."""
    async with database.session() as session:
        await add_generation(session, **overrides)
        return await claim_one(session)


async def find_lapsed(session: AsyncSession) -> dict[Lease, datetime]:
    """Return the leases that have expired by the database's clock, each with its end."""
    clock, held = await queue.read_clock(session), await queue.find_leases(session)
    return {lease: each.expires_at for lease, each in held.items() if each.expires_at < clock}


async def rescue_lapsed(session: AsyncSession) -> list[queue.Rescued]:
    """Rescue what has expired by the database's clock; return what was taken."""
    return await queue.rescue(session, await find_lapsed(session))


def completion_of(lease: Lease, **overrides: Any) -> Completion:
    values: dict[str, Any] = {
        "file_path": f"{lease.generation_id}-{lease.attempt}.wav",
        "file_size_bytes": 1024,
        "sha256": "ab" * 32,
        "model_version": "v1",
        "generation_time_seconds": 1.5,
        "audio": {"peak": 0.5},
    }
    return Completion(lease=lease, **values | overrides)


async def read(database: Database, generation_id: str) -> Generation:
    """Return the row as everybody sees it."""
    async with database.session(read_only=True) as session:
        found = await session.get(Generation, generation_id)
    assert found is not None
    return found


async def read_all(database: Database, query: Select[Any]) -> list[Any]:
    async with database.session(read_only=True) as session:
        return list(await session.scalars(query))


class Program:
    """Another process that runs one of the programs in ``tests/storage/programs.py`` and prints JSON lines."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def start(cls, name: str, url: str, *arguments: str) -> Program:
        """Start it and wait until it is ready to begin."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "tests.storage.programs", name, url, *arguments),
            cwd=ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        program = cls(process)
        assert await program.read_line() == "ready"
        return program

    def begin(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"begin\n")

    async def read_line(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(await self.process.stdout.readline())

    async def rest(self) -> list[Any]:
        """Wait for its end and return all that it has printed."""
        output, _ = await self.process.communicate()
        return [
            json.loads(line) for line in output.splitlines(keepends=True) if line.endswith(b"\n")
        ]
