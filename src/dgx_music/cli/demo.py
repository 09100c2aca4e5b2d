"""``dgx-music demo``: the whole way from prompt to audio, by the real worker, in its own folder."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dgx_music.catalog import UNTRAINED_NOTICE
from dgx_music.cli.options import at_home
from dgx_music.cli.output import (
    end_of_id,
    fail,
    near,
    print_line,
    print_table,
    print_waveform,
    tell,
)
from dgx_music.config import EngineName, load_settings
from dgx_music.errors import EngineUnavailableError, how_to_install
from dgx_music.files import create_file

if TYPE_CHECKING:
    import anyio.abc

    from dgx_music.storage import Database, Generation

MODEL = "musicgen-tiny-untrained"
PROMPTS = {"trap beat 140 BPM": 4.0, "lofi rain": 3.0, "ambient pads": 2.0}

_GRACE_SECONDS = 10.0
_LAST_LOOK_SECONDS = 2.0
_DURATION_TOLERANCE_SECONDS = 1e-3
_LOG_LINES = 15


def demo(
    folder: Annotated[
        Path, typer.Option(help="Where its database and audio go.", callback=at_home)
    ] = Path("demo"),
    engine: Annotated[
        EngineName,
        typer.Option(
            help="musicgen at toy size, or tone: sine waves, for which torch is not needed."
        ),
    ] = "musicgen",
) -> None:
    """See it work: three prompts, the real worker, audio.

    Uses a database and a folder of its own; running it again adds three more.
    """
    if engine == "musicgen":
        _check_installed()
        tell(
            f"The demo's model is the real MusicGen at toy size with {UNTRAINED_NOTICE}. Every other step is real."
        )
    url = f"sqlite:///{folder / 'generations.db'}"
    worker_code, generations = asyncio.run(_run(folder, url, engine))
    if worker_code != 0:
        _print_end_of(folder / "worker.log")
        raise typer.Exit(
            fail(
                f"The worker ended with code {worker_code}; its log is {folder / 'worker.log'}",
                worker_code,
            )
        )
    problems = [problem for generation in generations for problem in find_problems(generation)]
    _print_generations(generations)
    for problem in problems:
        fail(problem, 1)
    if problems:
        raise typer.Exit(1)
    tell(
        "All is well: every row is completed, and every file has the size, the hash and the duration its row says."
    )
    _print_next_steps(url)


def find_problems(generation: Generation) -> list[str]:
    """Return a sentence for each difference between the row and its file; none if all is well."""
    import soundfile

    if not generation.is_complete:
        return [f"Generation {generation.id} is {generation.status}: {generation.error_message}"]
    path = Path(generation.file_path or "")
    if not path.is_file():
        return [f"The file {path} is not there."]
    data, duration = path.read_bytes(), soundfile.info(path).duration
    problems = []
    if len(data) != generation.file_size_bytes:
        problems.append(
            f"The file {path} has {len(data):,} bytes, not {generation.file_size_bytes:,}."
        )
    if hashlib.sha256(data).hexdigest() != generation.sha256:
        problems.append(f"The file {path} has another hash than its row.")
    if abs(duration - generation.duration_seconds) > _DURATION_TOLERANCE_SECONDS:
        problems.append(
            f"The file {path} lasts {duration:g} s, not {generation.duration_seconds:g} s."
        )
    return problems


async def _run(folder: Path, url: str, engine: EngineName) -> tuple[int, list[Generation]]:
    """Enqueue, let a worker drain the queue, and return its exit code and the rows."""
    from dgx_music.cli.opening import opened
    from dgx_music.client.enqueue import enqueue_many

    async with opened(url) as database:
        requests = [
            {"prompt": prompt, "duration": duration, "model": MODEL}
            for prompt, duration in PROMPTS.items()
        ]
        ids = [row.id for row in await enqueue_many(requests)]
        tell(f"Enqueued {len(ids)} prompts; the worker starts, its log is {folder / 'worker.log'}.")
        code = await _work(_worker_command(folder, url, engine), folder / "worker.log", ids)
        return code, await _read(database, ids)


def _worker_command(folder: Path, url: str, engine: EngineName) -> list[str]:
    options = {
        "--database-url": url,
        "--output": str(folder / "audio"),
        "--model": MODEL,
        "--engine": engine,
    }
    words = [word for option in options.items() for word in option]
    return [sys.executable, "-P", "-m", "dgx_music.cli", "worker", "--drain", *words]


async def _work(command: list[str], log: Path, ids: list[str]) -> int:
    """Show progress until the worker ends; if we leave early, the worker is asked to stop."""
    import anyio

    from dgx_music.cli.progress import follow

    with suppress(FileExistsError):
        create_file(log, is_private=load_settings().is_private)
    with log.open("ab") as stream:
        process = await anyio.open_process(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
        )
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follow, ids, name="progress")
            code = await process.wait()
            tasks.cancel_scope.deadline = anyio.current_time() + (0 if code else _LAST_LOOK_SECONDS)
    finally:
        await _stop(process)
    return code


async def _stop(process: anyio.abc.Process) -> None:
    import anyio

    with anyio.CancelScope(shield=True), anyio.move_on_after(_GRACE_SECONDS):
        if process.returncode is None:
            process.terminate()
            await process.wait()
    if process.returncode is None:
        process.kill()


async def _read(database: Database, ids: list[str]) -> list[Generation]:
    from dgx_music.storage import get_generation

    async with database.session(read_only=True) as session:
        rows = [await get_generation(session, generation_id) for generation_id in ids]
    return [row for row in rows if row is not None]


def _check_installed() -> None:
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise EngineUnavailableError(
            f"The demo needs {' and '.join(missing)}; {how_to_install('musicgen')}, "
            "or try `dgx-music demo --engine tone`."
        )


def _print_generations(generations: list[Generation]) -> None:
    headings = ("ID", "DURATION", "ATTEMPTS", "RUN", "RTF", "PROMPT")
    print_line()
    print_table(headings, [_as_line(row) for row in generations], numbers=headings[1:5])
    for row in generations:
        print_line()
        print_line(f"{row.prompt}: {near(row.file_path or 'no file')}")
        print_waveform(row)
    print_line()


def _as_line(row: Generation) -> tuple[object, ...]:
    seconds = row.generation_time_seconds or 0.0
    rtf = seconds / row.duration_seconds
    return (
        end_of_id(row.id),
        f"{row.duration_seconds:g} s",
        row.attempt,
        f"{seconds:.2f} s",
        f"{rtf:.2f}",
        row.prompt,
    )


def _print_next_steps(url: str) -> None:
    program = _program()
    tell("Next:")
    tell(f"  {program} list --database-url {url}")
    tell(f"  {program} doctor")
    tell(
        f'  {program} enqueue "lofi rain" --duration 10 --wait --out rain.wav     and, in another terminal:'
    )
    tell(f"  {program} worker")


def _program() -> str:
    """Return what to type for this program: its name if the shell finds it, else its path."""
    if shutil.which("dgx-music"):
        return "dgx-music"
    called = Path(sys.argv[0])
    return (
        near(str(called))
        if called.name == "dgx-music"
        else f"{near(sys.executable)} -m dgx_music.cli"
    )


def _print_end_of(log: Path) -> None:
    for line in log.read_text(errors="replace").splitlines()[-_LOG_LINES:]:
        tell(line)
