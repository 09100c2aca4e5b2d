"""Audio in an object store (S3, Google Cloud Storage, Azure); imported only for such outputs."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, ParamSpec, TypeVar, cast
from urllib.parse import urlsplit

import anyio
import obstore
from anyio import sleep, to_thread
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    GenericError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import from_url

from dgx_music.artifacts.interface import (
    CHUNK_BYTES,
    LONGEST_LINK_SECONDS,
    Artifact,
    StoredFile,
    check_held,
    check_range,
    describe,
    file_name,
    file_names,
    is_preview,
    name_is_taken,
    parse_name,
    preview_folder,
    preview_name,
)
from dgx_music.config import PREFIX
from dgx_music.errors import ArtifactError, ConfigurationError
from dgx_music.retrying import for_ever, keep_trying
from dgx_music.validation import check_between

if TYPE_CHECKING:
    from obstore._sign import SignCapableStore
    from obstore.store import ObjectStore, RetryConfig, S3Config

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)

RETRY: RetryConfig = {"max_retries": 10, "retry_timeout": timedelta(minutes=1)}
"""How the client retries 5xx replies, and lost connections and timeouts of requests that only
read."""
PATIENCE_SECONDS = 60.0
"""How long after the first failure a publication or a deletion starts one more round."""

_PROBE = "dgx-music-can-write-here"
_WAITS_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""The waits between those rounds; the last one repeats."""
_LOOK_SECONDS = 2.0
"""The same for a check of the place before the work begins: a user waits for the answer."""
_LONGEST_REASON = 200
_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3")
_SPACE = re.compile(r"\s")
_BAD_SCHEME = "BadScheme"
"""Part of the client's message if plain HTTP was not allowed."""
_CREDENTIAL_HOSTS = ("169.254.169.254", "169.254.170.2", "metadata.google.internal")
"""The hosts that the client asks for credentials if the environment has none."""


