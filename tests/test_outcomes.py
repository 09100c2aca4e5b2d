"""Which error fails an attempt for good, which may be tried again, and which costs nothing."""

from __future__ import annotations

import pytest

from dgx_music.errors import (
    ArtifactError,
    EngineCrashedError,
    EngineError,
    EngineReplacedError,
    GenerationRejectedError,
    InvalidRequestError,
)
from dgx_music.worker.outcomes import Failed, Released, outcome_of


@pytest.mark.parametrize("kind", [EngineReplacedError, ArtifactError])
def test_what_the_generation_did_not_cause_releases_it(kind: type[Exception]) -> None:
    error = kind("no memory")
    assert outcome_of(error) == Released("no memory", error)


@pytest.mark.parametrize(
    "error",
    [GenerationRejectedError("no"), InvalidRequestError("duration", "is too long", "use less")],
    ids=lambda error: type(error).__name__,
)
def test_what_no_attempt_can_do_fails_for_good(error: Exception) -> None:
    assert outcome_of(error) == Failed(error, is_final=True)


@pytest.mark.parametrize("kind", [EngineError, EngineCrashedError, TimeoutError, MemoryError])
def test_everything_else_fails_one_attempt(kind: type[Exception]) -> None:
    error = kind("out of luck")
    assert outcome_of(error) == Failed(error, is_final=False)


@pytest.mark.parametrize(
    ("error", "why"), [(TimeoutError(), "TimeoutError"), (OSError("a\0b"), "a\ufffdb")]
)
def test_a_failure_has_a_message_that_every_database_can_keep(error: Exception, why: str) -> None:
    assert Failed(error).why == why
