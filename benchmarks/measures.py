"""The measurements of every queue: each on a fresh database, each returns a value for each row.

Values are jobs per second if the row's name ends with ``/s``, and milliseconds otherwise.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager

from benchmarks import processes
from benchmarks.contestants import (
    PRODUCERS,
    ClaimingQueue,
    Queue,
    enqueue_at_once,
    enqueue_each,
)
from benchmarks.places import Place, PostgresPlace

WARM_UP = 20
BULK_CALLS = 5
CLAIMS_IN_A_TURN = 5
LONGEST_SECONDS = 300.0

Measured = dict[str, float]
"""A value for each row of the table."""


@asynccontextmanager
async def opened(place: Place, kind: type[Queue]) -> AsyncIterator[Queue]:
    queue = await kind.open(await place.fresh(kind))
    yield queue
    await queue.close()


async def seconds(work: Awaitable[object]) -> float:
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


def prompts(count: int, kind: str = "prompt") -> list[str]:
    return [f"{kind} {number}" for number in range(count)]


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


# producers


async def measure_enqueue(place: Place, kind: type[Queue], count: int) -> Measured:
    async with opened(place, kind) as queue:
        await enqueue_each(queue, prompts(WARM_UP, "warm"))
        cpu = time.process_time()
        rate = count / await seconds(enqueue_each(queue, prompts(count)))
        cpu = time.process_time() - cpu
    return {
        "enqueue, one at a time, /s": rate,
        "CPU of the producer, one at a time, ms": 1000 * cpu / count,
    }


async def measure_enqueue_at_once(place: Place, kind: type[Queue], count: int) -> Measured:
    async with opened(place, kind) as queue:
        await enqueue_at_once(queue, prompts(4 * PRODUCERS, "warm"))
        cpu = time.process_time()
        rate = count / await seconds(enqueue_at_once(queue, prompts(count)))
        cpu = time.process_time() - cpu
    return {
        f"enqueue, {PRODUCERS} at a time in one process, /s": rate,
        f"CPU of the producer, {PRODUCERS} at a time, ms": 1000 * cpu / count,
    }


async def measure_bulk(place: Place, kind: type[Queue], count: int) -> Measured:
    """Measure the first call in a fresh database, whose files have to grow, and later ones."""
    if not kind.has_bulk:
        return {}
    async with opened(place, kind) as queue:
        await queue.enqueue_many(prompts(WARM_UP, "warm"))
        wanted = prompts(count * (1 + BULK_CALLS))
        calls = [wanted[start : start + count] for start in range(0, len(wanted), count)]
        first, *later = [await seconds(queue.enqueue_many(each)) for each in calls]
    name = f"enqueue, {count:,} in one transaction"
    return {
        f"{name}, /s": count / statistics.median(later),
        f"{name}, the first, /s": count / first,
    }


# workers


class Arrivals:
    """When each job reached its handler, and the CPU time that this process had used by then.

    Called from any thread.
    """

    def __init__(self, expected: int) -> None:
        self.at: dict[str, float] = {}
        self._expected = expected
        self._moments: list[tuple[float, float]] = []
        self._all, self._loop = asyncio.Event(), asyncio.get_running_loop()

    def __call__(self, prompt: str) -> None:
        self.at[prompt] = time.monotonic()
        self._moments.append((self.at[prompt], time.process_time()))
        if len(self._moments) == self._expected:
            self._loop.call_soon_threadsafe(self._all.set)

    async def wait(self) -> None:
        """Wait until as many have arrived as are expected."""
        async with asyncio.timeout(LONGEST_SECONDS):
            await self._all.wait()

    def seconds_each(self, skipped: int) -> tuple[float, float]:
        """Return the seconds of the clock and of CPU time of each job after the first few."""
        if len(self.at) != self._expected:
            raise RuntimeError(f"{self._expected} jobs arrived, {len(self.at)} of them different")
        (first, first_cpu), (last, last_cpu) = self._moments[skipped], self._moments[-1]
        count = self._expected - skipped - 1
        return (last - first) / count, (last_cpu - first_cpu) / count


@asynccontextmanager
async def working(queue: Queue, slots: int, arrivals: Arrivals) -> AsyncIterator[None]:
    """Have a worker run meanwhile; its error is raised here."""
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(queue.work(slots, arrivals), name="worker")
        yield
        await arrivals.wait()
        await queue.stop()


async def measure_drain(place: Place, kind: type[Queue], count: int, slots: int) -> Measured:
    """Measure one worker process, between the first and the last call of its handler."""
    async with opened(place, kind) as queue:
        await queue.enqueue_many(prompts(WARM_UP + count))
        arrivals = Arrivals(WARM_UP + count)
        async with working(queue, slots, arrivals):
            pass
    clock, cpu = arrivals.seconds_each(WARM_UP)
    name = f"{slots} slot{'s' if slots > 1 else ''}"
    return {f"drain, {name}, /s": 1 / clock, f"CPU of the worker process, {name}, ms": 1000 * cpu}


async def measure_processes(
    place: Place, kind: type[Queue], count: int, workers: int, slots: int
) -> Measured:
    """Measure several worker processes, while all of them work."""
    if not kind.is_shared:
        return {}
    location = await place.fresh(kind)
    started = [await processes.start("work", kind, location, str(slots)) for _ in range(workers)]
    queue = await kind.open(location)
    await queue.enqueue_many(prompts(count))
    await queue.close()
    for process in started:
        processes.begin(process)
    moments = await asyncio.gather(*[processes.hear(process) for process in started])
    await asyncio.gather(*[process.wait() for process in started])
    if sum(map(len, moments)) != count:
        raise RuntimeError(f"of {count} jobs the workers got {[len(own) for own in moments]}")
    rate = rate_of_all([own for own in moments if own])
    return {f"drain, {workers} processes of {slots} slots, /s": rate} if rate else {}


def rate_of_all(moments: list[list[float]]) -> float:
    """Return the jobs per second while all workers work; 0 if they never did at once.

    That is from the first job of the worker that began last to the last job of the one that ended
    first.
    """
    begin, end = max(own[0] for own in moments), min(own[-1] for own in moments)
    inside = sum(begin < moment <= end for own in moments for moment in own)
    return inside / (end - begin) if inside else 0.0


async def measure_pickup(place: Place, kind: type[Queue], count: int) -> Measured:
    """Measure how soon an idle worker calls its handler after a producer's commit.

    The producer is another process.
    """
    location = await place.fresh(kind)
    queue, arrivals = await kind.open(location), Arrivals(WARM_UP + count)
    producer = await processes.start("produce", kind, location, str(WARM_UP + count))
    async with working(queue, 1, arrivals):
        processes.begin(producer)
        told = [await processes.hear(producer) for _ in range(WARM_UP + count)]
    await producer.wait()
    await queue.close()
    waits = [1000 * (arrivals.at[prompt] - committed) for prompt, committed in told[WARM_UP:]]
    return {
        "pickup by an idle worker, p50, ms": percentile(waits, 0.5),
        "pickup by an idle worker, p95, ms": percentile(waits, 0.95),
    }


# claims beside many finished rows


Opened = dict[tuple[int, type[ClaimingQueue]], ClaimingQueue]
"""The open queues, by the number of finished rows and by their kind."""
Turn = tuple[int, type[ClaimingQueue], Measured]
"""The number of the turn, whose turn it was, and what was measured."""


async def measure_claims(
    place: Place, kinds: list[type[ClaimingQueue]], kept: tuple[int, ...], turns: int
) -> AsyncIterator[Turn]:
    """Measure the claim of one row; on PostgreSQL before and after a VACUUM ANALYZE.

    All databases are made first and measured in short turns, so that a slow moment of the machine
    meets all of them.
    """
    locations = {(finished, kind): await place.fresh(kind) for finished in kept for kind in kinds}
    waiting = 2 * (turns + 1) * CLAIMS_IN_A_TURN
    opened = {key: await open_kept(*key, where, waiting) for key, where in locations.items()}
    if isinstance(place, PostgresPlace):
        async for turn in take_turns(opened, turns, ", never vacuumed"):
            yield turn
        for location in locations.values():
            place.vacuum(location)
    async for turn in take_turns(opened, turns, ""):
        yield turn
    for queue in opened.values():
        await queue.close()


async def open_kept(
    finished: int, kind: type[ClaimingQueue], location: str, waiting: int
) -> ClaimingQueue:
    queue = await kind.open(location)
    await queue.add_finished(finished)
    await queue.enqueue_many(prompts(waiting))
    await time_claims(queue)  # compiles statements and fills the page cache
    return queue


async def take_turns(opened: Opened, turns: int, suffix: str) -> AsyncIterator[Turn]:
    for turn in range(turns):
        for (finished, kind), queue in opened.items():
            name = f"claim one row, {finished:,} finished kept{suffix}, ms"
            yield turn, kind, {name: await time_claims(queue)}


async def time_claims(queue: ClaimingQueue) -> float:
    times = [await seconds(queue.claim()) for _ in range(CLAIMS_IN_A_TURN)]
    return 1000 * statistics.median(times)
