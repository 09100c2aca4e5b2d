"""``dgx-music token``: who may use the web API, and for what."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dgx_music.cli.options import AsJson, DatabaseUrl
from dgx_music.cli.output import distance, print_json, print_line, print_table, tell

if TYPE_CHECKING:
    from dgx_music.client.tokens import NewToken
    from dgx_music.storage.models import Token

app = typer.Typer(
    help="Make, list and revoke the tokens of the web API.",
    no_args_is_help=True,
    add_completion=False,
)

_HEADINGS = ("NAME", "ROLE", "TENANT", "STATE", "CREATED", "USED", "EXPIRES")
RoleName = Literal["read", "enqueue", "operate"]
TokenName = Annotated[str, typer.Argument(metavar="NAME", help="Whom or what it is for.")]


@app.command()
def create(
    name: TokenName,
    role: Annotated[
        RoleName,
        typer.Option(help="What it allows: read, enqueue (and read), or operate (everything)."),
    ] = "enqueue",
    tenant: Annotated[
        str | None,
        typer.Option(help="It sees and makes the generations of this tenant only."),
    ] = None,
    days: Annotated[
        float | None, typer.Option(help="It is valid for so many days; default: for ever.")
    ] = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Make a token and print it, the only time that it is shown."""
    made = asyncio.run(_create(name, role, tenant, days, database_url))
    if as_json:
        print_json({"token": made.secret, **_as_dict(made.token, is_valid=True)})
        return
    print_line(made.secret)
    tell("Keep it now: it is not stored, and cannot be shown again.")


@app.command("list")
def list_tokens(database_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """List the tokens, oldest first: what each allows, and whether it is valid."""
    found = asyncio.run(_list(database_url))
    if as_json:
        print_json([_as_dict(token, is_valid=is_valid) for token, is_valid in found])
    elif found:
        print_table(_HEADINGS, [_as_line(token, is_valid=is_valid) for token, is_valid in found])
    else:
        tell("There are no tokens yet; make one with: dgx-music token create NAME")


@app.command()
def revoke(name: TokenName, database_url: DatabaseUrl = None) -> None:
    """Make a token invalid for ever; web servers that run notice it within 2 seconds."""
    asyncio.run(_revoke(name, database_url))
    tell(f"The token {name} is revoked.")


def _as_dict(token: Token, *, is_valid: bool) -> dict[str, object]:
    row = token.to_dict()
    del row["sha256"]
    return {**row, "is_valid": is_valid}


def _as_line(token: Token, *, is_valid: bool) -> tuple[object, ...]:
    return (
        token.name,
        token.role,
        token.tenant or "all",
        _state_of(token, is_valid=is_valid),
        distance(token.created_at),
        "never" if token.last_used_at is None else distance(token.last_used_at),
        "never" if token.expires_at is None else distance(token.expires_at),
    )


def _state_of(token: Token, *, is_valid: bool) -> str:
    if is_valid:
        return "valid"
    return "expired" if token.revoked_at is None else "revoked"


async def _create(
    name: str, role: RoleName, tenant: str | None, days: float | None, database_url: str | None
) -> NewToken:
    from dgx_music.cli.opening import opened
    from dgx_music.client.tokens import create_token

    async with opened(database_url):
        return await create_token(name, role, tenant=tenant, days=days)


async def _list(database_url: str | None) -> list[tuple[Token, bool]]:
    from dgx_music.cli.opening import opened
    from dgx_music.client.tokens import list_tokens

    async with opened(database_url):
        return await list_tokens()


async def _revoke(name: str, database_url: str | None) -> None:
    from dgx_music.cli.opening import opened
    from dgx_music.client.tokens import revoke_token

    async with opened(database_url):
        await revoke_token(name)
