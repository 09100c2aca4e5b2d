"""One setting: what is known of it, and how what somebody typed becomes its value."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dgx_music.errors import ConfigurationError
from dgx_music.validation import shown

_QUOTED = re.compile(r"""(?P<quote>["']).*(?P=quote)""", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Setting:
    """What is known of a setting; the last fields come from the field that it describes."""

    description: str
    low: float | None = None
    high: float | None = None
    check: Callable[[Any], Any] | None = None
    """Returns the value as it is kept; raises ``ConfigurationError``."""
    panel: str | None = None
    """The heading in ``dgx-music worker --help``."""
    metavar: str | None = None
    more_variables: tuple[str, ...] = ()
    """Environment variables that also set it, after its own."""
    name: str = ""
    variable: str = ""
    type: Any = None
    """Without ``None``: a setting may be ``None`` if its default is."""
    default: Any = None
    is_secret: bool = False

    def value_of(self, given: Mapping[str, Any], environment: Mapping[str, str]) -> Any:
        """Return the value as it is kept: the given one, else the environment's, else the default.

        Raises ``ConfigurationError`` if that cannot be this setting's value.
        """
        source, value = self._find(given, environment)
        if source is None:
            return self.default
        text = tidy(source, value)
        if text == "" and value != "":  # blank means not set
            return self.default
        parsed = self._parse(text)
        return parsed if self.check is None else self.check(parsed)

    @property
    def remedy(self) -> str:
        """What to do about an unacceptable value."""
        if get_origin(self.type) is Literal:
            return f"use one of {', '.join(get_args(self.type))}"
        if self.low is not None:
            number = "whole number" if self.type is int else "number"
            return f"use a {number} from {self.low:.12g} to {self.high:.12g}"
        return f"use text: {self.description}"

    def _find(
        self,
        given: Mapping[str, Any],
        environment: Mapping[str, str],
    ) -> tuple[str | None, object]:
        """Return the variable's name and the value of the first place that has one, or two ``None``."""
        if self.name in given:
            return self.variable, given[self.name]
        variables = (self.variable, *self.more_variables)
        found = next((name for name in variables if name in environment), None)
        return found, None if found is None else environment[found]

    def _parse(self, value: object) -> object:
        """Return the value in the setting's type; a ``check`` does this if that is a union."""
        if value is None and self.default is None:
            return None
        if get_origin(self.type) is Literal:
            if value in get_args(self.type):
                return value
        elif self.type in (int, float):
            if (number := self._number(value)) is not None:
                return number
        elif self.type is not str or isinstance(value, str):
            return value
        problem = "is unacceptable" if self.is_secret else f"is {shown(value)}"
        raise ConfigurationError(self.variable, problem, self.remedy)

    def _number(self, value: object) -> int | float | None:
        """Return the number in the setting's type, or ``None`` if it is not within the limits."""
        is_text = isinstance(value, str) and _NUMBER.fullmatch(value) is not None
        if isinstance(value, bool) or not (is_text or isinstance(value, int | float)):
            return None
        try:
            number = float(value)  # type: ignore[arg-type]  # it is text or a number
        except OverflowError:
            return None
        if self.low is None or self.high is None or not self.low <= number <= self.high:
            return None
        if self.type is int:
            return int(number) if number.is_integer() else None
        return number


def declared(settings: type, prefix: str) -> dict[str, Setting]:
    """Return each setting by its name, with what its field of this dataclass says.

    Raises ``TypeError`` for a field whose values could not be read.
    """
    hints = get_type_hints(settings, include_extras=True)
    found = {}
    for field in fields(settings):
        kind, setting = get_args(hints[field.name])
        if field.default is None:
            (kind,) = {*get_args(kind)} - {type(None)}
        variable = f"{prefix}{field.name.upper()}"
        known = {"name": field.name, "variable": variable, "type": kind, "default": field.default}
        found[field.name] = replace(setting, **known, is_secret=not field.repr)
        _check_readable(found[field.name])
    return found


def _check_readable(setting: Setting) -> None:
    if setting.type in (int, float):
        if setting.low is None or setting.high is None:
            raise TypeError(
                f"The setting {setting.name} is a number; give it the limits low and high."
            )
    elif (
        setting.type is not str
        and get_origin(setting.type) is not Literal
        and setting.check is None
    ):
        problem = f"cannot be read as {setting.type}"
        raise TypeError(f"The setting {setting.name} {problem}; give it a check that does this.")


def tidy(variable: str, value: object) -> object:
    """Return text without white space around it; refuses quotes, which some tools keep."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if _QUOTED.fullmatch(text):
        raise ConfigurationError(
            variable,
            "is in quotes, which would be a part of it",
            "leave the quotes out",
        )
    return text
