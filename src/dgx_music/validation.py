"""The one validator: library, command line and web refuse the same things in the same words.

Each check returns the value in the form that is stored, or raises ``InvalidRequestError``. The
checks run before any driver sees the value, because drivers differ: SQLite enforces no length,
turns NaN into NULL and stores NUL bytes; PostgreSQL refuses NUL bytes and lone surrogates only when
the statement runs.
"""

from __future__ import annotations

import json
import math
import os
import re
import unicodedata
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias, get_args

from dgx_music.catalog import (
    MAX_DURATION_SECONDS,
    MIN_DURATION_SECONDS,
    MODELS,
    WINDOW_SECONDS,
    ModelInfo,
    find_model,
)
from dgx_music.errors import InvalidRequestError
from dgx_music.text import says_something

AudioFormat: TypeAlias = Literal["wav", "flac", "mp3", "ogg"]
AUDIO_FORMATS: tuple[AudioFormat, ...] = get_args(AudioFormat)
MelodyKind: TypeAlias = Literal["auto", "solo", "mix", "stems"]
MELODY_KINDS: tuple[MelodyKind, ...] = get_args(MelodyKind)
MAX_PROMPT_CHARACTERS = 2_000
MAX_NAME_CHARACTERS = 200
MAX_NOTES_CHARACTERS = 10_000
MAX_TAGS = 20
MAX_TAG_CHARACTERS = 50
MAX_PATH_CHARACTERS = 4_096
MAX_MESSAGE_CHARACTERS = 2_000
MAX_METADATA_BYTES = 16_384
MAX_METADATA_DEPTH = 8
MAX_SEED = 2**63 - 1
MAX_TOP_K = 2_048
PRIORITY_LIMIT = 1_000
MAX_ATTEMPTS_LIMIT = 25
CLIP_FIELDS = ("continuation", "melody")
"""The fields of a request that take audio; its row refers to each clip as ``<field>_sha256``."""
CLIP_REMEDY = f"use a clip of {MIN_DURATION_SECONDS:g} to {WINDOW_SECONDS:g} seconds"
MELODY_SECONDS = MAX_DURATION_SECONDS
"""So much of a melody is kept: as much as the longest music can follow."""

_KEY = re.compile(r"([A-G])([#♯b♭]?) *(m|min|minor|maj|major)?", re.IGNORECASE)
_KEY_NAMES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_SURROGATE_OF_A_BYTE = range(0xDC80, 0xDD00)
"""The surrogates that stand for arguments' bytes outside the locale's encoding."""
_LONGEST_SHOWN = 40


def check_prompt(value: object, field: str = "prompt") -> str:
    """Return the prompt stripped: at most 2,000 characters of clean text.

    Its lines end with newlines. An empty prompt asks for unconditional music. White space alone is
    refused: it is more likely a mistake.
    """
    text = _description(field, value)
    if value != "":
        remedy = "describe the music, or give an empty prompt for unconditional music"
        _check_says_something(field, text, remedy)
    return text


def check_negative_prompt(value: object, field: str = "negative_prompt") -> str:
    """Return what the music must not be like: the text of a prompt, but never empty."""
    text = _description(field, value)
    remedy = "say what the music must not be like, or leave it out"
    if not text:
        raise InvalidRequestError(field, "is empty", remedy)
    _check_says_something(field, text, remedy)
    return text


def _description(field: str, value: object) -> str:
    if isinstance(value, str):
        value = value.replace("\r\n", "\n")  # what browsers and Windows send
    remedy = "newlines and tabs are the only control characters allowed"
    text = _clean_text(field, value, remedy).strip()
    _check_length(field, text, MAX_PROMPT_CHARACTERS)
    return text


def check_search(value: object, field: str = "words") -> str:
    """Return the words to search for, stripped: 1 to 2,000 characters of clean text."""
    text = _clean_text(field, value, "use printable characters").strip()
    if not text:
        raise InvalidRequestError(field, "is empty", "give at least one word to look for")
    _check_says_something(field, text, "give at least one word to look for")
    _check_length(field, text, MAX_PROMPT_CHARACTERS)
    return text


