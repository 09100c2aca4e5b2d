"""The tables: generations, the prompts and clips they use, the attempts made at them, and the workers that make them."""

from __future__ import annotations

import hashlib
import math
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Connection,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    column,
    event,
    false,
    inspect,
    select,
)
from sqlalchemy import text as sql
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, validates

from dgx_music.errors import IllegalTransitionError
from dgx_music.storage.schema import (
    CANCELLED,
    COMPLETED,
    DEFAULT_MAX_ATTEMPTS,
    FAILED,
    FINISHED,
    LEGAL_TRANSITIONS,
    PENDING,
    PROCESSING,
    GenerationStatus,
    HashText,
    Id,
    JsonObject,
    LongText,
    Real,
    ShortText,
    StatusText,
    UtcDateTime,
    WorkerState,
    claim_order,
    new_id,
    now,
)
from dgx_music.storage.words import search_text
from dgx_music.validation import CLIP_FIELDS

ALL_MODELS = "*"
"""In the place of a model's name: whichever it is."""
CLIP_COLUMNS = tuple(f"{name}_sha256" for name in CLIP_FIELDS)
CANCEL_REQUESTED = "its cancellation was requested"

_CLAIM_ORDER = claim_order(column("run_at"), column("priority"))
_FINISHED_SQL = "status IN ('completed', 'failed', 'cancelled')"


class Base(DeclarativeBase):
    """Naming convention included, so that migrations can name every constraint on every database."""

    type_annotation_map = {float: Real}  # noqa: RUF012 - SQLAlchemy's interface
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Prompt(Base):
    """A prompt's text, once, with how often it was asked for."""

    __tablename__ = "prompts"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    text: Mapped[str] = mapped_column(LongText)
    text_hash: Mapped[str] = mapped_column(HashText, unique=True)
    """SHA-256 of the text: unique in its place, since PostgreSQL's index rows are shorter than a long prompt."""
    search_text: Mapped[str] = mapped_column(
        LongText,
        default=lambda context: search_text(context.get_current_parameters()["text"]),
        server_default="",
        deferred=True,
        deferred_raiseload=True,
    )
    """The text's words as ``words.py`` has them, for the databases' indexes: written, and never read again."""
    used_count: Mapped[int] = mapped_column(default=1, server_default=sql("1"))
    first_used_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())
    last_used_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())

    __table_args__ = (CheckConstraint("used_count >= 1", "used_count"), Index("ix_prompts_used_count", "used_count"))

    def __init__(self, **values: Any) -> None:
        if "text" in values:
            values.setdefault("text_hash", text_hash(values["text"]))
        super().__init__(**{"used_count": 1} | values)

    @validates("text")
    def _keep_words(self, _name: str, text: str) -> str:
        self.search_text = search_text(text)
        return text

    def increment_usage(self) -> None:
        """Count one more use in this object; ``track_prompt_usage`` does it in one atomic statement."""
        self.used_count += 1
        self.last_used_at = datetime.now(UTC)

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain JSON values, times in ISO 8601."""
        return _columns_as_json(self)


def text_hash(text: str) -> str:
    """Return the SHA-256 of the text, as hexadecimal; also of one that cannot be stored, so that it is looked for in vain."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


