"""What is printed, and where: data on stdout, messages on stderr; colours only on a terminal.

Text of people and engines is shown as what it is: characters that cannot be seen are escaped, also
in JSON.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer
from rich.console import Console
from rich.text import Text

from dgx_music.catalog import UNTRAINED_NOTICE, is_untrained
from dgx_music.errors import InvalidRequestError
from dgx_music.sampling import Sampling
from dgx_music.text import plain, plain_json
from dgx_music.validation import CLIP_FIELDS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from dgx_music.storage import Generation

WAVEFORM_WIDTH = 72
UNCONDITIONAL = "(unconditional)"
"""Shown instead of an empty prompt."""
ID_END_CHARACTERS = 12
"""The last group of a UUIDv7, which is random: enough to tell ids apart without a look at all."""

_BARS = "▁▂▃▄▅▆▇█"
_PIPE_WIDTH = 10_000
_LEAST_ROOM = 12
_GAP = Text("  ")
_LABELS = {
    "device_seconds": "device time",
    "bpm": "tempo",
    "musical_key": "key",
}
_STATES = {"STATUS", "OUTCOME", "STATE", "CHECK"}
STYLES = {
    "pending": "yellow",
    "processing": "cyan",
    "completed": "green",
    "failed": "red",
    "cancelled": "magenta",
    "lost": "red",
    "ok": "green",
    "warning": "yellow",
    "alive": "green",
    "loading": "yellow",
    "silent": "red",
}
_PASSWORD = re.compile(r"(://[^:/@\s]*):\S+@")
_UNITS = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))


def tell(message: str) -> None:
    """Say one line on stderr, for people and not for programs."""
    typer.echo(plain(message), err=True)


def fail(message: str, exit_code: int) -> int:
    """Say on one line of stderr what went wrong, without passwords, and return the exit code."""
    label = typer.style("Error:", fg="red", bold=True)
    typer.echo(f"{label} {plain(one_line(without_passwords(message)))}", err=True)
    return exit_code


def warn(message: str) -> None:
    """Say on one line of stderr what somebody should mend, although the command goes on."""
    label = typer.style("Warning:", fg="yellow", bold=True)
    typer.echo(f"{label} {plain(message)}", err=True)


def confirm(question: str, *, is_agreed: bool, action: str = "") -> None:
    """Return once a person, or ``--yes``, has agreed; raises ``typer.Exit`` after a no.

    Raises ``InvalidRequestError`` if there is no terminal: text from a pipe is no answer. The
    message then says the ``action`` that was not taken.
    """
    if is_agreed:
        return
    if not sys.stdin.isatty():
        problem = "is missing and there is no terminal to ask on"
        remedy = f"add it to {action}" if action else "add it to go ahead"
        raise InvalidRequestError("--yes", problem, remedy)
    with _interruptible():
        is_yes = typer.confirm(plain(question), err=True)
    if not is_yes:
        tell("Nothing was changed.")
        raise typer.Exit(1)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end a question: an event loop around it would only note the signal."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def without_passwords(text: str) -> str:
    """Return the text with stars instead of each password in a URL."""
    return _PASSWORD.sub(r"\1:***@", text)


def has_password(url: str) -> bool:
    """Return True if the URL holds a password."""
    return _PASSWORD.search(url) is not None


def print_json(value: object, indent: int | None = 2) -> None:
    """Print the value as JSON on stdout, in ASCII if stdout is not UTF-8."""
    typer.echo(plain_json(json.dumps(value, indent=indent, ensure_ascii=not _is_utf8())))


def print_json_rows(rows: Iterable[dict[str, Any]]) -> None:
    """Print a JSON array on stdout with one line for each row, without spaces in it."""
    is_ascii, separators = not _is_utf8(), (",", ":")
    lines = [json.dumps(row, separators=separators, ensure_ascii=is_ascii) for row in rows]
    typer.echo(plain_json("[" + ",\n".join(lines) + "]"))


def _is_utf8() -> bool:
    return str(sys.stdout.encoding).lower().replace("-", "") == "utf8"


def print_line(text: str = "") -> None:
    """Print one line of data on stdout."""
    typer.echo(plain(text))


def make_console(file: TextIO | None = None) -> Console:
    """Return a console on stdout, or on another stream, that reads no markup in text.

    It is as wide as the terminal, or as COLUMNS says; in a pipe it is so wide that nothing is cut.
    """
    stream = file or sys.stdout
    width = None if is_bounded(stream) else _PIPE_WIDTH
    return Console(file=stream, width=width, markup=False, emoji=False, highlight=False)


def is_bounded(stream: TextIO | None = None) -> bool:
    """Return True if stdout, or another stream, has a width: long text is cut for people."""
    return (stream or sys.stdout).isatty() or "COLUMNS" in os.environ


def end_of_id(whole: str | None) -> str:
    """Return the end of an id on a terminal, and all of it for programs."""
    return (whole or "")[-ID_END_CHARACTERS:] if is_bounded() else whole or ""


def print_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    numbers: Iterable[str] = (),
    is_cut: bool = True,
) -> None:
    """Print a table without lines; on a narrow terminal its last column is cut, or else wraps."""
    console = make_console()
    cells = [[Text(heading, style="bold") for heading in headings]]
    cells += [
        [_cell(heading, value) for heading, value in zip(headings, row, strict=True)]
        for row in rows
    ]
    widths = [max(cell.cell_len for cell in column) for column in zip(*cells, strict=True)]
    for row_cells in cells:
        for heading, cell, width in zip(headings, row_cells[:-1], widths, strict=False):
            cell.pad_left(width - cell.cell_len) if heading in numbers else cell.pad_right(
                width - cell.cell_len
            )
        _print_row(console, _GAP.join(row_cells[:-1]), row_cells[-1], is_cut=is_cut)


def print_waveform(generation: Generation) -> None:
    """Draw the peaks of a completed generation's audio in one line."""
    facts = generation.get_metadata().get("audio")
    if isinstance(facts, dict) and facts.get("waveform"):
        print_line(waveform_text(facts["waveform"], min(WAVEFORM_WIDTH, make_console().width)))


