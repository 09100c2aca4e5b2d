"""Full-text search in the prompts: the same results by SQLite's FTS5 and PostgreSQL's tsvector.

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

from sqlalchemy import ColumnElement, Select, column, func, join, literal_column, select, table
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

_BY_LENGTH = 2
"""Normalisation of ts_rank_cd: by the number of words, so that short prompts come first."""


@dataclass(frozen=True)
class SearchHit:
    """A prompt that was found, with its newest generation."""

    generation: Generation
    """The newest generation of this prompt that fits the filters."""
    rank: float
    """How well the prompt fits: higher is better; comparable only within one search."""
    used_count: int
    """How often the prompt was asked for in total."""


class _Terms(NamedTuple):
    """What to search: each term is one word, or several that must follow one another."""

    wanted: tuple[str, ...]
    excluded: tuple[str, ...]


async def search_generations(
    session: AsyncSession, words: str, *, limit: int = 20, **filters: Unpack[Filters]
) -> list[SearchHit]:
    """Return at most ``limit`` prompts that hold all the words, best first.

    A prompt is one hit however often it was used; of equally good hits the one used last comes
    first. Words match in any form (``drum`` finds ``drums``); case and accents do not count. Words
    ``"in quotes"`` must follow one another, and ``-words`` must be absent. In a script without
    spaces between words (Chinese, Japanese, Thai) any part is found. The filters are those of
    ``list_generations``. A generation without ``prompt_id`` (added by hand, or with a prompt that
    is not counted yet) is not found. Raises ``InvalidRequestError``.
    """
    terms = _parse(validation.check_search(words))
    limit = validation.check_integer("limit", limit, 0, MAX_ROWS)
    find = _find_postgresql if dialect_of(session) == "postgresql" else _find_sqlite
    rows = await session.execute(find(terms, filters).limit(limit))
    return [SearchHit(generation, rank, used_count) for generation, rank, used_count in rows.all()]


def _find_postgresql(terms: _Terms, filters: Filters) -> Select[Any]:
    asked = " ".join([*_quoted(terms.wanted), *(f"-{term}" for term in _quoted(terms.excluded))])
    query = func.websearch_to_tsquery(literal_column("'english'::regconfig"), asked)
    # The model does not have this column, since nobody reads it.
    text: ColumnElement[Any] = literal_column("prompts.text_search")
    rank = func.ts_rank_cd(text, query, _BY_LENGTH)
    return _newest_of(Prompt, rank, filters).where(text.op("@@")(query))


def _find_sqlite(terms: _Terms, filters: Filters) -> Select[Any]:
    asked = " AND ".join(_quoted(terms.wanted))
    if terms.excluded:
        asked = f"({asked}) NOT ({' OR '.join(_quoted(terms.excluded))})"
    index = table("prompts_search", column("rowid"), column("rank"))
    found = join(index, Prompt, Prompt.id == index.c.rowid)
    is_match = literal_column("prompts_search").op("MATCH")(asked)
    return _newest_of(found, -index.c.rank, filters).where(is_match)


def _newest_of(found: Any, rank: ColumnElement[Any], filters: Filters) -> Select[Any]:
    """Return the prompts found with a generation that fits, best first.

    Columns: the newest such generation, the rank, the uses of the prompt.
    """
    other = aliased(Generation)
    newest = select(other.id).where(other.prompt_id == Prompt.id, *conditions(filters, other))
    newest = newest.order_by(other.created_at.desc(), other.id.desc()).limit(1)
    chosen = Generation.id == newest.correlate(Prompt).scalar_subquery()
    query = select(Generation, rank, Prompt.used_count).select_from(found).join(Generation, chosen)
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
