"""Requests from a file or a pipe: a prompt in each line, or a JSON object."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dgx_music.client.requests import CheckedRequests, naming, plan, read_clips
from dgx_music.errors import InvalidRequestError
from dgx_music.validation import CLIP_FIELDS, MAX_NAME_CHARACTERS, check_name, shown, tidy_text

_JSON_LINES = {".jsonl", ".ndjson"}
_STDIN = Path("-")
_COMMENT = "# "


def read_requests(file: Path, defaults: Mapping[str, Any]) -> CheckedRequests:
    """Return the file's checked requests, each with the defaults that it does not override.

    Blank lines are skipped, and comments, which begin with ``#`` and a space. A line that starts
    with ``{`` is JSON, and so is each line of a file whose name ends in ``.jsonl`` or ``.ndjson``.
    Raises ``InvalidRequestError`` that names the first line that cannot be enqueued.
    """
    plans = []
    for number, line in _read_lines(file):
        name = f"line {number}"
        with naming(name):
            request = {**defaults, **_parse(line, is_json=file.suffix.lower() in _JSON_LINES)}
            plans.append(plan(request.pop("prompt", None), request, name))
    if not plans:
        raise InvalidRequestError(
            "--file",
            f"{str(file)!r} holds no prompts",
            "write one in each line",
        )
    return read_clips(plans)


def name_of(file: Path) -> str | None:
    """Return the name of a file as that of a batch; ``None`` for stdin, and if it is no name."""
    words = file.name.split()
    if file == _STDIN or not words:
        return None
    try:
        return check_name("name", tidy_text(" ".join(words))[:MAX_NAME_CHARACTERS])
    except InvalidRequestError:
        return None


def parse_metadata(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with the metadata, if it is given, as an object instead of JSON text."""
    if "metadata" not in options:
        return {**options}
    return {**options, "metadata": parse_object("metadata", options["metadata"], '{"bpm": 140}')}


def parse_object(field: str, text: str, example: str) -> dict[str, Any]:
    """Return a JSON object; raises ``InvalidRequestError`` with the field and the example."""
    remedy = f"use an object such as {example}"
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except InvalidRequestError as error:
        raise InvalidRequestError(field, error.problem, error.remedy) from None
    except json.JSONDecodeError as error:
        raise InvalidRequestError(
            field,
            f"is not JSON ({error.msg} at column {error.colno})",
            remedy,
        ) from None
    except (ValueError, RecursionError):
        raise InvalidRequestError(
            field,
            "is JSON with a number or a nesting beyond all bounds",
            remedy,
        ) from None
    if not isinstance(value, dict):
        raise InvalidRequestError(field, "is JSON, but not an object", remedy)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object; refuses a repeated name, since readers of JSON differ on which counts."""
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidRequestError("object", f"has {shown(twice)} twice", "leave one of them out")
    return dict(pairs)


def _read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines that are neither blank nor comments, with their numbers, from 1."""
    for number, line in enumerate(_read(file).splitlines(), 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise InvalidRequestError(
                f"line {number}",
                "is not UTF-8 text",
                "save the file as UTF-8",
            ) from None
        if text.strip() and not text.startswith(_COMMENT):
            yield number, text.strip()


def _read(file: Path) -> bytes:
    try:
        return sys.stdin.buffer.read() if file == _STDIN else file.read_bytes()
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise InvalidRequestError(
            "--file", f"{str(file)!r} cannot be read ({why})", "name a text file, or - for stdin"
        ) from None


def _parse(line: str, *, is_json: bool) -> dict[str, Any]:
    if is_json or line.startswith("{"):
        request = parse_object("request", line, '{"prompt": "lofi rain", "duration": 16}')
        return {
            name: Path(value) if name in CLIP_FIELDS and isinstance(value, str) else value
            for name, value in request.items()
        }
    return {"prompt": line}
