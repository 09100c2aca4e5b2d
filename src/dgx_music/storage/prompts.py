"""The prompts: each text once, with the number of its uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from typing import Any, cast

from sqlalchemy import (
    CTE,
    Integer,
    Select,
    Table,
    bindparam,
    column,
    delete,
    func,
    literal_column,
    not_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music import validation
from dgx_music.storage.listing import limited
from dgx_music.storage.models import Generation, Prompt, text_hash
from dgx_music.storage.prepared import Prepared
from dgx_music.storage.schema import dialect_of, insert, now
from dgx_music.storage.words import search_text

_COUNT_LOCK = 0x6467_7870  # "dgxp": the first half of advisory locks' numbers


async def track_prompt_usage(session: AsyncSession, prompt_text: str) -> Prompt:
    """Count one use of this prompt in one atomic statement, and return its row."""
    text = validation.check_prompt(prompt_text)
    if dialect_of(session) == "postgresql":
        await session.execute(select(func.pg_advisory_xact_lock(_COUNT_LOCK, _bucket(text))))
    return (await _count(session, [text]))[0]


async def get_prompt_by_text(session: AsyncSession, text: str) -> Prompt | None:
    """Return the prompt's row, or ``None`` if it was never used."""
    text = text.strip() or text  # the empty prompt is valid, white space alone is not
    return await session.scalar(select(Prompt).where(Prompt.text_hash == text_hash(text)))


async def get_most_used_prompts(session: AsyncSession, limit: int = 10) -> list[Prompt]:
    """Return prompts, most used first."""
    query = select(Prompt).order_by(Prompt.used_count.desc(), Prompt.id)
    return list(await session.scalars(limited(query, limit)))


async def count_prompt_uses(session: AsyncSession, texts: Iterable[str]) -> list[Prompt]:
    """Count one use for each text given, repeated ones too, and return the rows that were counted.

    On PostgreSQL a text that another open transaction is counting is left out: a long transaction
    of one producer must neither delay others with the same prompt nor deadlock with them. In a
    transaction of a stricter isolation all texts are left out, since a count that was made
    meanwhile would make it fail. ``count_overlooked_prompts`` counts them later.
    """
    texts = list(texts)
    if dialect_of(session) == "postgresql":
        free = await _lock_buckets(session, {_bucket(text) for text in texts})
        texts = [text for text in texts if _bucket(text) in free]
    return await _count(session, texts) if texts else []


async def uncount_prompt_uses(session: AsyncSession, texts: Iterable[str]) -> None:
    """Take back one use for each text given; a prompt that was used for nothing else is deleted."""
    for text, count in sorted(Counter(texts).items()):
        is_it = Prompt.text_hash == text_hash(text)
        is_used = select(Generation.id).where(Generation.prompt_id == Prompt.id).exists()
        unused = delete(Prompt).where(is_it, Prompt.used_count <= count, not_(is_used))
        await session.execute(unused)
        values = {"used_count": Prompt.used_count - count}
        counted = update(Prompt).where(is_it, Prompt.used_count > count).values(values)
        await session.execute(counted)


async def count_overlooked_prompts(session: AsyncSession, limit: int = 500) -> int:
    """Count the prompts of generations whose enqueue left that out; return how many generations.

    SQLite has none.
    """
    if dialect_of(session) != "postgresql":
        return 0
    overlooked = select(Generation.id, Generation.prompt).where(Generation.prompt_id.is_(None))
    unlocked = overlooked.limit(limit).with_for_update(skip_locked=True, key_share=True)
    rows = (await session.execute(unlocked)).all()
    prompts = await count_prompt_uses(session, [row.prompt for row in rows])
    counted = {prompt.text: prompt.id for prompt in prompts}
    for row in rows:
        if row.prompt in counted:
            linked = (
                update(Generation)
                .where(Generation.id == row.id)
                .values(prompt_id=counted[row.prompt])
            )
            await session.execute(linked, execution_options={"synchronize_session": False})
    return sum(row.prompt in counted for row in rows)


async def _lock_buckets(session: AsyncSession, buckets: Collection[int]) -> set[int]:
    """Lock these for the rest of the transaction, without waiting; return those that were free."""
    return set(await session.scalars(_lock_statement(), {"buckets": sorted(buckets)}))


@cache
def _lock_statement() -> Any:
    bucket = func.unnest(bindparam("buckets", type_=ARRAY(Integer))).column_valued("bucket")
    is_usual = func.current_setting("transaction_isolation") == "read committed"
    return select(bucket).where(is_usual, func.pg_try_advisory_xact_lock(_COUNT_LOCK, bucket))


def _bucket(text: str) -> int:
    """Return which of 256 locks counts this text: too many locks would fill the server's table."""
    return int(text_hash(text)[:2], 16)


