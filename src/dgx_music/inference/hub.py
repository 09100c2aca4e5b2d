"""The Hugging Face hub, asked once and for 3 s at most: the library itself would ask for 38 s. Needs huggingface_hub."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

PATIENCE_SECONDS = 3.0

_Answer = TypeVar("_Answer")


class HubUnavailableError(Exception):
    """The hub does not give the files; the message says why, as half a sentence."""


class RevisionUnknownError(HubUnavailableError):
    """The hub has the repository, but not this revision of it."""


def list_files(repository: str, revision: str) -> list[str]:
    """Return the names of the files that the hub holds of this revision.

    Raises ``HubUnavailableError`` where it does not answer within ``PATIENCE_SECONDS``, or refuses.
    """
    from huggingface_hub import HfApi

    info = _within_patience(lambda: HfApi().model_info(repository, revision=revision, timeout=PATIENCE_SECONDS))
    return [file.rfilename for file in info.siblings or ()]


def _within_patience(ask: Callable[[], _Answer]) -> _Answer:
    """Return the answer; a thread is left to wait for it, since no timeout of a socket covers the resolver of names."""
    answer: Future[_Answer] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:  # raised again by result()
            answer.set_exception(error)

    threading.Thread(target=run, name="hub", daemon=True).start()
    try:
        return answer.result(PATIENCE_SECONDS)
    except Exception as error:
        raise _explain(error) from error


def _explain(error: Exception) -> HubUnavailableError:
    from huggingface_hub import errors

    if isinstance(error, errors.RevisionNotFoundError):
        return RevisionUnknownError("the hub does not know this revision")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubUnavailableError("HF_HUB_OFFLINE is set")
    if isinstance(error, errors.HfHubHTTPError):
        return HubUnavailableError(f"the hub answers {error.response.status_code}")
    if isinstance(error, TimeoutError):
        return HubUnavailableError(f"the hub does not answer within {PATIENCE_SECONDS:g} s")
    if isinstance(error, ValueError | TypeError | KeyError):  # a proxy's or a hotel's own page
        return HubUnavailableError("what answers is not the hub")
    return HubUnavailableError(f"the hub cannot be reached: {str(error).partition(chr(10))[0].rstrip('.')}")
