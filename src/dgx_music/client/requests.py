"""From what a caller asks for to the rows to insert: options, checks, clips, hash.

This needs no database and stores nothing: a refused request has changed nothing.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Annotated, Any, TypedDict, TypeVar, cast, get_type_hints

from dgx_music import validation
from dgx_music.catalog import ModelInfo
from dgx_music.client.variations import MAX_VARIATIONS, check_variations, takes_of
from dgx_music.config import default_model
from dgx_music.errors import InvalidRequestError
from dgx_music.inference.engine import GenerationRequest
from dgx_music.sampling import Sampling, SamplingOptions
from dgx_music.storage.generation import words_of_labels
from dgx_music.storage.labels import checked_labels
from dgx_music.storage.metadata import AUDIO_KEY
from dgx_music.storage.models import Upload
from dgx_music.storage.new_rows import AlikeRows, Row
from dgx_music.storage.schema import DEFAULT_MAX_ATTEMPTS, new_id
from dgx_music.validation import CLIP_FIELDS

F = TypeVar("F", bound=Callable[..., Any])

MAX_BATCH = 10_000
_AUDIO = ("channels", "sample_rate")
_OPTIONAL: dict[str, Any] = dict.fromkeys(
    (
        *("audio_format", "batch_id", "batch_name", "take", "parent_id"),
        *("title", "notes", "tags", "search_text", "request_hash"),
    )
) | {"is_starred": False}
"""The columns of a row that most requests leave empty; ``batch_name`` is one of its batch."""


class MusicOptions(TypedDict, total=False):
    """What is made, and with which model."""

    duration: Annotated[float, "Seconds of audio: at least 0.08, and at most the model's 300."]
    model: Annotated[
        str | None,
        "A name from the catalogue, or a local folder's absolute path; DGX_MUSIC_MODEL if not given.",
    ]
    channels: Annotated[
        int | None,
        "1 or 2 in the file; the model's own if not given, and 1 for a local folder.",
    ]
    sample_rate: Annotated[
        int | None,
        "In Hz, of the file; the model's own if not given, and 32,000 for a local folder.",
    ]
    audio_format: Annotated[
        str | None,
        "Of the file: wav, flac, mp3 or ogg; the worker's own setting if not given.",
    ]
    continuation: Annotated[
        os.PathLike[str] | bytes | None,
        "The music starts with this audio, 0.08 to 30 s long, and the duration counts from its "
        "start: a pathlib.Path, read now with the rights of this process, or the bytes of a file.",
    ]
    melody: Annotated[
        os.PathLike[str] | bytes | None,
        "The music follows the tune of the first 300 s of this audio: a pathlib.Path or bytes. "
        "Only for models that can hear a melody.",
    ]


class RequestOptions(MusicOptions, SamplingOptions, total=False):
    """The options of one request besides its prompt; each has a default."""

    variations: Annotated[
        int,
        "So many takes of the same request, at most 16: seed, seed + 1, and so on, or seeds that "
        "are chosen for them.",
    ]
    priority: Annotated[
        int,
        "Higher goes first; a point is worth a minute of waiting; from -1,000 to 1,000.",
    ]
    tenant: Annotated[
        str | None,
        "For whom: workers may limit how many generations of one tenant run at a time.",
    ]
    run_at: Annotated[
        datetime | str | None,
        "Not claimed before this time: an aware datetime, or ISO 8601 text; None for at once.",
    ]
    max_attempts: Annotated[
        int,
        "After this many failures the generation has failed; lost workers count; at most 25.",
    ]
    title: Annotated[
        str | None,
        "What people call it: one line, at most 200 characters.",
    ]
    notes: Annotated[
        str | None,
        "What people say about it: at most 10,000 characters.",
    ]
    tags: Annotated[
        list[str] | None,
        "Words to find it by: at most 20, each of at most 50 characters; kept in lower case.",
    ]
    starred: Annotated[
        bool | None,
        "Whether it has a star.",
    ]
    idempotency_key: Annotated[
        str | None,
        "The same request under the same key gets the existing row; a different one is refused.",
    ]
    metadata: Annotated[
        dict[str, Any] | None,
        "JSON of the caller's own, kept with the row: at most 16 KiB.",
    ]


OPTIONS: dict[str, Any] = get_type_hints(RequestOptions, include_extras=True)
"""Each option's type, annotated with its meaning, in the order of the help."""
DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(OPTIONS),
    **asdict(Sampling()),
    "duration": 10.0,
    "variations": 1,
    "priority": 0,
    "max_attempts": DEFAULT_MAX_ATTEMPTS,
}


