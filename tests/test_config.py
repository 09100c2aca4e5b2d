"""Settings as people type them."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest

import dgx_music
from dgx_music.config import (
    OTHER_VARIABLES,
    PREFIX,
    check_variables,
    default_model,
    load_settings,
    parse_output,
)
from dgx_music.errors import ConfigurationError
from dgx_music.setting import Setting, declared


def refused(**given: object) -> str:
    """Return the sentence with which the settings are refused."""
    with pytest.raises(ConfigurationError) as caught:
        load_settings(**given)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("DGX_MUSIC_SLOT", "DGX_MUSIC_SLOTS"),
        ("DGX_MUSIC_DATABSE_URL", "DGX_MUSIC_DATABASE_URL"),
        ("DGX_MUSIC_TONE_SPED", "DGX_MUSIC_TONE_SPEED"),
        ("dgx_music_lease", "DGX_MUSIC_LEASE_SECONDS"),
    ],
)
def test_a_variable_that_nobody_reads_is_refused_with_the_nearest_one(
    monkeypatch: pytest.MonkeyPatch, name: str, nearest: str
) -> None:
    monkeypatch.setenv(name, "postgresql://ann:hunter2@h/d")

    assert refused() == f"{name} is no setting; use {nearest} if you mean that, or take it out."


def test_a_setting_of_an_earlier_version_is_refused_with_what_replaced_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DGX_MUSIC_COMPILE", "off")

    assert refused() == (
        "DGX_MUSIC_COMPILE is no setting any more; "
        "use DGX_MUSIC_KERNELS=auto or DGX_MUSIC_KERNELS=off, or take it out."
    )


@pytest.mark.parametrize(
    "name",
    [
        "DGX_MUSIC_TEST_POSTGRES_URL",
        "DGX_MUSIC_SERVICE_HOST",
        "DGX_MUSIC_SERVICE_PORT_HTTP",
        "DGX_MUSIC_PORT",
        "DGX_MUSIC_PORT_80_TCP_ADDR",
        "DGX_MUSIC_DB_SERVICE_PORT",
        "DGX_MUSIC_DB_PORT_5432_TCP",
        "_DGX_MUSIC_COMPLETE",
    ],
)
def test_what_a_cluster_sets_for_a_service_of_that_name_is_no_mistake(name: str) -> None:
    check_variables([name])


@pytest.mark.parametrize(
    "name",
    ["DGX_MUSIC_PORTION", "DGX_MUSIC_PORT_80_TCPX", "DGX_MUSIC_TEST_", "DGX_MUSIC_SERVICE_HOSTS"],
)
def test_what_only_begins_like_a_clusters_variable_is_a_mistake(name: str) -> None:
    with pytest.raises(ConfigurationError, match="is no setting"):
        check_variables([name])


def test_every_variable_that_the_code_names_is_known() -> None:
    files = Path(dgx_music.__file__).parent.rglob("*.py")
    named = {
        name
        for file in files
        for name in re.findall(rf"\b{PREFIX}[A-Z_]+[A-Z]\b", file.read_text())
    }

    assert named >= {*OTHER_VARIABLES}
    check_variables(named)


async def test_a_program_hears_of_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGX_MUSIC_MODLE", "musicgen-large")

    with pytest.raises(ConfigurationError, match="use DGX_MUSIC_MODEL if"):
        await dgx_music.init_db()
    with pytest.raises(ConfigurationError, match="use DGX_MUSIC_MODEL if"):
        await dgx_music.enqueue("lofi rain")


@pytest.mark.parametrize("quote", ["'", '"'])
@pytest.mark.parametrize(
    "name", ["database_url", "output", "model", "device", "lease_seconds", "slots"]
)
def test_quotes_that_a_file_of_variables_kept_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, quote: str
) -> None:
    setting = f"{PREFIX}{name.upper()}"
    monkeypatch.setenv(setting, f"{quote}30{quote}\r")

    assert (
        refused() == f"{setting} is in quotes, which would be a part of it; leave the quotes out."
    )


@pytest.mark.parametrize(
    ("name", "typed", "meant"),
    [
        ("lease_seconds", " 30\r", 30.0),
        ("engine", "tone\r\n", "tone"),
        ("slots", " auto ", "auto"),
        ("model", "\tmusicgen-large ", "musicgen-large"),
        ("output", " s3://bucket/music ", "s3://bucket/music"),
        ("output", "  ", Path("data/audio")),
        ("database_url", " sqlite:///x.db ", "sqlite:///x.db"),
    ],
)
def test_white_space_around_a_value_means_nothing(
    monkeypatch: pytest.MonkeyPatch, name: str, typed: str, meant: object
) -> None:
    monkeypatch.setenv(f"{PREFIX}{name.upper()}", typed)

    assert getattr(load_settings(), name) == meant


def test_a_home_is_found_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("DGX_MUSIC_MODEL", " ~/mine")

    settings = load_settings(output="~/audio", models="musicgen-small,~/mine")

    assert (settings.output, settings.model, settings.models) == (
        Path("/home/ann/audio"),
        "/home/ann/mine",
        "musicgen-small,/home/ann/mine",
    )
    assert default_model() == "/home/ann/mine"


def test_a_home_that_nobody_has_is_refused() -> None:
    assert refused(output="~nobody-here/a") == (
        "DGX_MUSIC_OUTPUT begins with ~nobody-here, whose home is not known; write the path in full."
    )


NO_NUMBERS = ["30s", "1,5", "NaN", "inf", "-inf", "0x10", "true", "3600.0001", "9" * 5000, 10**5000]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=range(len(NO_NUMBERS)))
def test_what_is_no_number_within_the_limits_is_one_short_sentence(value: object) -> None:
    sentence = refused(lease_seconds=value)

    assert sentence.startswith("DGX_MUSIC_LEASE_SECONDS is ")
    assert sentence.endswith("; use a number from 1 to 3600.")
    assert len(sentence) < 120


@pytest.mark.parametrize(
    "name", ["pool_size", "lease_seconds", "tenant_limit", "slots", "model", "engine"]
)
def test_yes_and_no_are_no_numbers_and_no_names(name: str) -> None:
    assert refused(**{name: True}).startswith(f"{PREFIX}{name.upper()} is True; use ")


def test_a_third_of_the_lease_is_told_exactly() -> None:
    assert "is 10.0000001, more than a third of DGX_MUSIC_LEASE_SECONDS (30)" in refused(
        heartbeat_seconds=10.0000001
    )


def test_an_output_that_is_empty_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="DGX_MUSIC_OUTPUT is empty; name a folder"):
        parse_output("")


@pytest.mark.parametrize(
    ("name", "limit", "past"),
    [
        ("slots", 1, 0),
        ("slots", 256, 257),
        ("tenant_limit", 1, 0),
        ("pool_size", 1, 0),
        ("pool_size", 200, 201),
        ("lease_seconds", 1, 0.99),
        ("heartbeat_seconds", 0.1, 0.34),
    ],
)
def test_a_limit_is_accepted_and_what_is_past_it_is_refused(
    name: str, limit: float, past: float
) -> None:
    given = {"lease_seconds": 1, "heartbeat_seconds": 0.1}

    assert getattr(load_settings(**given | {name: limit}), name) == limit
    assert refused(**given | {name: past}).startswith(f"{PREFIX}{name.upper()} is ")


def test_a_heartbeat_of_a_third_of_the_lease_is_accepted() -> None:
    assert load_settings(lease_seconds=30, heartbeat_seconds=10).heartbeat_seconds == 10


def test_settings_that_are_printed_hide_their_passwords() -> None:
    url = "postgresql://ann:hunter2@host/db"

    assert "hunter2" not in repr(load_settings(database_url=url, replica_url=url))


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:0", "cuda:123"])
def test_a_device_of_a_known_form_is_accepted(name: str) -> None:
    assert load_settings(device=name).device == name


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:1234", "cuda:x", "xcpu"])
def test_a_device_of_another_form_is_refused(name: str) -> None:
    assert refused(device=name) == f"DGX_MUSIC_DEVICE is {name!r}; use auto, cpu, cuda or cuda:N."


def test_a_setting_that_is_not_there_is_refused_and_none_is_changed_later() -> None:
    assert refused(lenght=1) == "DGX_MUSIC_LENGHT is unacceptable; leave it out."
    with pytest.raises(FrozenInstanceError):
        load_settings().slots = 3  # type: ignore[misc]


def test_what_is_made_is_for_its_owner_alone_unless_the_umask_is_asked_for() -> None:
    assert [load_settings(**given).is_private for given in ({}, {"file_access": "umask"})] == [
        True,
        False,
    ]


def test_a_replica_that_is_given_with_its_database_is_kept() -> None:
    assert (
        load_settings(database_url="postgresql://h/d", replica_url="postgresql://r/d").replica_url
        == "postgresql://r/d"
    )


def test_a_bad_database_of_the_environment_is_no_trouble_to_one_that_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DATABASE_URL", "sqlite://")
    assert load_settings(database_url="sqlite:///a.db").database_url == "sqlite:///a.db"
    assert "names a database in memory" in refused()


@pytest.mark.parametrize(
    ("kind", "setting", "problem"),
    [
        (bool, Setting("on or off"), r"x cannot be read as <class 'bool'>; give it a check"),
        (
            int | str,
            Setting("a number or a name"),
            r"x cannot be read as int \| str; give it a check",
        ),
        (int, Setting("a number"), "x is a number; give it the limits"),
        (float, Setting("a number", low=0), "x is a number; give it the limits"),
    ],
)
def test_a_setting_that_nobody_could_set_is_a_programmers_mistake(
    kind: Any, setting: Setting, problem: str
) -> None:
    with pytest.raises(TypeError, match=f"^The setting {problem}"):
        declared(make_dataclass("Settings", [("x", Annotated[kind, setting], 0)]), PREFIX)


def test_a_check_may_read_what_a_type_alone_does_not_say() -> None:
    switch = Setting("on or off", check=lambda text: text == "on")
    settings = declared(make_dataclass("Settings", [("x", Annotated[bool, switch], False)]), "MY_")

    assert settings["x"].value_of({}, {"MY_X": "off"}) is False
