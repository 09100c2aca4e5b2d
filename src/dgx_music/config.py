"""Settings: environment variables ``DGX_MUSIC_*``, or the command line's options of the same names.

They come from people: white space around a value means nothing, ``~`` is somebody's home, quotes do not belong to a value,
and a variable that nobody reads is a mistake in its name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin

from pydantic import AliasChoices, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from dgx_music import validation
from dgx_music.catalog import DEFAULT_MODEL, MODELS, find_model
from dgx_music.errors import ConfigurationError, InvalidRequestError
from dgx_music.validation import exactly, shown

DEFAULT_DATABASE_URL = "sqlite:///data/generations.db"
PREFIX = "DGX_MUSIC_"
OTHER_VARIABLES = ("DGX_MUSIC_TONE_SCRIPT", "DGX_MUSIC_TONE_SPEED")
"""Read where they are used, by an engine's process."""
MOST_SLOTS = 256
_NOT_OURS = re.compile(r"TEST_\w+|(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)")
"""The tests' own variables, and what Kubernetes and Docker set in every container for a service called ``dgx-music…``."""
_QUOTED = re.compile(r"""(?P<quote>["']).*(?P=quote)""", re.DOTALL)
_SLOTS = re.compile(r"[0-9]{1,3}")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+):/(?P<rest>.*)", re.IGNORECASE | re.DOTALL)
_STORE_SCHEMES = ("s3", "gs", "az")
_STORE_PLACE = re.compile(r"/[A-Za-z0-9][A-Za-z0-9._-]*(/(?!\.{1,2}(/|$))[A-Za-z0-9._=-]+)*/?")

AudioFormat = Literal["wav", "flac", "mp3", "ogg"]
Loudness = Literal["lufs", "peak", "none"]
EngineName = Literal["musicgen", "tone"]


