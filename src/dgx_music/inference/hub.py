"""One question to the Hugging Face hub, with an answer after at most 3 s.

The library itself would go on asking for 38 s. Needs huggingface_hub.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

TIMEOUT_SECONDS = 3.0

_Answer = TypeVar("_Answer")


class HubUnavailableError(Exception):
    """The hub does not give the files; the message says why, as a part of a sentence."""


class RevisionUnknownError(HubUnavailableError):
    """The hub has the repository, but not this revision."""


def list_files(repository: str, revision: str) -> list[str]:
    """Return the names of the files that the hub has for this revision.

    Raises ``HubUnavailableError`` if it refuses or does not answer within ``TIMEOUT_SECONDS``.
    """
    from huggingface_hub import HfApi

    info = _with_timeout(
        lambda: HfApi().model_info(repository, revision=revision, timeout=2 * TIMEOUT_SECONDS),
    )
    return [file.rfilename for file in info.siblings or ()]


def _with_timeout(ask: Callable[[], _Answer]) -> _Answer:
    """Return the answer, or leave behind a thread that waits for it.

    A socket's timeout would not be enough: looking up the host's name may take much longer. So it
    is set longer, and only stops the thread that is left behind.
    """
    answer: Future[_Answer] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:  # raised again by result()
            answer.set_exception(error)

    threading.Thread(target=run, name="hub", daemon=True).start()
    try:
        return answer.result(TIMEOUT_SECONDS)
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
        return HubUnavailableError(f"the hub does not answer within {TIMEOUT_SECONDS:g} s")
    if isinstance(error, ValueError | TypeError | KeyError):  # the page of a proxy or a hotel
        return HubUnavailableError("what answers is not the hub")
    reason = str(error).partition("\n")[0].rstrip(".")
    return HubUnavailableError(f"the hub cannot be reached: {reason}")
