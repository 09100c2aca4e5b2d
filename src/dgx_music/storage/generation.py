"""The table of generations: one row from enqueue to file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from functools import cache
from typing import Any, cast

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Connection,
    ForeignKey,
    Index,
    Table,
    column,
    event,
    false,
    inspect,
    select,
)
from sqlalchemy import text as sql
from sqlalchemy.orm import (
    Mapped,
    Mapper,
    class_mapper,
    mapped_column,
    validates,
)
from sqlalchemy.orm.attributes import instance_state

from dgx_music.errors import IllegalTransitionError
from dgx_music.statuses import (
    CANCELLED,
    COMPLETED,
    FAILED,
    FINISHED,
    LEGAL_TRANSITIONS,
    PENDING,
    PROCESSING,
    GenerationStatus,
)
from dgx_music.storage.base import Base
from dgx_music.storage.metadata import AUDIO_KEY, Metadata
from dgx_music.storage.schema import (
    DEFAULT_MAX_ATTEMPTS,
    HashText,
    Id,
    JsonObject,
    LongText,
    ShortText,
    Status,
    UtcDateTime,
    claim_order,
    new_id,
    now,
)
from dgx_music.storage.words import search_text
from dgx_music.validation import CLIP_FIELDS

CLIP_COLUMNS = tuple(f"{name}_sha256" for name in CLIP_FIELDS)
CANCEL_REQUESTED = "its cancellation was requested"

_ONLY_ALONE = (
    *("continuation_sha256", "melody_sha256", "sha256", "model_version"),
    *("max_attempts", "run_at", "started_at", "lease_expires_at"),
)
"""What ``to_summary`` leaves out too."""
_AUDIO_IN_SUMMARY = ("duration_seconds", "format")
"""Of the facts of the audio; tempo and key are columns of the row."""

_CLAIM_ORDER = claim_order(column("run_at"), column("priority"))
_FINISHED_SQL = "status IN ('completed', 'failed', 'cancelled')"


def _only(condition: str) -> dict[str, Any]:
    """Return the options of an index that holds only the rows with this condition."""
    return {"sqlite_where": sql(condition), "postgresql_where": sql(condition)}


class Generation(Base):
    """One request for music, from enqueue to file.

    ``attempt`` counts claims, only ever goes up, and fences every write after a claim; it is also
    SQLAlchemy's version counter, so an ORM write that raced with a claim raises ``StaleDataError``
    instead of overwriting it.
    """

    __tablename__ = "generations"
    internal = ("prompt_id", "request_hash")

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
    audio_format: Mapped[str | None] = mapped_column(ShortText)
    """The format of the file; null means the worker's own setting."""
    batch_id: Mapped[str | None] = mapped_column(ForeignKey("batches.id"))
    """The batch that it was enqueued with."""
    take: Mapped[int | None]
    """From 1, among the variations of one request; null if it has none."""
    parent_id: Mapped[str | None] = mapped_column(Id)
    """The generation that it repeats or continues; that one may be deleted by now."""
    priority: Mapped[int] = mapped_column(default=0, server_default=sql("0"))
    """Higher goes first; a point is worth ``AGEING_SECONDS`` of waiting."""
    tenant: Mapped[str] = mapped_column(ShortText, default="", server_default="")
    """For whom it is made; empty: for nobody in particular, and no limit holds it back."""
    max_attempts: Mapped[int] = mapped_column(
        default=DEFAULT_MAX_ATTEMPTS, server_default=sql(str(DEFAULT_MAX_ATTEMPTS))
    )
    """How many failures it takes to give up."""
    idempotency_key: Mapped[str | None] = mapped_column(ShortText, unique=True)
    request_hash: Mapped[str | None] = mapped_column(HashText)
    """SHA-256 of what was asked for: tells a repeated request from another with its key.

    Null without a key: nothing is compared then.
    """
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())

    # Its place in life: moved by the guarded statements that queue.py lists.
    status: Mapped[GenerationStatus] = mapped_column(
        Status, default=PENDING, server_default=PENDING
    )
    run_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now())
    """Not claimed before this time: as the caller asked, or after a failure the end of the backoff."""
    attempt: Mapped[int] = mapped_column(default=0, server_default=sql("0"))
    failures: Mapped[int] = mapped_column(default=0, server_default=sql("0"))
    """Errors, crashes and lost workers so far; a release adds none, a retry by hand starts at 0."""
    worker_id: Mapped[str | None] = mapped_column(ShortText)
    """Who holds it; null if its caller works on it by hand: then nobody rescues it."""
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When its current or last attempt began."""
    lease_expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """Not indexed, so that renewals stay heap-only updates on PostgreSQL."""
    progress: Mapped[float] = mapped_column(default=0.0, server_default=sql("0"))
    """0 to 1, of the current or last attempt."""
    cancel_requested: Mapped[bool] = mapped_column(default=False, server_default=false())
    """Set while it runs; such a row ends cancelled, whatever its attempt returns."""

    # Its result: written when it finishes.
    completed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When it finished: completed, failed for good, or cancelled."""
    model_version: Mapped[str | None] = mapped_column(ShortText)
    file_path: Mapped[str | None] = mapped_column(LongText)
    """Its creator's wish, until completion writes the real place of the audio."""
    file_size_bytes: Mapped[int | None] = mapped_column(BigInteger)
    sha256: Mapped[str | None] = mapped_column(HashText)
    generation_time_seconds: Mapped[float | None]
    error_message: Mapped[str | None] = mapped_column(LongText)
    """Why the last attempt failed; kept while the next one runs, null when it has completed."""
    metadata_: Mapped[dict[str, Any] | None] = mapped_column("metadata", Metadata)
    bpm: Mapped[float | None]
    """The tempo that was measured, in beats per minute; null if none is sure enough."""
    musical_key: Mapped[str | None] = mapped_column(ShortText)
    """The key that was measured, such as ``F#m``; null if none is sure enough."""

    # What people say about it: may change at any time, whatever its status.
    title: Mapped[str | None] = mapped_column(ShortText)
    notes: Mapped[str | None] = mapped_column(LongText)
    tags: Mapped[list[str] | None] = mapped_column(JsonObject)
    """In alphabetical order; null if there are none. A trigger copies them to ``Tag``."""
    is_starred: Mapped[bool] = mapped_column(default=False, server_default=false())
    search_text: Mapped[str | None] = mapped_column(
        LongText, deferred=True, deferred_raiseload=True
    )
    """The words of title, notes and tags, by the rules of ``words.py``; the databases index it."""

    __mapper_args__ = {  # noqa: RUF012 - SQLAlchemy's interface
        "version_id_col": attempt,
        "version_id_generator": False,
    }
    __table_args__ = (
        CheckConstraint(
            "status IN ('pending', 'processing', 'completed', 'failed', 'cancelled')", "status"
        ),
        CheckConstraint(f"({_FINISHED_SQL}) = (completed_at IS NOT NULL)", "finished_has_time"),
        CheckConstraint("(worker_id IS NULL) = (lease_expires_at IS NULL)", "claim_has_lease"),
        CheckConstraint("worker_id IS NULL OR status = 'processing'", "only_processing_is_held"),
        CheckConstraint("duration_seconds > 0 AND sample_rate > 0 AND channels > 0", "audio_shape"),
        CheckConstraint("attempt >= 0 AND failures >= 0 AND max_attempts >= 1", "counts"),
        CheckConstraint("progress >= 0 AND progress <= 1", "progress"),
        # The claim chooses by this one, in order, however many finished rows there are.
        Index(
            "ix_generations_claim",
            *("model_name", _CLAIM_ORDER, "id"),
            **_only("status = 'pending'"),
        ),
        # The same for each tenant, if each may run only so many.
        Index(
            "ix_generations_tenant_claim",
            *("model_name", "tenant", _CLAIM_ORDER, "id"),
            **_only("status = 'pending'"),
        ),
        Index(
            "ix_generations_tenant_created_at",
            *("tenant", "created_at", "id"),
            **_only("tenant <> ''"),
        ),
        # Lists of one status, and all that asks for the running rows, which are few.
        Index("ix_generations_status_created_at", "status", "created_at", "id"),
        Index("ix_generations_created_at", "created_at", "id"),
        Index("ix_generations_model_name_created_at", "model_name", "created_at", "id"),
        Index("ix_generations_completed_at", "completed_at", **_only("completed_at IS NOT NULL")),
        # Whether anything is due at all, however much is scheduled for later. The attempt in its
        # condition, which is always true, keeps claims away: they would have to sort its rows.
        Index(
            "ix_generations_due",
            *("model_name", "run_at"),
            **_only("status = 'pending' AND attempt >= 0"),
        ),
        # What retention may delete, oldest first.
        Index(
            "ix_generations_finished",
            *("status", "completed_at"),
            **_only("completed_at IS NOT NULL"),
        ),
        # The newest generation of a prompt: the search shows it.
        Index("ix_generations_prompt_id_created_at", "prompt_id", "created_at", "id"),
        # What people chose, newest first.
        Index("ix_generations_starred", "created_at", "id", **_only("is_starred")),
        Index(
            "ix_generations_batch",
            *("batch_id", "created_at", "id"),
            **_only("batch_id IS NOT NULL"),
        ),
        Index("ix_generations_parent_id", "parent_id", **_only("parent_id IS NOT NULL")),
        Index("ix_generations_bpm", "bpm", **_only("bpm IS NOT NULL")),
        Index(
            "ix_generations_musical_key",
            *("musical_key", "created_at", "id"),
            **_only("musical_key IS NOT NULL"),
        ),
        # Whether any generation refers to a clip: pruning and the foreign keys ask.
        *(
            Index(f"ix_generations_{name}", name, **_only(f"{name} IS NOT NULL"))
            for name in CLIP_COLUMNS
        ),
        {"postgresql_with": {"fillfactor": 80}},
    )

    def __init__(self, **values: Any) -> None:
        metadata = values.pop("metadata", None)
        fresh = {"attempt": 0, "failures": 0, "cancel_requested": False, "is_starred": False}
        own = {"id": new_id(), "status": GenerationStatus.PENDING, **fresh}
        super().__init__(**own | values)
        if metadata is not None:
            self.set_metadata(metadata)

    @validates("status")
    def _keep_status(self, _key: str, status: Any) -> Any:
        """Make a known text a ``GenerationStatus``; the database refuses any other text."""
        return (
            GenerationStatus(status)
            if isinstance(status, str) and status in LEGAL_TRANSITIONS
            else status
        )

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
        """True when its audio is stored."""
        return self.status == COMPLETED

    @property
    def is_failed(self) -> bool:
        """True when it has failed for good."""
        return self.status == FAILED

    @property
    def is_cancelled(self) -> bool:
        """True when it has been cancelled."""
        return self.status == CANCELLED

    @property
    def is_finished(self) -> bool:
        """True when it is completed, failed or cancelled."""
        return self.status in FINISHED

    def get_metadata(self) -> dict[str, Any]:
        """Return a copy of the metadata; empty if there is none."""
        return dict(self.metadata_ or {})

    def to_dict(self, *, with_waveform: bool = False) -> dict[str, Any]:
        """Return the row as plain JSON values, times in ISO 8601.

        The names are those of the columns, but ``starred`` is that of ``enqueue`` and the filters.
        The waveform in ``metadata.audio`` is 7 kB: it is left out unless it is asked for.
        """
        row = super().to_dict()
        row["starred"] = row.pop("is_starred")
        return row if with_waveform else _with_facts(row, lambda name: name != "waveform")

    def to_summary(self) -> dict[str, Any]:
        """Return what a list says of the row: ``to_dict`` without what only a look at it needs."""
        row = self.to_dict(with_waveform=True)
        for name in _ONLY_ALONE:
            del row[name]
        return _with_facts(row, _AUDIO_IN_SUMMARY.__contains__)

    def set_metadata(self, metadata: dict[str, Any]) -> None:
        """Replace the metadata."""
        self.metadata_ = dict(metadata)

    def mark_processing(self) -> None:
        """Take this row to work on by hand; of two sessions at once one gets ``StaleDataError``."""
        self._move(GenerationStatus.PROCESSING)
        self.attempt += 1
        self.started_at = datetime.now(UTC)
        self.progress = 0.0

    def mark_completed(self, generation_time_seconds: float) -> None:
        """Finish it as completed, after this many seconds of work."""
        self._move(GenerationStatus.COMPLETED)
        self.generation_time_seconds = generation_time_seconds
        self.completed_at = datetime.now(UTC)
        self.error_message = None
        self.progress = 1.0

    def mark_failed(self, error_message: str) -> None:
        """Finish it as failed, for this reason; as cancelled if that was requested."""
        self._move(GenerationStatus.FAILED)
        self.error_message = error_message
        self.completed_at = datetime.now(UTC)

    def _move(self, wanted: GenerationStatus) -> None:
        """Change the status by hand; an object that was never stored may take any."""
        if inspect(self).has_identity:
            if self.worker_id is not None:
                raise IllegalTransitionError(
                    self.id, self.status, wanted, f"worker {self.worker_id} holds it"
                )
            if wanted not in LEGAL_TRANSITIONS[self.status]:
                raise IllegalTransitionError(self.id, self.status, wanted)
            if self.cancel_requested and wanted == COMPLETED:
                raise IllegalTransitionError(self.id, self.status, wanted, CANCEL_REQUESTED)
            if self.cancel_requested and wanted == FAILED:
                wanted = GenerationStatus.CANCELLED
        self.status = wanted

    def __repr__(self) -> str:
        return f"<Generation {self.id} {self.status} attempt {self.attempt}>"


