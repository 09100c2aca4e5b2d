"""The table that compares ours, the floor and the other queues, row by row."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.contestants import Queue
from benchmarks.markdown import table
from benchmarks.measures import Measured

Values = dict[type[Queue], dict[int, float]]
"""The value of each round, by the kind of queue."""

NOTES = (
    "Each cell is the median of the rounds, with the smallest and the largest in brackets. `/s` is"
    " jobs per second: more is better. `ms` is milliseconds of each job: less is better. The ratio"
    " is ours divided by the floor, the median of the rounds. The floor's rows leave out the fence,"
    " leases, attempts and retries, prompts, statistics, search, idempotency keys, priorities and"
    " cancelling. CPU is that of the process, so without PostgreSQL's server."
)


class Comparison:
    """The values of all queues; rows stand in the order of the first round."""

    def __init__(
        self,
        ours: type[Queue],
        floor: type[Queue],
        *,
        variants: Sequence[type[Queue]] = (),
        peers: Sequence[type[Queue]] = (),
    ) -> None:
        self._ours, self._floor, self._variants, self._peers = ours, floor, variants, peers
        self._rows: dict[str, Values] = {}

    def add(self, kind: type[Queue], round_number: int, found: Measured) -> None:
        for name, value in found.items():
            self._rows.setdefault(name, {}).setdefault(kind, {})[round_number] = value

    def table(self) -> str:
        """Return it as Markdown."""
        others = [*self._variants, *self._peers]
        titles = ["measurement", self._ours.name, self._floor.name, "ratio"]
        titles += [kind.name for kind in others]
        if self._peers:
            titles.append("beside the best library")
        return table(titles, [self._cells(name, others) for name in self._rows])

    def _cells(self, name: str, others: Sequence[type[Queue]]) -> list[str]:
        values = self._rows[name]
        cells = [name, cell(values, self._ours), cell(values, self._floor)]
        cells += [self._beside_floor(values), *[cell(values, kind) for kind in others]]
        if self._peers:
            cells.append(self._beside_best_peer(name, values))
        return cells

    def _beside_floor(self, values: Values) -> str:
        ours, floor = values.get(self._ours, {}), values.get(self._floor, {})
        ratios = [ours[number] / floor[number] for number in ours if number in floor]
        return times(statistics.median(ratios)) if ratios else ""

    def _beside_best_peer(self, name: str, values: Values) -> str:
        peers = [median(values, kind) for kind in self._peers if kind in values]
        if not peers or self._ours not in values:
            return ""
        best = max(peers) if name.endswith("/s") else min(peers)
        return times(median(values, self._ours) / best)


def median(values: Values, kind: type[Queue]) -> float:
    return statistics.median(values[kind].values())


def cell(values: Values, kind: type[Queue]) -> str:
    """Return the median and the spread, or nothing."""
    if kind not in values:
        return ""
    least, most = min(values[kind].values()), max(values[kind].values())
    return f"{number(median(values, kind))} ({number(least)}–{number(most)})"


def number(value: float) -> str:
    """Return it with three digits, or with all before the point."""
    decimals = next((count for count, least in enumerate((100, 10, 1)) if value >= least), 3)
    return f"{value:,.{decimals}f}"


def times(factor: float) -> str:
    return f"{factor:.2f} ×" if factor >= 0.1 else f"{factor:.2g} ×"
