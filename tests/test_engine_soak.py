"""The whole line under fire: requests of every kind, the real engine in its slots, cancels, and SIGKILL after SIGKILL.

What the requests are, which of them are cancelled and at which moment of theirs follows from a seed; an assertion names the
generation, and the row says what it asked for.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import random
import signal
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Any

import anyio
import pytest
import soundfile
from sqlalchemy import Row, select

from dgx_music import cancel_generation
from dgx_music.audio import clips
from dgx_music.audio import files as audio
from dgx_music.errors import IllegalTransitionError
from dgx_music.inference.engine import Engine, EngineSettings, GenerationRequest
from dgx_music.inference.musicgen import engine as musicgen
from dgx_music.statuses import COMPLETED, FINISHED, PENDING, PROCESSING
from dgx_music.storage.clips import read_clips
from dgx_music.storage.database import Database
from dgx_music.storage.models import Attempt, Generation
from tests.daemons import Daemon, add, attempts_of, rows_of
from tests.factories import audio_file, on
from tests.inference.factories import QuietRun

TINY = "musicgen-tiny-untrained"
ENGINE = {"engine": "musicgen", "model": TINY, "device": "cpu", "dtype": "float32"}
WORKER = ENGINE | {"slots": 4, "lease_seconds": 30.0, "heartbeat_seconds": 0.2}
BACKOFF_BASE_SECONDS = 0.05  # the daemons'
BACKLOG = 24
MAX_ATTEMPTS = 25
"""More than there are kills, so that nothing can run out of its budget by bad luck."""
LASTING_SECONDS = 10.0
"""So much audio takes the engine long enough to be cancelled in the middle."""
KILLED = "was killed by SIGKILL"
KINDS: list[dict[str, Any]] = [
    {"prompt": "lofi rain"},
    {"prompt": "trap beat 140 BPM, dark and slow, with a choir from far away"},
    {"prompt": ""},
    {"prompt": "string quartet", "guidance_scale": 1.0},
    {"prompt": "slow ambient pads", "guidance_scale": 5.0, "negative_prompt": "drums, vocals"},
    {"prompt": "solo piano", "top_p": 0.9},
    {"prompt": "brass band", "top_k": 0, "temperature": 1.3},
    {"prompt": "drum and bass", "temperature": 0.0},
    {"prompt": "jazz trio", "channels": 2, "sample_rate": 44_100},
    {"prompt": "build up to a chorus", "continuation": audio_file(0.6)},
]


class When(Enum):
    """The moment of its life at which a generation is cancelled."""

    PENDING = "while it waits"
    RUNNING = "while it runs"
    STORED = "when its audio is stored, and its row not yet completed"


@dataclass(eq=False)
class Request:
    """What is asked for; ``cancel_at`` is how much of the queue to let come, or of the music be made, before the cancel."""

    options: dict[str, Any]
    cancel_when: When | None = None
    cancel_at: float = 0.0
    id: str = ""


def make_requests(
    seed: int, count: int, longest_seconds: float, long_form_count: int = 0
) -> list[Request]:
    """Return requests of every kind and length in a random order, a tenth of them to be cancelled."""
    rng = random.Random(seed)
    lengths = [
        0.08,
        *(round(rng.uniform(0.08, longest_seconds), 2) for _ in range(count - long_form_count - 1)),
    ]
    lengths += [round(rng.uniform(31, 40), 2) for _ in range(long_form_count)]
    kinds = itertools.cycle(KINDS)
    requests = [
        Request(next(kinds) | {"duration": length, "seed": rng.randrange(2**63)})
        for length in lengths
    ]
    for request, when in zip(
        rng.sample(requests[1:], count // 10), itertools.cycle(When), strict=False
    ):
        request.cancel_when, request.cancel_at = when, rng.uniform(0.05, 0.6)
        request.options["duration"] = max(LASTING_SECONDS, request.options["duration"])
    for request in requests:
        if "continuation" in request.options:
            request.options["duration"] = max(1.0, request.options["duration"])
    rng.shuffle(requests)
    return requests


@dataclass
class Fire:
    """What is done to a worker at work: requests keep coming, some are cancelled, its engine is killed over and over.

    A kill waits until something was completed since the last one and something else runs: a worker whose engine dies
    of one generation after another without any success rightly stops.
    """

    database: Database
    daemon: Daemon
    folder: Path
    requests: list[Request]
    kill_every: float
    most_kills: int
    cancelled: set[str] = field(default_factory=set)
    kill_count: int = 0
    _enqueued: list[Request] = field(default_factory=list)
    _killed_at: float = field(default_factory=time.monotonic)
    _completed_at_kill: int = 0

    async def burn(self, seconds: float) -> None:
        """Go on until every request is finished, at most so long."""
        waiting = deque(self.requests)
        with anyio.fail_after(seconds), self.database.changes.subscribe() as changes:
            while _open_count(rows := await self._look()) or waiting:
                await self._enqueue(waiting, BACKLOG - _open_count(rows))
                await self._cancel(rows, is_last=not waiting)
                self._kill(rows)
                await changes.wait(0.1)
                assert self.daemon.process.poll() is None, self.daemon.said()[-4_000:]

    async def _look(self) -> dict[str, Row[Any]]:
        query = select(
            Generation.id, Generation.status, Generation.progress, Generation.error_message
        )
        async with self.database.session(read_only=True) as session:
            rows = {row.id: row for row in await session.execute(query)}
        assert all(KILLED in (row.error_message or KILLED) for row in rows.values()), (
            self.daemon.said()[-4_000:]
        )
        return rows

    async def _enqueue(self, waiting: deque[Request], count: int) -> None:
        for _ in range(min(count, len(waiting))):
            request = waiting.popleft()
            options = {"model": TINY, "max_attempts": MAX_ATTEMPTS} | request.options
            request.id = (await add(self.database, **options)).id
            self._enqueued.append(request)

    async def _cancel(self, rows: dict[str, Row[Any]], *, is_last: bool) -> None:
        """Cancel whose moment has come; one that is finished before it has come is left as it is."""
        for place, request in enumerate(self._enqueued):
            if request.cancel_when is None or (row := rows.get(request.id)) is None:
                continue
            behind = 1.0 if is_last else (len(self._enqueued) - place) / BACKLOG
            is_moment = {
                When.PENDING: row.status == PENDING and behind > request.cancel_at,
                When.RUNNING: row.status == PROCESSING and row.progress >= request.cancel_at,
                When.STORED: row.status == PROCESSING,
            }
            if is_moment[request.cancel_when]:
                await self._cancel_now(request)
                request.cancel_when = None

    async def _cancel_now(self, request: Request) -> None:
        try:
            async with self.database.session() as session:
                await cancel_generation(request.id, session=session)
                if request.cancel_when is When.STORED:  # which a transaction that is open holds up
                    await self._until_stored(request.id)
        except IllegalTransitionError:  # it was completed at the same moment
            return
        self.cancelled.add(request.id)

    async def _until_stored(self, generation_id: str) -> None:
        with anyio.move_on_after(10):
            while not any(self.folder.glob(f"{generation_id}-*.wav")):
                await anyio.sleep(0.01)
            await anyio.sleep(0.1)  # for the worker to go on, as far as it can

    def _kill(self, rows: dict[str, Row[Any]]) -> None:
        completed = sum(row.status == COMPLETED for row in rows.values())
        is_at_work = any(row.status == PROCESSING for row in rows.values())
        is_time = (
            time.monotonic() - self._killed_at >= self.kill_every
            and self.kill_count < self.most_kills
        )
        if is_time and is_at_work and completed > self._completed_at_kill:
            (child,) = self.daemon.children()
            os.kill(child, signal.SIGKILL)
            self.kill_count += 1
            self._killed_at, self._completed_at_kill = time.monotonic(), completed


def _open_count(rows: dict[str, Row[Any]]) -> int:
    return sum(row.status not in FINISHED for row in rows.values())


# what must be true afterwards


def check_all_is_accounted_for(fire: Fire, rows: dict[str, Generation]) -> None:
    """Every row is completed but for those, and all of those, whose cancel was acknowledged."""
    assert rows.keys() == {request.id for request in fire.requests}
    others = {row.id: row.status for row in rows.values() if row.status != COMPLETED}
    assert others == dict.fromkeys(fire.cancelled, "cancelled")


def check_attempts(row: Generation, made: list[Attempt]) -> None:
    """They are numbered, one at a time, none after a success; only kills have failed them, and failures count the kills."""
    outcomes = [attempt.outcome for attempt in made]
    errors = [attempt.error_message for attempt in made if attempt.error_message is not None]
    assert [attempt.attempt for attempt in made] == [*range(1, row.attempt + 1)], row.id
    assert all(
        former.finished_at <= latter.started_at for former, latter in itertools.pairwise(made)
    ), row.id
    assert {*outcomes[:-1]} <= {"failed", "released"}, row.id
    assert (outcomes[-1:] == ["completed"]) == (row.status == COMPLETED), row.id
    assert all(KILLED in error for error in errors), (row.id, errors)
    assert row.failures == len(errors), row.id


def check_audio(rows: dict[str, Generation], folder: Path) -> None:
    """Each completed row has the one file that it names, as long as was asked for to the frame; there are no others."""
    completed = {str(row.file_path): row for row in rows.values() if row.status == COMPLETED}
    files = [str(file) for file in folder.rglob("*") if file.is_file()]  # previews, too
    assert sorted(files) == sorted(completed)
    for path, row in completed.items():
        data, file = Path(path).read_bytes(), soundfile.info(path)
        frames = round(round(row.duration_seconds * 32_000) * row.sample_rate / 32_000)
        assert (file.frames, file.channels, file.samplerate) == (
            frames,
            row.channels,
            row.sample_rate,
        ), row.id
        assert (len(data), hashlib.sha256(data).hexdigest()) == (row.file_size_bytes, row.sha256), (
            row.id
        )


@dataclass
class Turn:
    """One attempt's way to its claim. Of a backoff only the bounds are known, and so of when it was due."""

    id: str
    due_after: datetime
    due_before: datetime
    free_at: datetime
    started_at: datetime

    @property
    def wait_seconds(self) -> float:
        return (self.started_at - self.free_at).total_seconds()