def waveform_text(waveform: Sequence[float], width: int = 60) -> str:
    """Return the waveform's peaks (0 to 1) as one line of at most ``width`` blocks."""
    width = min(width, len(waveform))
    starts = [part * len(waveform) // width for part in range(width)]
    peaks = [
        max(waveform[start:end]) for start, end in zip(starts, [*starts[1:], None], strict=False)
    ]
    return "".join(_BARS[min(int(peak * len(_BARS)), len(_BARS) - 1)] for peak in peaks)


def print_fields(fields: Iterable[tuple[str, object]]) -> None:
    """Print names and values in two columns; a long value is not wrapped, so that it can be copied."""
    console, lines = make_console(), [(plain(name), value) for name, value in fields]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        parts = str(value).expandtabs(4).split("\n")
        text = ("\n" + " " * (width + _GAP.cell_len)).join(plain(part) for part in parts)
        line = Text.assemble((f"{name:{width}}", "bold"), _GAP, (text, STYLES.get(text, "")))
        console.print(line, soft_wrap=True)


def _print_row(console: Console, start: Text, last: Text, *, is_cut: bool) -> None:
    indent = start.cell_len + _GAP.cell_len
    room = max(console.width - indent, _LEAST_ROOM)
    if is_cut:
        last.truncate(room, overflow="ellipsis")
    first, *others = last.wrap(console, room)
    console.print(start + _GAP + first, soft_wrap=True)
    for line in others:
        console.print(Text(" " * indent) + line, soft_wrap=True)


def _cell(heading: str, value: object) -> Text:
    text = plain(one_line(str(value)))
    return Text(text, style=STYLES.get(text.partition(" ")[0], "") if heading in _STATES else "")


def shown(name: str, value: Any, now: datetime) -> str:
    """Return the value of a row's field in words.

    The end of the field's name (``_at``, ``_bytes``) decides how it is shown.
    """
    if name.endswith("_at"):
        moment = datetime.fromisoformat(value)
        return f"{moment:%Y-%m-%d %H:%M:%S} UTC ({distance(moment, now)})"
    if name.endswith("_bytes"):
        return size(value)
    if name.endswith("_seconds"):
        return f"{value:.3f}".rstrip("0").rstrip(".") + " s"
    if name == "bpm":
        return f"{value:.1f} bpm"
    if name == "tags":
        return ", ".join(value)
    if name == "progress":
        return f"{value:.0%}"
    if name == "sample_rate":
        return f"{value:,} Hz"
    if name == "sampling":
        told = {
            key: item
            for key, item in in_order(value, Sampling).items()
            if item is not None and key != "negative_prompt"
        }
        return ", ".join(f"{label(key)} {item}" for key, item in told.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def in_order(values: Mapping[str, Any], declared: type[DataclassInstance]) -> dict[str, Any]:
    """Return the values in the order of the fields of this dataclass, then the others by name.

    PostgreSQL keeps no order of them.
    """
    names = [each.name for each in fields(declared)]
    others = sorted(values.keys() - {*names})
    return {name: values[name] for name in (*names, *others) if name in values}


def prompt_in_words(row: Generation) -> str:
    """Return the prompt, or what an empty one means, and which clips were given with it."""
    clips = [name for name in CLIP_FIELDS if getattr(row, f"{name}_sha256") is not None]
    return (row.prompt or UNCONDITIONAL) + (f" (with {' and '.join(clips)})" if clips else "")


def status_in_words(row: Generation) -> str:
    """Return the status, and how far a generation that runs has come."""
    return f"{row.status} {row.progress:.0%}" if row.is_processing else row.status


def tell_untrained(generations: Iterable[Generation]) -> None:
    """Warn of the models of these generations that make noise."""
    tell_untrained_models({row.model_name for row in generations})


def tell_untrained_models(names: Iterable[str]) -> None:
    """Warn of those of these models that make noise."""
    for name in sorted(filter(is_untrained, names)):
        tell(f"Note: {name} has {UNTRAINED_NOTICE}.")


def label(name: str) -> str:
    """Return a field's name in words, without its unit, which stands with the value."""
    return _LABELS.get(name) or name.removesuffix("_seconds").removesuffix("_bytes").replace(
        "_", " "
    )


def distance(moment: datetime, now: datetime | None = None) -> str:
    """Return how far away a moment is: ``3 min ago``, or ``in 2 h``."""
    passed = (now or datetime.now(UTC)) - moment
    return f"{span(passed)} ago" if passed >= timedelta(0) else f"in {span(-passed)}"


def span(length: timedelta) -> str:
    """Return a length of time in its largest whole unit."""
    seconds = length.total_seconds()
    unit, unit_seconds = next(
        ((unit, size) for unit, size in _UNITS if seconds >= size), _UNITS[-1]
    )
    return f"{int(seconds // unit_seconds)} {unit}"


def size(count: float) -> str:
    """Return a number of bytes in KiB, MiB or GiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"


def one_line(text: str) -> str:
    """Return the text with one space for each run of white space."""
    return " ".join(text.split())


def shorten(text: str, length: int) -> str:
    """Return at most this many characters; if some are missing, the last one is ``…``."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def near(path: str) -> str:
    """Return the path relative to this folder if it is in it, else as it is."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path