class Generation(Base):
    """One request for music, from enqueue to file.

    ``attempt`` counts claims, only ever goes up, and fences every write after a claim; it is also SQLAlchemy's version
    counter, so an ORM write that raced with a claim raises ``StaleDataError`` instead of overwriting it.
    """

    __tablename__ = "generations"

    # What was asked for: set by the producer, never changed.
    id: Mapped[str] = mapped_column(Id, primary_key=True, default=new_id)
    prompt: Mapped[str] = mapped_column(LongText)
    prompt_id: Mapped[int | None] = mapped_column(ForeignKey("prompts.id", ondelete="SET NULL"))
    model_name: Mapped[str] = mapped_column(ShortText)
    duration_seconds: Mapped[float]
    sample_rate: Mapped[int]
    channels: Mapped[int]
    sampling: Mapped[dict[str, Any] | None] = mapped_column(JsonObject)
    """The fields of ``Sampling``; null means the defaults."""
    continuation_sha256: Mapped[str | None] = mapped_column(ForeignKey("clips.sha256"))
    """The clip that the music starts with; the duration counts from its start."""
    melody_sha256: Mapped[str | None] = mapped_column(ForeignKey("clips.sha256"))
    """The clip whose tune the music follows."""
    priority: Mapped[int] = mapped_column(default=0, server_default=sql("0"))
    """Higher goes first; a point is worth ``AGEING_SECONDS`` of waiting."""
    tenant: Mapped[str] = mapped_column(ShortText, default="", server_default="")
    """For whom it is made; empty: for nobody in particular, and never held back for others' sake."""
    max_attempts: Mapped[int] = mapped_column(
        default=DEFAULT_MAX_ATTEMPTS, server_default=sql(str(DEFAULT_MAX_ATTEMPTS))
    )
    """How many failures it takes to give up."""
    idempotency_key: Mapped[str | None] = mapped_column(ShortText, unique=True)
    request_hash: Mapped[str | None] = mapped_column(HashText)
    """SHA-256 of what was asked for, to tell a repeated request from another one under the same key."""
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())

    # Where it is: moved by the guarded statements of queue.py.
    status: Mapped[str] = mapped_column(StatusText, default=PENDING, server_default=PENDING)
    run_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())
    """Not claimed before this moment: the producer's wish at first, after a failure the end of the backoff."""
    attempt: Mapped[int] = mapped_column(default=0, server_default=sql("0"))
    failures: Mapped[int] = mapped_column(default=0, server_default=sql("0"))
    """Errors, crashes and lost workers so far; a graceful release costs nothing, a retry by hand starts at 0 again."""
    worker_id: Mapped[str | None] = mapped_column(ShortText)
    """Who holds it; null for a row that was marked processing by hand, which belongs to its caller and is never rescued."""
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When its current or last attempt began."""
    lease_expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """Not indexed: renewals would no longer be heap-only updates on PostgreSQL."""
    progress: Mapped[float] = mapped_column(default=0.0, server_default=sql("0"))
    """0 to 1, of the current or last attempt."""
    cancel_requested: Mapped[bool] = mapped_column(default=False, server_default=false())
    """Set while it runs; such a row ends cancelled, whatever its attempt comes to."""

    # What came of it: written when it finishes.
    completed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When it finished: completed, failed for good, or cancelled."""
    model_version: Mapped[str | None] = mapped_column(ShortText)
    file_path: Mapped[str | None] = mapped_column(LongText)
    """A creator's wish until completion replaces it with where the audio really is."""
    file_size_bytes: Mapped[int | None] = mapped_column(BigInteger)
    sha256: Mapped[str | None] = mapped_column(HashText)
    generation_time_seconds: Mapped[float | None]
    error_message: Mapped[str | None] = mapped_column(LongText)
    """Why the last attempt failed; kept while the next one runs, gone once it completes."""
    metadata_: Mapped[dict[str, Any] | None] = mapped_column("metadata", JsonObject)

    __mapper_args__ = {"version_id_col": attempt, "version_id_generator": False}  # noqa: RUF012 - SQLAlchemy's interface
    __table_args__ = (
        CheckConstraint("status IN ('pending', 'processing', 'completed', 'failed', 'cancelled')", "status"),
        CheckConstraint(f"({_FINISHED_SQL}) = (completed_at IS NOT NULL)", "finished_has_time"),
        CheckConstraint("(worker_id IS NULL) = (lease_expires_at IS NULL)", "claim_has_lease"),
        CheckConstraint("worker_id IS NULL OR status = 'processing'", "only_processing_is_held"),
        CheckConstraint("duration_seconds > 0 AND sample_rate > 0 AND channels > 0", "audio_shape"),
        CheckConstraint("attempt >= 0 AND failures >= 0 AND max_attempts >= 1", "counts"),
        CheckConstraint("progress >= 0 AND progress <= 1", "progress"),
        # The claim chooses by this one, in order, however many finished rows are kept.
        Index(
            "ix_generations_claim",
            "model_name",
            _CLAIM_ORDER,
            "id",
            sqlite_where=sql("status = 'pending'"),
            postgresql_where=sql("status = 'pending'"),
        ),
        # The same for one tenant after another, where each may run only so many.
        Index(
            "ix_generations_tenant_claim",
            "model_name",
            "tenant",
            _CLAIM_ORDER,
            "id",
            sqlite_where=sql("status = 'pending'"),
            postgresql_where=sql("status = 'pending'"),
        ),
        Index(
            "ix_generations_tenant_created_at",
            "tenant",
            "created_at",
            "id",
            sqlite_where=sql("tenant <> ''"),
            postgresql_where=sql("tenant <> ''"),
        ),
        Index(
            "ix_generations_processing",
            "worker_id",
            sqlite_where=sql("status = 'processing'"),
            postgresql_where=sql("status = 'processing'"),
        ),
        Index("ix_generations_status_created_at", "status", "created_at", "id"),
        Index("ix_generations_created_at", "created_at", "id"),
        Index("ix_generations_model_name_created_at", "model_name", "created_at", "id"),
        Index("ix_generations_completed_at", "completed_at"),
        # Whether anything is due at all, however much is scheduled for later.
        Index(
            "ix_generations_due",
            "model_name",
            "run_at",
            sqlite_where=sql("status = 'pending'"),
            postgresql_where=sql("status = 'pending'"),
        ),
        # What retention may delete, oldest first.
        Index(
            "ix_generations_finished",
            "status",
            "completed_at",
            sqlite_where=sql("completed_at IS NOT NULL"),
            postgresql_where=sql("completed_at IS NOT NULL"),
        ),
        # A prompt's newest generation: what the search shows of it.
        Index("ix_generations_prompt_id_created_at", "prompt_id", "created_at", "id"),
        # Whether anybody refers to a clip: what pruning and the foreign keys ask.
        *(
            Index(
                f"ix_generations_{name}",
                name,
                sqlite_where=sql(f"{name} IS NOT NULL"),
                postgresql_where=sql(f"{name} IS NOT NULL"),
            )
            for name in CLIP_COLUMNS
        ),
        {"postgresql_with": {"fillfactor": 80}},
    )

    def __init__(self, **values: Any) -> None:
        metadata = values.pop("metadata", None)
        super().__init__(
            **{"id": new_id(), "status": PENDING, "attempt": 0, "failures": 0, "cancel_requested": False} | values
        )
        if metadata is not None:
            self.set_metadata(metadata)

    @property
    def is_pending(self) -> bool:
        """True while it waits to be claimed."""
        return self.status == PENDING

    @property
    def is_processing(self) -> bool:
        """True while an attempt runs."""
        return self.status == PROCESSING

    @property
    def is_complete(self) -> bool:
        """True once its audio is stored."""
        return self.status == COMPLETED

    @property
    def is_failed(self) -> bool:
        """True once it has failed for good."""
        return self.status == FAILED

    @property
    def is_cancelled(self) -> bool:
        """True once it has been cancelled."""
        return self.status == CANCELLED

    @property
    def is_finished(self) -> bool:
        """True once it is completed, failed or cancelled."""
        return self.status in FINISHED

    def get_metadata(self) -> dict[str, Any]:
        """Return a copy of the metadata; empty where there is none."""
        return dict(self.metadata_ or {})

    def set_metadata(self, metadata: dict[str, Any]) -> None:
        """Replace the metadata."""
        self.metadata_ = dict(metadata)

    def mark_processing(self) -> None:
        """Take this row to work on by hand; two sessions that do so at once end in one ``StaleDataError``."""
        self._move(PROCESSING)
        self.attempt += 1
        self.started_at = datetime.now(UTC)
        self.progress = 0.0

    def mark_completed(self, generation_time_seconds: float) -> None:
        """Finish it as completed, after this many seconds of work."""
        self._move(COMPLETED)
        self.generation_time_seconds = generation_time_seconds
        self.completed_at = datetime.now(UTC)
        self.error_message = None
        self.progress = 1.0

    def mark_failed(self, error_message: str) -> None:
        """Finish it as failed, for this reason; as cancelled where that was requested."""
        self._move(FAILED)
        self.error_message = error_message
        self.completed_at = datetime.now(UTC)

    def _move(self, wanted: str) -> None:
        """Change the status by hand. An object that was never stored has no life to contradict and may take any."""
        if inspect(self).has_identity:
            if self.worker_id is not None:
                raise IllegalTransitionError(self.id, self.status, wanted, f"worker {self.worker_id} holds it")
            if wanted not in LEGAL_TRANSITIONS[self.status]:
                raise IllegalTransitionError(self.id, self.status, wanted)
            if self.cancel_requested and wanted == COMPLETED:
                raise IllegalTransitionError(self.id, self.status, wanted, CANCEL_REQUESTED)
            if self.cancel_requested and wanted == FAILED:
                wanted = CANCELLED
        self.status = wanted

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain JSON values, times in ISO 8601."""
        return _columns_as_json(self)

    def __repr__(self) -> str:
        return f"<Generation {self.id} {self.status} attempt {self.attempt}>"


@event.listens_for(Generation, "before_update")
def _heed_cancel(_mapper: object, connection: Connection, generation: Generation) -> None:
    """Keep an ORM write to what may become of a row whose cancel was acknowledged, maybe after the object was read.

    Such a row ends cancelled: a failure becomes that, and all else raises ``IllegalTransitionError``.
    """
    attributes = inspect(generation).attrs
    is_moved, flag = attributes.status.history.has_changes(), attributes.cancel_requested.history.added
    if not (is_moved or flag):
        return
    row = Generation.__table__.c
    query = select(row.status, row.cancel_requested).where(row.id == generation.id).with_for_update(key_share=True)
    stored = connection.execute(query).one_or_none()
    if stored is None or stored.status != PROCESSING or not stored.cancel_requested:
        return
    if is_moved and generation.status == FAILED:
        generation.status = CANCELLED
    elif (is_moved and generation.status != CANCELLED) or False in (flag or ()):
        raise IllegalTransitionError(generation.id, stored.status, generation.status, CANCEL_REQUESTED)


class Clip(Base):
    """Audio given with requests, once however many share it: FLAC of 16 bits, as their models take it."""

    __tablename__ = "clips"

    sha256: Mapped[str] = mapped_column(HashText, primary_key=True)
    """Of the samples, with their rate and channels: equal music is one clip, whatever file it came in."""
    data: Mapped[bytes] = mapped_column(LargeBinary)
    duration_seconds: Mapped[float]
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())
    last_used_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())
    """Keeps it from being pruned while somebody's new generation is about to refer to it."""


