"""Full-text search in prompts, titles, notes and tags: the same results by SQLite's FTS5 and PostgreSQL's tsvector.

What a user types is only words. They are parsed here, in one way for both databases, and written
again in each one's query language. So no operator and no open quote of the user's text reaches a
database.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

from sqlalchemy import (
    ColumnElement,
    Select,
    and_,
    column,
    func,
    join,
    literal_column,
    select,
    table,
)
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from dgx_music import validation
from dgx_music.errors import InvalidRequestError
from dgx_music.storage.filters import Filters, conditions
from dgx_music.storage.listing import MAX_ROWS
from dgx_music.storage.models import Generation, Prompt
from dgx_music.storage.schema import dialect_of
from dgx_music.storage.words import words_of

_PIECE = re.compile(r'(-?)(?:"([^"]*)"?|([^\s"]+))')
_STOP_WORDS = """
i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it
its itself they them their theirs themselves what which who whom this that these those am is are was were be been
being have has had having do does did doing a an the and but if or because as until while of at by for with about
against between into through during before after above below to from up down in out on off over under again
further then once here there when where why how all any both each few more most other some such no nor not only
own same so than too very s t can will just don should now
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
"""Words that PostgreSQL's 'english' does not index; SQLite does, so they are left out here."""

_ENGLISH: ColumnElement[Any] = literal_column("'english'::regconfig")
_BY_LENGTH = 2
"""Normalisation of ts_rank_cd: by the number of words, so that short prompts come first."""


@dataclass(frozen=True)
class SearchHit:
    """A prompt that was found, with its newest generation; or a generation found by its labels."""

    generation: Generation
    """It has the words in its title, notes and tags, or is the newest one of a prompt with them."""
    rank: float
    """How well it fits, from 0 to 1 for the best prompt and for the best labels of this search."""
    used_count: int
    """How often the prompt was asked for in total."""


class _Terms(NamedTuple):
    """What to search: each term is one word, or several that must follow one another."""

    wanted: tuple[str, ...]
    excluded: tuple[str, ...]


async def search_generations(
    session: AsyncSession, words: str, *, limit: int = 20, **filters: Unpack[Filters]
) -> list[SearchHit]:
    """Return at most ``limit`` hits that hold all the words, best first.

    A prompt is one hit however often it was used: its newest generation. A generation whose title,
    notes and tags hold all the words is a hit of its own; it comes before equally good prompts, and
    of these the one used last comes first. Words match in any form (``drum`` finds ``drums``); case
    and accents do not count. Words ``"in quotes"`` must follow one another, and ``-words`` must be
    absent from the prompt or the labels that hold the others. In a script without spaces between
    words (Chinese, Japanese, Thai) any part is found. The filters are those of
    ``list_generations``. A generation without ``prompt_id`` (added by hand, or with a prompt that
    is not counted yet) is found only by its labels. Raises ``InvalidRequestError``.
    """
    terms = _parse(validation.check_search(words))
    limit = validation.check_integer("limit", limit, 0, MAX_ROWS)
    is_postgresql = dialect_of(session) == "postgresql"
    finds = _ON_POSTGRESQL if is_postgresql else _ON_SQLITE
    hits: dict[str, SearchHit] = {}
    for find in finds:
        rows = (await session.execute(find(terms, filters).limit(limit))).all()
        for generation, rank, used_count in rows:
            hit = SearchHit(generation, rank / rows[0].rank, used_count)
            known = hits.setdefault(generation.id, hit)
            if known.rank < hit.rank:
                hits[generation.id] = hit
    return sorted(hits.values(), key=lambda hit: hit.rank, reverse=True)[:limit]


def _find_prompts_on_postgresql(terms: _Terms, filters: Filters) -> Select[Any]:
    query = _postgresql_query(terms)
    # The model does not have this column, since nobody reads it.
    text: ColumnElement[Any] = literal_column("prompts.text_search")
    rank = func.ts_rank_cd(text, query, _BY_LENGTH)
    return _newest_of(Prompt, rank, filters).where(text.op("@@")(query))


def _find_labels_on_postgresql(terms: _Terms, filters: Filters) -> Select[Any]:
    query = _postgresql_query(terms)
    text = func.to_tsvector(_ENGLISH, Generation.search_text)  # as the index has it
    rank = func.ts_rank_cd(text, query, _BY_LENGTH)
    is_match = and_(Generation.search_text.is_not(None), text.op("@@")(query))
    return _labelled(Generation, rank, filters).where(is_match)


