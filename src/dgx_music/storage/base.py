"""The base of all tables: its naming convention, and a row as JSON."""

from __future__ import annotations

import math
from collections.abc import Collection
from datetime import datetime
from functools import cache
from typing import Any, ClassVar

from sqlalchemy import MetaData, inspect
from sqlalchemy.orm import DeclarativeBase

from dgx_music.statuses import GenerationStatus
from dgx_music.storage.schema import Real

_PLAIN = (str, int, bool, dict, list)
"""Most values are of these types, and are JSON already."""


class Base(DeclarativeBase):
    """Has a naming convention, so that migrations can name every constraint on every database."""

    internal: ClassVar[Collection[str]] = ()
    """The columns that ``to_dict`` leaves out."""
    type_annotation_map = {float: Real}  # noqa: RUF012 - SQLAlchemy's interface
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain JSON values, times in ISO 8601."""
        return {name: _as_json(getattr(self, key)) for name, key in _told(type(self))}


@cache
def _told(model: type[Base]) -> tuple[tuple[str, str], ...]:
    """Return the names of the columns that ``to_dict`` has, each with that of its attribute."""
    read = (attribute for attribute in inspect(model).column_attrs if not attribute.deferred)
    names = ((each.columns[0].name, each.key) for each in read)
    return tuple((name, key) for name, key in names if name not in model.internal)


def _as_json(value: Any) -> Any:
    if value is None or type(value) in _PLAIN:
        return value
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, GenerationStatus):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
