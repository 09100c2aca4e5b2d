"""``dgx-music doctor``: is everything here that a worker needs, and if not, what to do."""

from __future__ import annotations

import asyncio
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

import typer

from dgx_music.artifacts import LocalArtifacts, open_output
from dgx_music.catalog import UNTRAINED_NOTICE, find_model
from dgx_music.cli.database import exists
from dgx_music.cli.options import AsJson, DatabaseUrl, Output, complete_model, given, setting
from dgx_music.cli.output import print_json, print_table, size, tell
from dgx_music.config import EngineName, Settings, load_settings
from dgx_music.errors import ConfigurationError, DatabaseError
from dgx_music.inference import inventory
from dgx_music.storage import Database
from dgx_music.storage.database import is_newer
from dgx_music.storage.schema import SCHEMA_REVISION
from dgx_music.storage.sqlite import warn_of_old_sqlite

PACKAGES = ("sqlalchemy", "aiosqlite", "alembic", "anyio", "numpy", "soundfile", "pyloudnorm", "soxr")
ENGINE_PACKAGES = ("torch", "transformers", "safetensors")
HOW_TO_INSTALL = "pip install 'dgx-music[musicgen]'"

Verdict = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ``failed`` means that no worker can run until it is mended."""

    verdict: Verdict
    subject: str
    detail: str


def doctor(
    engine: Annotated[EngineName | None, setting("engine")] = None,
    model: Annotated[str | None, setting("model", autocompletion=complete_model)] = None,
    device: Annotated[str | None, setting("device")] = None,
    output: Output = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Check what a worker needs: packages, device, model, disk.

    Ends with 0 where a worker can run here, else with 1.
    """
    options = given(engine=engine, model=model, device=device, output=output, database_url=database_url)
    findings = list(examine(options))
    is_usable = all(finding.verdict != "failed" for finding in findings)
    if as_json:
        print_json({"is_usable": is_usable, "findings": [asdict(finding) for finding in findings]})
    else:
        rows = [(finding.verdict, finding.subject, finding.detail) for finding in findings]
        print_table(("CHECK", "SUBJECT", "DETAIL"), rows, is_cut=False)
        tell("A worker can run here." if is_usable else "A worker cannot run here until what failed is mended.")
    if not is_usable:
        raise typer.Exit(1)


def examine(options: dict[str, object]) -> Iterator[Finding]:
    """Yield what there is to say, most basic first; a wrong setting ends it early."""
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.platform(terse=True)}")
    yield _examine_packages("packages", PACKAGES, "pip install --upgrade dgx-music")
    try:
        settings = load_settings(**options)
        database = Database.from_settings(settings)
    except ConfigurationError as error:
        yield Finding("failed", "settings", str(error))
        return
    yield from _examine_engine(settings)
    yield asyncio.run(_examine_database(database))
    if database.is_embedded and (warning := warn_of_old_sqlite()) is not None:
        yield Finding("warning", "sqlite", warning)
    yield asyncio.run(_examine_output(settings.output))


def _examine_packages(subject: str, names: tuple[str, ...], remedy: str) -> Finding:
    found = {name: _version_of(name) for name in names}
    missing = [name for name, found_version in found.items() if found_version is None]
    if missing:
        return Finding("failed", subject, f"{', '.join(missing)} not installed; {remedy}")
    return Finding("ok", subject, ", ".join(f"{name} {found_version}" for name, found_version in found.items()))


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _examine_engine(settings: Settings) -> Iterator[Finding]:
    if settings.engine == "tone":
        yield Finding("warning", "engine", "tone: sine waves for tests, not music; torch is not needed")
        return
    packages = _examine_packages("engine", ENGINE_PACKAGES, HOW_TO_INSTALL)
    yield packages
    if packages.verdict == "ok":
        yield _examine_device(settings.device)
        yield from (_examine_model(settings, name) for name in settings.served_models)


def _examine_device(wanted: str) -> Finding:
    if wanted == "cpu":
        return Finding("ok", "device", "cpu, as asked for")
    found = inventory.find_cuda_devices()
    index = int(wanted.partition(":")[2] or 0)
    if index < len(found):
        return Finding("ok", "device", f"cuda:{index}, {found[index]}")
    if wanted == "auto":
        return Finding("warning", "device", "cpu: torch finds no CUDA device, so expect minutes, not seconds")
    return Finding(
        "failed", "device", f"{wanted} was asked for and torch finds {len(found)} CUDA devices; use auto or cpu"
    )


def _examine_model(settings: Settings, name: str) -> Finding:
    model = find_model(name)
    if model is None or model.is_untrained:
        return Finding("warning", "model", f"{name} is built here; {UNTRAINED_NOTICE}")
    if model.repository is None:
        return _examine_folder(Path(model.name))
    revision = settings.revision or model.revision or "main"
    if inventory.has_weights(model.repository, revision):
        return Finding("ok", "model", f"{model.name} is in the Hugging Face cache ({model.licence})")
    return Finding(
        "warning", "model", f"{model.name} is downloaded when a worker starts; its licence is {model.licence}"
    )


def _examine_folder(folder: Path) -> Finding:
    if any(folder.glob("*.safetensors")):
        return Finding("ok", "model", f"{folder} holds safetensors weights")
    return Finding(
        "failed", "model", f"{folder} holds no *.safetensors file; save the model there with save_pretrained"
    )


async def _examine_database(database: Database) -> Finding:
    if not exists(database):
        return Finding("ok", "database", f"{database} does not exist yet; it is created on first use")
    try:
        found = await database.revision()
    except DatabaseError as error:
        return Finding("failed", "database", str(error))
    finally:
        await database.dispose()
    if found == SCHEMA_REVISION:
        return Finding("ok", "database", f"{database} is at head ({found})")
    if is_newer(found):
        return Finding(
            "failed", "database", f"{database} is at revision {found}, newer than this version's; upgrade dgx-music"
        )
    verdict: Verdict = "warning" if database.is_embedded else "failed"  # an embedded one migrates itself
    return Finding(verdict, "database", f"{database} is at revision {found or 'none'}; run `dgx-music db migrate`")


async def _examine_output(output: Path | str) -> Finding:
    try:
        artifacts = open_output(output)
    except ConfigurationError as error:
        return Finding("failed", "output", str(error))
    problem = await artifacts.find_problem()
    if problem is not None:
        return Finding("failed", "output", problem)
    if not isinstance(artifacts, LocalArtifacts):
        return Finding("ok", "output", f"{output} can be written")
    existing = next(path for path in (artifacts.root, *artifacts.root.parents) if path.exists())
    return Finding("ok", "output", f"{output} can be written; {size(shutil.disk_usage(existing).free)} free")