async def _count(session: AsyncSession, texts: Iterable[str]) -> list[Prompt]:
    """Count in the order of the texts: two transactions with different orders would deadlock."""
    statement = _count_statement(dialect_of(session))
    options = {"populate_existing": True}
    return list(await session.scalars(statement, _rows(texts), execution_options=options))


@cache
def _count_statement(dialect: str) -> Any:
    return _counting(insert(dialect, Prompt)).returning(Prompt)


def _counting(upsert: Any) -> Any:
    """Return the INSERT so that a text that is there already is counted instead."""
    used_count = Prompt.used_count + upsert.excluded.used_count
    return upsert.on_conflict_do_update(
        index_elements=["text_hash"],
        set_={"used_count": used_count, "last_used_at": now()},
    )


# ------------------------------------------------------------------ as a part of the INSERT of rows


async def count_on_sqlite(session: AsyncSession, texts: Iterable[str]) -> dict[str, Any]:
    """Count one use for each text given, and return the row of each one's prompt.

    It has the prompt's ``id``, and the time of the database as ``now``.
    """
    return {row.text: row for row in await _COUNT_ON_SQLITE.rows_of_each(session, _rows(texts))}


def _rows(texts: Iterable[str]) -> list[dict[str, Any]]:
    """Return the row to insert for each text."""
    return [dict(zip(_USE, row, strict=True)) for row in zip(*_columns(texts), strict=True)]


def _columns(texts: Iterable[str]) -> tuple[Sequence[Any], ...]:
    """Return the columns ``_USE`` of these texts, each once, in order."""
    uses = Counter(texts)
    once = sorted(uses)
    counts = [uses[text] for text in once]
    return once, [*map(text_hash, once)], [*map(search_text, once)], counts


def uses_of(texts: Iterable[str]) -> dict[str, Any]:
    """Return the parameters of ``counted_prompts`` for one use of each text given."""
    return dict(zip(map("texts_{}".format, _USE), _columns(texts), strict=True))


def counted_prompts() -> CTE:
    """Return the part of PostgreSQL's INSERT that counts prompts, as ``count_prompt_uses`` does.

    Its parameters are those of ``uses_of``; it returns ids and texts of what it counted.
    """
    types = {name: _p[name].type for name in _USE}
    arrays = [bindparam(f"texts_{name}", type_=ARRAY(types[name])) for name in _USE]
    each = func.unnest(*arrays).table_valued(*(column(name, types[name]) for name in _USE))
    uses = _once(select(*each.render_derived(name="given").c), "uses")
    bucket = func.get_byte(func.decode(func.left(uses.c.text_hash, 2), "hex"), 0)
    is_usual = func.current_setting("transaction_isolation") == "read committed"
    buckets = _once(select(bucket.label("bucket")).distinct().where(is_usual), "buckets")
    is_free = func.pg_try_advisory_xact_lock(_COUNT_LOCK, buckets.c.bucket)
    free = _once(select(buckets.c.bucket).where(is_free), "free")
    # In the order of the texts: two transactions with different orders would deadlock.
    counted = select(uses).where(bucket.in_(select(free.c.bucket))).order_by(uses.c.text)
    upsert = postgresql.insert(_prompts).from_select([*_USE], counted, include_defaults=False)
    return cast("CTE", _counting(upsert).returning(_p.id, _p.text).cte("counted"))


def use_of(text: str) -> dict[str, Any]:
    """Return the parameters of ``counted_prompt`` for one use of this text."""
    return {
        "prompt": text,
        "text_hash": text_hash(text),
        "prompt_words": search_text(text),
        "bucket": _bucket(text),
    }


def counted_prompt() -> CTE:
    """Return the part of PostgreSQL's INSERT of one row that counts its prompt, if it is free.

    Its parameters are those of ``use_of``; it returns the id.
    """
    is_usual = func.current_setting("transaction_isolation") == "read committed"
    is_free = func.pg_try_advisory_xact_lock(_COUNT_LOCK, bindparam("bucket", type_=Integer))
    use = {
        "text": bindparam("prompt", type_=_p.text.type),
        "text_hash": bindparam("text_hash", type_=_p.text_hash.type),
        "search_text": bindparam("prompt_words", type_=_p.search_text.type),
        "used_count": literal_column("1"),
    }
    upsert = postgresql.insert(_prompts).from_select(
        list(use), select(*use.values()).where(is_usual, is_free), include_defaults=False
    )
    return cast("CTE", _counting(upsert).returning(_p.id).cte("counted"))


def _once(query: Select[Any], name: str) -> CTE:
    return query.cte(name).prefix_with("MATERIALIZED")


_prompts = cast("Table", Prompt.__table__)
_p = _prompts.c
_USE = ("text", "text_hash", "search_text", "used_count")
"""The columns of a prompt's row that are given."""
_COUNT_ON_SQLITE = Prepared(
    lambda: _counting(
        sqlite.insert(_prompts).values({name: bindparam(name) for name in _USE})
    ).returning(_p.id, _p.text, now().label("now"))
)
