"""EnCodec alone: a clip in one pass, as transformers does it, beside our windows.

One clip at a time, of the true shape, in float32, as in the engine.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import device
from benchmarks.musicgen_models import build_codec, frames
from dgx_music.inference.musicgen.codec import Codec
from dgx_music.inference.residents import free_bytes

WHOLE, WINDOWS = "one pass", "windows"
ROUNDS = 3
BYTES_OF_ONE_PASS = 50e6
"""At most so many for each second of audio; a clip for which there is not twice that is left out."""

Decode = Callable[[Tensor], object]


@dataclass(frozen=True)
class CodecCell:
    """One way to decode a clip of one length; the samples are part of the peak."""

    way: str
    clip_seconds: float
    seconds: float
    peak_bytes: int

    @property
    def audio_seconds_per_second(self) -> float:
        return self.clip_seconds / self.seconds


@torch.inference_mode()
def measure_codec(size: str, options: argparse.Namespace) -> list[CodecCell]:
    """Return the cells of all lengths; the two ways alternate."""
    place: torch.device = options.device
    stock, ours = build_codec(size, place), Codec(build_codec(size, place), 1)
    ways: dict[str, Decode] = {
        WHOLE: lambda codes: stock.decode(codes[None, None], [None]),
        WINDOWS: lambda codes: ours.decode(codes).finish(),
    }
    for decode in ways.values():
        decode(_random_codes(1.0, place))
    return [
        cell for seconds in options.codec_seconds for cell in _measure_length(ways, seconds, place)
    ]


def windows_seconds(cells: list[CodecCell]) -> float:
    """Return the seconds that the windows of the shortest clip take for a second of audio."""
    shortest = min(
        (cell for cell in cells if cell.way == WINDOWS), key=lambda cell: cell.clip_seconds
    )
    return 1 / shortest.audio_seconds_per_second


def _measure_length(
    ways: dict[str, Decode], seconds: float, place: torch.device
) -> list[CodecCell]:
    codes = _random_codes(seconds, place)
    measured = {way: list[tuple[float, int]]() for way in ways if _fits(way, seconds, place)}
    for _ in range(ROUNDS):
        for way, runs in measured.items():
            runs.append(_measure(ways[way], codes, place))
    return [
        CodecCell(
            way,
            seconds,
            statistics.median(taken for taken, _ in runs),
            max(peak for _, peak in runs),
        )
        for way, runs in measured.items()
    ]


def _measure(decode: Decode, codes: Tensor, place: torch.device) -> tuple[float, int]:
    before, started = device.held_bytes(place), device.now(place)
    decode(codes)
    return device.now(place) - started, device.peak_bytes(place) - before


def _fits(way: str, seconds: float, place: torch.device) -> bool:
    free = free_bytes(str(place))
    return way != WHOLE or free is None or 2 * BYTES_OF_ONE_PASS * seconds < free


def _random_codes(seconds: float, place: torch.device) -> Tensor:
    return torch.randint(2_048, (4, frames(seconds)), device=place)
