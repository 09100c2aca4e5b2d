"""The metadata of a generation, and the facts of its audio that completion writes into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from sqlalchemy import Dialect
from sqlalchemy.types import TypeDecorator

from dgx_music.storage.prepared import as_json
from dgx_music.storage.schema import JsonObject
from dgx_music.waveform import PREFIX, Waveform

AUDIO_KEY = "audio"
"""The key in the metadata under which completion writes the facts of the audio."""
WAVEFORM_KEY = "waveform"
"""The key of the waveform among these facts."""


class Metadata(TypeDecorator[dict[str, Any]]):
    """A JSON object whose waveform, if it is stored as text, is read as a list of numbers.

    Completion writes it as text. In rows of earlier versions it is a list.
    """

    impl = JsonObject
    cache_ok = True

    def process_result_value(
        self, value: dict[str, Any] | None, dialect: Dialect
    ) -> dict[str, Any] | None:
        """Return plain JSON values."""
        facts = value.get(AUDIO_KEY) if isinstance(value, dict) else None
        text = facts.get(WAVEFORM_KEY) if isinstance(facts, dict) else None
        if isinstance(text, str) and text.startswith(PREFIX):
            facts = {**cast("dict[str, Any]", facts), WAVEFORM_KEY: list(Waveform(text))}
            return {**cast("dict[str, Any]", value), AUDIO_KEY: facts}
        return value


def facts_as_json(facts: Mapping[str, Any]) -> str:
    """Return the facts of an audio as the JSON that is stored."""
    waveform = facts.get(WAVEFORM_KEY)
    if isinstance(waveform, Waveform):
        facts = {**facts, WAVEFORM_KEY: waveform.text}
    return as_json(facts)
