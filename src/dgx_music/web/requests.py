"""The bodies of requests: described by the library's options, and checked by its validator.

These models only say which fields there are. What a value may be is decided by the one validator,
so that the library, the command line and the web refuse the same things in the same words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, TypeAdapter, WithJsonSchema, create_model

from dgx_music.catalog import DEFAULT_MODEL
from dgx_music.client.requests import DEFAULTS, OPTIONS, naming
from dgx_music.errors import InvalidRequestError
from dgx_music.roles import Role
from dgx_music.sampling import SamplingOptions
from dgx_music.validation import CLIP_FIELDS, MAX_PROMPT_CHARACTERS
from dgx_music.web.access import Access, check_tenant
from dgx_music.web.options import MOST_IN_A_BATCH
from dgx_music.web.problems import FORBIDDEN, ProblemError
from dgx_music.web.upload_ids import check_ids, find_named, replaced

LABELS = ("title", "notes", "tags", "starred")
CHANGES = ("prompt", *(name for name in OPTIONS if name not in ("variations", "idempotency_key")))
"""What may differ when a generation is made again."""
_SEED = re.compile(r"\d{1,19}", re.ASCII)
_SPECIAL: Mapping[str, dict[str, Any]] = {
    **{name: {"type": ["string", "null"]} for name in CLIP_FIELDS},
    "run_at": {"type": ["string", "null"], "format": "date-time"},
    "seed": {"type": ["integer", "string", "null"]},
    "metadata": {"type": ["object", "null"]},
}
"""The types of the fields that are given otherwise than in Python."""
_NULLABLE = frozenset(SamplingOptions.__annotations__)
"""Null is their default, as if they were not given."""
_MEANINGS: Mapping[str, str] = {
    "continuation": "The id of an upload of at most 30 s: the music starts with it, and the duration "
    "counts from its start.",
    "melody": "The id of an upload: the music follows the tune of its first 300 s.",
    "model": f"A name of `GET models`, such as {DEFAULT_MODEL}; the server's default if not given.",
    "seed": "The same seed, model and settings make the same audio; in answers it is text.",
}
EXAMPLE = {"prompt": "lofi rain", "duration": 16, "seed": "4711", "metadata": {"order": 7}}
_PROMPT = {
    "type": "string",
    "maxLength": MAX_PROMPT_CHARACTERS,
    "description": "What the music is like; an empty prompt asks for unconditional music.",
}


def _described(schema: dict[str, Any]) -> Any:
    return Annotated[Any, WithJsonSchema(schema)]


def _option(name: str) -> tuple[Any, Any]:
    kind, meaning = get_args(OPTIONS[name])
    if name in _NULLABLE:
        kind = kind | None
    schema = _SPECIAL.get(name) or TypeAdapter(kind).json_schema()
    described = {**schema, "description": _MEANINGS.get(name, meaning)}
    return _described(described), DEFAULTS[name]


def _change(name: str) -> tuple[Any, Any]:
    """Return the field of an option that stays as it is if it is not given."""
    return _option(name)[0], None


def _body(*examples: dict[str, Any]) -> ConfigDict:
    # What is not a field reaches the validator, whose sentence names those that are.
    extra: dict[str, Any] = {"additionalProperties": False, "examples": list(examples)}
    return ConfigDict(extra="allow", json_schema_extra=extra)


_OPTION_FIELDS: dict[str, Any] = {name: _option(name) for name in OPTIONS}
_REQUESTS = {
    "type": "array",
    "minItems": 1,
    "maxItems": MOST_IN_A_BATCH,
    "items": {"anyOf": [{"type": "string"}, {"$ref": "#/components/schemas/GenerationRequest"}]},
    "description": "Prompts, or objects with a prompt; the other fields apply to each of them.",
}

_BATCH = {"type": ["string", "null"], "description": "The name of the batch."}

if TYPE_CHECKING:
    GenerationRequest: TypeAlias = BaseModel
    BatchRequest: TypeAlias = BaseModel
    ModelRequest: TypeAlias = BaseModel
    ChangeRequest: TypeAlias = BaseModel
    LabelRequest: TypeAlias = BaseModel
    BulkRequest: TypeAlias = BaseModel
else:
    GenerationRequest = create_model(
        "GenerationRequest",
        __config__=_body(EXAMPLE),
        prompt=(_described(_PROMPT), ...),
        **_OPTION_FIELDS,
    )
    BatchRequest = create_model(
        "BatchRequest",
        __config__=_body({"requests": ["lofi rain", EXAMPLE], "duration": 10}),
        requests=(_described(_REQUESTS), ...),
        batch=(_described(_BATCH), None),
        **_OPTION_FIELDS,
    )
    ModelRequest = create_model(
        "ModelRequest",
        __config__=_body({"model": DEFAULT_MODEL}),
        model=(
            _described({"type": ["string", "null"], "description": "Without it: all models."}),
            None,
        ),
    )
    ChangeRequest = create_model(
        "ChangeRequest",
        __config__=_body({"seed": "same", "temperature": 1.2}),
        prompt=(_described(_PROMPT), None),
        **{name: _change(name) for name in CHANGES if name in OPTIONS},
    )
    LabelRequest = create_model(
        "LabelRequest",
        __config__=_body({"title": "Rain", "tags": ["night"], "starred": True}),
        **{name: _change(name) for name in LABELS},
    )
    BulkRequest = create_model(
        "BulkRequest",
        __config__=_body({"filters": {"status": "pending", "batch": "01a2…"}, "expected": 12}),
        filters=(_described({"type": "object", "minProperties": 1}), ...),
        expected=(_described({"type": "integer", "minimum": 0}), ...),
    )


def given(body: BaseModel) -> dict[str, Any]:
    """Return the fields that the client gave, also those that do not exist."""
    return body.model_dump(exclude_unset=True)


def check_only(fields: Mapping[str, Any], *known: str) -> None:
    """Raise ``InvalidRequestError`` for a field that is not one of these."""
    for name in fields:
        if name not in known:
            remedy = f"use {', '.join(known)}" if known else "send an empty object"
            raise InvalidRequestError(name[:40] or "''", "is not a field here", remedy)


async def prepared(options: Mapping[str, Any], access: Access) -> dict[str, Any]:
    """Return the options as the library takes them; raises what this client may not ask for."""
    wanted = _checked(options, access)
    return replaced(wanted, await find_named([wanted], access))


def _checked(options: Mapping[str, Any], access: Access) -> dict[str, Any]:
    """Return the options as the library takes them, except for uploads, which are still ids."""
    wanted = dict(options)
    check_ids(wanted)
    _check_model(wanted.get("model"), access)
    if isinstance(seed := wanted.get("seed"), str) and _SEED.fullmatch(seed):
        wanted["seed"] = int(seed)
    if wanted.get("tenant") is not None:
        check_tenant(access, wanted["tenant"])
    elif access.tenant is not None:
        wanted["tenant"] = access.tenant
    return wanted


async def prepared_batch(
    body: BaseModel, access: Access
) -> tuple[list[Any], str | None, dict[str, Any]]:
    """Return the requests of a batch, its name, and the options of all; raises as ``prepared``."""
    options = given(body)
    requests, name = options.pop("requests"), options.pop("batch", None)
    if not isinstance(requests, list) or not requests:
        remedy = "send a list of prompts, or of objects with one"
        raise InvalidRequestError("requests", "is no list with something in it", remedy)
    if len(requests) > MOST_IN_A_BATCH:
        remedy = f"send at most {MOST_IN_A_BATCH:,} at a time"
        raise InvalidRequestError("requests", f"are {len(requests):,}", remedy)
    if "prompt" in options:
        remedy = "give each of the requests its own"
        raise InvalidRequestError("prompt", "is not an option of a batch", remedy)
    shared = _checked(options, access)
    checked = [_checked_one(number, each, access) for number, each in enumerate(requests, 1)]
    asked = [each for each in checked if isinstance(each, dict)]
    found = await find_named([shared, *asked], access)
    prepared_all = [
        replaced(each, found, f"request {number}: ") if isinstance(each, dict) else each
        for number, each in enumerate(checked, 1)
    ]
    return prepared_all, name, replaced(shared, found)


def _checked_one(number: int, request: Any, access: Access) -> Any:
    if not isinstance(request, dict):
        return request
    with naming(f"request {number}"):
        return _checked(request, access)


def _check_model(model: object, access: Access) -> None:
    """Let only operators name a folder of the workers' machines."""
    if isinstance(model, str) and model.startswith(("/", "~")) and not access.may(Role.OPERATE):
        detail = f"A local folder as model needs the role {Role.OPERATE}; name a model instead."
        raise ProblemError(FORBIDDEN, detail, field="model")