def turns_of(row: Generation, made: list[Attempt]) -> Iterator[Turn]:
    """Yield each attempt's turn: a failure sends a generation to the end of the queue, a release leaves its place."""
    due_after = due_before = free_at = row.created_at
    failures = 0
    for attempt in made:
        yield Turn(row.id, due_after, due_before, free_at, attempt.started_at)
        if attempt.outcome == "failed":
            longest = BACKOFF_BASE_SECONDS * 2**failures
            due_after, due_before = (
                attempt.finished_at + timedelta(seconds=longest * part) for part in (0.5, 1.0)
            )
            failures += 1
        free_at = max(due_before, attempt.finished_at)


def overtakers_of(turn: Turn, turns: list[Turn]) -> list[str]:
    """Return who became due after this one, and was started before it while it waited."""
    later = (other for other in turns if other.due_after > turn.due_before)
    return [other.id for other in later if turn.free_at < other.started_at < turn.started_at]


def check_nothing_starved(turns: list[Turn]) -> None:
    """Nobody is overtaken by more than what one claim takes."""
    overtaken = {turn.id: overtakers_of(turn, turns) for turn in turns}
    assert {
        name: others for name, others in overtaken.items() if len(others) > WORKER["slots"]
    } == {}


async def check_same_as_undisturbed(database: Database, rows: list[Generation]) -> None:
    """What was made beside cancels, newcomers and kills, in whichever attempt, is what one alone becomes, to the byte."""
    engine = musicgen.load(EngineSettings(**ENGINE, slots=1))
    given = {row.continuation_sha256 for row in rows if row.continuation_sha256 is not None}
    async with database.session(read_only=True) as session:
        contents = await read_clips(session, given)
    others = [
        row.id
        for row in rows
        if samples_of(make_alone(engine, row, contents)) != samples_of(await file_of(row))
    ]
    assert others == []


