"""The picture of ``dgx-music top``: lines of text made of facts, for any size of terminal.

Nothing here asks a database, a clock or a terminal. All text of people is shown as what it is:
characters that cannot be seen are escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from textwrap import wrap
from typing import NamedTuple

from rich.text import Text

from dgx_music.cli.estimates import moment_in_words
from dgx_music.cli.output import (
    STYLES,
    UNCONDITIONAL,
    distance,
    one_line,
    shorten,
    span,
    without_passwords,
)
from dgx_music.statuses import FAILED, PROCESSING, WorkerState
from dgx_music.storage.overview import ModelQueue, QueueEntry, QueueOverview, WorkerOverview
from dgx_music.text import plain

_GAP = "  "
_NARROW = 60
_ID_CHARACTERS = 6
_NAME_CELLS = 26
_BAR_CELLS = 10
_MESSAGE_LINES = 3
_ERROR_PROMPT_CHARACTERS = 40
_NOBODY = "No worker is running; start one with: dgx-music worker"
_NOTHING = 'Nothing runs and nothing waits; add one with: dgx-music enqueue "lofi rain"'
_NO_KEYS = "Keys cannot be read here; Ctrl-C ends it."


@dataclass(frozen=True, kw_only=True)
class View:
    """What is to be seen: the facts, the time on the database's clock, and the talk with a person."""

    overview: QueueOverview
    now: datetime
    place: str
    """The database, without its password."""
    chosen_id: str | None = None
    """The running or waiting generation that the next key means."""
    message: str | None = None
    """What the last key has done."""
    trouble: str | None = None
    """Why the facts are old."""
    question: str | None = None
    """To be answered with y or n."""
    has_keys: bool = True

    @property
    def entries(self) -> list[QueueEntry]:
        """The generations that can be chosen, in the order in which they are shown."""
        return [*self.overview.running, *self.overview.waiting]

    @property
    def chosen(self) -> QueueEntry | None:
        """The chosen generation; ``None`` if none is chosen, or if it neither runs nor waits."""
        return next((entry for entry in self.entries if entry.id == self.chosen_id), None)


class _Column(NamedTuple):
    heading: str
    rank: int = 0
    """If there is no room, the columns of the highest rank are left out first; 0: never."""
    is_number: bool = False
    least: int = 0
    """As wide as this at least: the columns stay where they are while times go on.

    Other columns are left out until the last one has so many cells.
    """


class _Section(NamedTuple):
    """A table: its columns, its rows, and what is said if there are none."""

    columns: Sequence[_Column]
    rows: Sequence[Sequence[Text]]
    total: int
    """How many rows there would be with all that was left out; 0: nobody has counted."""
    if_empty: str
    at: int = 0
    """The row that must be seen."""


def draw(view: View, width: int, height: int | None = None) -> list[Text]:
    """Return the lines of the picture, at most ``height``; all there is if that is ``None``.

    Without a height there is no line about keys.
    """
    top, bottom = _header(view, width), [] if height is None else _footer(view, width)
    sections = [_queue(view, width), _models(view), _workers(view), _finished(view)]
    wants = [max(1, len(section.rows)) for section in sections]
    room = None if height is None else height - len(top) - len(bottom)
    queue, models, workers, finished = (
        _section_lines(section, count, width, is_screen=height is not None)
        for section, count in zip(sections, share_rows(room, wants), strict=True)
    )
    middle = [*workers, *models, *queue, *finished]
    if height is not None:
        middle = middle[: max(0, height - len(top) - len(bottom))]
        middle += [Text()] * (height - len(top) - len(middle) - len(bottom))
    return (top + middle + bottom)[:height]


def short_id(whole: str) -> str:
    """Return the end of an id: its beginning is the time, which its neighbours share."""
    return f"…{_clean(whole)[-_ID_CHARACTERS:]}"


