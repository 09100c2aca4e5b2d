"""Every error this library raises on purpose.

DgxMusicError
├── InvalidRequestError (ValueError)      one field of a request is unacceptable
│   └── UnreadableAudioError              a file is no audio that can be read
├── ConfigurationError                    one setting is unacceptable
├── GenerationNotFoundError               no such row
├── BatchNotFoundError                    no such batch
├── IllegalTransitionError                the row's status does not allow it
├── NoAudioError                          the generation is not completed
├── CountDiffersError                     another number of rows is meant than was expected
├── PartlyDoneError                       a change of many rows was broken off after some of them
├── IdempotencyConflictError              the key was used for another request
├── QueueFullError                        too many generations wait already
├── WaitTimeoutError (TimeoutError)       the generation did not finish in time
├── DatabaseError
│   ├── DatabaseNotInitializedError       init_db() was not called
│   ├── DatabaseNotMigratedError          the schema is not the one this version needs
│   └── DatabaseUnavailableError          cannot be opened or reached
├── ArtifactError                         audio could not be written, or is not there
└── EngineError
    ├── EngineUnavailableError            the engine cannot start here (weights, device, package)
    ├── EngineCrashedError                the engine's process died or hung during this generation
    ├── EngineReplacedError               given up because of something else (process ended, no memory)
    ├── GenerationRejectedError           this request can never succeed; do not retry
    └── GenerationCancelledError          stopped on request
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dgx_music.statuses import GenerationStatus
    from dgx_music.storage.bulk import BulkResult


class DgxMusicError(Exception):
    """Base of all errors of this library; ``exit_code`` is what the command line ends with."""

    exit_code: int = 1


class InvalidRequestError(DgxMusicError, ValueError):
    """A field of a request is unacceptable: names the field, the problem and the remedy."""

    exit_code = 2

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        super().__init__(f"{field} {problem}; {remedy}.")
        self.field = field
        self.problem = problem
        self.remedy = remedy


class UnreadableAudioError(InvalidRequestError):
    """A file that was given is no audio that can be read."""


class ConfigurationError(DgxMusicError):
    """A setting is unacceptable: names the setting, the problem and the remedy."""

    exit_code = 2

    def __init__(self, setting: str, problem: str, remedy: str) -> None:
        super().__init__(f"{setting} {problem}; {remedy}.")
        self.setting = setting
        self.problem = problem
        self.remedy = remedy


class GenerationNotFoundError(DgxMusicError):
    """No generation has this id."""

    exit_code = 3

    def __init__(self, generation_id: str, *, nor_batch: bool = False) -> None:
        what, who = "generation", "`dgx-music list` shows"
        if nor_batch:
            what, who = "generation or batch", "`dgx-music list` and `dgx-music batches` show"
        super().__init__(f"There is no {what} {generation_id!r}; {who} those that exist.")
        self.generation_id = generation_id


class BatchNotFoundError(DgxMusicError):
    """No batch has this id."""

    exit_code = 3

    def __init__(self, batch_id: str) -> None:
        super().__init__(
            f"There is no batch {batch_id!r}; `dgx-music batches` shows those that exist."
        )
        self.batch_id = batch_id


class IllegalTransitionError(DgxMusicError):
    """The generation's status does not allow the change: names both states."""

    exit_code = 4

    def __init__(
        self,
        generation_id: str,
        current: GenerationStatus,
        wanted: str,
        reason: str = "",
    ) -> None:
        because = f" ({reason})" if reason else ""
        super().__init__(
            f"Generation {generation_id} is {current} and cannot become {wanted}{because}."
        )
        self.generation_id = generation_id
        self.current = current
        self.wanted = wanted


class NoAudioError(DgxMusicError):
    """The generation has no audio: it is not completed."""

    exit_code = 4

    def __init__(self, generation_id: str, status: GenerationStatus) -> None:
        yet = " yet" if status in ("pending", "processing") else ""
        super().__init__(f"Generation {generation_id} is {status} and has no audio{yet}.")
        self.generation_id = generation_id
        self.status = status


class CountDiffersError(DgxMusicError):
    """Another number of generations is meant than was expected; nothing was changed."""

    exit_code = 4

    def __init__(self, expected: int, found: int) -> None:
        super().__init__(
            f"{expected:,} generations were expected and {found:,} are meant; nothing was changed."
        )
        self.expected = expected
        self.found = found


class PartlyDoneError(DgxMusicError):
    """A change of many generations was broken off by its ``__cause__``; ``done`` is what it did.

    The change that was being written then may have been made all the same. ``cancelled`` are the
    ids of those that a deletion with force cancelled, and did not delete.
    """

    def __init__(
        self, done: BulkResult, count: int, cause: Exception, cancelled: Sequence[str] = ()
    ) -> None:
        more = f" {', '.join(cancelled)}: cancelled and not deleted." if cancelled else ""
        super().__init__(
            f"{done.changed:,} of {count:,} generations were changed, and then: {cause}{more}"
        )
        self.done = done
        self.count = count
        self.cancelled = tuple(cancelled)
        self.exit_code = getattr(cause, "exit_code", self.exit_code)


