"""What ``dgx-music doctor`` looks at, and what it finds."""

from __future__ import annotations

import asyncio
import platform
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from dgx_music.artifacts import FileInspection, LocalArtifacts, open_output
from dgx_music.catalog import UNTRAINED_NOTICE, ModelInfo, find_model
from dgx_music.cli import memory
from dgx_music.cli.opening import exists
from dgx_music.cli.output import size
from dgx_music.config import Settings, load_settings
from dgx_music.errors import (
    ConfigurationError,
    DatabaseError,
    DatabaseNotMigratedError,
    DgxMusicError,
    EngineError,
    how_to_install,
    is_newer,
)
from dgx_music.inference.musicgen import inventory
from dgx_music.inference.trouble import first_line
from dgx_music.storage import Database
from dgx_music.storage.connection.revision import SCHEMA_REVISION
from dgx_music.storage.connection.sqlite import warn_of_old_sqlite
from dgx_music.storage.retention import find_completed_files
from dgx_music.storage.trial import check_writable, find_folder_problem

PACKAGES = (
    "sqlalchemy",
    "aiosqlite",
    "alembic",
    "anyio",
    "numpy",
    "soundfile",
    "pyloudnorm",
    "soxr",
)
ENGINE_PACKAGES = ("torch", "transformers", "safetensors")

Verdict = Literal["ok", "warning", "failed"]