def _postgresql_query(terms: _Terms) -> ColumnElement[Any]:
    asked = " ".join([*_quoted(terms.wanted), *(f"-{term}" for term in _quoted(terms.excluded))])
    return func.websearch_to_tsquery(_ENGLISH, asked)


def _find_prompts_on_sqlite(terms: _Terms, filters: Filters) -> Select[Any]:
    index = table("prompts_search", column("rowid"), column("rank"))
    found = join(index, Prompt, Prompt.id == index.c.rowid)
    is_match = literal_column("prompts_search").op("MATCH")(_sqlite_query(terms))
    return _newest_of(found, -index.c.rank, filters).where(is_match)


def _find_labels_on_sqlite(terms: _Terms, filters: Filters) -> Select[Any]:
    index = table("generations_search", column("rowid"), column("rank"))
    words = table("generations_words", column("id"), column("generation_id"))
    found = join(index, words, words.c.id == index.c.rowid)
    found = join(found, Generation, Generation.id == words.c.generation_id)
    is_match = literal_column("generations_search").op("MATCH")(_sqlite_query(terms))
    return _labelled(found, -index.c.rank, filters).where(is_match)


def _sqlite_query(terms: _Terms) -> str:
    asked = " AND ".join(_quoted(terms.wanted))
    return f"({asked}) NOT ({' OR '.join(_quoted(terms.excluded))})" if terms.excluded else asked


_ON_POSTGRESQL = (_find_labels_on_postgresql, _find_prompts_on_postgresql)
_ON_SQLITE = (_find_labels_on_sqlite, _find_prompts_on_sqlite)


def _labelled(found: Any, rank: ColumnElement[Any], filters: Filters) -> Select[Any]:
    """Return the generations found by their labels that fit, best first, as ``_newest_of``."""
    used_count = func.coalesce(Prompt.used_count, 1)
    query = select(Generation, rank.label("rank"), used_count).select_from(found)
    query = query.outerjoin(Prompt, Prompt.id == Generation.prompt_id)
    newest_first = (Generation.created_at.desc(), Generation.id.desc())
    return query.where(*conditions(filters, Generation)).order_by(rank.desc(), *newest_first)


def _newest_of(found: Any, rank: ColumnElement[Any], filters: Filters) -> Select[Any]:
    """Return the prompts found with a generation that fits, best first.

    Columns: the newest such generation, the rank, the uses of the prompt.
    """
    other = aliased(Generation)
    newest = select(other.id).where(other.prompt_id == Prompt.id, *conditions(filters, other))
    newest = newest.order_by(other.created_at.desc(), other.id.desc()).limit(1)
    chosen = Generation.id == newest.correlate(Prompt).scalar_subquery()
    query = select(Generation, rank.label("rank"), Prompt.used_count).select_from(found)
    query = query.join(Generation, chosen)
    return query.order_by(rank.desc(), Prompt.last_used_at.desc(), Prompt.id.desc())


def _quoted(terms: Sequence[str]) -> list[str]:
    return [f'"{term}"' for term in terms]


def _parse(text: str) -> _Terms:
    """Return the terms of the text; raise ``InvalidRequestError`` if there is no word to search."""
    plain = unicodedata.normalize("NFKC", text)  # for the quotes and minuses
    wanted: dict[str, None] = {}
    excluded: dict[str, None] = {}
    for minus, quoted, bare in _PIECE.findall(plain):
        term = " ".join(_without_stop_words(words_of(quoted or bare)))
        if term:
            (excluded if minus else wanted)[term] = None
    if not wanted:
        problem = "only says what to leave out" if excluded else "has no word to look for"
        raise InvalidRequestError("words", problem, "add one, and not one as frequent as 'the'")
    return _Terms(tuple(wanted), tuple(excluded))


def _without_stop_words(words: list[str]) -> list[str]:
    """Leave out the stop words at both ends; PostgreSQL counts those in between as places."""
    kept = [place for place, word in enumerate(words) if word not in STOP_WORDS]
    return words[kept[0] : kept[-1] + 1] if kept else []