async def file_of(row: Generation) -> bytes:
    return await anyio.Path(str(row.file_path)).read_bytes()


def samples_of(file: bytes) -> bytes:
    """Return the samples alone: the tags before them have the day on which they were made."""
    samples, _rate = soundfile.read(io.BytesIO(file), dtype="int16")
    return bytes(samples.tobytes())


def make_alone(engine: Engine, row: Generation, contents: dict[str, bytes]) -> bytes:
    """Return the file that an engine with nothing else to do makes of a row."""
    clip = row.continuation_sha256
    request = GenerationRequest(
        generation_id=row.id,
        prompt=row.prompt,
        duration=row.duration_seconds,
        model=row.model_name,
        **{name: value for name, value in (row.sampling or {}).items() if value is not None},
        continuation=None if clip is None else clips.load("continuation", contents[clip], clip),
    )
    made = engine.generate(request, QuietRun())
    return audio.finish(
        made,
        sample_rate=row.sample_rate,
        channels=row.channels,
        audio_format="wav",
        loudness="lufs",
    ).data


@dataclass
class Ashes:
    """What is left: the rows, their attempts, and the attempts' turns."""

    rows: dict[str, Generation]
    attempts: dict[str, list[Attempt]]
    turns: list[Turn]

    @property
    def killed(self) -> list[Attempt]:
        """The attempts that a kill has ended."""
        made = itertools.chain(*self.attempts.values())
        return [attempt for attempt in made if KILLED in (attempt.error_message or "")]

    def completed(self, least_attempts: int = 1) -> list[Generation]:
        """Return the completed rows that took so many attempts or more."""
        return [
            row
            for row in self.rows.values()
            if row.status == COMPLETED and row.attempt >= least_attempts
        ]


