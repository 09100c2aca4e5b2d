"""Settings: environment variables ``DGX_MUSIC_*``, or the command line's options of the same names.

To add a setting, add a field to ``Settings``. Its type, default and description are also those of
the environment variable and of the option of ``dgx-music worker``.

People type these values: white space around a value means nothing, ``~`` is a home folder, quotes
are not part of a value, and a variable named like a setting that does not exist is a mistake.

Every command reads its settings, so this module imports little. Checking them here saves each
command the 0.1 s of CPU time that importing a validation library costs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from dgx_music import validation
from dgx_music.catalog import DEFAULT_MODEL, MODELS, find_model
from dgx_music.errors import ConfigurationError, InvalidRequestError
from dgx_music.setting import Setting, declared, tidy
from dgx_music.validation import AudioFormat, exactly, shown

DEFAULT_DATABASE_URL = "sqlite:///data/generations.db"
PREFIX = "DGX_MUSIC_"
OTHER_VARIABLES = ("DGX_MUSIC_TONE_SCRIPT", "DGX_MUSIC_TONE_SPEED")
"""An engine's process reads these itself."""
MOST_SLOTS = 256
_REPLACED = {"COMPILE": f"use {PREFIX}KERNELS=auto or {PREFIX}KERNELS=off, or take it out"}
"""Settings of earlier versions, and what to do about them."""
QUEUE_SETTINGS = ("max_pending", "max_pending_per_tenant")
"""What enqueues reads these; a worker does not."""

_NOT_OURS = re.compile(
    r"TEST_\w+|(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)"
)
"""The tests' own variables, and those that Kubernetes and Docker set in each container for a
service named ``dgx-music…``."""
_SLOTS = re.compile(r"[0-9]{1,3}")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+):/(?P<rest>.*)", re.IGNORECASE | re.DOTALL)
_STORE_SCHEMES = ("s3", "gs", "az")
_STORE_PLACE = re.compile(r"/[A-Za-z0-9][A-Za-z0-9._-]*(/(?!\.{1,2}(/|$))[A-Za-z0-9._=-]+)*/?")
_MODEL, _AUDIO, _TIMING, _SERVER = "Model", "Audio", "Timing", "PostgreSQL"