def prompt_of(entry: QueueEntry) -> str:
    """Return the prompt on one line, or what an empty one means."""
    return _clean(entry.prompt) or UNCONDITIONAL


def share_rows(room: int | None, wants: Sequence[int]) -> list[int]:
    """Return how many rows each section gets if so many lines are there for all.

    A section's first row costs two lines, one for its heading. Each gets a row in turn, and the
    first one two. Without a ``room`` each gets all that it wants.
    """
    if room is None:
        return list(wants)
    given, is_moving = [0] * len(wants), True
    while is_moving:
        is_moving = False
        for index in (*range(len(wants)), 0):
            cost = 1 if given[index] else 2
            if given[index] < wants[index] and room >= cost:
                given[index], room, is_moving = given[index] + 1, room - cost, True
    return given


def _header(view: View, width: int) -> list[Text]:
    title = Text.assemble(
        ("dgx-music top", "bold"),
        f"{_GAP}{view.now:%H:%M:%S} UTC{_GAP}{_clean(view.place)}",
    )
    return [_cut(title, width), _cut(_summary(view.overview, width), width)]


def _summary(overview: QueueOverview, width: int) -> Text:
    """Return counts and rates; the last ones are left out if there is no room."""
    rates = overview.rates
    waiting = sum(model.waiting_count for model in overview.models)
    later = sum(model.scheduled_count for model in overview.models)
    parts = [
        f"{len(overview.running):,} running",
        f"{waiting:,} waiting" + (f", {later:,} of them later" if later else ""),
        f"{rates.completed_per_minute:,.1f} completed/min",
        f"{rates.audio_seconds_per_second:,.1f} s of audio/s",
        f"{rates.failed_count:,} failed in {rates.window_seconds / 60:g} min",
    ]
    paused = ["EVERYTHING IS PAUSED"] if overview.is_paused else []
    shown = paused + parts
    while len(shown) > 1 and len(" · ".join(shown)) > width:
        shown.pop()
    text = Text(" · ".join(shown))
    if paused:
        text.stylize("bold yellow", 0, len(paused[0]))
    return text


def _footer(view: View, width: int) -> list[Text]:
    lines = []
    if view.trouble is not None:
        lines += _wrapped(without_passwords(view.trouble), width, "red")
    if view.message is not None:
        lines += _wrapped(view.message, width, "yellow")
    if view.question is not None:
        return [*lines, _cut(Text(_clean(view.question), style="bold"), width)]
    return [*lines, _cut(Text(_keys(view, width), style="dim"), width)]


def _keys(view: View, width: int) -> str:
    if not view.has_keys:
        return _NO_KEYS
    if width < _NARROW:
        return "j/k c cancel p pause r resume q quit"
    what = "all" if view.chosen is None else _clean(view.chosen.model_name)
    return f"j/k choose · c cancel · p pause, r resume {what} · q quit"


def _wrapped(text: str, width: int, style: str) -> list[Text]:
    parts = wrap(_clean(text), width, max_lines=_MESSAGE_LINES, placeholder=" …")
    return [_cut(Text(part, style=style), width) for part in parts]


def _workers(view: View) -> _Section:
    columns = (
        *(_Column("STATE"), _Column("WORKER"), _Column("SLOTS"), _Column("MODEL", 1)),
        *(_Column("HEARD", 2, least=9), _Column("DEVICE", 3), _Column("HOST", least=8)),
    )
    rows = [_worker_cells(worker, view.now) for worker in view.overview.workers]
    return _Section(columns, rows, len(rows), _NOBODY)


def _worker_cells(worker: WorkerOverview, now: datetime) -> list[Text]:
    state = "silent"
    if worker.is_alive:
        state = "loading" if worker.state == WorkerState.LOADING else "alive"
    others = len(worker.models) - 1
    model = worker.model_name + (f" +{others}" if others > 0 else "")
    return [
        _styled(state),
        Text(short_id(worker.id)),
        Text(f"{worker.running_count} of {worker.slots}"),
        _text(model, _NAME_CELLS),
        Text(distance(min(worker.heartbeat_at, now), now)),
        _text(worker.device, _NAME_CELLS),
        _text(worker.host + ("" if worker.notice is None else f" · {worker.notice}")),
    ]