def check_name(field: str, value: object) -> str:
    """Return a name (an idempotency key, a model, …): 1 to 200 characters on one line."""
    text = _one_line(field, value)
    remedy = f"use 1 to {MAX_NAME_CHARACTERS} characters"
    if not text.strip():
        raise InvalidRequestError(field, "is empty", remedy)
    _check_says_something(field, text, remedy)
    _check_length(field, text, MAX_NAME_CHARACTERS)
    return text


def check_title(value: object, field: str = "title") -> str:
    """Return the title stripped: 1 to 200 characters on one line."""
    return check_name(field, value).strip()


def check_notes(value: object, field: str = "notes") -> str:
    """Return the notes stripped: 1 to 10,000 characters of clean text."""
    if isinstance(value, str):
        value = value.replace("\r\n", "\n")
    remedy = "newlines and tabs are the only control characters allowed"
    text = _clean_text(field, value, remedy).strip()
    _check_says_something(field, text, "write something, or leave it out")
    _check_length(field, text, MAX_NOTES_CHARACTERS)
    return text


def check_tags(value: object, field: str = "tags") -> list[str]:
    """Return the tags, given as one or as a list: lower case, each once, in alphabetical order.

    At most 20, each of 1 to 50 characters on one line.
    """
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list | tuple | set | frozenset):
        raise InvalidRequestError(field, f"is {shown(value)}", "use a list of texts")
    tags = sorted({_check_tag(field, each) for each in given})
    if len(tags) > MAX_TAGS:
        raise InvalidRequestError(field, f"has {len(tags):,} tags", f"use at most {MAX_TAGS}")
    return tags


def _check_tag(field: str, value: object) -> str:
    text = unicodedata.normalize("NFC", _one_line(field, value).strip().lower())
    _check_says_something(field, text, f"use tags of 1 to {MAX_TAG_CHARACTERS} characters")
    _check_length(field, text, MAX_TAG_CHARACTERS)
    return text


def check_musical_key(value: object, field: str = "key") -> str:
    """Return a key as it is stored, such as ``F#m`` or ``C``: flats become sharps."""
    found = _KEY.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        remedy = "use a key such as C, F#m or Bb minor"
        raise InvalidRequestError(field, f"is {shown(value)}", remedy)
    note, accidental, mode = found[1].upper(), found[2].lower(), found[3] or ""
    shift = {"": 0, "#": 1, "♯": 1}.get(accidental, -1)
    name = _KEY_NAMES[(_KEY_NAMES.index(note) + shift) % len(_KEY_NAMES)]
    return name + ("m" if mode == "m" or mode.lower() in ("min", "minor") else "")


def check_path(field: str, value: object) -> str:
    """Return a path as text: 1 to 4,096 characters on one line."""
    text = _one_line(field, value)
    if not 1 <= len(text) <= MAX_PATH_CHARACTERS:
        problem = f"has {len(text):,} characters"
        raise InvalidRequestError(field, problem, f"use 1 to {MAX_PATH_CHARACTERS:,}")
    return text


def at_home(field: str, path: str) -> str:
    """Return the path with ``~`` or ``~user`` at its start replaced by that home."""
    found = os.path.expanduser(path)  # noqa: PTH111 - pathlib raises if it knows no home
    if found.startswith("~"):
        user = path.partition("/")[0]
        problem = f"begins with {user}, whose home is not known"
        raise InvalidRequestError(field, problem, "write the path in full")
    return found


def tidy_text(message: str) -> str:
    """Return an error's message as every database can keep it: printable, of bounded length."""
    shown = _SURROGATE.sub("\ufffd", _CONTROL.sub("\ufffd", message)).strip()
    return shown[:MAX_MESSAGE_CHARACTERS] or "no message"


