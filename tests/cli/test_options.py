"""What the command line says again, because it cannot import it for ``--help``, stays the same."""

from __future__ import annotations

from typing import get_args

from dgx_music.cli.options import StatusName
from dgx_music.cli.request_options import REQUEST_OPTIONS
from dgx_music.client.requests import OPTIONS
from dgx_music.storage import GenerationStatus


def test_the_statuses_are_those_of_the_library() -> None:
    assert [*get_args(StatusName)] == [status.value for status in GenerationStatus]


def test_enqueue_has_each_option_of_the_library() -> None:
    assert REQUEST_OPTIONS.keys() == OPTIONS.keys()
