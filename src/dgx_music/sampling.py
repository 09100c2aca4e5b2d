"""How the tokens of a generation are drawn: the fields, their limits, and the form that is stored.

A new field is one line in each of the two classes, and its use in the sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache, partial
from typing import Annotated, Any, TypedDict

from dgx_music.validation import (
    MAX_TOP_K,
    MelodyKind,
    check_between,
    check_guided,
    check_integer,
    check_melody_kind,
    check_negative_prompt,
    check_seed,
)

CHOSEN_SEED_BITS = 53
"""Of a seed that nobody gave: JavaScript, and so a browser, keeps no larger whole number exactly."""


class SamplingOptions(TypedDict, total=False):
    """The sampling fields as options of a request, each with its meaning."""

    guidance_scale: Annotated[float, "How closely to follow the prompt, 1 (no guidance) to 20."]
    temperature: Annotated[float, "How adventurous to be, 0 (always the likeliest token) to 5."]
    top_k: Annotated[int, "Choose among this many of the likeliest tokens; 0 for all of them."]
    top_p: Annotated[
        float | None,
        "Among those of top_k, keep only the likeliest of this total probability; None for all. "
        "With top_k 0: among all tokens, as audiocraft has it.",
    ]
    seed: Annotated[
        int | None,
        "The same seed, model and settings make the same audio; None for one from the row's id.",
    ]
    negative_prompt: Annotated[
        str | None,
        "What the music must not be like; needs a guidance_scale above 1.",
    ]
    melody_kind: Annotated[
        MelodyKind,
        "What the melody's clip holds: solo, a tune alone; mix, a tune above a bass; auto, "
        "whichever of the two it sounds like; stems, a mix whose drums and bass demucs takes away.",
    ]


def _checked(default: Any, check: Callable[..., object], **limits: float) -> Any:
    """Return a field that is stored only if it differs from its default.

    So a request that leaves a new field out keeps its JSON and its hash. The default must stay.
    """
    return field(default=default, metadata={"check": partial(check, **limits)})


def _always_stored(default: Any, check: Callable[..., object], **limits: float) -> Any:
    """Return a field that is in every row's JSON, as the first five are; use it for no new one."""
    return field(
        default=default, metadata={"check": partial(check, **limits), "is_always_stored": True}
    )


_fields_of = cache(fields)
"""What each request asks for several times."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The sampling fields; building it raises ``InvalidRequestError`` on the first bad one.

    The defaults are those of audiocraft (``audiocraft/models/musicgen.py``,
    ``set_generation_params``): top_k 250, top_p off, temperature 1.0, guidance 3.0. ``top_p``
    narrows ``top_k``, as in transformers; in audiocraft it replaces ``top_k``, which is ``top_k`` 0
    here. ``temperature`` 0 decodes greedily. ``negative_prompt`` is the text of the unconditional
    pass: what the music must not be like. ``melody_kind`` says how a melody's clip is read, which is
    no sampling but goes the same way, from the options through the row to the engine.
    """

    guidance_scale: float = _always_stored(3.0, check_between, low=1, high=20)
    temperature: float = _always_stored(1.0, check_between, low=0, high=5)
    top_k: int = _always_stored(250, check_integer, low=0, high=MAX_TOP_K)
    top_p: float | None = _always_stored(None, check_between, low=0.01, high=1)
    seed: int | None = _always_stored(None, lambda _name, value: check_seed(value))
    negative_prompt: str | None = _checked(None, lambda _name, value: check_negative_prompt(value))
    melody_kind: MelodyKind = _checked(  # noqa: RUF009
        "auto", lambda _name, value: check_melody_kind(value)
    )

    def __post_init__(self) -> None:
        for each in _fields_of(Sampling):
            value = getattr(self, each.name)
            if value is not None or each.default is not None:
                self._set(each.name, each.metadata["check"](each.name, value))
        if self.negative_prompt is not None:
            check_guided("negative_prompt", self.guidance_scale)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the documented way in a frozen dataclass

    @property
    def sampling(self) -> dict[str, float | int | str | None]:
        """The sampling fields as they are stored, and as they count in a request's hash."""
        return {
            each.name: getattr(self, each.name)
            for each in _fields_of(Sampling)
            if "is_always_stored" in each.metadata or getattr(self, each.name) != each.default
        }

    @staticmethod
    def pick(values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the sampling fields among the values; one that is ``None`` keeps its default."""
        names = (each.name for each in _fields_of(Sampling))
        return {name: values[name] for name in names if values.get(name) is not None}