def check_model(value: object, field: str = "model") -> ModelInfo:
    """Return the facts of the model of this name, or of this local folder."""
    if isinstance(value, str) and value in MODELS:  # nearly always: without more checks
        return MODELS[value]
    name = check_name(field, value)
    model = find_model(at_home(field, name))
    if model is None:
        remedy = f"use {', '.join(MODELS)}, or a local folder's absolute path"
        raise InvalidRequestError(field, f"{name!r} is not known", remedy)
    return model


def check_audio_format(value: object, field: str = "audio_format") -> AudioFormat:
    """Return the format of a file: ``wav``, ``flac``, ``mp3`` or ``ogg``."""
    for known in AUDIO_FORMATS:
        if value == known:
            return known
    raise InvalidRequestError(field, f"is {shown(value)}", f"use {one_of(AUDIO_FORMATS)}")


def check_melody_kind(value: object, field: str = "melody_kind") -> MelodyKind:
    """Return how a melody's clip is read: ``auto``, ``solo``, ``mix`` or ``stems``."""
    for known in MELODY_KINDS:
        if value == known:
            return known
    raise InvalidRequestError(field, f"is {shown(value)}", f"use {one_of(MELODY_KINDS)}")


def one_of(names: Sequence[str]) -> str:
    """Return the names as a list that ends with ``or``."""
    return f"{', '.join(names[:-1])} or {names[-1]}"


def check_duration(value: object, longest: float, field: str = "duration") -> float:
    """Return the duration in seconds, within what the model can do."""
    seconds = _number(field, value, "use a number of seconds")
    if not MIN_DURATION_SECONDS <= seconds <= longest:
        remedy = f"use {MIN_DURATION_SECONDS:g} to {longest:g} seconds"
        raise InvalidRequestError(field, f"is {exactly(seconds)} s", remedy)
    return seconds


def check_guided(field: str, guidance_scale: float) -> None:
    """Refuse what has no effect without guidance."""
    if guidance_scale == 1:
        problem = "has no effect with a guidance_scale of 1"
        raise InvalidRequestError(field, problem, "use one above 1, or leave it out")


def check_clip_source(field: str, value: object) -> None:
    """Refuse anything but a ``pathlib.Path`` or bytes. No file is touched.

    Text is refused: a request that a web client sent as JSON must not choose a file of this
    machine.
    """
    if isinstance(value, str):
        remedy = "use pathlib.Path(...) for a file of this machine, or the bytes of one"
        raise InvalidRequestError(field, "is text", remedy)
    if not isinstance(value, bytes | bytearray | memoryview | os.PathLike):
        problem = f"is of the type {type(value).__name__}"
        raise InvalidRequestError(field, problem, "use the path of an audio file, or its bytes")


def check_continuation(clip_seconds: float, duration: float, field: str = "continuation") -> None:
    """Refuse a clip that is not 0.08 to 30 s long, or is as long as the music."""
    check_clip(field, clip_seconds)
    if clip_seconds >= duration:
        counted = f"the duration of {exactly(duration)} s counts from its start"
        problem = f"is {exactly(clip_seconds)} s long, and {counted}"
        raise InvalidRequestError(field, problem, "use a longer duration, or a shorter clip")


def check_has_melody(kind: MelodyKind, field: str = "melody_kind") -> None:
    """Refuse, for a request without a melody, any way to read one but the default."""
    if kind != "auto":
        problem = f"is {kind}, but there is no melody"
        raise InvalidRequestError(field, problem, "give a melody, or leave it out")


def check_hears_melody(model: ModelInfo, field: str = "melody") -> None:
    """Refuse a tune for a model that hears none; of a local folder only the engine knows."""
    if model.hears_melody is False:
        hearing = (other for other in MODELS.values() if other.hears_melody)
        able = next(other for other in hearing if other.channels == model.channels)
        problem = f"is given for {model.name}, which hears none"
        raise InvalidRequestError(field, problem, f"use {able.name}")


def check_clip(field: str, clip_seconds: float, longest: float = WINDOW_SECONDS) -> None:
    """Refuse a clip of less than 0.08 s, or of more than ``longest`` seconds."""
    if not MIN_DURATION_SECONDS <= clip_seconds <= longest:
        remedy = f"use a clip of {MIN_DURATION_SECONDS:g} to {longest:g} seconds"
        raise InvalidRequestError(field, f"is {exactly(clip_seconds)} s long", remedy)


