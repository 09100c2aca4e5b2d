"""The names that ElevenLabs gives to encodings: codec, sample rate and, if it has one, bit rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from dgx_music.client.content import Codec, Encoding
from dgx_music.storage import Generation
from dgx_music.web.compat.fields import check_one_of

DEFAULT_OUTPUT = "mp3_44100_128"
_BEST = "auto"
_MP3_RATES = (
    *("22050_32", "24000_48", "44100_32", "44100_64", "44100_96", "44100_128", "44100_192"),
    *("48000_128", "48000_192", "48000_240", "48000_320"),
)
_OPUS_RATES = ("48000_32", "48000_64", "48000_96", "48000_128", "48000_192")
_RATES = ("8000", "16000", "22050", "24000", "32000", "44100", "48000")
OUTPUT_FORMATS = (
    _BEST,
    *(f"mp3_{each}" for each in _MP3_RATES),
    *(f"opus_{each}" for each in _OPUS_RATES),
    *(f"{codec}_{each}" for codec in ("pcm", "wav") for each in _RATES),
    *("ulaw_8000", "alaw_8000"),
)
_MEDIA_TYPES: Mapping[Codec, str] = {
    "mp3": "audio/mpeg",
    "opus": "audio/opus",
    "wav": "audio/wav",
    "flac": "audio/flac",
    "pcm": "audio/pcm",
    "ulaw": "audio/basic",
    "alaw": "audio/x-alaw-basic",
}
MEDIA_TYPES = tuple(_MEDIA_TYPES.values())


def read_output_format(value: str) -> Encoding:
    """Return the encoding of this name; raises ``InvalidRequestError``."""
    name = check_one_of("output_format", value, OUTPUT_FORMATS)
    codec, *rates = (DEFAULT_OUTPUT if name == _BEST else name).split("_")
    return Encoding(cast("Codec", codec), *(int(rate) for rate in rates))


def media_type_of(encoding: Encoding, row: Generation) -> str:
    """Return the media type of a row's audio in this encoding; raw samples say their form."""
    name = _MEDIA_TYPES[encoding.codec]
    if encoding.codec != "pcm":
        return name
    rate, channels = encoding.rate_for(row.sample_rate), encoding.channels_for(row.channels)
    return f"{name};rate={rate};channels={channels}"
