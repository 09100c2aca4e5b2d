"""A randomised model check: one world of producers, workers and accidents, whose steps follow from a seed.

``check_schedule`` takes a database through a schedule and raises ``AssertionError`` with the seed and the steps on the first
thing that is not as promised. The steps follow from the seed; how the workers' own statements fall between them does not.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import shutil
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import numpy as np
from sqlalchemy import event, select, text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm.exc import StaleDataError

from dgx_music import cancel_generation, enqueue, enqueue_many, retry_generation
from dgx_music.artifacts import Artifact, LocalArtifacts
from dgx_music.audio.samples import Audio
from dgx_music.client import fleet, prune
from dgx_music.config import load_settings
from dgx_music.errors import (
    ArtifactError,
    DatabaseUnavailableError,
    DgxMusicError,
    EngineCrashedError,
    EngineError,
    EngineReplacedError,
    GenerationRejectedError,
)
from dgx_music.inference.engine import GenerationRequest
from dgx_music.inference.messages import EngineInfo
from dgx_music.storage import (
    Attempt,
    Generation,
    close_db,
    complete_generation,
    delete_generation,
    get_database,
    get_database_stats,
    init_db,
    queue,
    update_generation_status,
)
from dgx_music.storage.database import Database
from dgx_music.storage.schema import now, now_plus
from dgx_music.worker.worker import Worker
from tests.factories import MODEL

STEPS = 40
_FINISHED = ("completed", "failed", "cancelled")
_PATIENCE_SECONDS = 60.0
_REFUSALS = (DgxMusicError, StaleDataError)
"""What a caller may meet; anything else is a raw error of a driver, or a fault of ours."""


class ViolationError(AssertionError):
    """Something promised does not hold."""


class Killed(BaseException):
    """What everything that a dead worker still tries ends with: nothing of it gets through."""


class OddError(Exception):
    """An error of no known class: a driver's bug, no memory."""


@dataclass
class Fate:
    """What will befall one process: at which of its coming actions it dies, which commit goes wrong and how."""

    dies_in: int | None = None
    is_dead: bool = False
    commit_troubles: list[str] = field(default_factory=list)
    disk_is_full: bool = False

    def act(self) -> None:
        """Count one action that others can see; raise ``Killed`` if it is the one too many."""
        if self.dies_in is not None:
            self.dies_in -= 1
            self.is_dead = self.is_dead or self.dies_in < 0
        if self.is_dead:
            raise Killed

    def rule(self, database: Database) -> None:
        """Have every statement and commit of this database's connections ask."""
        for engine in database.engines:
            event.listen(engine.sync_engine, "before_cursor_execute", lambda *_: self.act())
            dialect = engine.sync_engine.dialect
            dialect.do_commit = self._commit_with(dialect.do_commit)  # type: ignore[method-assign]

    def _commit_with(self, commit: Callable[[Any], None]) -> Callable[[Any], None]:
        def do_commit(connection: Any) -> None:
            self.act()
            trouble = self.commit_troubles.pop(0) if self.commit_troubles else ""
            if trouble == "refused":
                raise OperationalError(
                    "COMMIT", None, Exception("the server is gone"), connection_invalidated=True
                )
            commit(connection)
            if trouble == "lost":
                raise OperationalError(
                    "COMMIT", None, Exception("no reply"), connection_invalidated=True
                )
            if trouble == "odd":
                raise OddError("something else went wrong after the commit")
            self.act()

        return do_commit


class FatefulArtifacts(LocalArtifacts):
    """A folder of audio whose writer may die between any two steps, or find the disk full."""

    def __init__(self, root: Path, fate: Fate) -> None:
        super().__init__(root)
        self._fate = fate

    async def publish(
        self, generation_id: str, attempt: int, extension: str, data: bytes
    ) -> Artifact:
        self._fate.act()
        if self._fate.disk_is_full:
            self._fate.disk_is_full = False
            raise ArtifactError("Audio cannot be stored: no space left on device.")
        try:
            self._fate.act()
        except Killed:  # in the middle of its write
            self.root.mkdir(exist_ok=True)
            (self.root / f"{generation_id}-{attempt}.{extension}.part").write_bytes(data[:100])
            raise
        artifact = await super().publish(generation_id, attempt, extension, data)
        self._fate.act()
        return artifact

    async def delete(self, generation_id: str, attempts: Iterable[int]) -> int:
        self._fate.act()
        count = await super().delete(generation_id, attempts)
        self._fate.act()
        return count


