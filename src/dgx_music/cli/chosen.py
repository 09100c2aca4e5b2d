"""How a command changes the generations that ids or filters name: it says how many, asks, reports."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import typer

from dgx_music.cli.output import confirm, print_json, tell
from dgx_music.errors import (
    GenerationNotFoundError,
    IllegalTransitionError,
    InvalidRequestError,
)

if TYPE_CHECKING:
    from dgx_music.storage import Database, Filters
    from dgx_music.storage.bulk import BulkResult

_REFUSALS_SHOWN = 10


@dataclass(frozen=True)
class Chosen:
    """What a command is to change: the generations that ids name, or those that fit filters."""

    ids: list[str]
    """As given: maybe only parts of ids."""
    filters: Filters

    def check(self) -> None:
        """Raise ``InvalidRequestError`` unless there are either ids or filters."""
        if bool(self.ids) == bool(self.filters):
            problem = "comes with filters" if self.ids else "is missing, and so are filters"
            remedy = "name ids, or choose by --batch and the filters of `list`"
            raise InvalidRequestError("ID", problem, remedy)

    @property
    def is_one(self) -> bool:
        """True for one id."""
        return len(self.ids) == 1


@dataclass(frozen=True)
class Question:
    """How a command speaks of what it does: ``cancel`` before it, ``Cancelled`` after it."""

    verb: str
    done: str
    more: str = ""
    """What the question says besides, such as that the audio goes too."""
    is_asked_for_ids: bool = False


async def change_chosen(
    database: Database,
    chosen: Chosen,
    question: Question,
    change: Callable[..., Awaitable[BulkResult]],
    *,
    is_agreed: bool,
) -> BulkResult:
    """Make the library's change of what was chosen, once that is agreed; return what was done.

    Exactly those that were counted are changed, as far as they still fit the filters then.
    """
    from dgx_music.cli.filter_options import find_filters
    from dgx_music.client.bulk import choose

    chosen.check()
    if chosen.ids:
        ids, unknown = await _look_for(database, chosen.ids)
        if ids and question.is_asked_for_ids:
            _ask(question, _named(ids), database, is_agreed=is_agreed)
        return await change(ids=ids) + unknown
    filters = await find_filters(database, chosen.filters)
    ids = await choose(None, None, None, filters)
    what = f"{_count(len(ids))} ({in_words(filters)})"
    if ids:
        _ask(question, what, database, is_agreed=is_agreed)
    return await change(ids=ids, **filters)


def report(done: BulkResult, chosen: Chosen, question: Question, *, as_json: bool) -> None:
    """Print what was done, and what was refused and why.

    Raises ``typer.Exit`` with 4 if an id was refused, or if all that fit the filters were; with 3
    if ids were refused only because they are not there.
    """
    if as_json:
        print_json(done.to_dict())
    else:
        tell(_summary(done, question))
    for refusal in done.refused[:_REFUSALS_SHOWN]:
        tell(f"Refused {refusal.generation_id}: {refusal.reason}.")
    if done.refused_count > _REFUSALS_SHOWN:
        tell(
            f"{done.refused_count - _REFUSALS_SHOWN:,} more were refused; --json shows the first 100."
        )
    if done.refused_count and (chosen.ids or not (done.changed or done.unchanged)):
        is_unknown = all(refusal.status is None for refusal in done.refused)
        error = GenerationNotFoundError if is_unknown else IllegalTransitionError
        raise typer.Exit(error.exit_code)


def in_words(filters: Mapping[str, Any]) -> str:
    """Return the filters in words, such as ``status failed or cancelled, tenant label-7``."""
    return ", ".join(
        f"{name.replace('_', ' ')} {_value(name, value)}" for name, value in filters.items()
    )


async def _look_for(database: Database, wanted: Sequence[str]) -> tuple[list[str], BulkResult]:
    """Return the ids that are meant, each once, and the refusals of those that are not there."""
    from dgx_music.cli.opening import find_generation
    from dgx_music.storage.bulk import NOT_THERE, Refusal, refusals

    ids: list[str] = []
    unknown: list[Refusal] = []
    for each in dict.fromkeys(wanted):
        try:
            ids.append((await find_generation(database, each)).id)
        except GenerationNotFoundError:
            unknown.append(Refusal(each, None, NOT_THERE))
    return list(dict.fromkeys(ids)), refusals(unknown)


def _ask(question: Question, what: str, database: Database, *, is_agreed: bool) -> None:
    """Say what is to be done, and return once that is agreed."""
    action = f"{question.verb} {what} in {database}{question.more}"
    if is_agreed:
        tell(f"To do: {action}.")
    confirm(f"{action[0].upper()}{action[1:]}?", is_agreed=is_agreed, action=action)


def _summary(done: BulkResult, question: Question) -> str:
    parts = [f"{question.done} {_count(done.changed)}"]
    if done.running:
        parts.append(f"{done.running:,} of them run until their workers have stopped them")
    if done.unchanged:
        parts.append(f"{done.unchanged:,} already so")
    if done.refused_count:
        parts.append(f"{done.refused_count:,} refused")
    return f"{'; '.join(parts)}."


def _count(count: int) -> str:
    return "1 generation" if count == 1 else f"{count:,} generations"


def _named(ids: list[str]) -> str:
    return f"generation {ids[0]}" if len(ids) == 1 else _count(len(ids))


def _value(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return " and ".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, datetime):
        return value.isoformat(sep=" ", timespec="seconds")
    if isinstance(value, Iterable) and not isinstance(value, str):
        return (" or " if name == "status" else " and ").join(map(str, value))
    return str(value)
