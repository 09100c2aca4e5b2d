"""How often tempo and key are right, on pieces made from seeds, and what they cost.

    python -m benchmarks.analysis                    # 200 pieces
    python -m benchmarks.analysis --first 5000 --pieces 50
    python -m benchmarks.analysis --skip 5           # without their beginning

The constants of ``audio/tempo.py`` and ``audio/key.py`` were chosen on the seeds 0 to 299: give a
higher ``--first`` to measure on pieces that nobody has looked at.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from benchmarks import pieces
from benchmarks.markdown import table
from benchmarks.pieces import KEYS, RATE, Piece, make_piece
from dgx_music.audio.analysis import Analysis, analyse

LENGTHS = (5.0, 12.0, 30.0)
WITHOUT = ("make_noise", "make_drone")


@dataclass(frozen=True)
class Result:
    """One piece, and what was measured in it."""

    piece: Piece
    found: Analysis
    cpu_seconds: float

    def has_tempo(self, share: float, octaves: Iterable[float] = (1,)) -> bool:
        """Return whether the tempo is right to within this share, or this many times as fast."""
        ratio = (self.found.bpm or 0) / self.piece.bpm
        return any(abs(ratio / octave - 1) <= share for octave in octaves)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=5_000, help="the first seed")
    parser.add_argument("--pieces", type=int, default=200, help="pieces of each length")
    parser.add_argument("--skip", type=float, default=0.0, help="seconds to cut off the beginning")
    given = parser.parse_args(arguments)
    seeds = range(given.first, given.first + given.pieces)
    rows = [
        row_of(seconds, [measure(cut(seed, seconds, given.skip)) for seed in seeds])
        for seconds in LENGTHS
    ]
    titles = ["seconds", "tempo ±4 %", "or an octave", "or an octave, ±1 %", "no tempo"]
    titles += ["key", "or relative", "no key", "CPU s/s"]
    print(table(titles, rows))
    for name in WITHOUT:
        make = getattr(pieces, name)
        claims = [found for seed in seeds if (found := analyse(make(seed), RATE)) != Analysis()]
        print(f"\n{name.removeprefix('make_')}: something claimed in {len(claims)} of {len(seeds)}")


def cut(seed: int, seconds: float, skip: float) -> Piece:
    """Return a piece that begins so many seconds late, maybe in the middle of a chord."""
    piece = make_piece(seed, seconds=seconds + skip)
    return replace(piece, samples=piece.samples[:, round(skip * RATE) :])


def measure(piece: Piece) -> Result:
    started = time.process_time()
    found = analyse(piece.samples, RATE)
    return Result(piece, found, time.process_time() - started)


def row_of(seconds: float, results: list[Result]) -> list[str]:
    """Return the row of the table for pieces of this length."""
    octaves = (0.5, 1, 2)
    keys = [(each.found.key, each.piece.key) for each in results]
    counts = [
        sum(each.has_tempo(0.04) for each in results),
        sum(each.has_tempo(0.04, octaves) for each in results),
        sum(each.has_tempo(0.01, octaves) for each in results),
        sum(each.found.bpm is None for each in results),
        sum(found == key for found, key in keys),
        sum(found in (key, relative_of(key)) for found, key in keys),
        sum(found is None for found, _ in keys),
    ]
    cpu = sum(each.cpu_seconds for each in results) / (seconds * len(results))
    return [f"{seconds:g}", *(f"{count / len(results):.1%}" for count in counts), f"{cpu:.4f}"]


def relative_of(key: str) -> str:
    """Return the minor key of the same notes as a major key, or the other way round."""
    tonic, is_minor = KEYS.index(key) // 2, key.endswith("m")
    return KEYS[(tonic + 3) % 12 * 2] if is_minor else KEYS[(tonic + 9) % 12 * 2 + 1]


if __name__ == "__main__":
    main()
