"""The columns of a table of generations, which ``--columns`` chooses."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

from dgx_music.cli.output import (
    distance,
    end_of_id,
    is_bounded,
    print_table,
    prompt_in_words,
    shorten,
    status_in_words,
)
from dgx_music.errors import InvalidRequestError

if TYPE_CHECKING:
    from dgx_music.storage import Generation

_TITLE_CHARACTERS = 24


class _Column(NamedTuple):
    heading: str
    text: Callable[[Generation], str]
    is_number: bool = False


COLUMNS = {
    "id": _Column("ID", lambda row: row.id),
    "status": _Column("STATUS", lambda row: status_in_words(row)),
    "star": _Column("★", lambda row: "★" if row.is_starred else ""),
    "duration": _Column("DURATION", lambda row: f"{row.duration_seconds:g} s", is_number=True),
    "created": _Column("CREATED", lambda row: distance(row.created_at)),
    "finished": _Column(
        "FINISHED", lambda row: "" if row.completed_at is None else distance(row.completed_at)
    ),
    "run-time": _Column(
        "RUN TIME", lambda row: _number(row.generation_time_seconds, " s"), is_number=True
    ),
    "model": _Column("MODEL", lambda row: row.model_name),
    "tempo": _Column("TEMPO", lambda row: _number(row.bpm), is_number=True),
    "key": _Column("KEY", lambda row: row.musical_key or ""),
    "tags": _Column("TAGS", lambda row: ", ".join(row.tags or ())),
    "batch": _Column("BATCH", lambda row: end_of_id(row.batch_id)),
    "take": _Column("TAKE", lambda row: "" if row.take is None else str(row.take), is_number=True),
    "parent": _Column("PARENT", lambda row: end_of_id(row.parent_id)),
    "tenant": _Column("TENANT", lambda row: row.tenant),
    "notes": _Column("NOTES", lambda row: _short(row.notes)),
    "title": _Column("TITLE", lambda row: _short(row.title)),
    "prompt": _Column("PROMPT", prompt_in_words),
}
_USUAL = ("id", "status", "duration", "created", "prompt")


def read_columns(text: str | None) -> list[str] | None:
    """Return the names of the columns; ``None`` for the usual ones."""
    if text is None:
        return None
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in COLUMNS:
            raise InvalidRequestError(
                "--columns", f"has no {name!r}", f"use some of {','.join(COLUMNS)}"
            )
    if not names:
        raise InvalidRequestError("--columns", "is empty", f"use some of {','.join(COLUMNS)}")
    return names


def print_generations(
    rows: Sequence[Generation], names: Sequence[str] | None, id_characters: int | None
) -> None:
    """Print a table of these columns; without names: the usual ones, and the star if one has it.

    Of each id, its last characters are shown, or all of it. If there is no column of titles, a
    title stands before the prompt.
    """
    if names is None:
        starred = ("star",) if any(row.is_starred for row in rows) else ()
        names = (*_USUAL[:2], *starred, *_USUAL[2:])
    columns = [COLUMNS[name] for name in names]
    lines = [
        [
            short_id(row, id_characters) if name == "id" else _text(row, name, names)
            for name in names
        ]
        for row in rows
    ]
    numbers = [each.heading for each in columns if each.is_number]
    print_table([each.heading for each in columns], lines, numbers=numbers)


def short_id(row: Generation, characters: int | None) -> str:
    """Return so many of the last characters of the id, or all of it."""
    return row.id if characters is None else row.id[-characters:]


def titled_prompt(row: Generation) -> str:
    """Return the prompt, behind the title and the number of the take if there are any."""
    take = None if row.take is None else f"take {row.take}"
    return " · ".join(filter(None, [row.title, take, prompt_in_words(row)]))


def _text(row: Generation, name: str, names: Collection[str]) -> str:
    if name == "prompt" and "title" not in names:
        return titled_prompt(row)
    return COLUMNS[name].text(row)


def _short(text: str | None) -> str:
    return shorten(text or "", _TITLE_CHARACTERS) if is_bounded() else text or ""


def _number(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:.1f}{unit}"
