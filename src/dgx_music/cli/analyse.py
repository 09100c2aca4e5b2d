"""``dgx-music analyse``: what can be measured in audio files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from dgx_music import validation
from dgx_music.cli.options import AsJson
from dgx_music.cli.output import fail, print_json, print_line
from dgx_music.errors import InvalidRequestError

Files = Annotated[list[str], typer.Argument(metavar="FILE", help="WAV, FLAC, MP3 or OGG files.")]

_CHANNELS = {1: "mono", 2: "stereo"}


def analyse(files: Files, as_json: AsJson = False) -> None:
    """Measure audio files: length, peak, loudness, tempo and key.

    It prints one line for each file; with --json, one JSON object on each line. The numbers in
    brackets say how sure tempo and key are, up to 1. The true tempo may be half or twice as fast.
    There is none without a clear beat, no key without clear harmony, and neither in less than 4 s.
    A file that cannot be read is named on stderr; the others are measured, and the exit code is 2.
    """
    code = 0
    for name in files:
        try:
            facts = _measure(name)
        except InvalidRequestError as error:
            code = fail(str(error), error.exit_code)
            continue
        if as_json:
            print_json(facts, indent=None)
        else:
            print_line(_in_words(facts))
    raise typer.Exit(code)


def _measure(name: str) -> dict[str, Any]:
    """Return the facts of one file, by the names that they have in a generation's metadata."""
    from dgx_music.audio.analysis import analyse as analyse_samples
    from dgx_music.audio.loudness import measure
    from dgx_music.audio.reading import read_file

    audio = read_file(Path(validation.at_home("FILE", name)))
    samples, rate = audio.samples, audio.sample_rate
    lufs = measure(samples, rate) if len(samples) in _CHANNELS else None
    return {
        "file": name,
        "duration_seconds": audio.duration,
        "sample_rate": rate,
        "channels": len(samples),
        "peak": round(max(float(samples.max()), -float(samples.min())), 4),
        "loudness_lufs": None if lufs is None else round(lufs, 2),
        **vars(analyse_samples(samples, rate)),
    }


def _in_words(facts: dict[str, Any]) -> str:
    """Return the facts of one file on one line."""
    channels, lufs = facts["channels"], facts["loudness_lufs"]
    return ", ".join(
        [
            f"{facts['file']}: {facts['duration_seconds']:.1f} s",
            f"{facts['sample_rate']:,} Hz",
            _CHANNELS.get(channels, f"{channels} channels"),
            f"peak {20 * math.log10(facts['peak']):.1f} dBFS" if facts["peak"] else "silent",
            "no loudness" if lufs is None else f"{lufs:.1f} LUFS",
            _claim(facts, "bpm", " BPM") or "no clear tempo",
            _claim(facts, "key", "") or "no clear key",
        ]
    )


def _claim(facts: dict[str, Any], name: str, unit: str) -> str | None:
    if facts[name] is None:
        return None
    return f"{facts[name]}{unit} ({facts[f'{name}_confidence']:.2f})"
