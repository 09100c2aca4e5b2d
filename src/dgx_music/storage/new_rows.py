"""The rows to insert, and the objects that are made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from operator import itemgetter
from typing import Any, overload

from sqlalchemy import bindparam

from dgx_music.storage.generation import CLIP_COLUMNS, Generation, as_inserted, g

Row = Mapping[str, Any]
"""The columns of a new generation, by their names; ``wanted_run_at`` is ``None`` to run at once.

``batch_name`` is the name of the batch that ``batch_id`` identifies.
"""

GIVEN = (
    *("id", "prompt", "model_name", "duration_seconds", "sample_rate", "channels", "sampling"),
    *CLIP_COLUMNS,
    *("priority", "tenant", "max_attempts", "idempotency_key", "request_hash", "metadata"),
    *("audio_format", "batch_id", "take", "parent_id"),
    *("title", "notes", "tags", "is_starred", "search_text"),
)
"""The columns that a request gives; the database adds the others."""


@dataclass(frozen=True)
class AlikeRows(Sequence[Row]):
    """Rows that have all in common but their ids and prompts, and have neither keys nor clips.

    What they share is written and sent once.
    """

    shared: Row
    ids: Sequence[str]
    prompts: Sequence[str]

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> AlikeRows: ...
    def __getitem__(self, place: int | slice) -> Row | AlikeRows:
        ids, prompts = self.ids[place], self.prompts[place]
        if isinstance(place, slice):
            return replace(self, ids=ids, prompts=prompts)
        return {**self.shared, "id": ids, "prompt": prompts}

    def __iter__(self) -> Iterator[Row]:
        for id_, prompt in zip(self.ids, self.prompts, strict=True):
            yield {**self.shared, "id": id_, "prompt": prompt}

    def with_all(self, values: Row) -> AlikeRows:
        """Return the rows with these values in common as well."""
        return replace(self, shared={**self.shared, **values})


def keys_of(rows: Sequence[Row]) -> set[str]:
    """Return the idempotency keys of these rows."""
    if isinstance(rows, AlikeRows):
        return set()
    return {row["idempotency_key"] for row in rows if row["idempotency_key"] is not None}


def have_clips(rows: Sequence[Row]) -> bool:
    """Return True if any of these rows refers to a clip."""
    return not isinstance(rows, AlikeRows) and any(any(_clips_of(row)) for row in rows)


def attribute(column_name: str) -> str:
    """Return the name of a column's attribute."""
    return "metadata_" if column_name == "metadata" else column_name


def parameters(names: Sequence[str]) -> dict[str, Any]:
    """Return the parameter of each of these columns; it has the name of the attribute."""
    return {name: bindparam(attribute(name), type_=g[name].type) for name in names}


def object_of(row: Row) -> Generation:
    """Return the object of a row; what the database adds to it is still missing."""
    values = dict(zip(_ATTRIBUTES, _values_of(row), strict=True))
    values["sampling"] = dict(values["sampling"])  # rows of one batch share theirs
    return as_inserted(values)


def add_times(
    generation: Generation, prompt_id: int | None, created_at: datetime, run_at: datetime
) -> Generation:
    """Add what the database has added to the row."""
    vars(generation).update(prompt_id=prompt_id, created_at=created_at, run_at=run_at)
    return generation


_clips_of = itemgetter(*CLIP_COLUMNS)
_ATTRIBUTES = tuple(map(attribute, GIVEN))
_values_of = itemgetter(*_ATTRIBUTES)
