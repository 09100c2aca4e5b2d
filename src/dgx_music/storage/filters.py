"""The filters of lists, searches and changes of many: which generations are meant.

All filters are checked here and become conditions. PostgreSQL has statistics of the values and
chooses an index by them. SQLite has none, so one condition leads, which is the one that is likely
to fit the fewest rows, and it may choose no index by the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple, TypedDict

from sqlalchemy import ColumnElement, and_, literal_column, not_, select

from dgx_music import validation
from dgx_music.errors import InvalidRequestError
from dgx_music.statuses import COMPLETED, GenerationStatus
from dgx_music.storage.models import Tag
from dgx_music.storage.schema import as_condition, check_status, has_json_value, unindexed

Sort = Literal["created", "finished", "duration", "bpm", "run-time"]


class Filters(TypedDict, total=False):
    """Which generations: those that fit all filters given; ``None`` is not a filter."""

    status: GenerationStatus | str | Sequence[GenerationStatus | str] | None
    """One status, or several: generations of any of them."""
    model: str | None
    tenant: str | None
    """If empty: generations without a tenant."""
    batch: str | None
    """The id of a batch."""
    parent: str | None
    """The id of a generation: those that repeat or continue it."""
    starred: bool | None
    tag: str | Sequence[str] | None
    """One tag, or several: generations that have all of them."""
    bpm_from: float | None
    """The measured tempo is this or higher; a generation without one does not fit."""
    bpm_to: float | None
    """The measured tempo is this or lower."""
    key: str | None
    """The measured key, such as ``F#m``, ``Gb minor`` or ``C``."""
    metadata: Mapping[str, str | float | bool] | None
    """Top-level keys of the metadata with their values. ``"4711"`` finds the text and the number."""
    created_from: datetime | str | None
    """Created at this moment or later; a datetime with a time zone, or ISO 8601 text."""
    created_before: datetime | str | None
    """Created earlier than this moment."""


@dataclass(frozen=True)
class CheckedFilters:
    """Filters that were checked, in the form in which the database has the values."""

    statuses: tuple[str, ...] = ()
    model: str | None = None
    tenant: str | None = None
    batch: str | None = None
    parent: str | None = None
    starred: bool | None = None
    tags: tuple[str, ...] = ()
    frequent_tags: tuple[str, ...] = ()
    """Those of the tags that so many rows have that their index would find too many to sort."""
    bpm_from: float | None = None
    bpm_to: float | None = None
    key: str | None = None
    metadata: tuple[tuple[str, str], ...] = ()
    created_from: datetime | None = None
    created_before: datetime | None = None

    @property
    def rare_tags(self) -> tuple[str, ...]:
        """The tags by whose index the rows may be found."""
        return tuple(tag for tag in self.tags if tag not in self.frequent_tags)

    @property
    def are_statuses_split(self) -> bool:
        """True if a list is best read for each of its statuses alone, each from its index."""
        rarer = (self.parent, self.batch, self.rare_tags, self.key, self.starred, self.tenant)
        is_led_by_model = self.model is not None and COMPLETED in self.statuses
        return len(self.statuses) > 1 and not any(rarer) and not is_led_by_model


def check_filters(filters: Filters) -> CheckedFilters:
    """Return the filters checked; raises ``InvalidRequestError`` for a wrong value or range."""
    for name in filters.keys() - Filters.__annotations__.keys():
        raise TypeError(f"there is no filter {name!r}; use {', '.join(Filters.__annotations__)}")
    checked: dict[str, Any] = {}
    for name, value in filters.items():
        if value is not None:
            field, check = _CHECKS[name]
            checked[field] = check(value)
    asked = CheckedFilters(**checked)
    validation.check_bpm_range(asked.bpm_from, asked.bpm_to, "bpm_from", "bpm_to")
    first, end = asked.created_from, asked.created_before
    validation.check_time_range(first, end, "created_from", "created_before")
    return asked


def conditions(filters: Filters, row: Any, *, is_found: bool = True) -> list[ColumnElement[bool]]:
    """Return the filters' conditions on a row.

    ``is_found`` says that another condition finds the row, so that SQLite must not choose an index
    by these. Raises ``InvalidRequestError``.
    """
    asked = check_filters(filters)
    return [*choices(asked, row, is_found=is_found), *moments(asked, row)]


def choices(
    asked: CheckedFilters, row: Any, *, is_found: bool = False, sort: Sort = "created"
) -> list[ColumnElement[bool]]:
    """Return the conditions on all but the time of creation.

    Of them one may choose an index, if the rows are not found by another condition. A list in
    another order than by creation is better read in its order than by a frequent value.
    """
    wanted = [*_rare(asked, row), *_frequent(asked, row)]
    leaders = {"bpm": set[str](), "finished": {"status"}}.get(sort, {"status", "model"})
    may_lead = [not is_found and (each.name in {*leaders, _RARE}) for each in wanted]
    leader = may_lead.index(True) if True in may_lead else None
    is_led_by_tempo = not is_found and (sort == "bpm" or (leader is None and _is_narrow(asked)))
    return [
        *(each.leading if at == leader else each.plain for at, each in enumerate(wanted)),
        *_tempo(asked, row.bpm if is_led_by_tempo else unindexed(row.bpm)),
        *_others(asked, row),
    ]


def moments(asked: CheckedFilters, row: Any) -> list[ColumnElement[bool]]:
    """Return the conditions on the time of creation."""
    bounds: list[ColumnElement[bool]] = []
    if asked.created_from is not None:
        bounds.append(row.created_at >= asked.created_from)
    if asked.created_before is not None:
        bounds.append(row.created_at < asked.created_before)
    return bounds