def check_positive(field: str, value: object) -> float:
    """Return a finite number above zero."""
    number = _number(field, value, "use a number above 0")
    if number <= 0:
        raise InvalidRequestError(field, f"is {exactly(number)}", "use a number above 0")
    return number


def check_between(field: str, value: object, low: float, high: float) -> float:
    """Return a finite number from ``low`` to ``high``, both included."""
    remedy = f"use a number from {low:g} to {high:g}"
    number = _number(field, value, remedy)
    if not low <= number <= high:
        raise InvalidRequestError(field, f"is {exactly(number)}", remedy)
    return number


def check_bpm(field: str, value: object) -> float:
    """Return a tempo in beats per minute: from 0 to 10,000."""
    return check_between(field, value, 0, 10_000)


def check_bpm_range(low: float | None, high: float | None, low_field: str, high_field: str) -> None:
    """Refuse a range of tempos that no tempo is in; ``None`` is no limit."""
    if low is not None and high is not None and low > high:
        problem = f"is {exactly(low)} and {high_field} is {exactly(high)}, so no tempo fits"
        remedy = f"use a lower {low_field} or a higher {high_field}"
        raise InvalidRequestError(low_field, problem, remedy)


def check_time_range(
    start: datetime | None, end: datetime | None, start_field: str, end_field: str
) -> None:
    """Refuse a range of time that is empty, since its end does not belong to it."""
    if start is not None and end is not None and start >= end:
        problem = f"is {start.isoformat()} and {end_field} is {end.isoformat()}, so no time fits"
        remedy = f"use an earlier {start_field} or a later {end_field}"
        raise InvalidRequestError(start_field, problem, remedy)


def check_integer(field: str, value: object, low: int, high: int) -> int:
    """Return a whole number from ``low`` to ``high``, both included."""
    remedy = f"use a whole number from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(field, f"is {shown(value)}", remedy)
    if not low <= value <= high:
        raise InvalidRequestError(field, f"is {shown(value)}", remedy)
    return int(value)


def check_boolean(field: str, value: object) -> bool:
    """Return True or False; nothing else is taken for one of them."""
    if not isinstance(value, bool):
        raise InvalidRequestError(field, f"is {shown(value)}", "use true or false")
    return value


def check_seed(value: object, field: str = "seed") -> int:
    """Return the seed, at most 63 bits; the error says how to ask for a random one."""
    try:
        return check_integer(field, value, 0, MAX_SEED)
    except InvalidRequestError as error:
        remedy = f"{error.remedy}, or leave it out for a random one"
        raise InvalidRequestError(field, error.problem, remedy) from None


def check_run_at(value: object, field: str = "run_at") -> datetime:
    """Return the moment in UTC, given as a datetime or as ISO 8601 text.

    A time without a zone is refused: two machines would read it differently.
    """
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            remedy = "use a time such as 2026-01-31T12:00:00Z"
            raise InvalidRequestError(field, f"is {shown(value)}", remedy) from None
    if not isinstance(value, datetime):
        raise InvalidRequestError(field, f"is {shown(value)}", "use a datetime with a time zone")
    if value.tzinfo is None:
        raise InvalidRequestError(field, "has no time zone", "add one, such as Z or +01:00")
    try:
        return value.astimezone(UTC)
    except OverflowError:
        remedy = "use a date between the years 2 and 9998"
        raise InvalidRequestError(field, f"is {value.isoformat()}", remedy) from None


def check_metadata(value: object, field: str = "metadata") -> dict[str, Any]:
    """Return the metadata as plain JSON: an object of at most 16 KiB, 8 levels, finite numbers."""
    if not isinstance(value, dict):
        raise InvalidRequestError(field, f"is {shown(value)}", "use a JSON object (a dict)")
    _check_json(field, value, depth=1)
    text = json.dumps(value, ensure_ascii=False)
    size = len(text.encode())
    if size > MAX_METADATA_BYTES:
        problem = f"takes {size:,} bytes as JSON"
        raise InvalidRequestError(field, problem, f"use at most {MAX_METADATA_BYTES:,}")
    plain: dict[str, Any] = json.loads(text)
    return plain