class Engine:
    """Makes another sound for each attempt; how it fares follows from the seed, the prompt and the attempt."""

    def __init__(self, world: World, slots: int) -> None:
        self._world = world
        self._slots = slots
        self._pid = 1

    async def start(self, model: str) -> EngineInfo:
        return EngineInfo(
            slots=self._slots, device="cpu", model_version="model", notice=None, pid=self._pid
        )

    async def generate(
        self,
        request: GenerationRequest,
        on_progress: Callable[[float], None],
        on_slot_free: Callable[[], None],
        on_part: Callable[[Audio, int], None],
    ) -> Audio:
        self._world.note_start(request)
        rng = random.Random(f"{self._world.seed} {request.prompt} {request.attempt}")
        what = rng.choices(
            ["make", "wait", "raise", "crash", "reject", "replace"], [10, 5, 2, 1, 1, 1]
        )[0]
        on_progress(rng.random())
        await asyncio.sleep(rng.random() * 0.01)
        if what == "wait" and not self._world.is_ending.is_set():
            await self._world.is_let_go.wait()
        if what == "crash":
            self._pid += 1
        troubles = {
            "raise": EngineError,
            "crash": EngineCrashedError,
            "reject": GenerationRejectedError,
        }
        troubles["replace"] = EngineReplacedError
        if what in troubles:
            raise troubles[what](f"{what} of {request.prompt}")
        if rng.random() < 0.5:
            on_slot_free()
            await asyncio.sleep(0)
        return Audio(np.full((1, 2560), rng.uniform(0.1, 0.9), dtype=np.float32), 32_000)

    async def close(self) -> None:
        pass


@dataclass
class Living:
    """One worker, as if it were a process of its own: its own connections, its own fate."""

    worker: Worker
    database: Database
    fate: Fate
    task: asyncio.Task[None]


