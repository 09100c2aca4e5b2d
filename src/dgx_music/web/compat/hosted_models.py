"""Our models as Replicate names them: ``owner/name``, and versions that are 64 hexadecimal digits.

``meta/musicgen`` is any of them: there, ``model_version`` says which.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from dgx_music.catalog import MODELS, ModelInfo, short_name
from dgx_music.config import default_model
from dgx_music.errors import InvalidRequestError
from dgx_music.validation import check_name, shown
from dgx_music.web.compat.inputs import INPUTS
from dgx_music.web.problems import NOT_FOUND, ProblemError

ANY_MODEL = "musicgen"
"""The name, with any owner, of the model whose ``model_version`` says which one is meant."""
_OWNER_OF_ANY = "meta"
_OWNER = "dgx-music"
"""Of models that have none on the hub."""
_SINCE = "2023-06-08T00:00:00+00:00"
_COG_VERSION = "0.9.0"
"""From 0.3.9 on the ``replicate`` package reads the schema of the output as it is."""
_HASH = re.compile(r"[0-9a-f]{64}")
_REFERENCE = re.compile(r"(?:[^/:]+/)?(?P<name>[^/:]+)(?::(?P<version>[0-9a-f]{64}))?")
_SCHEMA: Mapping[str, Any] = {
    "openapi": "3.0.2",
    "info": {"title": "dgx-music", "version": "1"},
    "paths": {},
    "components": {
        "schemas": {
            "Input": {"type": "object", "title": "Input", "properties": dict(INPUTS)},
            "Output": {"type": "string", "title": "Output", "format": "uri"},
        }
    },
}


def version_id(name: str) -> str:
    """Return the id of the only version of a model."""
    return hashlib.sha256(f"{_OWNER}/{name}".encode()).hexdigest()


_BY_VERSION = {version_id(name): name for name in MODELS}


def find_hosted(owner: str, name: str) -> str:
    """Return our name of a model, or ``ANY_MODEL``; raises ``ProblemError`` if there is none."""
    if name == ANY_MODEL or name in MODELS:
        return name
    called = shown(f"{owner}/{name}")
    raise ProblemError(NOT_FOUND, f"There is no model {called} here; `GET models` lists those.")


def read_version(given: object) -> tuple[str, str]:
    """Return our name of the model, or ``ANY_MODEL``, and the version's id.

    It is given by its id, by ``owner/name``, or by both as ``owner/name:id``. An id that is not ours
    means ``ANY_MODEL``: programs have that of ``meta/musicgen``. Raises ``InvalidRequestError``.
    """
    text = check_name("version", given)
    if _HASH.fullmatch(text):
        return _BY_VERSION.get(text, ANY_MODEL), text
    found = _REFERENCE.fullmatch(text)
    if found is None or not (found["name"] == ANY_MODEL or found["name"] in MODELS):
        remedy = "use the id of a version, or a model such as meta/musicgen"
        raise InvalidRequestError("version", f"{shown(text)} is not known", remedy)
    return found["name"], found["version"] or version_id(found["name"])


def check_version(name: str, version: str) -> None:
    """Raise ``ProblemError`` unless the model has this version; ``ANY_MODEL`` has all."""
    is_known = _HASH.fullmatch(version) if name == ANY_MODEL else version == version_id(name)
    if not is_known:
        detail = f"The model {name} has no version {shown(version)}; it has {version_id(name)}."
        raise ProblemError(NOT_FOUND, detail)


def reference_of(name: str) -> tuple[str, str]:
    """Return owner and name of one of our models, or of a local folder."""
    if name == ANY_MODEL:
        return _OWNER_OF_ANY, name
    model = MODELS.get(name)
    owner = _OWNER if model is None or model.repository is None else model.repository.split("/")[0]
    return owner, short_name(name)


def as_version(version: str) -> dict[str, Any]:
    """Return a version as JSON values."""
    return {
        "id": version,
        "created_at": _SINCE,
        "cog_version": _COG_VERSION,
        "openapi_schema": _SCHEMA,
    }


def as_hosted(name: str, root: str) -> dict[str, Any]:
    """Return a model with its version as JSON values; ``root`` is the API's address, with its slash."""
    return {**as_listed(name, root), "latest_version": as_version(version_id(name))}


def as_listed(name: str, root: str) -> dict[str, Any]:
    """Return a model as JSON values for a list: without its version, which has a long schema."""
    owner, called = reference_of(name)
    return {
        "url": f"{root}models/{owner}/{called}",
        "owner": owner,
        "name": called,
        "description": _description(MODELS.get(default_model() if name == ANY_MODEL else name)),
        "visibility": "public",
        "run_count": 0,
    }


def as_openai_model(name: str) -> dict[str, Any]:
    """Return one of our models as clients of OpenAI read it."""
    return {"id": name, "object": "model", "created": 0, "owned_by": reference_of(name)[0]}


def _description(model: ModelInfo | None) -> str:
    if model is None:
        return "A local folder."
    sound = "stereo" if model.channels == 2 else "mono"
    heard = ", follows melodies" if model.hears_melody else ""
    noise = "; untrained, so the audio is noise" if model.is_untrained else ""
    return f"{model.name}: {sound}{heard}{noise}."
