"""The options that choose generations, the same for every command that takes them.

A command takes them with ``@taking(FILTER_OPTIONS, before="limit")`` and ``**options``, and makes
the library's filters of them with ``filters_of(options)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from dgx_music.cli.options import complete_model
from dgx_music.cli.output import tell
from dgx_music.cli.times import local_words, read_time
from dgx_music.errors import GenerationNotFoundError, InvalidRequestError
from dgx_music.statuses import GenerationStatus
from dgx_music.validation import check_bpm, check_bpm_range, check_musical_key, check_time_range

if TYPE_CHECKING:
    from dgx_music.storage import Database, Filters

FILTERS = "Filters"
"""The heading of these options in the help."""
_ID_CHARACTERS = 36


def _option(kind: Any, help: str, *names: str, **more: Any) -> Any:  # noqa: A002
    return Annotated[kind | None, typer.Option(*names, help=help, rich_help_panel=FILTERS, **more)]


FILTER_OPTIONS: dict[str, Any] = {
    "status": _option(
        list[GenerationStatus],
        f"Only those of this status: {', '.join(GenerationStatus)}; give it again for more.",
        "--status",
        "-s",
        metavar="STATUS",
    ),
    "batch": _option(
        str, "Only those of this batch: its id, a part of it, or its name.", "--batch", metavar="ID"
    ),
    "parent": _option(str, "Only those made from this generation.", "--parent", metavar="ID"),
    "tag": _option(
        list[str],
        "Only those with this tag; give it again for all of several.",
        "--tag",
        metavar="TAG",
    ),
    "starred": _option(bool, "Only those with a star, or without.", "--starred/--not-starred"),
    "key": _option(str, "Only those in this key, such as F#m or C.", "--key"),
    "bpm_from": _option(float, "Only those of this measured tempo or faster.", "--bpm-from"),
    "bpm_to": _option(float, "Only those of this measured tempo or slower.", "--bpm-to"),
    "meta": _option(
        list[str],
        "Only those with this value in their metadata; give it again for more keys.",
        "--meta",
        metavar="KEY=VALUE",
    ),
    "model": _option(str, "Only those of this model.", "--model", autocompletion=complete_model),
    "tenant": _option(str, "Only those made for this tenant.", "--tenant"),
    "since": _option(
        str,
        "Only those created then or later: yesterday, 2h, 3d, 2026-01-31 (local time), or "
        "2026-01-31T12:00:00Z.",
        "--since",
        metavar="TIME",
    ),
    "until": _option(
        str, "Only those created earlier than then.", "--until", "--before", metavar="TIME"
    ),
}
"""Each option's annotation, by its name."""
_LIBRARY_NAMES = {"since": "created_from", "until": "created_before", "meta": "metadata"}
"""The filters that have another name in the library."""


def filters_of(options: Mapping[str, Any]) -> Filters:
    """Return the library's filters from the options given; says once which times are local.

    Ids may be parts of ids: see ``find_filters``. Raises ``InvalidRequestError``.
    """
    read: dict[str, Callable[[Any], Any]] = {
        "meta": _metadata,
        "key": lambda text: check_musical_key(text, "--key"),
        "bpm_from": lambda bpm: check_bpm("--bpm-from", bpm),
        "bpm_to": lambda bpm: check_bpm("--bpm-to", bpm),
        "since": lambda text: read_time(text, "--since"),
        "until": lambda text: read_time(text, "--until"),
    }
    given = {name: value for name, value in options.items() if value not in (None, [])}
    if (
        given.get("tenant") == ""
    ):  # a variable of the shell that is not set, not a wish for most rows
        raise InvalidRequestError("--tenant", "is empty", "name a tenant, or leave it out")
    found = {name: read.get(name, lambda value: value)(value) for name, value in given.items()}
    local = []
    for name in found.keys() & {"since", "until"}:
        found[name], is_local = found[name]
        local += [f"{name} {local_words(found[name])}"] if is_local else []
    if local:
        tell(f"In local time: {', '.join(sorted(local))}.")
    check_bpm_range(found.get("bpm_from"), found.get("bpm_to"), "--bpm-from", "--bpm-to")
    check_time_range(found.get("since"), found.get("until"), "--since", "--until")
    return cast("Filters", {_LIBRARY_NAMES.get(name, name): value for name, value in found.items()})


async def find_filters(database: Database, filters: Filters) -> Filters:
    """Return the filters with the whole ids of what their parts of ids mean.

    Raises ``BatchNotFoundError``, ``GenerationNotFoundError``, or ``InvalidRequestError`` if a part
    fits several.
    """
    from dgx_music.cli.opening import find_batch_id

    found = filters.copy()
    if batch := filters.get("batch"):
        found["batch"] = await find_batch_id(database, batch)
    if parent := filters.get("parent"):
        found["parent"] = await _find_parent(database, parent)
    return found


async def _find_parent(database: Database, wanted: str) -> str:
    """Return the id that is meant; a whole one also if that generation is deleted."""
    from dgx_music.cli.opening import find_generation

    try:
        return (await find_generation(database, wanted)).id
    except GenerationNotFoundError:
        if len(wanted) != _ID_CHARACTERS:
            raise
        return wanted.lower()


def _metadata(pairs: Iterable[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not (name and separator):
            raise InvalidRequestError("--meta", f"is {pair!r}", "use KEY=VALUE, as in order=4711")
        found[name] = value
    return found