def takes_options(function: F) -> F:
    """Show the options in the signature of a function with ``**options``, and their meanings."""
    signature = inspect.signature(function)
    own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    keywords = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=DEFAULTS[name],
            annotation=hint.__origin__,
        )
        for name, hint in OPTIONS.items()
    ]
    meanings = [_in_lines(f"{name}: {hint.__metadata__[0]}") for name, hint in OPTIONS.items()]
    described = cast("Any", function)
    described.__signature__ = signature.replace(parameters=[*own, *keywords])
    described.__doc__ = f"{inspect.getdoc(function)}\n\nOptions:\n" + "\n".join(meanings)
    return function


def _in_lines(text: str) -> str:
    return textwrap.fill(text, 92, initial_indent="    ", subsequent_indent="        ")


@dataclass(frozen=True)
class Origin:
    """The generation that a request repeats or continues, and what it takes over unread."""

    parent_id: str
    clips: Mapping[str, str]
    """The ``sha256`` of each stored clip that is used again, by the name of its field."""


@dataclass(frozen=True)
class Plan:
    """A checked request: all of its rows, except for what depends on its clips."""

    identity: dict[str, Any]
    """The columns that identify the request; its hash is made of them."""
    circumstances: dict[str, Any]
    """The columns that say when and how urgently, and the ids; without the hash."""
    model: ModelInfo
    sources: Mapping[str, Any]
    """The clips as they were given, by the names of their fields."""
    name: str
    """What an error calls the request if it is one of many, such as ``line 7``; else empty."""
    variations: int
    uploads: Mapping[str, Upload]
    """The clips that were uploaded before, by the names of their fields."""
    origin: Origin | None = None