def _check_json(field: str, value: object, depth: int) -> None:
    if depth > MAX_METADATA_DEPTH:
        remedy = f"use at most {MAX_METADATA_DEPTH} levels"
        raise InvalidRequestError(field, "is nested too deeply", remedy)
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise InvalidRequestError(
                    field, f"has the key {shown(key)}", "use text for every key"
                )
            _clean_text(field, key, "remove it from the key")
            _check_json(field, item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_json(field, item, depth + 1)
    elif isinstance(value, str):
        _clean_text(field, value, "remove it from the text")
    elif isinstance(value, float) and not math.isfinite(value):
        raise InvalidRequestError(field, f"holds {value}", "JSON has finite numbers only")
    elif isinstance(value, int) and abs(value) > MAX_SEED:
        raise InvalidRequestError(
            field, "holds a whole number of more than 63 bits", "store it as text"
        )
    elif not (value is None or isinstance(value, bool | int | float)):
        raise InvalidRequestError(
            field,
            f"holds {shown(value)}",
            "use text, numbers, true, false, null, lists and objects",
        )


def _check_length(field: str, text: str, longest: int) -> None:
    if len(text) > longest:
        problem = f"has {len(text):,} characters"
        raise InvalidRequestError(field, problem, f"use at most {longest:,}")


def _check_says_something(field: str, text: str, remedy: str) -> None:
    if not text:
        raise InvalidRequestError(field, "is only white space", remedy)
    if not says_something(text):
        raise InvalidRequestError(field, "has no character that can be seen on its own", remedy)


def _clean_text(field: str, value: object, remedy: str) -> str:
    if type(value) is str and value.isascii() and value.isprintable():  # nearly always
        return value
    if not isinstance(value, str):
        raise InvalidRequestError(field, f"is {shown(value)}", "use text")
    if (found := _SURROGATE.search(value)) is not None:
        if (code := ord(found[0])) in _SURROGATE_OF_A_BYTE:
            problem = f"has the byte 0x{code - 0xDC00:02X}, which is no text here"
            remedy = "send UTF-8, in a locale of UTF-8 such as C.UTF-8"
            raise InvalidRequestError(field, problem, remedy)
        problem = "has a lone surrogate, which is not a character"
        raise InvalidRequestError(field, problem, "send well-formed Unicode")
    found = _CONTROL.search(value)
    if found:
        problem = f"has the control character U+{ord(found.group()):04X}"
        raise InvalidRequestError(field, problem, remedy)
    return str.__str__(value)  # plain text, also from an enumeration: drivers only know str


def _one_line(field: str, value: object) -> str:
    text = _clean_text(field, value, "use printable characters on one line")
    if text.splitlines() not in ([], [text]) or "\t" in text:
        raise InvalidRequestError(
            field, "has a line break or tab", "use printable characters on one line"
        )
    return text


def _number(field: str, value: object, remedy: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequestError(field, f"is {shown(value)}", remedy)
    try:
        number = float(value)
    except OverflowError:
        raise InvalidRequestError(field, f"is {shown(value)}", remedy) from None
    if not math.isfinite(number):
        raise InvalidRequestError(field, f"is {number}", remedy)
    return number


def exactly(number: float) -> str:
    """Return the number as short as it may be said without changing it: 300.0001 is not 300."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def shown(value: object) -> str:
    """Describe a refused value briefly: by its repr if that is short, else by its type."""
    if value is None:
        return "missing"
    try:
        text = repr(value)
    except Exception:  # the caller's __repr__, or an integer with too many digits for Python
        text = ""
    return text if 0 < len(text) <= _LONGEST_SHOWN else f"a {type(value).__name__} too long to show"