class _Choice(NamedTuple):
    """A condition on one value, in two forms."""

    name: str
    leading: ColumnElement[bool]
    """May choose an index on SQLite."""
    plain: ColumnElement[bool]
    """May not."""


_RARE = "rare"
_NARROW_BPM = 10


def _rare(asked: CheckedFilters, row: Any) -> list[_Choice]:
    """Return the conditions that few rows fit, the one likely to fit the fewest first."""
    found = [
        _equal(_RARE, row.parent_id, asked.parent),
        _equal(_RARE, row.batch_id, asked.batch),
        *(_tagged(row, tag) for tag in asked.rare_tags),
        _equal(_RARE, row.musical_key, asked.key),
        _starred(row) if asked.starred else None,
        _of_tenant(row, asked.tenant) if asked.tenant else None,
    ]
    return [each for each in found if each is not None]


def _frequent(asked: CheckedFilters, row: Any) -> list[_Choice]:
    """Return the conditions on model and status: most rows are completed."""
    model = _equal("model", row.model_name, asked.model)
    status = _of_status(row, asked.statuses) if asked.statuses else None
    both = (model, status) if COMPLETED in asked.statuses else (status, model)
    return [each for each in both if each is not None]


def _equal(name: str, column: Any, value: str | None) -> _Choice | None:
    return None if value is None else _Choice(name, column == value, unindexed(column) == value)


def _of_status(row: Any, statuses: Sequence[str]) -> _Choice | None:
    if len(statuses) == 1:
        return _equal("status", row.status, statuses[0])
    return _Choice("status", row.status.in_(statuses), unindexed(row.status).in_(statuses))


def _of_tenant(row: Any, tenant: str) -> _Choice:
    is_meant = and_(row.tenant == tenant, row.tenant != literal_column("''"))  # as in its index
    return _Choice(_RARE, is_meant, unindexed(row.tenant) == tenant)


def _tagged(row: Any, name: str) -> _Choice:
    tagged = select(Tag.generation_id).where(Tag.name == name)
    is_tagged = tagged.where(Tag.generation_id == row.id).correlate(row).exists()
    return _Choice(_RARE, row.id.in_(tagged), is_tagged)


def _starred(row: Any) -> _Choice:
    return _Choice(_RARE, as_condition(row.is_starred), as_condition(unindexed(row.is_starred)))


def _is_narrow(asked: CheckedFilters) -> bool:
    """Return True if few rows have such a tempo: those of a wide range would have to be sorted."""
    low, high = asked.bpm_from, asked.bpm_to
    return low is not None and high is not None and high - low <= _NARROW_BPM


def _tempo(asked: CheckedFilters, bpm: Any) -> Iterator[ColumnElement[bool]]:
    if asked.bpm_from is not None:
        yield bpm >= asked.bpm_from
    if asked.bpm_to is not None:
        yield bpm <= asked.bpm_to


def _others(asked: CheckedFilters, row: Any) -> Iterator[ColumnElement[bool]]:
    """Give the conditions that find no rows: nearly all rows fit, or nobody knows how many."""
    for tag in asked.frequent_tags:
        yield _tagged(row, tag).plain
    if asked.tenant == "":
        yield unindexed(row.tenant) == ""
    if asked.starred is False:
        yield not_(as_condition(unindexed(row.is_starred)))
    for name, text in asked.metadata:
        yield has_json_value(row.metadata_, name, text)


def _check_statuses(value: Any) -> tuple[str, ...]:
    """Return the statuses, each once; none if all are given."""
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, Iterable):
        several = [several]
    statuses = tuple(dict.fromkeys(check_status(each) for each in several))
    if not statuses:
        raise InvalidRequestError(
            "status", "is an empty list", "name at least one, or leave it out"
        )
    return () if len(statuses) == len(GenerationStatus) else statuses


def _check_tags(value: object) -> tuple[str, ...]:
    tags = tuple(validation.check_tags(value, "tag"))
    if not tags:
        raise InvalidRequestError("tag", "is empty", "name at least one, or leave it out")
    return tags


def _check_bpm(field: str) -> Callable[[object], float]:
    return lambda value: validation.check_bpm(field, value)


def _check_metadata(value: object) -> tuple[tuple[str, str], ...]:
    """Return the keys with the values as text, numbers as JSON writes them."""
    given = validation.check_metadata(value)
    if not given:
        raise InvalidRequestError("metadata", "is empty", "name at least one key, or leave it out")
    for name, item in given.items():
        if isinstance(item, dict | list):
            remedy = "use text, a number, true or false"
            raise InvalidRequestError("metadata", f"has no single value for {name!r}", remedy)
    return tuple(
        (name, item if isinstance(item, str) else json.dumps(item)) for name, item in given.items()
    )


def _check_named(field: str) -> Callable[[object], str]:
    return lambda value: validation.check_name(field, value)


def _check_moment(field: str) -> Callable[[object], datetime]:
    return lambda value: validation.check_run_at(value, field)


_CHECKS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "status": ("statuses", _check_statuses),
    "model": ("model", _check_named("model")),
    "tenant": ("tenant", lambda name: validation.check_name("tenant", name) if name else ""),
    "batch": ("batch", _check_named("batch")),
    "parent": ("parent", _check_named("parent")),
    "starred": ("starred", lambda value: validation.check_boolean("starred", value)),
    "tag": ("tags", _check_tags),
    "bpm_from": ("bpm_from", _check_bpm("bpm_from")),
    "bpm_to": ("bpm_to", _check_bpm("bpm_to")),
    "key": ("key", validation.check_musical_key),
    "metadata": ("metadata", _check_metadata),
    "created_from": ("created_from", _check_moment("created_from")),
    "created_before": ("created_before", _check_moment("created_before")),
}
"""For each filter the field of ``CheckedFilters`` and the check of its value."""
