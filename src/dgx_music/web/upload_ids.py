"""The ids of uploads in requests: no other text of a client leads to audio."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from dgx_music.client.uploads import find_uploads
from dgx_music.errors import InvalidRequestError
from dgx_music.storage.models import Upload
from dgx_music.validation import CLIP_FIELDS
from dgx_music.web.access import Access
from dgx_music.web.problems import NOT_FOUND, ProblemError

_FORM = re.compile(r"up_[A-Za-z0-9_-]{32}")


def check_ids(options: Mapping[str, Any]) -> None:
    """Raise ``InvalidRequestError`` for a clip that is not the id of an upload."""
    for name, value in _given(options):
        if not isinstance(value, str) or _FORM.fullmatch(value) is None:
            remedy = "send the audio to `POST uploads`, and give the id that it answers"
            raise InvalidRequestError(name, "is not the id of an upload", remedy)


async def find_named(requests: Iterable[Mapping[str, Any]], access: Access) -> dict[str, Upload]:
    """Return the uploads that these requests name, by id, if this client may use them."""
    ids = {value for options in requests for _, value in _given(options)}
    return await find_uploads(ids, tenant=access.tenant)


def replaced(
    options: Mapping[str, Any], found: Mapping[str, Upload], prefix: str = ""
) -> dict[str, Any]:
    """Return the options with uploads in the place of their ids; raises ``ProblemError``.

    ``prefix`` is what comes before the name of a field.
    """
    uploads: dict[str, Upload] = {}
    for name, value in _given(options):
        if value not in found:
            problem = "is no upload that is here, or it has expired; send the audio again."
            raise ProblemError(NOT_FOUND, f"{prefix}{name} {problem}", field=f"{prefix}{name}")
        uploads[name] = found[value]
    return {**options, **uploads}


def _given(options: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, options[name]) for name in CLIP_FIELDS if options.get(name) is not None]