class IdempotencyConflictError(DgxMusicError):
    """The idempotency key already belongs to a different request."""

    exit_code = 4

    def __init__(self, key: str, generation_id: str) -> None:
        super().__init__(
            f"idempotency_key {key!r} already belongs to generation {generation_id}, which asks for "
            "something else; send the same request again or choose another key."
        )
        self.key = key
        self.generation_id = generation_id


class QueueFullError(DgxMusicError):
    """The queue has no room for so many more generations; none of them was stored.

    With ``tenant`` it is this tenant's room that is used up.
    """

    exit_code = 75  # EX_TEMPFAIL: the same may be possible later

    def __init__(self, limit: int, count: int, tenant: str | None = None) -> None:
        whose, setting = "The queue", "DGX_MUSIC_MAX_PENDING"
        if tenant is not None:
            whose, setting = f"The queue of tenant {tenant!r}", f"{setting}_PER_TENANT"
        what = "one more generation" if count == 1 else f"{count:,} more generations"
        remedy = "wait until some have begun" if count <= limit else "send fewer at a time"
        super().__init__(
            f"{whose} has no room for {what}: {setting} lets {limit:,} wait; {remedy}."
        )
        self.limit = limit
        self.count = count
        self.tenant = tenant


class WaitTimeoutError(DgxMusicError, TimeoutError):
    """The generation did not finish within the given time; it still goes on.

    ``status`` is ``None`` if there was no time to read it.
    """

    exit_code = 124

    def __init__(
        self, generation_id: str, status: GenerationStatus | None, timeout_seconds: float
    ) -> None:
        so_far = status or "unfinished"
        super().__init__(
            f"Generation {generation_id} is still {so_far} after {timeout_seconds:g} s; it goes on."
        )
        self.generation_id = generation_id
        self.status = status


class DatabaseError(DgxMusicError):
    """Something is wrong with the database."""

    exit_code = 5


class DatabaseNotInitializedError(DatabaseError, RuntimeError):
    """There is no default database yet."""

    def __init__(self) -> None:
        super().__init__("The database is not initialized; call `await init_db()` first.")


def is_newer(found: str | None, needed: str) -> bool:
    """Return True if the tables were made by a newer version, or not by this library.

    Such tables are not migrated.
    """
    return found is not None and (found > needed or not _is_ours(found))


def remedy_for(found: str | None, needed: str) -> str:
    """Return what to do about a database that is at another revision than this version needs."""
    if found is not None and not _is_ours(found):
        return f"{found} is not one of this product's: name another database"
    return "upgrade dgx-music" if is_newer(found, needed) else "run `dgx-music db migrate`"


def _is_ours(revision: str) -> bool:
    return re.fullmatch("[0-9]{4}", revision) is not None


class DatabaseNotMigratedError(DatabaseError):
    """The database's schema is not the one this version needs."""

    def __init__(self, found: str | None, needed: str) -> None:
        problem = f"is at revision {found or 'none'} and this version needs {needed}"
        super().__init__(f"The database {problem}; {remedy_for(found, needed)}.")
        self.found = found
        self.needed = needed


class DatabaseUnavailableError(DatabaseError):
    """The database cannot be opened or reached."""

    def __init__(self, url: str, why: str) -> None:
        super().__init__(f"The database {url} cannot be used: {why}.")
        self.url = url
        self.why = why


class ArtifactError(DgxMusicError):
    """Audio could not be written to, or read from, the output folder."""

    exit_code = 7


class EngineError(DgxMusicError):
    """A generation failed in the engine; it may succeed on another attempt."""

    exit_code = 6


class EngineUnavailableError(EngineError):
    """The engine cannot start here: weights, device or a package are missing."""


class EngineCrashedError(EngineError):
    """The engine's process died or hung while the generation ran."""


class EngineReplacedError(EngineError):
    """The engine gave the generation up because of something else; this does not count as a failure.

    Its process was ended because of another generation, its model was unloaded, or there was too
    little memory for so many at a time.
    """


class GenerationRejectedError(EngineError):
    """This request can never succeed; it is not retried."""


class GenerationCancelledError(EngineError):
    """The generation was stopped on request."""


def how_to_install(extra: str = "") -> str:
    """Return the remedy for a missing package.

    It names no package index: dgx-music is on none, so a stranger could take the name there.
    """
    what = f"'.[{extra}]'" if extra else "."
    return f"run pip install {what} in a checkout of dgx-music"


def unwrap(error: BaseException) -> BaseException:
    """Return the only error in an exception group, or the first if all are ``DgxMusicError``.

    Otherwise returns the group; an error that is no group is returned as it is. Several tasks may
    notice at once that the database is lost: one message is enough.
    """
    leaves = list(_leaves(error))
    is_told_by_first = len(leaves) == 1 or all(isinstance(leaf, DgxMusicError) for leaf in leaves)
    return leaves[0] if is_told_by_first else error


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        yield error
        return
    for inner in error.exceptions:
        yield from _leaves(inner)
