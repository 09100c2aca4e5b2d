"""The fields of others' requests: their bodies, and our errors in their words."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, WithJsonSchema, create_model

from dgx_music.catalog import MODELS, find_model
from dgx_music.errors import InvalidRequestError
from dgx_music.validation import check_name, shown
from dgx_music.web.problems import ProblemError
from dgx_music.web.requests import check_only


def body_of(
    name: str, example: Mapping[str, Any], required: Collection[str], **fields: Mapping[str, Any]
) -> type[BaseModel]:
    """Return the model of a body with these fields, each described by a schema.

    It refuses nothing: ``given`` and ``check_given`` do, after what says more of the cause.
    """
    described: dict[str, Any] = {
        field: (Annotated[Any, WithJsonSchema(dict(schema))], None)
        for field, schema in fields.items()
    }
    extra: dict[str, Any] = {"examples": [dict(example)], "required": [*required]}
    config = ConfigDict(extra="allow", json_schema_extra=extra, protected_namespaces=())
    return cast("type[BaseModel]", create_model(name, __config__=config, **described))


def given(body: BaseModel) -> dict[str, Any]:
    """Return the fields that are not null; raises ``InvalidRequestError`` for an unknown one."""
    fields = {name: value for name, value in body.model_dump().items() if value is not None}
    check_only(fields, *type(body).model_fields)
    return fields


def check_given(fields: Mapping[str, Any], name: str) -> None:
    """Raise ``InvalidRequestError`` if this field is not there."""
    if name not in fields:
        raise InvalidRequestError(name, "is missing", "add it")


@contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """Have errors call our fields what the client calls them."""
    try:
        yield
    except InvalidRequestError as error:
        if error.field not in names:
            raise
        renamed = names[error.field]
        raise InvalidRequestError(renamed, error.problem, error.remedy) from None
    except ProblemError as error:
        if error.field is None or error.field not in names:
            raise
        renamed = names[error.field]
        detail = error.detail.replace(error.field, renamed, 1)
        raise ProblemError(error.kind, detail, field=renamed, headers=error.headers) from None


def check_absent(fields: Mapping[str, Any], impossible: Mapping[str, str]) -> None:
    """Raise ``InvalidRequestError`` if one of these is asked for; the text says why it cannot be."""
    for name, problem in impossible.items():
        if fields.get(name) not in (None, False):
            raise InvalidRequestError(name, problem, "leave it out")


def check_one_of(field: str, value: object, known: Collection[str]) -> str:
    """Return the value if it is one of these."""
    if not isinstance(value, str) or value not in known:
        raise InvalidRequestError(field, f"is {shown(value)}", f"use one of {', '.join(known)}")
    return value


def model_named(field: str, value: object) -> str:
    """Return the name of a model that may be written with its owner; raises if it is unknown."""
    name = check_name(field, value)
    if name.startswith(("/", "~")):
        return name  # a local folder: who may name one, and whether it can be, is asked later
    bare = name.rpartition("/")[2] if name.count("/") == 1 else name
    if find_model(bare) is None:
        raise InvalidRequestError(field, f"{name!r} is not known", f"use {', '.join(MODELS)}")
    return bare