@dataclass(frozen=True)
class CheckedRequests:
    """Checked requests: rows to insert, and their clips (content and seconds by ``sha256``)."""

    rows: Sequence[Row]
    clips: Mapping[str, tuple[bytes, float]]

    def in_batch(self, name: str | None = None) -> CheckedRequests:
        """Return them as a new batch; without this they are in none.

        Raises ``InvalidRequestError`` if the name is none.
        """
        checked = None if name is None else validation.check_name("batch", name)
        batch = {"batch_id": new_id(), "batch_name": checked}
        if isinstance(self.rows, AlikeRows):
            return replace(self, rows=self.rows.with_all(batch))
        return replace(self, rows=[{**row, **batch} for row in self.rows])

    def in_batch_if_many(self) -> CheckedRequests:
        """Return them as a new batch without a name, or as they are if there is one row."""
        return self if len(self.rows) == 1 else self.in_batch()


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put the name of a request before the field that an ``InvalidRequestError`` names."""
    try:
        yield
    except InvalidRequestError as error:
        if not name:
            raise
        raise InvalidRequestError(f"{name}: {error.field}", error.problem, error.remedy) from None


def plan(
    prompt: object, options: Mapping[str, Any], name: str = "", origin: Origin | None = None
) -> Plan:
    """Return the plan of one request; raises ``InvalidRequestError`` on the first bad field.

    Its clips are not read yet: that takes a while. In the place of a clip may be an ``Upload``.
    """
    _check_names(options)
    sources, uploads = _clips_given(options)
    wanted = options.get("model")
    model = validation.check_model(default_model() if wanted is None else wanted)
    audio = {"channels": model.channels, "sample_rate": model.sample_rate} | _given(options, _AUDIO)
    request = GenerationRequest(
        generation_id=new_id(),
        prompt=cast("str", prompt),
        duration=options.get("duration", DEFAULTS["duration"]),
        model=model.name,
        **audio,
        **Sampling.pick(options),
    )
    if "continuation" in uploads:
        seconds = uploads["continuation"].duration_seconds
        validation.check_continuation(seconds, request.duration)
    if (
        "melody" in sources
        or "melody" in uploads
        or (origin is not None and "melody" in origin.clips)
    ):
        validation.check_hears_melody(model)
    else:
        validation.check_has_melody(request.melody_kind)
    identity, circumstances = _identity(request, options), _circumstances(request, options)
    wanted_count = options.get("variations", DEFAULTS["variations"])
    variations = validation.check_integer("variations", wanted_count, 1, MAX_VARIATIONS)
    if variations > 1:
        check_variations(variations, request, circumstances["idempotency_key"])
    return Plan(identity, circumstances, model, sources, name, variations, uploads, origin)


def plan_numbered(number: int, request: object, defaults: Mapping[str, Any]) -> Plan:
    """Return the plan of one of many requests: a prompt, or a mapping with ``prompt``."""
    name = f"request {number}"
    options = {"prompt": request} if isinstance(request, str) else request
    with naming(name):
        if not isinstance(options, Mapping):
            remedy = "use a prompt, or an object with one"
            raise InvalidRequestError("request", "is not an object", remedy)
        if "prompt" not in options:
            raise InvalidRequestError("prompt", "is missing", "describe the music")
        given = {key: value for key, value in options.items() if key != "prompt"}
        return plan(options["prompt"], {**defaults, **given}, name)


def read_clips(plans: Sequence[Plan]) -> CheckedRequests:
    """Return the batch of these plans, with their clips read.

    Raises ``InvalidRequestError`` if there are too many, or for the first one whose clips cannot be
    read. Reading clips takes a while: if there are any, call this in a thread.
    """
    check_count(sum(plan.variations for plan in plans))
    if not any(plan.sources for plan in plans):
        return CheckedRequests([row for plan in plans for row in rows_of(plan)], {})
    from dgx_music.audio.clips import Reader  # imports NumPy

    reader = Reader()

    def read(plan: Plan) -> list[dict[str, Any]]:
        with naming(plan.name):
            clips = reader.read(plan.sources, plan.model, plan.identity["duration_seconds"])
        sources = {name: clip.source_sha256 for name, clip in clips.items()}
        return rows_of(plan, sources, {name: clip.sha256 for name, clip in clips.items()})

    return CheckedRequests([row for plan in plans for row in read(plan)], reader.data)


def check_count(count: int) -> None:
    """Refuse more rows than one call may add."""
    if count > MAX_BATCH:
        remedy = f"send at most {MAX_BATCH:,} at a time"
        raise InvalidRequestError("requests", f"are {count:,}", remedy)


def _check_names(options: Mapping[Any, Any]) -> None:
    for name in options:
        if name not in OPTIONS:
            called = name[:40] if isinstance(name, str) else validation.shown(name)
            known = ", ".join(sorted(OPTIONS))
            raise InvalidRequestError(called, "is not an option", f"use {known}")


def _clips_given(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Upload]]:
    """Return the clips to read, and those that were uploaded before, by the names of their fields."""
    given = _given(options, CLIP_FIELDS)
    uploads = {field: each for field, each in given.items() if isinstance(each, Upload)}
    sources = {field: each for field, each in given.items() if field not in uploads}
    for field, source in sources.items():
        validation.check_clip_source(field, source)
    return sources, uploads


def _given(options: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: options[name] for name in names if options.get(name) is not None}


def _identity(request: GenerationRequest, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that identify the request; its hash is made of them."""
    metadata, tenant = options.get("metadata"), options.get("tenant")
    named = {} if tenant is None else {"tenant": validation.check_name("tenant", tenant)}
    if (wanted := options.get("audio_format")) is not None:
        named["audio_format"] = _check_audio_format(wanted, request.sample_rate)
    if isinstance(metadata, dict) and AUDIO_KEY in metadata:
        problem = f"has the key {AUDIO_KEY!r}, which completion writes"
        raise InvalidRequestError("metadata", problem, "use another key")
    return {
        "prompt": request.prompt,
        "model_name": request.model,
        "duration_seconds": request.duration,
        "sample_rate": request.sample_rate,
        "channels": request.channels,
        "sampling": request.sampling,
        "metadata_": None if metadata is None else validation.check_metadata(metadata),
        **named,
    }


