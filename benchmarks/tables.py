"""The results, as Markdown and as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.arrivals import Poisson, Together
from benchmarks.cells import Cell
from benchmarks.codec import CodecCell
from benchmarks.loops import Stock
from benchmarks.markdown import table

SECTIONS = ("throughput", "memory", "codec", "mixed", "poisson")


class Report:
    """The results: Markdown at the end, and JSON after each measurement.

    So a run that is interrupted keeps most of its numbers.
    """

    def __init__(self, header: str, path: Path | None) -> None:
        self._header, self._path = header, path
        self._started = time.perf_counter()
        self._sections: dict[str, str] = {}
        self._data: dict[str, object] = {"header": header}

    def say(self, what: str) -> None:
        print(f"{time.perf_counter() - self._started:6.1f} s  {what}", file=sys.stderr, flush=True)

    def keep(self, name: str, data: object) -> None:
        self._data[name] = data
        if self._path is not None:
            self._path.write_text(json.dumps(self._data, indent=1) + "\n")

    def add(self, section: str, title: str, text: str) -> None:
        self._sections[section] = f"### {title}\n\n{text}"

    def show(self) -> None:
        print(
            self._header,
            *(self._sections[name] for name in SECTIONS if name in self._sections),
            sep="\n\n",
        )


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def throughput_table(cells: Sequence[Cell]) -> str:
    titles = (
        "size",
        "batch",
        "loop",
        "clip",
        "audio s/s",
        "p50",
        "p99",
        "of the roofline",
        "beside `generate`",
    )
    return table(
        titles,
        (
            (
                cell.size,
                cell.batch,
                cell.loop,
                f"{cell.clip_seconds:g} s",
                f"{cell.audio_seconds_per_second:.3g}",
                f"{cell.p50_seconds:.3g} s",
                f"{cell.p99_seconds:.3g} s",
                f"{cell.roofline_percent:.0f}%",
                "" if cell.loop == Stock.name else f"{cell.ratio:.2f} ×",
            )
            for cell in cells
        ),
    )


def memory_table(cells: Sequence[Cell]) -> str:
    titles = (
        "size",
        "batch",
        "loop",
        "clip",
        "language model",
        "caches and work at their peak",
        "together",
    )
    return table(
        titles,
        (
            (
                cell.size,
                cell.batch,
                cell.loop,
                f"{cell.clip_seconds:g} s",
                gigabytes(cell.weight_bytes),
                gigabytes(cell.working_bytes),
                gigabytes(cell.weight_bytes + cell.working_bytes),
            )
            for cell in cells
        ),
    )


def codec_table(cells: Sequence[CodecCell]) -> str:
    """Time and memory of EnCodec alone."""
    return table(
        ("clip", "EnCodec", "audio s/s", "peak memory"),
        (
            (
                f"{cell.clip_seconds:g} s",
                cell.way,
                f"{cell.audio_seconds_per_second:.3g}",
                gigabytes(cell.peak_bytes),
            )
            for cell in cells
        ),
    )


def codec_shares_table(cells: Sequence[Cell], codec_seconds: float) -> str:
    """EnCodec's share of the time of a clip, if it did not run beside the slots."""
    rows = []
    for cell in cells:
        share = codec_seconds / (codec_seconds + 1 / cell.audio_seconds_per_second)
        rows.append((cell.size, cell.batch, cell.loop, f"{100 * share:.1f}%"))
    return table(("size", "batch", "loop", "EnCodec's share of the time"), rows)


def together_table(stock: Stock, results: Sequence[Together]) -> str:
    theirs = [each for each in results if each.loop.startswith(stock.name)]
    best_mean, best_last = (
        min(each.mean_seconds for each in theirs),
        min(each.last_seconds for each in theirs),
    )
    rows = []
    for each in results:
        ratios = (
            f"{best_mean / each.mean_seconds:.2f} ×",
            f"{best_last / each.last_seconds:.2f} ×",
        )
        shown = ("", "") if each in theirs else ratios
        rows.append((each.loop, f"{each.mean_seconds:.3g} s", f"{each.last_seconds:.3g} s", *shown))
    titles = (
        "loop",
        "mean",
        "last",
        "mean, beside the best `generate`",
        "last, beside the best `generate`",
    )
    return table(titles, rows)


def poisson_table(results: Sequence[Poisson]) -> str:
    rows = (
        (
            each.loop,
            f"{each.mean_seconds:.3g} s",
            f"{each.p50_seconds:.3g} s",
            f"{each.p99_seconds:.3g} s",
            f"{each.audio_seconds_per_second:.3g}",
        )
        for each in results
    )
    return table(("loop", "mean latency", "p50", "p99", "audio s/s"), rows)