_EXIT_CODES = {
    "packages": 1,
    "settings": 2,
    "database": 5,
    "output": 7,
    "engine": 6,
    "device": 6,
    "model": 6,
    "memory": 6,
    "answers": 6,
}
"""The exit code of a worker for which this fails, in the order in which a worker would notice."""
_ROWS_AT_ONCE = 1_000


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; while it is ``failed`` no worker can run."""

    verdict: Verdict
    subject: str
    detail: str
    figures: dict[str, int | str | None] | None = None
    """The numbers behind the detail, for programs."""


def exit_code_of(findings: Iterable[Finding]) -> int:
    """Return the exit code of a worker here: that of the first failure it would meet, or 0."""
    failed = {finding.subject for finding in findings if finding.verdict == "failed"}
    return next((code for subject, code in _EXIT_CODES.items() if subject in failed), 0)


def examine(
    options: dict[str, object], *, is_verified: bool = False, are_files_counted: bool = False
) -> Iterator[Finding]:
    """Yield the findings, the most basic first; a wrong setting ends them early."""
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.platform(terse=True)}")
    packages = _examine_packages("packages", PACKAGES, how_to_install())
    yield packages
    try:
        settings = load_settings(**options)
        if packages.verdict == "ok":
            _check_format(settings)
        database = Database.from_settings(settings)
    except ConfigurationError as error:
        yield Finding("failed", "settings", str(error))
        return
    yield from _examine_engine(settings)
    if is_verified:
        yield from _examine_answers(settings)
    yield asyncio.run(_examine_database(database))
    if database.is_embedded and (warning := warn_of_old_sqlite()) is not None:
        yield Finding("warning", "sqlite", warning)
    yield asyncio.run(_examine_output(settings.output))
    if are_files_counted:
        yield asyncio.run(_examine_files(Database.from_settings(settings)))


def _check_format(settings: Settings) -> None:
    from dgx_music.audio.files import check_setting  # imports packages that may be missing

    check_setting(settings.audio_format)


def _examine_packages(subject: str, names: tuple[str, ...], remedy: str) -> Finding:
    found = {name: _version_of(name) for name in names}
    missing = [name for name, found_version in found.items() if found_version is None]
    if missing:
        return Finding("failed", subject, f"{', '.join(missing)} not installed; {remedy}")
    return Finding(
        "ok",
        subject,
        ", ".join(f"{name} {found_version}" for name, found_version in found.items()),
    )


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _examine_engine(settings: Settings) -> Iterator[Finding]:
    if settings.engine == "tone":
        from dgx_music.inference import tone

        try:
            tone.check_environment()
        except ConfigurationError as error:
            yield Finding("failed", "settings", str(error))
        yield Finding(
            "warning",
            "engine",
            "tone: sine waves for tests, not music; torch is not needed",
        )
        return
    packages = _examine_packages("engine", ENGINE_PACKAGES, how_to_install("musicgen"))
    yield packages
    if packages.verdict == "ok":
        yield _examine_device(settings.device)
        yield from (_examine_model(settings, name) for name in settings.served_models)
        yield from (_examine_memory(settings, name) for name in settings.served_models)


def _examine_device(wanted: str) -> Finding:
    if wanted == "cpu":
        return Finding("ok", "device", "cpu, as asked for")
    found = inventory.find_cuda_devices()
    index = int(wanted.partition(":")[2] or 0)
    if index < len(found):
        return Finding("ok", "device", f"cuda:{index}, {found[index]}")
    if wanted == "auto":
        return Finding(
            "warning",
            "device",
            "cpu: torch finds no CUDA device, so expect minutes, not seconds",
        )
    problem = f"{wanted} was asked for and torch finds {len(found)} CUDA devices; use auto or cpu"
    return Finding("failed", "device", problem)


def _examine_model(settings: Settings, name: str) -> Finding:
    model = find_model(name)
    if model is None or model.is_untrained:
        return Finding("warning", "model", f"{name} is built here; {UNTRAINED_NOTICE}")
    if model.repository is None:
        return _examine_folder(settings, model)
    if inventory.has_weights(model, settings.revision):
        return _examine_cached(settings, model)
    problem = inventory.find_obstacle(model, settings.revision)
    if problem is None:
        how = f"is downloaded when a worker starts; its licence is {model.licence}"
        return Finding("warning", "model", f"{model.name} {how}")
    return _cannot_load(settings, model, problem)


def _examine_cached(settings: Settings, model: ModelInfo) -> Finding:
    place = f"{model.name} in the Hugging Face cache"
    if (damage := inventory.find_damage_of(model, settings.revision)) is not None:
        remedy = "delete it, to have it downloaded again"
        return _cannot_load(settings, model, f"{place} cannot be loaded: {damage}; {remedy}")
    return Finding("ok", "model", f"{model.name} is in the Hugging Face cache ({model.licence})")


def _examine_folder(settings: Settings, model: ModelInfo) -> Finding:
    remedy = "save the model there with save_pretrained"
    if not inventory.holds_weights(Path(model.name)):
        return _cannot_load(settings, model, f"{model.name} holds no complete weights; {remedy}")
    if (damage := inventory.find_damage_of(model, None)) is not None:
        return _cannot_load(settings, model, f"{model.name} cannot be loaded: {damage}; {remedy}")
    return Finding("ok", "model", f"{model.name} holds weights")


def _cannot_load(settings: Settings, model: ModelInfo, problem: str) -> Finding:
    """Return a failure for the model that a worker loads first, a warning for another one."""
    if model.name != settings.served_models[0]:
        return Finding(
            "warning",
            "model",
            f"{problem.rstrip('.')}. A worker serves the others only.",
        )
    return Finding("failed", "model", problem)


def _examine_memory(settings: Settings, name: str) -> Finding:
    """Compare what the model takes of the device's memory with what is free."""
    from dgx_music.worker.daemon import engine_settings

    try:
        plan = inventory.plan_memory(replace(engine_settings(settings), model=name))
    except (EngineError, ValueError, OSError) as error:
        return Finding("warning", "memory", f"not known for {name}: {first_line(error)}")
    figures: dict[str, int | str | None] = {"model": name, **asdict(plan)}
    detail, shortage = memory.describe(name, plan), memory.find_shortage(plan)
    if shortage is None:
        return Finding("ok", "memory", detail, figures)
    is_first = name == settings.served_models[0]
    verdict: Verdict = "warning" if plan.has_room or not is_first else "failed"
    return Finding(verdict, "memory", f"{detail}: {shortage}", figures)


def _examine_answers(settings: Settings) -> Iterator[Finding]:
    """Compare the served models' numbers with those that are publicly known; downloads nothing."""
    if settings.engine == "tone" or any(_version_of(name) is None for name in ENGINE_PACKAGES):
        yield Finding(
            "warning",
            "answers",
            "not compared: there is no engine here whose numbers are publicly known",
        )
        return
    from dgx_music.inference.musicgen import known_answers
    from dgx_music.worker.daemon import engine_settings

    for name in settings.served_models:
        model = find_model(name)
        if (
            model is not None
            and model.repository is not None
            and not inventory.has_weights(model, settings.revision)
        ):
            yield Finding(
                "warning",
                "answers",
                f"not compared: the weights of {name} are not on this machine",
            )
            continue
        try:
            for comparison in known_answers.compare(replace(engine_settings(settings), model=name)):
                yield Finding(comparison.verdict, "answers", comparison.detail)
        except EngineError as error:
            yield Finding("failed", "answers", str(error))


