"""A claim takes due generations for a worker; due.py decides which ones are due."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from sqlalchemy import Integer, Select, bindparam, insert, literal, literal_column, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.errors import DatabaseNotMigratedError
from dgx_music.statuses import PENDING, PROCESSING
from dgx_music.storage.connection.revision import SCHEMA_REVISION
from dgx_music.storage.due import CLAIM_ORDER, due_rows, take_turns
from dgx_music.storage.generation import g, generations
from dgx_music.storage.leases import Lease, is_one_of
from dgx_music.storage.models import attempts
from dgx_music.storage.prepared import Prepared
from dgx_music.storage.schema import (
    dialect_of,
    is_our_schema,
    now,
    now_plus,
    rechecked,
    schema_revision,
    written,
)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claimed row: the lease on it, and what it asks for."""

    lease: Lease
    prompt: str
    model_name: str
    duration_seconds: float
    sample_rate: int
    channels: int
    sampling: Mapping[str, Any]
    failures: int
    continuation_sha256: str | None = None
    melody_sha256: str | None = None
    audio_format: str | None = None
    title: str | None = None


async def claim(
    session: AsyncSession,
    *,
    worker_id: str,
    model_name: str,
    limit: int,
    lease_seconds: float,
    tenant_limit: int | None = None,
) -> list[Claim]:
    """Take up to ``limit`` due generations of this model for this worker, most urgent first.

    With a ``tenant_limit`` no tenant has more than this many running, whichever workers hold them:
    they are counted in the rows themselves, by one claim at a time. Nothing of a paused model is
    taken. Raises ``DatabaseNotMigratedError``, and takes nothing, if the schema is not this
    version's any more.
    """
    if tenant_limit is not None:
        await take_turns(session)
    dialect = dialect_of(session)
    if tenant_limit is None:
        options = (worker_id, model_name, lease_seconds)
        statement = _claim_statement(dialect, *options, is_of_one=limit == 1)
    else:
        due = due_rows(dialect, model_name, limit, tenant_limit)
        statement = _claim(dialect, due, worker_id, lease_seconds)
    is_given = tenant_limit is None and limit != 1
    claimed = await statement.rows(session, {"most": limit} if is_given else {})
    rows = sorted(claimed, key=lambda row: (row.claim_order, row.id))
    if rows and dialect != "postgresql":
        made = [
            {"generation_id": row.id, "attempt": row.attempt, "worker_id": worker_id}
            for row in rows
        ]
        await _ADD_ATTEMPT.run_each(session, made)
    if not rows:
        await check_schema(session)
    return [_as_claim(row) for row in rows]


async def check_schema(session: AsyncSession) -> None:
    """Raise ``DatabaseNotMigratedError`` if the schema has become an older or a newer version's.

    A schema without a revision is being made anew: there is nothing to claim, and no reason to give
    up.
    """
    found = await session.scalar(schema_revision())
    if found not in (None, SCHEMA_REVISION):
        raise DatabaseNotMigratedError(found, SCHEMA_REVISION)


@lru_cache
def _claim_statement(
    dialect: str, worker_id: str, model_name: str, lease_seconds: float, *, is_of_one: bool
) -> Prepared:
    """Return the statement that claims at most ``most``, which is its parameter; made once.

    A claim of one row, the usual one of a busy worker, says so in its text. For a parameter
    PostgreSQL expects a tenth of all rows that wait, and so makes a new plan for each claim.
    """
    most = literal_column("1", Integer) if is_of_one else bindparam("most", type_=Integer)
    due = due_rows(dialect, model_name, most)
    return _claim(dialect, due, worker_id, lease_seconds)


def _claim(dialect: str, due: Select[Any], worker_id: str, lease_seconds: float) -> Prepared:
    """Return the statement that claims these rows.

    On PostgreSQL it also adds the attempts, in the same round trip; on SQLite it cannot.
    """
    claimed = (
        update(generations)
        .where(is_one_of(due), rechecked(g.status) == written(PENDING), is_our_schema())
        .values(
            status=PROCESSING,
            attempt=g.attempt + 1,
            worker_id=worker_id,
            started_at=now(),
            lease_expires_at=now_plus(lease_seconds),
            progress=0.0,
        )
        .returning(*_CLAIMED)
    )
    statement = _with_attempts(claimed, worker_id) if dialect == "postgresql" else claimed
    return Prepared(lambda: statement)


def _with_attempts(claimed: Any, worker_id: str) -> Any:
    taken = claimed.cte("claimed")
    columns = ["generation_id", "attempt", "worker_id"]
    made = select(taken.c.id, taken.c.attempt, literal(worker_id))
    return select(taken).add_cte(insert(attempts).from_select(columns, made).cte("made"))


_ADD_ATTEMPT = Prepared(
    lambda: insert(attempts).values(
        {name: bindparam(name) for name in ("generation_id", "attempt", "worker_id")}
    )
)
_COLUMNS = tuple(each.name for each in fields(Claim) if each.name != "lease")
"""A claim has the row's own names, so a new column is one field of ``Claim``."""
_CLAIMED = (g.id, g.attempt, *(g[name] for name in _COLUMNS), CLAIM_ORDER.label("claim_order"))


def _as_claim(row: Any) -> Claim:
    values = {name: getattr(row, name) for name in _COLUMNS}
    return Claim(lease=Lease(row.id, row.attempt), **values | {"sampling": row.sampling or {}})
