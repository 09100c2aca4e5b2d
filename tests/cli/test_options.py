"""What the command line says again, because it cannot import it for ``--help``, stays the same."""

from __future__ import annotations

import pytest

from dgx_music.cli.request_options import REQUEST_OPTIONS
from dgx_music.client.requests import DEFAULTS, OPTIONS
from dgx_music.sampling import SamplingOptions


def test_enqueue_has_each_option_of_the_library() -> None:
    assert REQUEST_OPTIONS.keys() == OPTIONS.keys()


@pytest.mark.parametrize(("name", "default"), DEFAULTS.items())
def test_the_help_says_each_default_of_the_library(name: str, default: object) -> None:
    text = REQUEST_OPTIONS[name].__metadata__[0].help
    assert "None" not in text
    shown = f"{default:g}" if isinstance(default, int | float) else default
    assert default is None or f"; default {shown}." in text


@pytest.mark.parametrize(
    "name", ["duration", *SamplingOptions.__annotations__, "priority", "max_attempts"]
)
def test_an_option_has_the_type_that_the_library_has(name: str) -> None:
    assert REQUEST_OPTIONS[name].__origin__ == OPTIONS[name].__origin__ | None


def test_the_help_calls_a_sampling_field_by_its_option() -> None:
    text = REQUEST_OPTIONS["top_p"].__metadata__[0].help
    assert text.startswith(
        "Among those of --top-k, keep only the likeliest of this total probability; default: all."
    )
