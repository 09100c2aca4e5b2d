"""The tables: generations, their batches, prompts, clips, uploads and attempts, workers, and others."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Any, cast

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, Integer, LargeBinary, Table
from sqlalchemy import text as sql
from sqlalchemy.orm import Mapped, mapped_column, validates

from dgx_music.statuses import WorkerState
from dgx_music.storage.base import Base
from dgx_music.storage.generation import Generation
from dgx_music.storage.schema import (
    HashText,
    Id,
    JsonObject,
    LongText,
    ShortText,
    StatusText,
    UtcDateTime,
    new_id,
    now,
)
from dgx_music.storage.words import search_text

__all__ = [
    "ALL_MODELS",
    "Attempt",
    "Base",
    "Batch",
    "Clip",
    "Generation",
    "Pause",
    "Prompt",
    "Speed",
    "Tag",
    "Tally",
    "Token",
    "Upload",
    "WorkerInfo",
    "attempts",
    "text_hash",
]

ALL_MODELS = "*"
"""Stands for every model, in the place of a model's name."""


class Prompt(Base):
    """A prompt's text, once, with how often it was asked for."""

    __tablename__ = "prompts"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    text: Mapped[str] = mapped_column(LongText)
    text_hash: Mapped[str] = mapped_column(HashText, unique=True)
    """SHA-256 of the text; unique instead of the text, which may be too long for an index row."""
    search_text: Mapped[str] = mapped_column(
        LongText,
        default=lambda context: search_text(context.get_current_parameters()["text"]),
        server_default="",
        deferred=True,
        deferred_raiseload=True,
    )
    """The words of the text, by the rules of ``words.py``; the databases index it."""
    used_count: Mapped[int] = mapped_column(default=1, server_default=sql("1"))
    first_used_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())
    last_used_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())

    __table_args__ = (
        CheckConstraint("used_count >= 1", "used_count"),
        Index("ix_prompts_used_count", "used_count"),
    )

    def __init__(self, **values: Any) -> None:
        if "text" in values:
            values.setdefault("text_hash", text_hash(values["text"]))
        super().__init__(**{"used_count": 1} | values)

    @validates("text")
    def _keep_words(self, _name: str, text: str) -> str:
        self.search_text = search_text(text)
        return text

    def increment_usage(self) -> None:
        """Count one more use in this object; ``track_prompt_usage`` does it atomically."""
        self.used_count += 1
        self.last_used_at = datetime.now(UTC)


def text_hash(text: str) -> str:
    """Return the SHA-256 of the text, in hexadecimal.

    Text that cannot be stored also gets a hash, so that a look-up finds nothing.
    """
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


class Batch(Base):
    """Generations that were enqueued together, and are watched and changed together."""

    __tablename__ = "batches"

    id: Mapped[str] = mapped_column(Id, primary_key=True, default=new_id)
    name: Mapped[str | None] = mapped_column(ShortText)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())


class Tag(Base):
    """One tag of one generation: a copy of ``Generation.tags``, made by triggers, to filter by."""

    __tablename__ = "tags"

    generation_id: Mapped[str] = mapped_column(
        ForeignKey("generations.id", ondelete="CASCADE"), primary_key=True
    )
    name: Mapped[str] = mapped_column(ShortText, primary_key=True)

    __table_args__ = (Index("ix_tags_name", "name", "generation_id"),)


class Clip(Base):
    """Audio given with requests, stored once for all that share it: FLAC of 16 bits."""

    __tablename__ = "clips"

    sha256: Mapped[str] = mapped_column(HashText, primary_key=True)
    """Of the samples, rate and channels: equal music is one clip, whatever file it came in."""
    data: Mapped[bytes] = mapped_column(LargeBinary)
    duration_seconds: Mapped[float]
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())
    last_used_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())
    """Keeps it from being pruned while a new generation is about to refer to it."""


class Attempt(Base):
    """One claim of a generation by a worker: who, when, how it ended."""

    __tablename__ = "attempts"

    generation_id: Mapped[str] = mapped_column(
        ForeignKey("generations.id", ondelete="CASCADE"), primary_key=True
    )
    attempt: Mapped[int] = mapped_column(primary_key=True)
    worker_id: Mapped[str] = mapped_column(ShortText)
    started_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    outcome: Mapped[str | None] = mapped_column(StatusText)
    error_message: Mapped[str | None] = mapped_column(LongText)
    device_seconds: Mapped[float | None]

    __table_args__ = (
        CheckConstraint(
            "outcome IN ('completed', 'failed', 'released', 'cancelled', 'lost')", "outcome"
        ),
        CheckConstraint("(outcome IS NULL) = (finished_at IS NULL)", "finished_has_outcome"),
    )


attempts = cast("Table", Attempt.__table__)
"""The table, for statements that change rows without their objects."""