def _models(view: View) -> _Section:
    columns = (
        *(_Column("MODEL"), _Column("WAIT", is_number=True), _Column("RUN", is_number=True)),
        *(_Column("LATER", 1, is_number=True), _Column("DONE", least=12)),
    )
    rows = [_model_cells(model) for model in view.overview.models]
    return _Section(columns, rows, len(rows), "No model is asked for or served.")


def _model_cells(model: ModelQueue) -> list[Text]:
    counts = (model.waiting_count, model.running_count, model.scheduled_count)
    parts = [_done(model), Text(model.notice or "", style="yellow")]
    if model.done_in is None and not model.is_paused:
        parts.reverse()  # a reason is long, and the notice must be seen
    end = Text(" · ").join(part for part in parts if part)
    return [_text(model.model_name, _NAME_CELLS), *(Text(f"{count:,}") for count in counts), end]


def _done(model: ModelQueue) -> Text:
    """Return when the last one is likely to be done, or why nobody knows."""
    if model.is_paused:
        return Text("paused", style="bold yellow")
    if model.done_in is not None:
        return Text(moment_in_words(model.done_in))
    idle = "nothing is due yet" if model.waiting_count else "nothing to do"
    return _text(model.unknown_because or idle)


def _queue(view: View, width: int) -> _Section:
    columns = (
        *(_Column("  ID"), _Column("PROGRESS"), _Column("TIME", is_number=True, least=6)),
        *(_Column("WORKER", 1), _Column("MODEL", 2), _Column("PROMPT", least=12)),
    )
    entries = view.entries
    ids = [entry.id for entry in entries]
    rows = [_queue_cells(entry, view, is_narrow=width < _NARROW) for entry in entries]
    waiting = sum(model.waiting_count for model in view.overview.models)
    total = max(len(rows), len(view.overview.running) + waiting)
    at = ids.index(view.chosen_id) if view.chosen_id in ids else 0
    return _Section(columns, rows, total, _NOTHING, at)


def _queue_cells(entry: QueueEntry, view: View, *, is_narrow: bool) -> list[Text]:
    is_chosen = entry.id == view.chosen_id
    progress, time = _state_of(entry, view.now, is_narrow=is_narrow)
    cells = [
        Text(("> " if is_chosen else "  ") + short_id(entry.id)),
        progress,
        Text(time),
        Text("" if entry.worker_id is None else short_id(entry.worker_id)),
        _text(entry.model_name, _NAME_CELLS),
        Text(prompt_of(entry)),
    ]
    for cell in cells if is_chosen else []:
        cell.stylize("bold")
    return cells


def _state_of(entry: QueueEntry, now: datetime, *, is_narrow: bool) -> tuple[Text, str]:
    """Return a bar, or what it waits for; and how long it has run or waited, or will wait."""
    if entry.status == PROCESSING:
        began = min(entry.started_at or now, now)
        if entry.cancel_requested:
            return Text("cancelling", style="magenta"), span(now - began)
        return _bar(entry.progress, is_narrow=is_narrow), span(now - began)
    if entry.run_at > now:
        word = "retry" if entry.attempt else "scheduled"
        return Text(word, style="dim"), f"in {span(entry.run_at - now)}"
    return Text("waiting", style="yellow"), span(now - entry.run_at)


def _bar(progress: float, *, is_narrow: bool) -> Text:
    percent = f"{progress:4.0%}"
    if is_narrow:
        return Text(percent, style="cyan")
    full = int(progress * _BAR_CELLS)
    parts = ("━" * full, "cyan"), ("─" * (_BAR_CELLS - full), "dim")
    return Text.assemble(*parts, (percent, "cyan"))