def _with_facts(row: dict[str, Any], is_kept: Callable[[str], bool]) -> dict[str, Any]:
    """Return the row with only these facts of its audio."""
    metadata = row["metadata"]
    audio = metadata.get(AUDIO_KEY) if isinstance(metadata, dict) else None
    if not isinstance(audio, dict):
        return row
    facts = {name: value for name, value in audio.items() if is_kept(name)}
    row["metadata"] = {**metadata, AUDIO_KEY: facts}
    return row


generations = cast("Table", Generation.__table__)
g = generations.c
"""The table and its columns, for statements that change rows without their objects."""

_FRESH: dict[str, Any] = {
    **dict.fromkeys("metadata_" if name == "metadata" else name for name in g.keys()),  # noqa: SIM118
    "status": GenerationStatus.PENDING,
    "attempt": 0,
    "failures": 0,
    "progress": 0.0,
    "cancel_requested": False,
    "is_starred": False,
}


def words_of_labels(title: str | None, notes: str | None, tags: Iterable[str] | None) -> str | None:
    """Return the ``search_text`` of these labels; ``None`` if they have no word."""
    return search_text(" ".join([title or "", notes or "", *(tags or ())])) or None


def as_inserted(values: Mapping[str, Any]) -> Generation:
    """Return the object of a pending row that was just inserted with these values of attributes.

    It is detached, as if it had been read, and spares a SELECT. A session can ``add`` it.
    """
    mapper = _mapper()
    generation: Generation = mapper.class_manager.new_instance()
    attributes = generation.__dict__
    attributes.update(_FRESH)
    attributes.update(values)
    # All that make_transient_to_detached would do for an object without unloaded attributes.
    key = mapper.identity_key_from_primary_key((attributes["id"],))
    instance_state(generation).key = key
    return generation


