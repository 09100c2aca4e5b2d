"""Options that several commands share, and options made from settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dgx_music import validation
from dgx_music.catalog import MODELS
from dgx_music.cli.output import has_password, warn
from dgx_music.config import PREFIX, SETTINGS
from dgx_music.storage import Filters, GenerationStatus
from dgx_music.validation import check_run_at

WAITING = "Waiting"


def setting(name: str, **more: Any) -> Any:
    """Return the option that overrides this setting; its help is the setting's own description."""
    known = SETTINGS[name]
    default = f"{known.default:g}" if isinstance(known.default, float) else known.default
    text = known.description.replace("`", "")
    text = text if known.description.startswith("`") else text[:1].upper() + text[1:]
    text = f"{text} ({known.variable}{'' if default is None else f', default {default}'})"
    return typer.Option(f"--{name.replace('_', '-')}", help=text, show_default=False, **more)


def warn_of_password(parameter: typer.CallbackParam, url: str | None) -> str | None:
    """Return the URL as it is, and say who else can read a password in it."""
    if url is not None and has_password(url):
        variable = f"{PREFIX}{str(parameter.name).upper()}"
        warn(
            f"every user of this machine can read the password in {parameter.opts[0]}, in `ps`; set {variable} instead."
        )
    return url


def at_home(parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    """Return the path with a home in the place of ``~``: a shell leaves it in ``--out=~/a.wav``."""
    return None if path is None else Path(validation.at_home(parameter.opts[0], str(path)))


def given(**options: Any) -> dict[str, Any]:
    """Return the options that were given: the others keep their defaults."""
    return {name: value for name, value in options.items() if value is not None}


def complete_model(incomplete: str) -> list[str]:
    """Return the catalogue's models that start so, for the shell."""
    return [name for name in MODELS if name.startswith(incomplete)]


def filters_of(
    status: GenerationStatus | None, model: str | None, tenant: str | None, since: str | None, before: str | None
) -> Filters:
    """Return the filters that were given."""
    filters = Filters(status=status, model=model, tenant=tenant)
    if since is not None:
        filters["created_from"] = check_run_at(since, "--since")
    if before is not None:
        filters["created_before"] = check_run_at(before, "--before")
    return filters


DatabaseUrl = Annotated[str | None, setting("database_url", metavar="URL", callback=warn_of_password)]
Output = Annotated[str | None, setting("output", metavar="FOLDER|URL")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for programs.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Limit = Annotated[int, typer.Option("--limit", "-n", min=0, help="How many to print at most.")]
Timeout = Annotated[
    float | None,
    typer.Option(
        help="Give up waiting after this many seconds (exit code 124); the generation goes on.", rich_help_panel=WAITING
    ),
]
Status = Annotated[GenerationStatus | None, typer.Option("--status", "-s", help="Only those of this status.")]
ModelName = Annotated[
    str | None, typer.Option("--model", help="Only those of this model.", autocompletion=complete_model)
]
Tenant = Annotated[str | None, typer.Option(help="Only those made for this tenant.")]
Since = Annotated[
    str | None, typer.Option(metavar="TIME", help="Only those created then or later, as in 2026-01-31T12:00:00Z.")
]
Before = Annotated[str | None, typer.Option(metavar="TIME", help="Only those created earlier.")]
GenerationId = Annotated[
    str, typer.Argument(metavar="ID", help="The generation's id, or its first characters (8 or more).")
]
