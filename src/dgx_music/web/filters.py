"""The parameters of lists: which there are, and how their text is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from starlette.requests import Request

from dgx_music.errors import InvalidRequestError
from dgx_music.statuses import GenerationStatus
from dgx_music.storage.filters import Sort
from dgx_music.validation import check_integer, check_name, shown
from dgx_music.web.access import Access, check_tenant
from dgx_music.web.options import MOST_ROWS

DEFAULT_ROWS = 50


@dataclass(frozen=True)
class Parameter:
    """A parameter of a URL."""

    name: str
    schema: Mapping[str, Any]
    description: str
    read: Callable[[str, str], Any] = lambda _name, text: text
    """Returns the value; is given the name for its error."""
    is_repeatable: bool = False
    """Whether it may be given several times; the value is then a list."""

    @property
    def described(self) -> dict[str, Any]:
        """The parameter as OpenAPI describes it."""
        one = dict(self.schema)
        return {
            "name": self.name,
            "in": "query",
            "schema": {"type": "array", "items": one} if self.is_repeatable else one,
            "description": self.description,
        }


def read_integer(name: str, text: str) -> int:
    """Return the whole number; raises ``InvalidRequestError``."""
    if not (text.isascii() and text.isdecimal() and len(text) <= 18):
        raise InvalidRequestError(name, f"is {shown(text)}", "use a whole number")
    return int(text)


def read_number(name: str, text: str) -> float:
    """Return the number; raises ``InvalidRequestError``."""
    if _NUMBER.fullmatch(text) is None:
        raise InvalidRequestError(name, f"is {shown(text)}", "use a number such as 120 or 137.5")
    return float(text)


def read_flag(name: str, text: str) -> bool:
    """Return True or False; raises ``InvalidRequestError``."""
    if text not in _FLAGS:
        raise InvalidRequestError(name, f"is {shown(text)}", "use true or false")
    return text in ("1", "true")


_NUMBER = re.compile(r"\d{1,9}(\.\d{1,9})?", re.ASCII)
_FLAGS = ("0", "1", "false", "true")
_ANY_TEXT: Mapping[str, Any] = {"type": "string"}
_TEXT: Mapping[str, Any] = {"type": "string", "minLength": 1}
_FLAG: Mapping[str, Any] = {"type": "boolean"}
_BPM: Mapping[str, Any] = {"type": "number", "exclusiveMinimum": 0}
_MOMENT: Mapping[str, Any] = {"type": "string", "format": "date-time"}
_STATUS: Mapping[str, Any] = {"enum": [str(each) for each in GenerationStatus]}
FILTERS = (
    Parameter("status", _STATUS, "Of this status, or of one of several.", is_repeatable=True),
    Parameter("model", _TEXT, "Of this model."),
    Parameter("tenant", _ANY_TEXT, "Of this tenant; empty: those without one."),
    Parameter("batch", _TEXT, "Of the batch with this id."),
    Parameter("parent", _TEXT, "Those that repeat or continue the generation with this id."),
    Parameter("starred", _FLAG, "With a star, or without one.", read_flag),
    Parameter("tag", _TEXT, "With this tag, or with all of several.", is_repeatable=True),
    Parameter("bpm_from", _BPM, "Of this measured tempo or a higher one.", read_number),
    Parameter("bpm_to", _BPM, "Of this measured tempo or a lower one.", read_number),
    Parameter("key", _TEXT, "Of this measured key, such as `F#m`."),
    Parameter("created_from", _MOMENT, "Created then or later."),
    Parameter("created_before", _MOMENT, "Created earlier."),
)
"""Each of them is a filter of the library, by the same name."""
SORTING = (
    Parameter("sort", {"enum": [*get_args(Sort)], "default": "created"}, "The order."),
    Parameter("reverse", _FLAG, "The other way round.", read_flag),
)
PAGING = (
    Parameter("q", _TEXT, "With these words in the prompt, best first; has one page only."),
    Parameter(
        "limit",
        {"type": "integer", "minimum": 1, "maximum": MOST_ROWS, "default": DEFAULT_ROWS},
        "How many at most.",
        read_integer,
    ),
    Parameter("after", _TEXT, "The `next` of the page before, with the same filters."),
)
IDS = Parameter(
    "ids",
    {"type": "string", "minLength": 1},
    f"The generations to watch, at most {MOST_ROWS}: their ids, separated by commas.",
    is_repeatable=True,
)


def split_ids(texts: Iterable[str]) -> list[str]:
    """Return the ids that are separated by commas, each once; raises ``InvalidRequestError``."""
    ids = [*dict.fromkeys(each for text in texts for each in text.split(",") if each)]
    if len(ids) > MOST_ROWS:
        raise InvalidRequestError(IDS.name, f"has {len(ids):,} ids", f"use at most {MOST_ROWS}")
    return [check_name(IDS.name, each) for each in ids]


def read_parameters(
    request: Request, *known: Parameter, ignored: Collection[str] = ()
) -> dict[str, Any]:
    """Return the values of the parameters in the URL; raises ``InvalidRequestError``.

    A parameter that does not exist is refused: a filter that is not applied would mislead. Those
    that are ``ignored`` belong to somebody else.
    """
    by_name = {each.name: each for each in known}
    values: dict[str, Any] = {}
    for name, text in request.query_params.multi_items():
        if name in ignored:
            continue
        if name not in by_name:
            remedy = f"use {', '.join(by_name)}"
            raise InvalidRequestError(name[:40], "is not a parameter here", remedy)
        value = by_name[name].read(name, text)
        if by_name[name].is_repeatable:
            values.setdefault(name, []).append(value)
        elif name in values:
            raise InvalidRequestError(name, "is given twice", "give it once")
        else:
            values[name] = value
    return values


def read_limit(values: dict[str, Any], default: int = DEFAULT_ROWS) -> int:
    """Take the limit out of the values and return it."""
    return check_integer("limit", values.pop("limit", default), 1, MOST_ROWS)


def within_tenant(filters: Mapping[str, Any], access: Access) -> dict[str, Any]:
    """Return the filters, for a tenant's token narrowed to its tenant."""
    if access.tenant is None:
        return dict(filters)
    if "tenant" in filters:
        check_tenant(access, filters["tenant"])
    return {**filters, "tenant": access.tenant}
