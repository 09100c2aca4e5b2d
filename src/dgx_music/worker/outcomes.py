"""How an attempt ends, as a value: each is written by one call of the storage."""

from __future__ import annotations

from dataclasses import dataclass

from dgx_music.errors import (
    ArtifactError,
    EngineReplacedError,
    GenerationRejectedError,
    InvalidRequestError,
)
from dgx_music.validation import tidy_text


@dataclass(frozen=True)
class Completed:
    """The row is completed: nothing is left to write."""


@dataclass(frozen=True)
class Released:
    """The row goes back to the queue at no cost, or ends cancelled if that was requested."""

    why: str
    error: Exception | None = None
    """``None`` if the attempt was stopped from outside, or its completion was refused."""


@dataclass(frozen=True)
class Failed:
    """A failure is counted: the row waits for its next attempt, or has failed for good."""

    error: Exception
    is_final: bool = False

    @property
    def why(self) -> str:
        """What the row says of it."""
        return tidy_text(str(self.error) or type(self.error).__name__)


def outcome_of(error: Exception) -> Released | Failed:
    """Return how an attempt ends that raised this error."""
    if isinstance(error, EngineReplacedError | ArtifactError):  # this generation did not cause it
        return Released(str(error), error)
    is_final = isinstance(error, GenerationRejectedError | InvalidRequestError)
    return Failed(error, is_final)
