"""Settings: environment variables ``DGX_MUSIC_*``, or the command line's options of the same names."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin

from pydantic import AliasChoices, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from dgx_music.catalog import DEFAULT_MODEL, MODELS, find_model
from dgx_music.errors import ConfigurationError

DEFAULT_DATABASE_URL = "sqlite:///data/generations.db"
PREFIX = "DGX_MUSIC_"
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")

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
    output: Path = Field(Path("data/audio"), description="folder the audio is published in")
    model: str = Field(DEFAULT_MODEL, description="model a worker serves, and the default for new generations")
    revision: str | None = Field(None, description="commit of the model's weights on the hub; default: the pinned one")
    engine: EngineName = Field("musicgen", description="`musicgen`, or `tone`: sine waves for tests, no torch needed")
    device: str = Field("auto", description="`auto`, `cpu`, `cuda` or `cuda:N`")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="the model's number format")
    slots: int = Field(1, ge=1, le=256, description="generations at a time (engine `musicgen` has one slot)")
    audio_format: AudioFormat = Field("wav", description="file format")
    loudness: Loudness = Field("lufs", description="`lufs` (-14 LUFS), `peak` (-1 dBFS) or `none`")
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

    @field_validator("database_url")
    @classmethod
    def _database_is_kept(cls, url: str) -> str:
        if url in ("sqlite://", "sqlite:///") or ":memory:" in url:
            problem = "names a database in memory, which ends with the process that made it"
            raise ConfigurationError(
                f"{PREFIX}DATABASE_URL", problem, "use something like sqlite:///data/generations.db"
            )
        return url

    @field_validator("model")
    @classmethod
    def _model_is_known(cls, name: str) -> str:
        model = find_model(name)
        if model is None:
            raise ConfigurationError(
                f"{PREFIX}MODEL",
                f"is {name!r}, which is not known",
                f"use {', '.join(MODELS)}, or a local folder's absolute path",
            )
        return model.name

    @field_validator("device")
    @classmethod
    def _device_has_a_known_form(cls, name: str) -> str:
        if _DEVICE.fullmatch(name) is None:
            raise ConfigurationError(f"{PREFIX}DEVICE", f"is {name!r}", "use auto, cpu, cuda or cuda:N")
        return name

    @model_validator(mode="after")
    def _lease_outlives_heartbeats(self) -> Self:
        if self.heartbeat_seconds * 3 > self.lease_seconds:
            raise ConfigurationError(
                f"{PREFIX}HEARTBEAT_SECONDS",
                f"is {self.heartbeat_seconds:g}, more than a third of {PREFIX}LEASE_SECONDS ({self.lease_seconds:g})",
                "a lease must outlive two missed heartbeats: lower the one or raise the other",
            )
        return self


def default_model() -> str:
    """Return the model of a generation that names none: ``DGX_MUSIC_MODEL``, else the catalogue's default."""
    return os.environ.get(f"{PREFIX}MODEL") or DEFAULT_MODEL


def load_settings(**given: Any) -> Settings:
    """Return the settings: what is given, else the environment, else the defaults.

    Raises ``ConfigurationError`` that names the setting, its problem and the remedy.
    """
    try:
        return Settings(**given)
    except ValidationError as error:
        raise _explain(error) from None


def _explain(error: ValidationError) -> ConfigurationError:
    first = error.errors()[0]
    name = str(first["loc"][0])
    field = Settings.model_fields.get(name)
    setting = name if name.isupper() else f"{PREFIX}{name.upper()}"
    problem = f"is {first['input']!r}" if field is not None and field.repr else "is unacceptable"
    return ConfigurationError(setting, problem, _remedy(field) if field is not None else "leave it out")


def _remedy(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return f"use one of {', '.join(get_args(field.annotation))}"
    bounds = {side: getattr(limit, side) for limit in field.metadata for side in ("ge", "le") if hasattr(limit, side)}
    if bounds:
        number = "whole number" if field.annotation is int else "number"
        return f"use a {number} from {bounds['ge']:g} to {bounds['le']:g}"
    return f"use text: {field.description}"