class Attempt(Base):
    """One claim of a generation by a worker: who, when, how it ended."""

    __tablename__ = "attempts"

    generation_id: Mapped[str] = mapped_column(ForeignKey("generations.id", ondelete="CASCADE"), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    worker_id: Mapped[str] = mapped_column(ShortText)
    started_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    outcome: Mapped[str | None] = mapped_column(StatusText)
    error_message: Mapped[str | None] = mapped_column(LongText)
    device_seconds: Mapped[float | None]

    __table_args__ = (
        CheckConstraint("outcome IN ('completed', 'failed', 'released', 'cancelled', 'lost')", "outcome"),
        CheckConstraint("(outcome IS NULL) = (finished_at IS NULL)", "finished_has_outcome"),
    )

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain JSON values, times in ISO 8601."""
        return _columns_as_json(self)


class WorkerInfo(Base):
    """One worker daemon: where it runs, when it was last heard of, and how it ended."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(ShortText, primary_key=True)
    host: Mapped[str] = mapped_column(ShortText)
    pid: Mapped[int]
    state: Mapped[str] = mapped_column(
        StatusText, default=WorkerState.SERVING.value, server_default=WorkerState.SERVING.value
    )
    """Loading its model, serving, or ended. One that was killed has ended without saying so, and is silent."""
    model_name: Mapped[str] = mapped_column(ShortText)
    """The one that is loaded, or being loaded."""
    models: Mapped[list[str]] = mapped_column(JsonObject, server_default="[]")
    """All that it serves."""
    device: Mapped[str] = mapped_column(ShortText)
    slots: Mapped[int]
    running_count: Mapped[int] = mapped_column(default=0, server_default=sql("0"))
    started_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())
    heartbeat_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())
    lease_seconds: Mapped[float]
    """Silent for longer than this, it is taken for dead."""
    ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    end_reason: Mapped[str | None] = mapped_column(LongText)
    """Why it ended, in words."""

    __table_args__ = (
        CheckConstraint("(state = 'ended') = (ended_at IS NOT NULL)", "ended_has_time"),
        {"postgresql_with": {"fillfactor": 50}},
    )

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain JSON values, times in ISO 8601."""
        return _columns_as_json(self)


class Pause(Base):
    """While this row is there, nothing of the model is claimed by anybody; ``ALL_MODELS`` stands for every model."""

    __tablename__ = "pauses"

    model_name: Mapped[str] = mapped_column(ShortText, primary_key=True)
    paused_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain JSON values, times in ISO 8601."""
        return _columns_as_json(self)


class Speed(Base):
    """How long a device takes for one second of a model's audio, in seconds, as its workers have measured lately.

    With all slots of the worker in use or not, as it came: 10, 50 and 90 of 100 generations took at most so long.
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
    """A change of a count, written by the tables' triggers: the sum over a name is the count, at no scan of the table.

    Rows are only ever added, since a counter that everybody updates makes everybody wait; now and then they are summed up.
    """

    __tablename__ = "tallies"

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True)
    name: Mapped[str] = mapped_column(StatusText)
    """A finished status, or ``prompts``."""
    delta: Mapped[int]


def _columns_as_json(row: Base) -> dict[str, Any]:
    mapper = inspect(type(row))
    read = (attribute for attribute in mapper.column_attrs if not attribute.deferred)
    return {attribute.columns[0].name: _as_json(getattr(row, attribute.key)) for attribute in read}


def _as_json(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, GenerationStatus):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