class World:
    """A database, a folder, producers, workers, and what has been promised to whom."""

    def __init__(self, seed: int, url: str, folder: Path) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.is_peaceful = self.rng.random() < 0.25
        """Nobody is killed and no reply is lost: then no file may be left even for a moment after the end."""
        self.url, self.folder = url, folder
        self.said: list[str] = []
        self.is_let_go = asyncio.Event()
        self.is_ending = asyncio.Event()
        self.fate = Fate()  # of the producers' process
        self.workers: list[Living] = []
        self.known: list[str] = []
        """Acknowledged to a producer, in order; those that are gone included."""
        self.gone: set[str] = set()
        """Deleted or pruned, or perhaps so if the reply was lost."""
        self.half_pruned: set[str] = set()
        self.cancelled: set[str] = set()
        """A cancel was acknowledged, and no retry since."""
        self.revived: Counter[str] = Counter()
        self.keys: dict[str, tuple[str, str | None]] = {}
        self.by_hand: set[str] = set()
        """Marked processing by hand at some time: that is an attempt without a row of its own."""
        self.seen: dict[str, Generation] = {}
        self.started: set[tuple[str, int]] = set()
        self.violations: list[str] = []
        self.deaths = 0
        self.counted: Counter[str] = Counter()
        self.tasks: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------------------------------------------- bookkeeping

    def say(self, words: str) -> None:
        self.said.append(words)

    def check(self, holds: object, words: str) -> None:
        """Raise with all that is needed to see it again, unless it holds."""
        if not holds:
            steps = "\n".join(f"  {number}. {line}" for number, line in enumerate(self.said, 1))
            raise ViolationError(f"seed {self.seed} on {self.url.split(':')[0]}: {words}\n{steps}")

    def note_start(self, request: GenerationRequest) -> None:
        claim = (request.generation_id, request.attempt)
        if claim in self.started:
            self.violations.append(f"attempt {claim} was given to an engine twice")
        self.started.add(claim)

    def pick(self) -> str | None:
        """Return some generation that a producer knows."""
        here = [generation_id for generation_id in self.known if generation_id not in self.gone]
        return self.rng.choice(here) if here else None

    def short(self, generation_id: str) -> str:
        return (
            f"#{self.known.index(generation_id)}" if generation_id in self.known else generation_id
        )

    async def attempt_to(self, words: str, call: Callable[[], Awaitable[Any]]) -> Any:
        """Return what the call returns, or the refusal that it raised; any other error is a violation."""
        self.say(words)
        try:
            return await call()
        except _REFUSALS as refusal:
            self.said[-1] += f" ({type(refusal).__name__})"
            return refusal
        except OddError as error:  # what we threw in ourselves
            self.said[-1] += " (odd error)"
            return DatabaseUnavailableError(self.url, str(error))
        except Exception as error:
            self.check(
                False, f"a caller met {type(error).__module__}.{type(error).__name__}: {error}"
            )

    # ------------------------------------------------------------------------------------------------------- steps

    async def enqueue(self) -> None:
        number = len(self.said)
        options: dict[str, Any] = {
            "duration": 0.08,
            "model": MODEL,
            "priority": self.rng.randint(-1, 1),
        }
        options |= {
            "max_attempts": self.rng.randint(1, 4),
            "tenant": self.rng.choice([None, "a", "b"]),
        }
        if self.rng.random() < 0.3:
            await self._enqueue_with_key(f"key {self.rng.randrange(5)}", options)
            return
        prompts = [f"prompt {number}.{each}" for each in range(self.rng.randint(1, 3))]
        made = await self.attempt_to(
            f"enqueue {len(prompts)}", lambda: enqueue_many(prompts, **options)
        )
        if not isinstance(made, Exception):
            self.known += [row.id for row in made]

    async def _enqueue_with_key(self, key: str, options: dict[str, Any]) -> None:
        """Ask again for what was asked for under this key, or for the first time: the same row comes back."""
        prompt, owner = self.keys.setdefault(key, (f"prompt of {key}", None))
        options |= {"tenant": None}
        made = await self.attempt_to(
            f"enqueue {key}", lambda: enqueue(prompt, idempotency_key=key, **options)
        )
        if isinstance(made, Exception):
            self.check(isinstance(made, DatabaseUnavailableError), f"{key} was refused: {made}")
            return
        if owner is not None and owner not in self.gone:
            self.check(made.id == owner, f"{key} gave another row than before")
        self.keys[key] = (prompt, made.id)
        if made.id not in self.known:
            self.known.append(made.id)

    async def start_worker(self) -> None:
        if len(self.workers) >= 3:
            return
        limit = self.rng.choice([None, None, 1, 2])
        self.say(f"start a worker, tenant limit {limit}")
        self.add_worker(self.rng.randint(1, 3), tenant_limit=limit)

    def add_worker(self, slots: int, *, drain: bool = False, **settings: Any) -> Living:
        database, fate = Database(self.url), Fate()
        fate.rule(database)
        chosen = load_settings(
            heartbeat_seconds=0.1, poll_seconds=0.1, loudness="none", grace_seconds=0.2, **settings
        )
        chosen = replace(chosen, backoff_base_seconds=0.01)
        artifacts = FatefulArtifacts(self.folder, fate)
        worker = Worker(
            database, Engine(self, slots), artifacts, chosen, rng=random.Random(self.seed)
        )
        living = Living(worker, database, fate, asyncio.create_task(worker.run(drain=drain)))
        self.workers.append(living)
        return living

    def a_worker(self) -> Living | None:
        return self.rng.choice(self.workers) if self.workers else None

    async def kill_worker(self) -> None:
        if living := self.a_worker():
            self.say("kill a worker at once")
            living.fate.is_dead = True
            await self.bury(living)

    async def doom_worker(self) -> None:
        if living := self.a_worker():
            living.fate.dies_in = self.rng.randint(0, 25)
            self.say(f"have a worker die after {living.fate.dies_in} actions")

    async def stop_worker(self) -> None:
        if living := self.a_worker():
            self.say("stop a worker")
            living.worker.stop()
            if self.rng.random() < 0.5:
                living.worker.stop()
            await self.bury(living)

    async def cancel_worker_task(self) -> None:
        if living := self.a_worker():
            self.say("cancel a worker's task")
            living.task.cancel()
            await self.bury(living)

    async def bury(self, living: Living) -> None:
        """Wait for a worker's end, and look what it died of."""
        if living.fate.is_dead:
            living.task.cancel()
        with anyio.move_on_after(_PATIENCE_SECONDS) as scope:
            await asyncio.wait([living.task])
        self.check(not scope.cancelled_caught, "a worker did not end")
        self.workers.remove(living)
        await living.database.dispose()
        error = None if living.task.cancelled() else living.task.exception()
        if living.fate.is_dead:
            self.deaths += 1
        else:
            self._check_end(error)

    def _check_end(self, error: BaseException | None) -> None:
        # an odd error of a heartbeat or a sweep ends the worker
        if isinstance(error, BaseExceptionGroup):
            error = error.split(OddError)[1]
        self.check(
            error is None or isinstance(error, DgxMusicError | OddError),
            f"a worker ended with {error!r}",
        )

    async def sweep(self) -> None:
        if living := self.a_worker():
            await self.attempt_to(
                "have a worker rescue", lambda: self._until_killed(living.worker._sweeping.rescue())
            )

    async def _until_killed(self, work: Awaitable[Any]) -> Any:
        with suppress(Killed):
            return await work

    async def expire_leases(self) -> None:
        chance = self.rng.random()
        self.say("let leases run out")
        await self.hand_write(
            update(Generation)
            .where(Generation.worker_id.is_not(None), Generation.id > self._some_id(chance))
            .values(lease_expires_at=now_plus(-1.0))
        )

    def _some_id(self, chance: float) -> str:
        return self.known[int(chance * len(self.known))] if self.known else ""

    async def hand_write(self, statement: Any) -> None:
        async with self.observer.session() as session:
            await session.execute(statement, execution_options={"synchronize_session": False})

    async def trouble_a_commit(self) -> None:
        living = self.a_worker()
        fate = self.fate if living is None or self.rng.random() < 0.4 else living.fate
        fates = ["lost", "refused"] if fate is self.fate else ["lost", "refused", "odd"]
        coming = [""] * self.rng.randint(0, 3) + [self.rng.choice(fates)]
        fate.commit_troubles = coming
        self.say(f"{'the producers' if fate is self.fate else 'a worker'}: commits go {coming}")

    async def fill_disk(self) -> None:
        if (living := self.a_worker()) and self.rng.random() < 0.5:
            self.say("a worker finds the disk full")
            living.fate.disk_is_full = True

    async def end_backend(self) -> None:
        if self.observer.is_embedded:
            return
        self.say("end a backend")
        other = "FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'dgx-music'"
        count = await self.observed(text(f"SELECT count(*) {other}"))
        offset = self.rng.randrange(count[0] or 1)
        await self.observed(
            text(f"SELECT pg_terminate_backend(pid) {other} ORDER BY pid LIMIT 1 OFFSET {offset}")
        )

    async def observed(self, query: Any) -> list[Any]:
        async with self.observer.session(read_only=True) as session:
            return list(await session.scalars(query))

    async def cancel(self) -> None:
        if chosen := self.pick():
            status = await self.attempt_to(
                f"cancel {self.short(chosen)}", lambda: cancel_generation(chosen)
            )
            if not isinstance(status, Exception):
                self.cancelled.add(chosen)

    async def retry(self) -> None:
        if chosen := self.pick():
            self.revive(chosen)
            await self.attempt_to(f"retry {self.short(chosen)}", lambda: retry_generation(chosen))

    def revive(self, chosen: str) -> None:
        """Forget that its cancel was acknowledged: it may be gone from now on, even if the reply is lost."""
        self.cancelled.discard(chosen)
        self.revived[chosen] += 1

    async def pause(self) -> None:
        model = self.rng.choice([None, MODEL])
        await self.attempt_to(f"pause {model}", lambda: fleet.pause(model))

    async def resume(self) -> None:
        for model in (None, MODEL):
            await self.attempt_to(f"resume {model}", lambda model=model: fleet.resume(model))  # type: ignore[misc]

    async def prune(self) -> None:
        status = self.rng.choice(_FINISHED)
        artifacts = LocalArtifacts(self.folder)
        before = await self.ids()
        count = await self.attempt_to(
            f"prune {status}", lambda: prune.prune(get_database(), artifacts, {status: 0.0})
        )
        gone = before - await self.ids()
        if isinstance(count, Exception):
            self.half_pruned |= before - gone
        else:
            self.check(
                len(gone) == count[status], f"prune said {count[status]} and took {len(gone)}"
            )
        self.gone |= gone

    async def ids(self) -> set[str]:
        return set(await self.observed(select(Generation.id)))

    async def delete(self) -> None:
        if chosen := self.pick():
            self.gone.add(chosen)
            await self.attempt_to(
                f"delete {self.short(chosen)}", lambda: self.by_session(delete_generation, chosen)
            )
            if chosen in await self.ids():
                self.gone.discard(chosen)

    async def by_session(self, call: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        async with get_database().session() as session:
            return await call(session, *arguments)

    async def move_by_hand(self) -> None:
        if not (chosen := self.pick()):
            return
        wanted = self.rng.choice(
            ["processing", "processing", "completed", "failed", "pending", "cancelled"]
        )
        if wanted == "processing":
            self.by_hand.add(chosen)
        if wanted == "pending":
            self.revive(chosen)
        words = f"by hand, {self.short(chosen)} {wanted}"
        await self.attempt_to(
            words, lambda: self.by_session(update_generation_status, chosen, wanted)
        )

    async def complete_by_hand(self) -> None:
        if chosen := self.pick():
            words = f"by hand, complete {self.short(chosen)}"
            await self.attempt_to(
                words, lambda: self.by_session(complete_generation, chosen, 1.0, 10)
            )

    async def write_by_object(self) -> None:
        """Take a row through the ORM's objects, slowly: a claim in between must turn the write into an error."""
        if not (chosen := self.pick()):
            return
        pause = self.rng.random() * 0.01

        async def work() -> None:
            async with get_database().session(read_only=True) as session:
                row = await session.get(Generation, chosen)
            if row is None:
                return
            await asyncio.sleep(pause)
            async with get_database().session() as session:
                session.add(row)
                row.mark_processing()

        self.by_hand.add(chosen)
        await self.attempt_to(f"by object, take {self.short(chosen)}", work)

    async def hold_row(self) -> None:
        """Keep a transaction open for a moment that has locked a row; SQLite's locks everything."""
        if not (chosen := self.pick()):
            return
        seconds, commits, revived = (
            self.rng.random() * 0.1,
            self.rng.random() < 0.5,
            self.revived[chosen],
        )

        async def hold() -> None:
            with suppress(*_REFUSALS):
                async with self.observer.session() as session:
                    await queue.cancel(session, chosen)
                    await asyncio.sleep(seconds)
                    if not commits:
                        await session.rollback()
                if commits and self.revived[chosen] == revived:
                    self.cancelled.add(chosen)

        self.say(
            f"cancel {self.short(chosen)} in a long transaction, {'committed' if commits else 'undone'}"
        )
        task = asyncio.create_task(hold())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def let_go(self) -> None:
        self.say("let go of what the engines hold")
        self.is_let_go.set()
        await asyncio.sleep(0)
        self.is_let_go.clear()

    async def look_at_clock(self) -> None:
        read = partial(self.by_session, queue.read_clock)
        moments = [await self.attempt_to("read the clock", read) for _ in range(2)]
        if not any(isinstance(moment, Exception) for moment in moments):
            self.check(moments[0] <= moments[1], "the database's clock went backwards")

    async def rest(self) -> None:
        await asyncio.sleep(self.rng.random() * 0.05)

    # ------------------------------------------------------------------------------------------------- what must be

    async def look(self) -> None:
        """Look at one moment of the database and the folder: all that must hold at any time."""
        for living in [each for each in self.workers if each.task.done()]:
            await self.bury(living)
        # as of now: a transaction beside us may commit while we look
        cancelled = frozenset(self.cancelled)
        async with self.observer.session(read_only=True) as session:
            rows = {row.id: row for row in await session.scalars(select(Generation))}
            attempts = list(await session.scalars(select(Attempt)))
            stats = await get_database_stats(session)
        self.check(not self.violations, "; ".join(self.violations))
        self._check_rows(rows, cancelled)
        self._check_attempts(rows, attempts)
        self._check_files(rows)
        self._check_stats(rows, stats)
        self.seen = rows

    def _check_rows(self, rows: dict[str, Generation], cancelled: Collection[str]) -> None:
        for number, generation_id in enumerate(self.known):
            self.check(
                generation_id in rows or generation_id in self.gone,
                f"#{number} was acknowledged and is gone",
            )
        for row in rows.values():
            name, before = self.short(row.id), self.seen.get(row.id)
            if before is not None:
                self.check(
                    row.attempt >= before.attempt,
                    f"{name}: attempt went from {before.attempt} to {row.attempt}",
                )
                is_same = (row.status, row.completed_at, row.sha256) == (
                    "completed",
                    before.completed_at,
                    before.sha256,
                )
                self.check(
                    before.status != "completed" or is_same,
                    f"{name} was completed and is {row.status} again",
                )
            is_stopped = row.status == "cancelled" or (
                row.status == "processing" and row.cancel_requested
            )
            self.check(
                row.id not in cancelled or is_stopped,
                f"{name}: its cancel is lost, it is {row.status}",
            )
            self.check(
                row.status != "pending" or row.failures < row.max_attempts,
                f"{name} waits beyond its budget",
            )

    def _check_attempts(self, rows: dict[str, Generation], attempts: list[Attempt]) -> None:
        made = {(each.generation_id, each.attempt): each for each in attempts}
        completed = Counter(each.generation_id for each in attempts if each.outcome == "completed")
        self.check(all(count == 1 for count in completed.values()), f"completed twice: {completed}")
        for (generation_id, number), each in made.items():
            row, name = rows[generation_id], f"attempt {number} of {self.short(generation_id)}"
            is_current = row.worker_id == each.worker_id and row.attempt == number
            self.check(number <= row.attempt, f"{name} is beyond its row's {row.attempt}")
            self.check(
                (each.outcome is None) == is_current,
                f"{name} is {each.outcome}, and its row {row.status}",
            )
            is_last = row.status == "completed" and row.attempt == number and row.sha256 is not None
            self.check(
                (each.outcome == "completed") == is_last,
                f"{name} is {each.outcome}, and its row {row.status}",
            )
        for row in rows.values():
            self.check(
                row.worker_id is None or (row.id, row.attempt) in made,
                f"{self.short(row.id)} has no attempt",
            )
            count = sum(generation_id == row.id for generation_id, _ in made)
            self.check(
                row.id in self.by_hand or count == row.attempt,
                f"{self.short(row.id)} has {count} attempts",
            )

    def _check_files(self, rows: dict[str, Generation]) -> None:
        for row in rows.values():
            if row.sha256 is None or row.id in self.half_pruned:
                continue
            name, path = self.short(row.id), Path(str(row.file_path))
            self.check(
                path.name == f"{row.id}-{row.attempt}.wav",
                f"{name} has the file of another attempt: {path}",
            )
            self.check(path.exists(), f"{name} is {row.status} and its file is gone")
            data = path.read_bytes()
            said = (len(data), hashlib.sha256(data).hexdigest())
            self.check(
                said == (row.file_size_bytes, row.sha256),
                f"{name}: its file is not what its row says",
            )

    def _check_stats(self, rows: dict[str, Generation], stats: dict[str, int]) -> None:
        counts = Counter(row.status for row in rows.values())
        said = {
            status: stats[f"{status}_generations"]
            for status in ("pending", "processing", *_FINISHED)
        }
        self.check(
            said == {status: counts[status] for status in said},
            f"statistics {said}, rows {dict(counts)}",
        )
        self.check(stats["total_generations"] == len(rows), "the total is not the number of rows")

    # ------------------------------------------------------------------------------------------------------ from to

    async def run(self, steps: int) -> None:
        """Take so many steps, then bring everything to its end."""
        self.observer = Database(
            self.url + ("" if "sqlite" in self.url else "?application_name=observer")
        )
        self.fate.rule(await init_db(self.url))
        try:
            for _ in range(steps):
                await self.take_a_step()
                await asyncio.sleep(self.rng.choice([0, 0.001, 0.01]))
                await self.look()
            await self.end()
        finally:
            await self._clear_up()

    async def take_a_step(self) -> None:
        weights = {
            step: weight for step, weight in _WEIGHTS if not (self.is_peaceful and step in _VIOLENT)
        }
        step = self.rng.choices(list(weights), list(weights.values()))[0]
        self.counted[step.__name__] += 1
        await step(self)

    async def end(self) -> None:
        """Let all accidents end, and a last worker finish everything; then nothing may be left over."""
        self.say("the end: no more accidents, one more worker, and everything finishes")
        await asyncio.gather(*self.tasks)
        self.fate.commit_troubles = []
        self.is_ending.set()
        self.is_let_go.set()
        for living in list(self.workers):
            living.fate.commit_troubles, living.fate.disk_is_full = [], False
            living.worker.stop()
            await self.bury(living)
        await self._drain()
        await self.look()
        unfinished = [row.id for row in self.seen.values() if not row.is_finished]
        self.check(not unfinished, f"not finished: {[self.short(each) for each in unfinished]}")
        await self._check_folder()

    async def _drain(self) -> None:
        for model in (None, MODEL):
            await fleet.resume(model)
        await self.hand_write(
            update(Generation).where(Generation.status == "pending").values(run_at=now())
        )
        is_ours = (Generation.status == "processing") & Generation.worker_id.is_(None)
        for generation_id in await self.observed(select(Generation.id).where(is_ours)):
            wanted = "cancelled" if generation_id in self.cancelled else "failed"
            await self.by_session(update_generation_status, generation_id, wanted)
        await self.hand_write(
            update(Generation)
            .where(Generation.worker_id.is_not(None))
            .values(lease_expires_at=now_plus(-1.0))
        )
        last = self.add_worker(3, drain=True)
        await self.bury(last)

    async def _check_folder(self) -> None:
        """Exactly the files of completed rows are left: by themselves in peace, else after a clean-up."""
        wanted = {
            Path(str(row.file_path)).name for row in self.seen.values() if row.sha256 is not None
        }
        if self.is_peaceful:
            self.check(
                self.names() == wanted | self._of_gone(), "files are left that no crash explains"
            )
        if any(
            path.startswith(generation_id) for path in self.names() for generation_id in self.seen
        ):
            await prune.prune_orphans(
                self.observer, LocalArtifacts(self.folder), older_than_seconds=0.0
            )
            self.check(self.names() >= wanted - self._pruned(), "a completed row has lost its file")
            self.check(self.names() <= wanted, f"files of nobody: {self.names() - wanted}")

    def names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()

    def _pruned(self) -> set[str]:
        return {path for path in self._expected() if path.rsplit("-", 1)[0] in self.half_pruned}

    def _expected(self) -> set[str]:
        return {Path(str(row.file_path)).name for row in self.seen.values()}

    def _of_gone(self) -> set[str]:
        """Return the files of rows that were deleted by hand: that leaves the file."""
        return {name for name in self.names() if name.rsplit("-", 1)[0] in self.gone}

    async def _clear_up(self) -> None:
        for living in list(self.workers):
            living.fate.is_dead = True
            living.task.cancel()
            await asyncio.gather(living.task, return_exceptions=True)
            await living.database.dispose()
        await close_db()
        await self.observer.dispose()
        shutil.rmtree(self.folder, ignore_errors=True)


_WEIGHTS: list[tuple[Callable[[World], Awaitable[None]], int]] = [
    (World.enqueue, 8),
    (World.start_worker, 5),
    (World.kill_worker, 2),
    (World.doom_worker, 3),
    (World.stop_worker, 1),
    (World.cancel_worker_task, 1),
    (World.sweep, 3),
    (World.expire_leases, 3),
    (World.trouble_a_commit, 4),
    (World.fill_disk, 1),
    (World.end_backend, 3),
    (World.cancel, 3),
    (World.retry, 3),
    (World.pause, 1),
    (World.resume, 2),
    (World.prune, 1),
    (World.delete, 1),
    (World.move_by_hand, 3),
    (World.complete_by_hand, 2),
    (World.write_by_object, 2),
    (World.hold_row, 2),
    (World.let_go, 3),
    (World.look_at_clock, 1),
    (World.rest, 6),
]


_VIOLENT = (
    World.kill_worker,
    World.doom_worker,
    World.trouble_a_commit,
    World.end_backend,
    World.fill_disk,
)


class _Unexpected(logging.Handler):
    """Collects the errors that the product logs with a traceback: those that it did not expect."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not isinstance(error, OddError):
            self._world.violations.append(f"{record.getMessage()}: {error!r}")


async def check_schedule(seed: int, url: str, folder: Path, steps: int = STEPS) -> World:
    """Take the database, which is empty, through the schedule of this seed; return the world, to be counted."""
    world = World(seed, url, folder)
    handler, logger = _Unexpected(world), logging.getLogger("dgx_music")
    logger.addHandler(handler)
    try:
        await world.run(steps)
    except ViolationError:
        raise
    except Exception as error:
        world.check(False, f"{type(error).__module__}.{type(error).__name__}: {error}")
    finally:
        logger.removeHandler(handler)
    return world
