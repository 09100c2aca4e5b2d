"""How much of a tune's pitch classes is kept when it is read from a mix, and how mixes are told.

    python -m benchmarks.tune                    # 48 mixes and 48 solos of 12 s
    python -m benchmarks.tune --first 70000 --pieces 200

The constants of ``inference/musicgen/mix.py`` were chosen on other seeds, below 50,060. Give a
higher ``--first`` to measure on pieces that nobody has looked at.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.markdown import table
from benchmarks.mixes import RATE, Mix, make_mix, make_solo
from dgx_music.inference.musicgen.melody import chroma, spectrum
from dgx_music.inference.musicgen.mix import find_notes, is_mix, tune_of

_VOICED_SHARE = 0.01
"""Of the energy of the tune's loudest frame."""


@dataclass(frozen=True)
class Result:
    """What was read from one mix; the tune alone says what is right."""

    mix: Mix

    @cached_property
    def voiced(self) -> Tensor:
        """In which frames the tune sounds ``[frame]``."""
        energies = spectrum(torch.from_numpy(self.mix.tune), RATE).square().sum(dim=0)
        return energies > _VOICED_SHARE * energies.amax()

    @cached_property
    def plain(self) -> int:
        """How many voiced frames are right if the mix is read like a solo."""
        return self._right(chroma)

    @cached_property
    def followed(self) -> int:
        """How many voiced frames are right if the tune is followed."""
        return self._right(tune_of)

    @property
    def is_hard(self) -> bool:
        """Whether fewer than half of the frames are right if the mix is read like a solo."""
        return self.plain < int(self.voiced.sum()) / 2

    def _right(self, read: Callable[[Tensor, int], Tensor]) -> int:
        heard = read(torch.from_numpy(self.mix.samples), RATE).argmax(dim=1)
        wanted = chroma(torch.from_numpy(self.mix.tune), RATE).argmax(dim=1)
        return int((heard == wanted)[self.voiced].sum())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=60_000, help="the first seed")
    parser.add_argument("--pieces", type=int, default=48, help="mixes, and as many solos")
    parser.add_argument("--seconds", type=float, default=12.0, help="the length of each")
    given = parser.parse_args(arguments)
    seeds = range(given.first, given.first + given.pieces)
    results = [Result(make_mix(seed, given.seconds)) for seed in seeds]
    groups: dict[str, Callable[[Result], bool]] = {
        "all": lambda _: True,
        "read like a solo, less than half is right": lambda each: each.is_hard,
        "a bass alone below the tune": lambda each: each.mix.parts == "bass",
        "with drums": lambda each: "drums" in each.mix.parts,
        "with a pad": lambda each: "pad" in each.mix.parts,
        "with chords": lambda each: "chords" in each.mix.parts,
    }
    rows = [row_of(name, filter(belongs, results)) for name, belongs in groups.items()]
    titles = ["mixes", "pieces", "read like a solo", "the tune followed", "the worst piece"]
    print(table(titles, rows))
    started = time.process_time()
    mixes = sum(is_a_mix(torch.from_numpy(each.mix.samples)) for each in results)
    cpu = (time.process_time() - started) / given.pieces
    solos = sum(not is_a_mix(torch.from_numpy(make_solo(seed, given.seconds))) for seed in seeds)
    print(f"\nmixes that auto takes for mixes: {mixes} of {given.pieces}")
    print(f"solos that auto takes for solos: {solos} of {given.pieces}")
    print(f"listening takes {cpu:.2f} s of CPU time for {given.seconds:g} s")


def is_a_mix(samples: Tensor) -> bool:
    return is_mix(find_notes(samples, RATE))


def row_of(name: str, results: Iterable[Result]) -> list[str]:
    """Return the row of the table for these mixes: shares of all voiced frames."""
    results = list(results)
    frames = [int(each.voiced.sum()) for each in results]
    plain, followed = [each.plain for each in results], [each.followed for each in results]
    worst = min((a / b for a, b in zip(followed, frames, strict=True)), default=0.0)
    total = max(sum(frames), 1)
    shares = [f"{sum(plain) / total:.1%}", f"{sum(followed) / total:.1%}", f"{worst:.0%}"]
    return [name, str(len(results)), *shares]


if __name__ == "__main__":
    main()