class WorkerInfo(Base):
    """One worker daemon: its machine, its last heartbeat, and how it ended."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(ShortText, primary_key=True)
    host: Mapped[str] = mapped_column(ShortText)
    pid: Mapped[int]
    state: Mapped[str] = mapped_column(
        StatusText, default=WorkerState.SERVING.value, server_default=WorkerState.SERVING.value
    )
    """Loading, serving, or ended; a worker that was killed keeps its last state."""
    model_name: Mapped[str] = mapped_column(ShortText)
    """The model that is loaded or being loaded."""
    models: Mapped[list[str]] = mapped_column(JsonObject, server_default="[]")
    """All models that it serves."""
    device: Mapped[str] = mapped_column(ShortText)
    slots: Mapped[int]
    running_count: Mapped[int] = mapped_column(default=0, server_default=sql("0"))
    started_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())
    heartbeat_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())
    lease_seconds: Mapped[float]
    """If it is silent for longer than this, it counts as dead."""
    ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    end_reason: Mapped[str | None] = mapped_column(LongText)
    """Why it ended, as a sentence."""

    __table_args__ = (
        CheckConstraint("(state = 'ended') = (ended_at IS NOT NULL)", "ended_has_time"),
        {"postgresql_with": {"fillfactor": 50}},
    )


class Pause(Base):
    """While this row exists, nobody claims anything of the model; ``ALL_MODELS``: of any model."""

    __tablename__ = "pauses"

    model_name: Mapped[str] = mapped_column(ShortText, primary_key=True)
    paused_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())


class Speed(Base):
    """Seconds that a device takes for one second of a model's audio, as measured lately.

    ``low``, ``typical`` and ``high`` are the 10th, 50th and 90th percentile over generations,
    whether all slots of the worker were in use or not.
    """

    __tablename__ = "speeds"

    model_name: Mapped[str] = mapped_column(ShortText, primary_key=True)
    device: Mapped[str] = mapped_column(ShortText, primary_key=True)
    low: Mapped[float]
    typical: Mapped[float]
    high: Mapped[float]
    measured_count: Mapped[int]
    measured_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())


class Tally(Base):
    """A change of a count, written by the tables' triggers: the sum over a name is the count.

    So no count scans a table. Rows are only added, since all writers would wait for a counter that
    all update; from time to time they are replaced by their sum.
    """

    __tablename__ = "tallies"

    id: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True
    )
    name: Mapped[str] = mapped_column(StatusText)
    """A finished status, or ``prompts``."""
    delta: Mapped[int]


class Token(Base):
    """One token of the web API: who it is for and what it allows; never the token itself."""

    __tablename__ = "tokens"

    name: Mapped[str] = mapped_column(ShortText, primary_key=True)
    sha256: Mapped[str] = mapped_column(HashText, unique=True)
    """Of the token. It has 256 random bits, so a slow hash, as for passwords, adds nothing."""
    role: Mapped[str] = mapped_column(StatusText)
    """A ``Role``."""
    tenant: Mapped[str | None] = mapped_column(ShortText)
    """The only tenant whose generations it sees and makes; null: all generations."""
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    last_used_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """Written at most once an hour, so that a request is no write."""

    __table_args__ = (CheckConstraint("role IN ('read', 'enqueue', 'operate')", "role"),)


class Upload(Base):
    """Audio that a client of the web API sent, to be named in a request within a day."""

    __tablename__ = "uploads"

    id: Mapped[str] = mapped_column(ShortText, primary_key=True)
    """Random, so that nobody can guess it."""
    tenant: Mapped[str] = mapped_column(ShortText, server_default="")
    mono_sha256: Mapped[str] = mapped_column(ForeignKey("clips.sha256"), index=True)
    stereo_sha256: Mapped[str] = mapped_column(ForeignKey("clips.sha256"), index=True)
    source_sha256: Mapped[str] = mapped_column(HashText)
    """Of the file as it was sent: a repeated request is known by it."""
    source_channels: Mapped[int]
    duration_seconds: Mapped[float]
    """Of the whole file; the clip of one channel has its first 300 s, the other one 30 s."""
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)

    def clip_sha256(self, channels: int | None) -> str:
        """Return the clip with so many channels; ``None``: with those of the file, 2 at most."""
        return self.mono_sha256 if (channels or self.source_channels) == 1 else self.stereo_sha256


class Login(Base):
    """One browser that has logged in to the page with a token, for some hours."""

    __tablename__ = "logins"

    sha256: Mapped[str] = mapped_column(HashText, primary_key=True)
    """Of the random text in the browser's cookie; the text itself is stored nowhere."""
    token_name: Mapped[str] = mapped_column(ShortText)
    """The token that allows it; if that is revoked or expires, so is the log-in."""
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)