def _finished(view: View) -> _Section:
    columns = (
        *(_Column("FINISHED"), _Column("ID"), _Column("ENDED", 1, least=10)),
        *(_Column("LENGTH", 3, is_number=True), _Column("RUN", 2, is_number=True)),
        _Column("PROMPT", least=12),
    )
    rows = [_finished_cells(entry, view.now) for entry in view.overview.finished]
    return _Section(columns, rows, 0, "Nothing is finished yet.")


def _finished_cells(entry: QueueEntry, now: datetime) -> list[Text]:
    ran, ended = entry.generation_time_seconds, min(entry.completed_at or now, now)
    prompt = prompt_of(entry)
    if entry.status == FAILED and entry.error_message:
        prompt = f"{shorten(prompt, _ERROR_PROMPT_CHARACTERS)} · {_clean(entry.error_message)}"
    return [
        _styled(entry.status),
        Text(short_id(entry.id)),
        Text(distance(ended, now)),
        Text(f"{entry.duration_seconds:g} s"),
        Text("" if ran is None else f"{ran:.1f} s"),
        Text(prompt),
    ]


def _section_lines(section: _Section, count: int, width: int, *, is_screen: bool) -> list[Text]:
    """Return the heading and so many rows; nothing if there is no row to show."""
    if count == 0:
        return []
    columns, rows = _that_fit(section, width)
    start = max(0, min(section.at - count // 2, len(rows) - count))
    seen = rows[start : start + count]
    headings = [column.heading for column in columns]
    if 0 < len(seen) < section.total:
        headings[-1] += f" {start + 1}-{start + len(seen)}/{section.total}"
    cells = [[Text(heading) for heading in headings], *([*row] for row in seen)]
    first, *lines = _aligned(columns, cells, width)
    first.stylize("bold reverse" if is_screen else "bold")
    if is_screen:
        first.pad_right(width - first.cell_len)
    lines = lines or [_cut(Text(section.if_empty, style="dim"), width)]
    return [first, *lines] if is_screen else [Text(), first, *lines]


def _that_fit(section: _Section, width: int) -> tuple[list[_Column], list[list[Text]]]:
    """Return the columns for which there is room, and the rows with their cells only."""
    kept = [*range(len(section.columns))]
    widths = [
        max(len(column.heading), column.least, *(row[index].cell_len for row in section.rows))
        for index, column in enumerate(section.columns)
    ]
    while len(kept) > 1:
        room = width - sum(widths[index] + len(_GAP) for index in kept[:-1])
        dropped = max(kept, key=lambda index: section.columns[index].rank)
        if room >= section.columns[-1].least or section.columns[dropped].rank == 0:
            break
        kept.remove(dropped)
    columns = [section.columns[index] for index in kept]
    return columns, [[row[index] for index in kept] for row in section.rows]


def _aligned(columns: Sequence[_Column], rows: Sequence[list[Text]], width: int) -> list[Text]:
    """Return a line for each row, its cells below each other; the last cell is cut."""
    widths = [max(cell.cell_len for cell in cells) for cells in zip(*rows, strict=True)]
    for row in rows:
        for column, cell, widest in zip(columns[:-1], row, widths, strict=False):
            missing = max(widest, column.least) - cell.cell_len
            cell.pad_left(missing) if column.is_number else cell.pad_right(missing)
    return [_cut(Text(_GAP).join(row), width) for row in rows]


def _styled(state: str) -> Text:
    return Text(state, style=STYLES.get(state, ""))


def _text(value: str, most: int | None = None) -> Text:
    text = Text(_clean(value))
    if most is not None:
        text.truncate(most, overflow="ellipsis")
    return text


def _cut(line: Text, width: int) -> Text:
    line.truncate(width, overflow="ellipsis")
    line.no_wrap = True
    return line


def _clean(text: str) -> str:
    return plain(one_line(text))