@cache
def _mapper() -> Mapper[Generation]:
    return class_mapper(Generation)


def copy_of(generation: Generation) -> Generation:
    """Return another object of the same row, detached, with the same values."""
    names = _FRESH.keys() & generation.__dict__.keys()
    return as_inserted({name: generation.__dict__[name] for name in names})


@event.listens_for(Generation, "before_update")
def _heed_cancel(_mapper: object, connection: Connection, generation: Generation) -> None:
    """Restrict an ORM write to a row whose cancel was requested, maybe after the object was read.

    Such a row ends cancelled: a failure becomes that, all else raises ``IllegalTransitionError``.
    """
    attributes = inspect(generation).attrs
    is_moved, flag = (
        attributes.status.history.has_changes(),
        attributes.cancel_requested.history.added,
    )
    if not (is_moved or flag):
        return
    query = select(g.status, g.cancel_requested).where(g.id == generation.id)
    stored = connection.execute(query.with_for_update(key_share=True)).one_or_none()
    if stored is None or stored.status != PROCESSING or not stored.cancel_requested:
        return
    if is_moved and generation.status == FAILED:
        generation.status = GenerationStatus.CANCELLED
    elif (is_moved and generation.status != CANCELLED) or False in (flag or ()):
        raise IllegalTransitionError(
            generation.id, stored.status, generation.status, CANCEL_REQUESTED
        )


@event.listens_for(Generation, "before_insert")
def _add_words(_mapper: object, _connection: Connection, generation: Generation) -> None:
    """Keep the words of the labels of an object that is added."""
    if generation.title or generation.notes or generation.tags:
        labels = (generation.title, generation.notes, generation.tags)
        generation.search_text = words_of_labels(*labels)


@event.listens_for(Generation, "before_update")
def _change_words(_mapper: object, connection: Connection, generation: Generation) -> None:
    """Keep the words of changed labels; others may have changed since the object was read."""
    attributes = inspect(generation).attrs
    changed = {
        name: getattr(generation, name)
        for name in ("title", "notes", "tags")
        if attributes[name].history.has_changes()
    }
    if not changed:
        return
    query = select(g.title, g.notes, g.tags).where(g.id == generation.id)
    stored = connection.execute(query.with_for_update(key_share=True)).one_or_none()
    if stored is not None:
        generation.search_text = words_of_labels(**{**stored._mapping, **changed})