def _check_audio_format(wanted: object, sample_rate: int) -> str:
    """Return the format of the file, if it can hold the sample rate."""
    from dgx_music.audio.formats import find_rate_problem

    audio_format = validation.check_audio_format(wanted)
    problem = find_rate_problem(audio_format, sample_rate)
    if problem is not None:
        raise InvalidRequestError("audio_format", f"{audio_format!r} {problem[0]}", problem[1])
    return audio_format


def _circumstances(request: GenerationRequest, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that say when and how urgently, and the ids; without the hash."""
    key, run_at = options.get("idempotency_key"), options.get("run_at")
    limit, most = validation.PRIORITY_LIMIT, validation.MAX_ATTEMPTS_LIMIT
    priority = options.get("priority", DEFAULTS["priority"])
    attempts = options.get("max_attempts", DEFAULTS["max_attempts"])
    return {
        "tenant": "",  # unless the identity has one: rows without a tenant keep their hashes
        "id": request.generation_id,
        "idempotency_key": None if key is None else validation.check_name("idempotency_key", key),
        "priority": validation.check_integer("priority", priority, -limit, limit),
        "max_attempts": validation.check_integer("max_attempts", attempts, 1, most),
        "wanted_run_at": None if run_at is None else validation.check_run_at(run_at),
        **_labels(options),
    }


def _labels(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of title, notes, tags and star, if any is given, and their words."""
    given = _given(options, ("title", "notes", "tags", "starred"))
    if not given:
        return {}
    labels = checked_labels(given)
    words = words_of_labels(*(labels.get(name) for name in ("title", "notes", "tags")))
    return {**labels, "search_text": words}


def rows_of(
    plan: Plan,
    sources: Mapping[str, str] = {},
    clips: Mapping[str, str] = {},
) -> list[dict[str, Any]]:
    """Return the columns of each row; ``sources`` and ``clips`` are hashes, by field.

    Rows with an idempotency key have the hash of what was asked for. Those of takes are of the seed
    that was asked for: so a repeated request has the same ones, also if the seeds are chosen here.
    """
    asked: dict[str, Any] = {**plan.identity, **sources, **_uploaded_sources(plan)}
    clips = {**clips, **_uploaded_clips(plan)}
    optional = _OPTIONAL
    if (origin := plan.origin) is not None:
        asked |= {"parent_id": origin.parent_id, **origin.clips}
        clips = {**origin.clips, **clips}
        optional = {**_OPTIONAL, "parent_id": origin.parent_id}
    columns = {f"{name}_sha256": clips.get(name) for name in CLIP_FIELDS}
    row = {**optional, **plan.circumstances, **plan.identity, **columns}
    takes = [row] if plan.variations == 1 else takes_of(row, plan.variations)
    if row["idempotency_key"] is None:
        return takes
    if plan.variations > 1:
        asked["variations"] = plan.variations
    return [{**take, "request_hash": _hash(asked, take["take"])} for take in takes]


def _uploaded_sources(plan: Plan) -> dict[str, str]:
    return {name: upload.source_sha256 for name, upload in plan.uploads.items()}


def _uploaded_clips(plan: Plan) -> dict[str, str]:
    """Return the ``sha256`` of each uploaded clip in the form that the model needs, by field."""
    return {
        name: upload.clip_sha256(plan.model.clip_channels(name))
        for name, upload in plan.uploads.items()
    }


def _hash(identity: Mapping[str, Any], take: int | None) -> str:
    """Identify what was asked for, not when or how urgently: the SHA-256 of its canonical JSON."""
    asked = identity if take is None else {**identity, "take": take}
    return hashlib.sha256(_as_canonical_json(asked).encode()).hexdigest()


_as_canonical_json = json.JSONEncoder(sort_keys=True, ensure_ascii=True).encode
"""The JSON of which the hashes are made: names in order, in ASCII."""