async def burn_and_check(fire: Fire, seconds: float) -> Ashes:
    """Let it burn, stop the worker, and check what holds whatever has happened."""
    await fire.burn(seconds)
    fire.daemon.send(signal.SIGTERM)
    assert fire.daemon.wait() == 0
    ashes = await gather_ashes(fire.database)
    check_all_is_accounted_for(fire, ashes.rows)
    for row in ashes.rows.values():
        check_attempts(row, ashes.attempts[row.id])
    check_audio(ashes.rows, fire.folder)
    check_nothing_starved(ashes.turns)
    return ashes


async def gather_ashes(database: Database) -> Ashes:
    rows, attempts = await rows_of(database), defaultdict(list)
    for attempt in await attempts_of(database):
        attempts[attempt.generation_id].append(attempt)
    turns = [turn for row in rows.values() for turn in turns_of(row, attempts[row.id])]
    return Ashes(rows, attempts, turns)


@pytest.fixture
def light(database: Database, tmp_path: Path, start: Callable[..., Daemon]) -> Callable[..., Fire]:
    """Return a function that starts a worker, and the fire to be under."""

    def light_fire(requests: list[Request], *, kill_every: float, most_kills: int) -> Fire:
        return Fire(database, start(**WORKER), tmp_path / "audio", requests, kill_every, most_kills)

    return light_fire


@pytest.mark.parametrize(
    "database_url", ["sqlite", pytest.param("asyncpg", marks=pytest.mark.soak)], indirect=True
)
async def test_kills_and_cancels_neither_lose_nor_change_what_others_become(database, light):
    fire = light(
        make_requests(seed=11, count=30, longest_seconds=1.5), kill_every=1.5, most_kills=2
    )
    ashes = await burn_and_check(fire, seconds=240)
    assert len(ashes.killed) >= fire.kill_count == 2
    assert ashes.completed(least_attempts=2)
    await check_same_as_undisturbed(database, ashes.completed())


@on("sqlite")
@pytest.mark.soak
@pytest.mark.timeout(1_500)
async def test_two_hundred_requests_survive_a_kill_every_twenty_seconds(database, light):
    requests = make_requests(seed=7, count=200, longest_seconds=20.0, long_form_count=6)
    fire = light(requests, kill_every=20.0, most_kills=MAX_ATTEMPTS - 1)
    ashes = await burn_and_check(fire, seconds=900)
    print(f"\n{describe(fire, ashes)}")
    assert len(ashes.killed) >= fire.kill_count >= 3
    assert len(fire.cancelled) >= 15
    assert "cancelled: completion refused" in fire.daemon.said()
    await check_same_as_undisturbed(database, ashes.completed())


def describe(fire: Fire, ashes: Ashes) -> str:
    """Return the run's figures."""
    made = [attempt for own in ashes.attempts.values() for attempt in own]
    seconds = (
        max(attempt.finished_at for attempt in made) - min(attempt.started_at for attempt in made)
    ).total_seconds()
    music = sum(row.duration_seconds for row in ashes.completed())
    most = max(row.attempt for row in ashes.rows.values())
    wait = max(turn.wait_seconds for turn in ashes.turns)
    overtaken = max(len(overtakers_of(turn, ashes.turns)) for turn in ashes.turns)
    return (
        f"{len(ashes.completed())} completed ({music:.0f} s of audio in {seconds:.0f} s), {len(fire.cancelled)} cancelled; "
        f"{fire.kill_count} kills of {len(ashes.killed)} attempts, {len(ashes.completed(least_attempts=2))} made again, "
        f"at most {most} attempts; longest wait {wait:.1f} s, overtaken at most {overtaken} times"
    )
