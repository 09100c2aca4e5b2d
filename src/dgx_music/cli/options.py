"""Options that several commands share, and options made from settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_origin

import typer

from dgx_music import validation
from dgx_music.catalog import MODELS
from dgx_music.config import SETTINGS

WAITING = "Waiting"

Command = TypeVar("Command", bound=Callable[..., None])


def setting(name: str, **more: Any) -> Any:
    """Return the option that overrides this setting; its help is the setting's own description."""
    known = SETTINGS[name]
    default = f"{known.default:g}" if isinstance(known.default, float) else known.default
    text = known.description.replace("`", "")
    text = text if known.description.startswith("`") else text[:1].upper() + text[1:]
    text = f"{text} ({known.variable}{'' if default is None else f', default {default}'})"
    return typer.Option(
        f"--{name.replace('_', '-')}",
        help=text,
        show_default=False,
        metavar=known.metavar,
        callback=warn_of_password if known.is_secret else None,
        autocompletion=complete_model if name == "model" else None,
        **more,
    )


def setting_options(names: Iterable[str], *, has_panels: bool = False) -> dict[str, Any]:
    """Return the annotation of each of these settings' options, by the setting's name."""
    options = {}
    for name in names:
        kind, panel = SETTINGS[name].type, SETTINGS[name].panel
        is_checked_here = kind in (int, float) or get_origin(kind) is Literal
        option = setting(name, rich_help_panel=panel if has_panels else None)
        options[name] = Annotated[(kind if is_checked_here else str) | None, option]
    return options


def taking(
    options: Mapping[str, Any],
    *,
    before: str | None = None,
) -> Callable[[Command], Command]:
    """Give a command an option for each of these annotations; it gets them as ``**options``.

    An option that is not given is ``None``. In the help they stand before the parameter named
    ``before``, or else last.
    """
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in options.items()
    ]

    def add(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [
            each
            for each in signature.parameters.values()
            if each.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        own = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
        at = next((index for index, each in enumerate(own) if each.name == before), len(own))
        command.__signature__ = signature.replace(parameters=own[:at] + added + own[at:])  # type: ignore[attr-defined]
        return command

    return add


def warn_of_password(parameter: typer.CallbackParam, url: str | None) -> str | None:
    """Return the URL as it is; warn if other users of this machine can read a password in it."""
    from dgx_music.cli.output import has_password, warn

    if url is not None and has_password(url):
        option, variable = parameter.opts[0], SETTINGS[str(parameter.name)].variable
        warn(
            f"every user of this machine can read the password in {option}, in `ps`; set {variable} instead."
        )
    return url


def at_home(parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    """Return the path with the home folder for ``~``: a shell leaves it in ``--out=~/a.wav``."""
    return None if path is None else Path(validation.at_home(parameter.opts[0], str(path)))


def given(**options: Any) -> dict[str, Any]:
    """Return the options that were given; those that were not are ``None``."""
    return {name: value for name, value in options.items() if value is not None}


def complete_model(incomplete: str) -> list[str]:
    """Return the names of the models that start with this text, for the shell."""
    return [name for name in MODELS if name.startswith(incomplete)]


DatabaseUrl = Annotated[str | None, setting("database_url")]
Output = Annotated[str | None, setting("output")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for programs.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Limit = Annotated[int, typer.Option("--limit", "-n", min=0, help="How many to print at most.")]
Timeout = Annotated[
    float | None,
    typer.Option(
        help="Give up waiting after this many seconds (exit code 124); the generation goes on.",
        rich_help_panel=WAITING,
    ),
]
GenerationId = Annotated[
    str,
    typer.Argument(
        metavar="ID", help="The generation's id, or any part of it that fits no other one."
    ),
]
