"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    return "\n".join(map(line, [titles, ["---"] * len(titles), *rows]))


def line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |".replace("| --- ", "|---")