async def _examine_database(database: Database) -> Finding:
    try:
        return await (_try_database(database) if exists(database) else _try_place_of(database))
    except DatabaseError as error:
        return Finding("failed", "database", str(error))
    finally:
        await database.dispose()


async def _try_database(database: Database) -> Finding:
    """Look at the revision, and try to write, as a worker does at once; the write is undone."""
    found = await database.revision()
    if found is not None and (
        is_newer(found, SCHEMA_REVISION) or (found != SCHEMA_REVISION and not database.is_embedded)
    ):
        raise DatabaseNotMigratedError(found, SCHEMA_REVISION)
    if found is None and not database.is_embedded:
        return Finding(
            "failed",
            "database",
            f"{database} is at revision none; run `dgx-music db migrate`",
        )
    # Only a fresh connection follows the server's default, which may be to refuse writes.
    await database.dispose()
    await check_writable(database)
    if found == SCHEMA_REVISION:
        return Finding("ok", "database", f"{database} is at head ({found})")
    why = f"{database} is at revision {found or 'none'}; a worker migrates it, as does `dgx-music db migrate`"
    return Finding("warning", "database", why)


async def _try_place_of(database: Database) -> Finding:
    """Look whether a database that is not there yet can be created."""
    if (
        database.path is not None
        and (problem := find_folder_problem(database.path.parent)) is not None
    ):
        return Finding(
            "failed",
            "database",
            f"{database} does not exist and cannot be created: {problem}",
        )
    return Finding("ok", "database", f"{database} does not exist yet; it is created on first use")


async def _examine_files(database: Database) -> Finding:
    """Count the completed generations whose file is gone or damaged; a worker can still run."""
    try:
        if not exists(database) or await database.revision() != SCHEMA_REVISION:
            return Finding(
                "warning",
                "files",
                "not counted: there is no database of this version to ask",
            )
        count, missing, damaged = await _count_files(database)
    except DgxMusicError as error:
        return Finding("warning", "files", f"not counted: {error}")
    finally:
        await database.dispose()
    problems = {"missing": missing, "damaged": damaged}
    told = [
        f"{len(paths):,} of {count:,} are {what}, such as {min(paths)}"
        for what, paths in problems.items()
        if paths
    ]
    if told:
        return Finding("warning", "files", "; ".join(told))
    return Finding("ok", "files", f"none of {count:,} is missing or damaged")


async def _count_files(database: Database) -> tuple[int, list[str], list[str]]:
    """Return how many completed generations have a file, the missing paths, and the damaged."""
    inspection, count, missing, damaged = FileInspection(), 0, list[str](), list[str]()
    page: list[tuple[str, str, int | None]] = [("", "", None)]
    while page:
        read = partial(find_completed_files, after_id=page[-1][0], limit=_ROWS_AT_ONCE)
        page = await database.transact(read, read_only=True)
        count += len(page)
        states = await inspection.look_at((path, size_bytes) for _, path, size_bytes in page)
        missing += [path for path, state in states.items() if state.is_missing]
        damaged += [path for path, state in states.items() if state.is_damaged]
    return count, missing, damaged


async def _examine_output(output: Path | str) -> Finding:
    try:
        artifacts = open_output(output)
    except ConfigurationError as error:
        return Finding("failed", "settings", str(error))
    problem = await artifacts.find_problem()
    if problem is not None:
        return Finding("failed", "output", problem)
    if not isinstance(artifacts, LocalArtifacts):
        return Finding("ok", "output", f"{output} can be written")
    if (weakness := await artifacts.find_weakness()) is not None:
        return Finding("warning", "output", f"{output} can be written; {weakness}")
    existing = next(path for path in (artifacts.root, *artifacts.root.parents) if path.exists())
    free = size(shutil.disk_usage(existing).free)
    if existing != artifacts.root:
        return Finding(
            "ok",
            "output",
            f"{output} does not exist yet; it is created on first use; {free} free",
        )
    return Finding("ok", "output", f"{output} can be written; {free} free")
