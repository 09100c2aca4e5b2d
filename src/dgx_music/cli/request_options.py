"""The options of a request, as ``dgx-music enqueue`` takes them."""

from __future__ import annotations

import re
from copy import copy
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from dgx_music.cli.options import complete_model
from dgx_music.sampling import Sampling, SamplingOptions
from dgx_music.validation import AudioFormat

_SAMPLING = get_type_hints(SamplingOptions, include_extras=True)


def _option(kind: Any, help: str, *names: str, panel: str, **more: Any) -> Any:  # noqa: A002
    return Annotated[kind | None, typer.Option(*names, help=help, rich_help_panel=panel, **more)]


def _music(kind: Any, help: str, *names: str, **more: Any) -> Any:  # noqa: A002
    return _option(kind, help, *names, panel="Music", **more)


def _queueing(kind: Any, help: str, *names: str, **more: Any) -> Any:  # noqa: A002
    return _option(kind, help, *names, panel="Queueing", **more)


def _label(kind: Any, help: str, *names: str, **more: Any) -> Any:  # noqa: A002
    return _option(kind, help, *names, panel="Labels", **more)


def _sampling(each: Field[Any]) -> Any:
    """Return the annotation of a sampling field: its type, meaning and default are the library's."""
    hint = _SAMPLING[each.name]
    return _music(hint.__origin__, _in_options(hint.__metadata__[0], each.default))


def _in_options(meaning: str, default: object) -> str:
    """Say a field's meaning with options for fields, and with its default.

    Of a field without a value, the meaning says "None for …".
    """
    meaning = re.sub(r"\w+_\w+", lambda name: f"--{name[0].replace('_', '-')}", meaning)
    if default is None:
        return meaning.replace("None for", "default:")
    shown = default if isinstance(default, str) else f"{default:g}"
    return f"{meaning.removesuffix('.')}; default {shown}."


REQUEST_OPTIONS: dict[str, Any] = {
    "duration": _music(float, "Seconds of audio, at most 300; default 10.", "--duration", "-d"),
    "model": _music(
        str,
        "A model's name, or a local folder's absolute path; default DGX_MUSIC_MODEL, else musicgen-small.",
        autocompletion=complete_model,
    ),
    "continuation": _music(
        Path,
        "Start with this audio, at most 30 s, and go on; the duration counts from its start.",
        metavar="FILE",
    ),
    "melody": _music(
        Path,
        "Follow the tune of this audio's first 300 s; for musicgen-melody and its like.",
        metavar="FILE",
    ),
    "channels": _music(int, "1 or 2; default: the model's own, 1 for a local folder."),
    "sample_rate": _music(
        int, "Hz in the file, 8000 to 192000; default: the model's own, 32000 for a local folder."
    ),
    "audio_format": _music(AudioFormat, "Of the file; default: the worker's own setting."),
    **{each.name: _sampling(each) for each in fields(Sampling)},
    "variations": _music(
        int,
        "So many takes, at most 16: seed, seed + 1, and so on, or seeds chosen for them; default 1.",
    ),
    "priority": _queueing(
        int,
        "Higher goes first; a point is worth a minute of waiting; default 0.",
        "--priority",
        "-p",
    ),
    "tenant": _queueing(str, "For whom: workers may limit each tenant's share."),
    "run_at": _queueing(str, "Not before this time, such as 2026-01-31T12:00:00Z."),
    "max_attempts": _queueing(
        int, "Give up after this many failures, lost workers included; default 10."
    ),
    "title": _label(str, "What you call it."),
    "notes": _label(str, "What you want to say about it."),
    "tags": _label(list[str], "A word to find it by; give it again for more.", "--tags", "--tag"),
    "starred": _label(bool, "Give it a star.", "--starred", "--star"),
    "idempotency_key": _queueing(str, "The same request under the same key is enqueued only once."),
    "metadata": _queueing(str, "An object of your own to keep with it.", metavar="JSON"),
}
"""Each option's annotation, by the name that ``dgx_music.enqueue`` has for it."""


def _without_default(option: Any) -> Any:
    """Return the option with a help that says no default."""
    described = copy(option.__metadata__[0])
    described.help = f"{described.help.partition('; default')[0].removesuffix('.')}."
    return Annotated[option.__origin__, described]


_CIRCUMSTANCES = ("priority", "run_at", "max_attempts", "idempotency_key")
CHANGE_OPTIONS: dict[str, Any] = {
    name: option if name in _CIRCUMSTANCES else _without_default(option)
    for name, option in REQUEST_OPTIONS.items()
    if name not in ("seed", "variations")
}
"""The options of a request that is made again: without them most are as they were."""