class ObjectArtifacts:
    """Audio under one prefix of one bucket.

    Endpoint, region, credentials and timeouts come from the environment. Failures that may pass
    (5xx, timeouts, lost replies) are retried for about a minute, and then raised as
    ``ArtifactError``.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        _check_endpoints()
        # The store compares it with what arrived; Google and Azure are given none, and have TLS.
        config: S3Config = {"checksum_algorithm": "SHA256"} if url.startswith("s3:") else {}
        try:
            self._store = from_url(url, config=config, retry_config=RETRY)
        except BaseError as error:
            raise ConfigurationError(
                f"{PREFIX}OUTPUT",
                f"is {url}, which cannot be opened ({_explain(error)})",
                "check its variables",
            ) from error

    def __str__(self) -> str:
        return self.url

    async def publish(
        self, generation_id: str, attempt: int, extension: str, data: bytes
    ) -> Artifact:
        """See ``Artifacts.publish``; the path is a URL.

        A cancelled publication ends at once. If its object arrives all the same, it is deleted
        again, unless the process ends first: then it is an orphan.
        """
        name = file_name(generation_id, attempt, extension)
        with self._explained("Audio cannot be stored in"):
            await _settle(lambda: self._create(name, data))
        return describe(f"{self.url}/{name}", data)

    async def delete(self, generation_id: str, attempts: Iterable[int]) -> int:
        """See ``Artifacts.delete``; nothing here is ever half-written."""
        attempts = [*attempts]
        names = file_names(generation_id, attempts)
        with self._explained("Audio cannot be removed from"):
            for attempt in attempts:
                names += await self._preview_parts(generation_id, attempt)
            return sum(await asyncio.gather(*map(self._remove, names)))

    async def publish_preview(
        self, generation_id: str, attempt: int, number: int, data: bytes
    ) -> None:
        """See ``Artifacts.publish_preview``; one request, cancelled as a publication is."""
        name = preview_name(generation_id, attempt, number)
        with self._explained("A preview cannot be stored in"):
            await self._create(name, data)

    async def read_preview(self, generation_id: str, attempt: int, number: int) -> bytes | None:
        """See ``Artifacts.read_preview``."""
        name = preview_name(generation_id, attempt, number)
        with self._explained("A preview cannot be read from"):
            return await self._read(name)

    async def delete_preview(self, generation_id: str, attempt: int) -> int:
        """See ``Artifacts.delete_preview``."""
        with self._explained("A preview cannot be removed from"):
            names = await self._preview_parts(generation_id, attempt)
            return sum(await asyncio.gather(*map(self._remove, names)))

    def holds(self, path: str) -> bool:
        """See ``Artifacts.holds``."""
        return path.rpartition("/")[0] == self.url

    async def exists(self, path: str) -> bool:
        """See ``Artifacts.exists``."""
        check_held(self, path)
        with self._explained(f"{self._name_of(path)} cannot be looked for in"):
            try:
                await _call(obstore.head, self._store, self._name_of(path))
            except FileNotFoundError:
                return False
            return True

    async def stream(
        self, path: str, start: int = 0, length: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        """See ``Artifacts.stream``; each chunk is a request, so a slow reader causes no timeout."""
        check_held(self, path)
        first, last = check_range(start, length)
        name = self._name_of(path)
        with self._explained(f"{name} cannot be read from"):
            size = (await _call(obstore.head, self._store, name))["size"]
        last = min(last, size)
        for place in range(first, last, CHUNK_BYTES):
            with self._explained(f"{name} cannot be read from"):
                end = min(place + CHUNK_BYTES, last)
                chunk = await _call(obstore.get_range, self._store, name, start=place, end=end)
            yield bytes(chunk)

    async def link(self, path: str, seconds: float) -> str:
        """See ``Artifacts.link``; a presigned URL for GET."""
        check_held(self, path)
        seconds = check_between("seconds", seconds, 1, LONGEST_LINK_SECONDS)
        store = cast("SignCapableStore", self._store)
        with self._explained("No link can be signed for"):
            return await _call(
                obstore.sign, store, "GET", self._name_of(path), timedelta(seconds=seconds)
            )

    async def list_files(self) -> AsyncIterator[StoredFile]:
        """See ``Artifacts.list_files``; objects below other prefixes are left out."""
        with self._explained("There is no listing of"):
            pages = obstore.list(self._store, chunk_size=1_000)
            while page := await _call(next, pages, None):
                for entry in page:
                    if (named := parse_name(entry["path"])) is not None:
                        path = f"{self.url}/{entry['path']}"
                        facts = entry["size"], entry["last_modified"]
                        yield StoredFile(*named, path, *facts, is_preview=is_preview(entry["path"]))

    async def find_problem(self) -> str | None:
        """See ``Artifacts.find_problem``; writes and deletes an object, always the same one."""
        try:
            with self._explained("Audio cannot be stored in"):
                # To ask for what is not there takes a right of its own: to list.
                await self._remove(_PROBE, _LOOK_SECONDS)
                await _call(obstore.put, self._store, _PROBE, b"", use_multipart=False)
                await self._remove(_PROBE, _LOOK_SECONDS)
        except ArtifactError as error:
            return str(error)
        return None

    async def _create(self, name: str, data: bytes) -> None:
        """Create the object; one that exists is fine if it holds the same data."""
        write = _Write(self._store, name, data)
        try:
            await _call(write.run)
        except anyio.get_cancelled_exc_class():
            write.is_abandoned = True
            raise
        except AlreadyExistsError as error:
            held = await self._read(name)
            if held is None:  # another write, or a delete, is under way
                raise GenericError(str(error)) from error
            if held != data:
                raise name_is_taken(name) from None

    async def _read(self, name: str) -> bytes | None:
        try:
            return await _call(lambda: bytes(obstore.get(self._store, name).bytes()))
        except FileNotFoundError:
            return None

    async def _preview_parts(self, generation_id: str, attempt: int) -> list[str]:
        return await _settle(partial(self._names_in, preview_folder(generation_id, attempt)))

    async def _names_in(self, folder: str) -> list[str]:
        pages = obstore.list(self._store, folder)
        names: list[str] = []
        while page := await _call(next, pages, None):
            names += [entry["path"] for entry in page]
        return names

    async def _remove(self, name: str, patience: float | None = None) -> bool:
        """Delete the object and return whether it was there: the store itself does not say so."""
        try:
            await _settle(lambda: _call(obstore.head, self._store, name), patience)
            await _settle(lambda: _call(obstore.delete, self._store, name), patience)
        except FileNotFoundError:
            return False
        return True

    def _name_of(self, path: str) -> str:
        return path.removeprefix(f"{self.url}/")

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except (BaseError, FileNotFoundError) as error:
            raise ArtifactError(f"{what} {self.url}: {_explain(error)}.") from error


class _Write:
    """The write of one object, in a thread that nobody may wait for any more."""

    def __init__(self, store: ObjectStore, name: str, data: bytes) -> None:
        self._store, self._name, self._data = store, name, data
        self.is_abandoned = False

    def run(self) -> None:
        """Create the object; delete it again if it arrives when the attempt is over."""
        obstore.put(self._store, self._name, self._data, mode="create", use_multipart=False)
        if self.is_abandoned:
            obstore.delete(self._store, self._name)


async def _call(function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """Return the client's answer, asked in a thread; a cancelled scope does not wait for it.

    The client's own coroutines are not used: at the end of the interpreter, a thread that delivers
    their result late aborts the process.
    """
    return await to_thread.run_sync(partial(function, *args, **options), abandon_on_cancel=True)


async def _settle(work: Callable[[], Awaitable[T]], patience: float | None = None) -> T:
    """Return the result of the work, retried for ``patience`` seconds (``PATIENCE_SECONDS``).

    The client itself gives up a refused connection within seconds, and never repeats a write that
    may have been done; each of our writes may be repeated.
    """

    def note(error: GenericError, wait: float | None) -> None:
        if _BAD_SCHEME in str(error):  # waiting does not help
            raise error
        if wait is not None:
            logger.info("object store: tries again in %g s: %s", wait, _explain(error))

    waits = _waits_within(PATIENCE_SECONDS if patience is None else patience)
    return await keep_trying(work, on=GenericError, waits=waits, note=note, sleep=sleep)


def _waits_within(patience: float) -> Iterator[float]:
    """Yield the waits that end within so many seconds, counted from when the first is asked for."""
    give_up_at = monotonic() + patience
    for wait in for_ever(*_WAITS_SECONDS):
        if monotonic() + wait > give_up_at:
            return
        yield wait


def _check_endpoints() -> None:
    """Raise unless each is a URL: if not, the client panics, and that is no ``Exception``."""
    for name in _ENDPOINTS:
        if name in os.environ and not _is_endpoint(os.environ[name]):
            remedy = "use something like https://host:9000"
            raise ConfigurationError(name, "is not the URL of a store", remedy)


def _is_endpoint(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and parts.port != 0
            and not _SPACE.search(text)
        )
    except ValueError:  # a port that is none, a bracket that is not closed
        return False


def _explain(error: Exception) -> str:
    """Return the reason in a few words: the client's own text is pages long."""
    text = str(error)
    if any(host in text for host in _CREDENTIAL_HOSTS):
        return "the environment has no credentials for it"
    if _BAD_SCHEME in text:
        return "its endpoint is plain http://, which AWS_ALLOW_HTTP=true allows"
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return "access is denied; check the credentials in the environment"
    if isinstance(error, FileNotFoundError):
        return "there is no such bucket, or no such object in it"
    line = text.partition("\n")[0]
    reason = (line.partition(" - ")[2] or line).partition(": <")[0]
    return reason.strip()[:_LONGEST_REASON]
