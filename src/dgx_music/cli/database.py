"""``dgx-music db``: creates, migrates, empties and copies the database."""

from __future__ import annotations

from typing import Annotated

import typer

from dgx_music.cli.options import AsJson, DatabaseUrl, Yes
from dgx_music.errors import InvalidRequestError, remedy_for

app = typer.Typer(
    help="Create, migrate, empty or look at the database.",
    no_args_is_help=True,
    add_completion=False,
)


@app.command()
def init(database_url: DatabaseUrl = None) -> None:
    """Create the database and its tables."""
    from dgx_music.cli import schema

    schema.migrate(database_url)


@app.command()
def migrate(database_url: DatabaseUrl = None) -> None:
    """Bring the tables to this version; what is in them stays."""
    from dgx_music.cli import schema

    schema.migrate(database_url)


@app.command()
def reset(database_url: DatabaseUrl = None, yes: Yes = False) -> None:
    """Delete everything in the database.

    Its tables are created anew, empty; audio files stay where they are. On a terminal it asks
    first; elsewhere it needs --yes.
    """
    from dgx_music.cli import schema

    schema.reset(database_url, is_agreed=yes)


@app.command()
def current(database_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Print the revision that the database is at."""
    from dgx_music.cli import schema
    from dgx_music.cli.output import print_json, print_line, tell
    from dgx_music.storage.connection.revision import SCHEMA_REVISION as head  # noqa: N811

    found = schema.read_revision(database_url)
    if as_json:
        print_json({"revision": found, "head": head, "is_at_head": found == head})
        return
    print_line(f"{found or 'none'}{' (head)' if found == head else ''}")
    if found != head:
        tell(f"This version needs {head}; {remedy_for(found, head)}.")


@app.command()
def backup(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The new file.", show_default=False)],
    database_url: DatabaseUrl = None,
) -> None:
    """Copy a SQLite database into a new file, also while it is in use.

    Copy the output folder afterwards, and prune nothing meanwhile: then it has every file that the
    copy names.
    """
    from dgx_music.cli import schema

    if not file.strip():
        raise InvalidRequestError("FILE", "is empty", "name a new file")
    schema.copy(database_url, file)