class Settings(BaseSettings):
    """Everything that can be set, validated when built; ``load_settings`` turns a mistake into one sentence."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, populate_by_name=True, extra="forbid", frozen=True
    )

    database_url: str = Field(
        DEFAULT_DATABASE_URL,
        repr=False,  # it may hold a password
        validation_alias=AliasChoices("DGX_MUSIC_DATABASE_URL", "DATABASE_URL"),
        description="where generations are kept",
    )
    replica_url: str | None = Field(
        None,
        repr=False,
        description="read replica of a PostgreSQL database, for lists, searches and statistics",
    )
    pool_size: int = Field(5, ge=1, le=200, description="connections to PostgreSQL that a process keeps at most")
    connect_timeout_seconds: float = Field(
        5.0, ge=0.1, le=600, description="longest wait for a connection to PostgreSQL, to each of several hosts"
    )
    statement_timeout_seconds: float = Field(
        10.0, ge=0.1, le=3600, description="time that PostgreSQL gives one statement, migrations aside"
    )
    command_timeout_seconds: float = Field(
        15.0, ge=0.1, le=3600, description="longest wait for PostgreSQL's answer; then the connection is given up"
    )
    idle_transaction_timeout_seconds: float = Field(
        60.0,
        ge=0.1,
        le=86_400,
        description="time that PostgreSQL lets an open transaction do nothing; then it is undone",
    )
    output: Path | str = Field(
        Path("data/audio"), description="where audio is published: a folder, or `s3://…`, `gs://…` or `az://…`"
    )
    file_access: Literal["owner", "umask"] = Field(
        "owner",
        description="`owner`: the folders, audio and SQLite database made here are for their owner alone; `umask`: as it says",
    )
    model: str = Field(DEFAULT_MODEL, description="model a worker serves, and the default for new generations")
    models: str | None = Field(
        None, description="models a worker serves, separated by commas; default: `DGX_MUSIC_MODEL` alone"
    )
    model_switch_seconds: float = Field(
        60.0, ge=0, le=86_400, description="longest time that the loaded model goes first while another one waits"
    )
    revision: str | None = Field(None, description="commit of the model's weights on the hub; default: the pinned one")
    engine: EngineName = Field("musicgen", description="`musicgen`, or `tone`: sine waves for tests, no torch needed")
    device: str = Field("auto", description="`auto`, `cpu`, `cuda` or `cuda:N`")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="the model's number format")
    slots: int | Literal["auto"] = Field(
        "auto", description="generations at a time, 1 to 256, which share every step; `auto`: as memory allows"
    )
    weights: Literal["full", "int8"] = Field(
        "full", description="`int8` rounds the language model's weights to 8 bits, unless that changes too much"
    )
    kv_cache: Literal["full", "fp8"] = Field(
        "full", description="`fp8` keeps attention's keys and values in 8 bits, unless that changes too much"
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="`auto`: on a CPU build a few kernels in C, where there is a compiler; `on`: have torch compile the step "
        "instead, which takes a minute at first and on a CPU was slower; `off`: neither",
    )
    audio_format: AudioFormat = Field("wav", description="file format")
    loudness: Loudness = Field("lufs", description="`lufs` (-14 LUFS), `peak` (-1 dBFS) or `none`")
    tenant_limit: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="generations of one tenant that run at a time in the whole fleet; default: any",
    )
    lease_seconds: float = Field(30.0, ge=1, le=3600, description="a worker silent for this long has lost its rows")
    heartbeat_seconds: float = Field(2.0, ge=0.05, le=600, description="time between two renewals of the lease")
    poll_seconds: float = Field(5.0, ge=0.05, le=600, description="longest time between two looks for work")
    grace_seconds: float = Field(
        30.0, ge=0, le=3600, description="time that running generations get to finish at a stop"
    )
    deadline_floor_seconds: float = Field(300.0, ge=1, le=86_400, description="least time an attempt may take")
    deadline_factor: float = Field(
        60.0, ge=0, le=10_000, description="further seconds an attempt gets for each second of audio"
    )
    backoff_base_seconds: float = Field(
        5.0, ge=0, le=3600, description="wait before the first retry; doubles with each"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="how much the worker tells")

    @model_validator(mode="before")
    @classmethod
    def _values_are_tidy(cls, values: dict[str, Any]) -> dict[str, Any]:
        check_variables()
        for name, field in cls.model_fields.items():
            # Pydantic would take it for 1 or 0.
            if isinstance(value := values.get(name), bool) and field.annotation in (int, float, int | None):
                raise ConfigurationError(_setting(name), f"is {value}", _remedy(field))
        tidy = {name: _tidy(_setting(name), value) for name, value in values.items()}
        return {name: value for name, value in tidy.items() if value != "" or values[name] == ""}  # blank is not set

    @field_validator("database_url")
    @classmethod
    def _database_is_kept(cls, url: str) -> str:
        if url in ("sqlite://", "sqlite:///") or ":memory:" in url:
            problem = "names a database in memory, which ends with the process that made it"
            raise ConfigurationError(
                f"{PREFIX}DATABASE_URL", problem, "use something like sqlite:///data/generations.db"
            )
        return url

    @field_validator("output", mode="before")
    @classmethod
    def _output_is_a_place(cls, place: object) -> object:
        return parse_output(place) if isinstance(place, str | Path) else place

    @field_validator("model")
    @classmethod
    def _model_is_known(cls, name: str) -> str:
        model = find_model(at_home(f"{PREFIX}MODEL", name))
        if model is None:
            raise ConfigurationError(
                f"{PREFIX}MODEL",
                f"is {name!r}, which is not known",
                f"use {', '.join(MODELS)}, or a local folder's absolute path",
            )
        return model.name

    @field_validator("models")
    @classmethod
    def _models_are_known(cls, names: str | None) -> str | None:
        known = [cls._model_is_known(name.strip()) for name in (names or "").split(",") if name.strip()]
        return ",".join(known) or None

    @property
    def served_models(self) -> tuple[str, ...]:
        """The models a worker serves; the first is loaded first."""
        return (self.model,) if self.models is None else tuple(dict.fromkeys(self.models.split(",")))

    @property
    def is_private(self) -> bool:
        """Whether what is made is for its owner alone."""
        return self.file_access == "owner"

    @field_validator("slots", mode="before")
    @classmethod
    def _slots_are_auto_or_a_number(cls, value: object) -> object:
        text = value if isinstance(value, str) else shown(value)
        if text == "auto" or (_SLOTS.fullmatch(text) and 1 <= int(text) <= MOST_SLOTS):
            return text if text == "auto" else int(text)
        remedy = f"use auto or a whole number from 1 to {MOST_SLOTS}"
        raise ConfigurationError(f"{PREFIX}SLOTS", f"is {None if value is None else shown(value)}", remedy)

    @field_validator("device")
    @classmethod
    def _device_has_a_known_form(cls, name: str) -> str:
        if _DEVICE.fullmatch(name) is None:
            raise ConfigurationError(f"{PREFIX}DEVICE", f"is {name!r}", "use auto, cpu, cuda or cuda:N")
        return name

    @model_validator(mode="after")
    def _revision_is_of_one_model(self) -> Self:
        if self.revision is not None and len(self.served_models) > 1:
            problem = f"is given for the {len(self.served_models)} models of {PREFIX}MODELS"
            raise ConfigurationError(f"{PREFIX}REVISION", problem, "leave it out, or serve one model")
        return self

    @model_validator(mode="after")
    def _lease_outlives_heartbeats(self) -> Self:
        if self.heartbeat_seconds * 3 > self.lease_seconds:
            raise ConfigurationError(
                f"{PREFIX}HEARTBEAT_SECONDS",
                f"is {exactly(self.heartbeat_seconds)}, more than a third of {PREFIX}LEASE_SECONDS "
                f"({exactly(self.lease_seconds)})",
                "a lease must outlive two missed heartbeats: lower the one or raise the other",
            )
        return self


def parse_output(place: str | Path) -> Path | str:
    """Return the folder as a path, or the object store's URL without a slash at its end.

    Raises ``ConfigurationError`` for a URL that is none of a bucket and a prefix; what it shows is no password.
    """
    if not str(place):
        raise _bad_output("is empty", "name a folder, or use s3://, gs:// or az://")
    url = _URL.fullmatch(str(place))
    if url is None:
        return Path(at_home(f"{PREFIX}OUTPUT", str(place)))
    scheme, rest = url["scheme"].lower(), url["rest"]
    if scheme not in _STORE_SCHEMES:
        raise _bad_output(f"begins with {scheme}://, which is not known", "name a folder, or use s3://, gs:// or az://")
    if re.search("[@?#]", rest):
        raise _bad_output(
            "holds a user, a password or a query", f"use {scheme}://bucket/prefix, and the environment for credentials"
        )
    if _STORE_PLACE.fullmatch(rest) is None:
        problem = f"is {str(place)!r}, which is not a bucket and a prefix"
        raise _bad_output(problem, f"use something like {scheme}://bucket/prefix, of letters, digits, . _ - and =")
    return f"{scheme}:/{rest.rstrip('/')}"


def _bad_output(problem: str, remedy: str) -> ConfigurationError:
    return ConfigurationError(f"{PREFIX}OUTPUT", problem, remedy)


def default_model() -> str:
    """Return the model of a generation that names none: ``DGX_MUSIC_MODEL``, else the catalogue's default."""
    name = f"{PREFIX}MODEL"
    return at_home(name, str(_tidy(name, os.environ.get(name, "")))) or DEFAULT_MODEL