Loudness = Literal["lufs", "peak", "none"]
EngineName = Literal["musicgen", "tone"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that can be set. ``load_settings`` builds it and checks each value."""

    database_url: Annotated[
        str,
        Setting(
            "where generations are kept",
            check=_check_database,
            metavar="URL",
            more_variables=("DATABASE_URL",),
        ),
    ] = field(default=DEFAULT_DATABASE_URL, repr=False)  # it may hold a password
    output: Annotated[
        Path | str,
        Setting(
            "where audio is published: a folder, or `s3://…`, `gs://…` or `az://…`",
            check=_check_output,
            metavar="FOLDER|URL",
        ),
    ] = Path("data/audio")
    file_access: Annotated[
        Literal["owner", "umask"],
        Setting(
            "`owner`: the folders, audio and SQLite database made here are for their owner alone; "
            "`umask`: the process's umask decides who may read them"
        ),
    ] = "owner"
    model: Annotated[
        str,
        Setting(
            "model a worker serves, and the default for new generations",
            check=_check_model,
            panel=_MODEL,
        ),
    ] = DEFAULT_MODEL
    models: Annotated[
        str | None,
        Setting(
            "models a worker serves, separated by commas; default: `DGX_MUSIC_MODEL` alone",
            check=_check_models,
            panel=_MODEL,
        ),
    ] = None
    model_switch_seconds: Annotated[
        float,
        Setting(
            "longest time that the loaded model goes first while another one waits",
            0,
            86_400,
            panel=_MODEL,
        ),
    ] = 60.0
    revision: Annotated[
        str | None,
        Setting("commit of the model's weights on the hub; default: the pinned one", panel=_MODEL),
    ] = None
    engine: Annotated[
        EngineName,
        Setting("`musicgen`, or `tone`: sine waves for tests, no torch needed", panel=_MODEL),
    ] = "musicgen"
    device: Annotated[
        str, Setting("`auto`, `cpu`, `cuda` or `cuda:N`", check=_check_device, panel=_MODEL)
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Setting("the model's number format", panel=_MODEL),
    ] = "auto"
    slots: Annotated[
        int | Literal["auto"],
        Setting(
            "generations at a time, 1 to 256, which share every step; `auto`: as memory allows",
            check=_check_slots,
            panel=_MODEL,
            metavar="auto|N",
        ),
    ] = "auto"
    weights: Annotated[
        Literal["full", "int8", "int4"],
        Setting(
            "`int8` and `int4` round the language model's weights to 8 or 4 bits, unless that changes "
            "too much",
            panel=_MODEL,
        ),
    ] = "full"
    kv_cache: Annotated[
        Literal["full", "fp8"],
        Setting(
            "`fp8` keeps attention's keys and values in 8 bits, unless that changes too much",
            panel=_MODEL,
        ),
    ] = "full"
    kernels: Annotated[
        Literal["auto", "off"],
        Setting(
            "`auto`: on a CPU build a few kernels in C, if there is a compiler; "
            "`off`: leave all work to torch",
            panel=_MODEL,
        ),
    ] = "auto"
    audio_format: Annotated[AudioFormat, Setting("file format", panel=_AUDIO)] = "wav"
    loudness: Annotated[
        Loudness, Setting("`lufs` (-14 LUFS), `peak` (-1 dBFS) or `none`", panel=_AUDIO)
    ] = "lufs"
    tenant_limit: Annotated[
        int | None,
        Setting(
            "generations of one tenant that run at a time in the whole fleet; default: any",
            1,
            10_000,
        ),
    ] = None
    max_pending: Annotated[
        int | None,
        Setting(
            "generations that may wait in the queue: `enqueue` refuses more; 0: any number; "
            "default: any, and 10,000 for the web",
            0,
            1e9,
        ),
    ] = None
    max_pending_per_tenant: Annotated[
        int | None,
        Setting(
            "the same for the generations of each tenant; default: any, and 1,000 for the web",
            0,
            1e9,
        ),
    ] = None
    lease_seconds: Annotated[
        float, Setting("a worker silent for this long has lost its rows", 1, 3600, panel=_TIMING)
    ] = 30.0
    heartbeat_seconds: Annotated[
        float, Setting("time between two renewals of the lease", 0.05, 600, panel=_TIMING)
    ] = 2.0
    poll_seconds: Annotated[
        float, Setting("longest time between two looks for work", 0.05, 600, panel=_TIMING)
    ] = 5.0
    grace_seconds: Annotated[
        float,
        Setting("time that running generations get to finish at a stop", 0, 3600, panel=_TIMING),
    ] = 30.0
    deadline_floor_seconds: Annotated[
        float, Setting("least time an attempt may take", 1, 86_400, panel=_TIMING)
    ] = 300.0
    deadline_factor: Annotated[
        float,
        Setting(
            "further seconds an attempt gets for each second of audio", 0, 10_000, panel=_TIMING
        ),
    ] = 60.0
    backoff_base_seconds: Annotated[
        float, Setting("wait before the first retry; doubles with each", 0, 3600, panel=_TIMING)
    ] = 5.0
    replica_url: Annotated[
        str | None,
        Setting(
            "read replica of a PostgreSQL database, for lists, searches and statistics",
            panel=_SERVER,
            metavar="URL",
        ),
    ] = field(default=None, repr=False)
    pool_size: Annotated[
        int,
        Setting("connections to PostgreSQL that a process keeps at most", 1, 200, panel=_SERVER),
    ] = 5
    connect_timeout_seconds: Annotated[
        float,
        Setting(
            "longest wait for a connection to PostgreSQL, to each of several hosts",
            0.1,
            600,
            panel=_SERVER,
        ),
    ] = 5.0
    statement_timeout_seconds: Annotated[
        float,
        Setting(
            "time that PostgreSQL gives one statement, migrations aside", 0.1, 3600, panel=_SERVER
        ),
    ] = 10.0
    command_timeout_seconds: Annotated[
        float,
        Setting(
            "longest wait for PostgreSQL's answer; then the connection is given up",
            0.1,
            3600,
            panel=_SERVER,
        ),
    ] = 15.0
    idle_transaction_timeout_seconds: Annotated[
        float,
        Setting(
            "time that PostgreSQL lets an open transaction do nothing; then it is undone",
            0.1,
            86_400,
            panel=_SERVER,
        ),
    ] = 60.0
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Setting("log level of the worker: the least severe events that it logs"),
    ] = "info"

    @property
    def served_models(self) -> tuple[str, ...]:
        """The models a worker serves; the first is loaded first."""
        return (
            (self.model,) if self.models is None else tuple(dict.fromkeys(self.models.split(",")))
        )

    @property
    def is_private(self) -> bool:
        """Whether only the owner may read what is made here."""
        return self.file_access == "owner"


def load_settings(**given: Any) -> Settings:
    """Return the settings: the given values, else the environment's, else the defaults.

    The environment's read replica belongs to the environment's database: it is ignored if another
    database is given. Raises ``ConfigurationError`` that names the setting, its problem and the
    remedy.
    """
    check_variables()
    if unknown := given.keys() - SETTINGS.keys():
        raise ConfigurationError(
            f"{PREFIX}{min(unknown).upper()}",
            "is unacceptable",
            "leave it out",
        )
    environment = _read_environment()
    # Only compared: if another one is given, nothing is wrong with a bad one here.
    in_environment = replace(SETTINGS["database_url"], check=None).value_of({}, environment)
    if given.get("database_url") not in (None, in_environment):
        given = {"replica_url": None} | given
    settings = Settings(
        **{name: each.value_of(given, environment) for name, each in SETTINGS.items()}
    )
    _check_together(settings)
    return settings


def default_model() -> str:
    """Return the model of a generation that names none: ``DGX_MUSIC_MODEL``, or the default."""
    name = f"{PREFIX}MODEL"
    return at_home(name, str(tidy(name, os.environ.get(name, "")))) or DEFAULT_MODEL


def queue_settings() -> dict[str, int]:
    """Return those of ``QUEUE_SETTINGS`` that are set in the environment."""
    settings = (SETTINGS[name] for name in QUEUE_SETTINGS)
    given = [each for each in settings if each.variable in os.environ]
    return {
        each.name: each.value_of({}, os.environ)
        for each in given
        if os.environ[each.variable].strip()
    }


def check_variables(names: Iterable[str] | None = None) -> None:
    """Refuse an environment variable that is named like a setting but is none.

    Raises ``ConfigurationError`` that names the nearest setting, or what replaced it.
    """
    known = [each.upper() for each in SETTINGS] + [
        each.removeprefix(PREFIX) for each in OTHER_VARIABLES
    ]
    for name in os.environ if names is None else names:
        prefix, own = name.upper()[: len(PREFIX)], name.upper()[len(PREFIX) :]
        if prefix == PREFIX and own not in known and not _NOT_OURS.fullmatch(own):
            if own in _REPLACED:
                raise ConfigurationError(name, "is no setting any more", _REPLACED[own])
            nearest = get_close_matches(own, known, n=1, cutoff=0.0)[0]
            raise ConfigurationError(
                name,
                "is no setting",
                f"use {PREFIX}{nearest} if you mean that, or take it out",
            )


def at_home(setting: str, path: str) -> str:
    """Return the setting's path with that home folder for ``~`` or ``~user`` at its start."""
    try:
        return validation.at_home(setting, path)
    except InvalidRequestError as error:
        raise ConfigurationError(setting, error.problem, error.remedy) from None


def parse_output(place: str | Path) -> Path | str:
    """Return the folder as a path, or the object store's URL without a slash at its end.

    Raises ``ConfigurationError`` if a URL is not a bucket and a prefix; its message shows no
    password.
    """
    if not str(place):
        raise _bad_output("is empty", "name a folder, or use s3://, gs:// or az://")
    url = _URL.fullmatch(str(place))
    if url is None:
        return Path(at_home(f"{PREFIX}OUTPUT", str(place)))
    scheme, rest = url["scheme"].lower(), url["rest"]
    if scheme not in _STORE_SCHEMES:
        raise _bad_output(
            f"begins with {scheme}://, which is not known",
            "name a folder, or use s3://, gs:// or az://",
        )
    if re.search("[@?#]", rest):
        remedy = f"use {scheme}://bucket/prefix, and the environment for credentials"
        raise _bad_output("holds a user, a password or a query", remedy)
    if _STORE_PLACE.fullmatch(rest) is None:
        problem = f"is {str(place)!r}, which is not a bucket and a prefix"
        raise _bad_output(
            problem,
            f"use something like {scheme}://bucket/prefix, of letters, digits, . _ - and =",
        )
    return f"{scheme}:/{rest.rstrip('/')}"


def _bad_output(problem: str, remedy: str) -> ConfigurationError:
    return ConfigurationError(f"{PREFIX}OUTPUT", problem, remedy)


def _read_environment() -> dict[str, str]:
    """Return the environment's variables that are not empty, with their names in upper case."""
    return {name.upper(): value for name, value in os.environ.items() if value.strip()}


def _check_database(url: str) -> str:
    if url in ("sqlite://", "sqlite:///") or ":memory:" in url:
        problem = "names a database in memory, which ends with the process that made it"
        raise ConfigurationError(
            f"{PREFIX}DATABASE_URL",
            problem,
            f"use something like {DEFAULT_DATABASE_URL}",
        )
    return url


def _check_output(place: object) -> Path | str:
    if isinstance(place, str | Path):
        return parse_output(place)
    raise ConfigurationError(f"{PREFIX}OUTPUT", f"is {shown(place)}", SETTINGS["output"].remedy)


def _check_model(name: str) -> str:
    variable = f"{PREFIX}MODEL"
    model = find_model(at_home(variable, name))
    if model is None:
        remedy = f"use {', '.join(MODELS)}, or a local folder's absolute path"
        raise ConfigurationError(variable, f"is {name!r}, which is not known", remedy)
    return model.name


def _check_models(names: str | None) -> str | None:
    known = [_check_model(name.strip()) for name in (names or "").split(",") if name.strip()]
    return ",".join(known) or None


def _check_slots(value: object) -> int | Literal["auto"]:
    text = value if isinstance(value, str) else shown(value)
    if text == "auto":
        return "auto"
    if _SLOTS.fullmatch(text) and 1 <= int(text) <= MOST_SLOTS:
        return int(text)
    remedy = f"use auto or a whole number from 1 to {MOST_SLOTS}"
    raise ConfigurationError(
        f"{PREFIX}SLOTS",
        f"is {None if value is None else shown(value)}",
        remedy,
    )


def _check_device(name: str) -> str:
    if _DEVICE.fullmatch(name) is None:
        raise ConfigurationError(f"{PREFIX}DEVICE", f"is {name!r}", "use auto, cpu, cuda or cuda:N")
    return name


def _check_together(settings: Settings) -> None:
    """Refuse settings that are each acceptable, but not beside each other."""
    if settings.revision is not None and len(settings.served_models) > 1:
        problem = f"is given for the {len(settings.served_models)} models of {PREFIX}MODELS"
        raise ConfigurationError(f"{PREFIX}REVISION", problem, "leave it out, or serve one model")
    if settings.heartbeat_seconds * 3 > settings.lease_seconds:
        raise ConfigurationError(
            f"{PREFIX}HEARTBEAT_SECONDS",
            f"is {exactly(settings.heartbeat_seconds)}, more than a third of {PREFIX}LEASE_SECONDS "
            f"({exactly(settings.lease_seconds)})",
            "a lease must outlive two missed heartbeats: lower the one or raise the other",
        )


SETTINGS: Mapping[str, Setting] = declared(Settings, PREFIX)
"""Each setting by its name, in the order of the fields of ``Settings``."""