def check_variables(names: Iterable[str] | None = None) -> None:
    """Refuse a variable of the environment that is called like a setting and is none; raises ``ConfigurationError``."""
    known = [name.upper() for name in Settings.model_fields] + [name.removeprefix(PREFIX) for name in OTHER_VARIABLES]
    for name in os.environ if names is None else names:
        prefix, own = name.upper()[: len(PREFIX)], name.upper()[len(PREFIX) :]
        if prefix == PREFIX and own not in known and not _NOT_OURS.fullmatch(own):
            nearest = get_close_matches(own, known, n=1, cutoff=0.0)[0]
            raise ConfigurationError(name, "is no setting", f"use {PREFIX}{nearest} if you mean that, or take it out")


def at_home(setting: str, path: str) -> str:
    """Return the setting's path with a home in the place of ``~`` or ``~user`` at its start; any other path as it is."""
    try:
        return validation.at_home(setting, path)
    except InvalidRequestError as error:
        raise ConfigurationError(setting, error.problem, error.remedy) from None


def _tidy(setting: str, value: object) -> object:
    """Return text without the white space around it; refuses what is in quotes, which some readers of files keep."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if _QUOTED.fullmatch(text):
        raise ConfigurationError(setting, "is in quotes, which would be a part of it", "leave the quotes out")
    return text


def _setting(name: str) -> str:
    """Return what a setting is called, given its field or its alias."""
    return name if name.isupper() else f"{PREFIX}{name.upper()}"


def load_settings(**given: Any) -> Settings:
    """Return the settings: what is given, else the environment, else the defaults.

    The environment's read replica is one of the environment's database, and of no other that is given. Raises
    ``ConfigurationError`` that names the setting, its problem and the remedy.
    """
    if given.get("database_url") not in (None, _environments_database()):
        given = {"replica_url": None} | given
    try:
        return Settings(**given)
    except ValidationError as error:
        raise _explain(error) from None


def _environments_database() -> str:
    found = (str(_tidy(name, os.environ.get(name, ""))) for name in (f"{PREFIX}DATABASE_URL", "DATABASE_URL"))
    return next(filter(None, found), DEFAULT_DATABASE_URL)


def _explain(error: ValidationError) -> ConfigurationError:
    first = error.errors()[0]
    name = str(first["loc"][0])
    field = Settings.model_fields.get(name)
    problem = f"is {shown(first['input'])}" if field is not None and field.repr else "is unacceptable"
    return ConfigurationError(_setting(name), problem, _remedy(field) if field is not None else "leave it out")


def _remedy(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return f"use one of {', '.join(get_args(field.annotation))}"
    bounds = {side: getattr(limit, side) for limit in field.metadata for side in ("ge", "le") if hasattr(limit, side)}
    if bounds:
        number = "whole number" if field.annotation is int else "number"
        return f"use a {number} from {bounds['ge']:g} to {bounds['le']:g}"
    return f"use text: {field.description}"
