"""Measures the slots beside transformers' own ``generate``.

Both have the same random weights of the true shapes, in the same dtype, in one run.

    python benchmarks/inference.py                                       all of it; prints Markdown
    python benchmarks/inference.py --sizes toy --seconds 0.5 --room 1    to see that it runs
    python benchmarks/inference.py --batches 1 8 --weights auto int8 --only throughput

Without options a GPU runs three sizes, batches of 1 to 32 and clips of 10 s within eight minutes,
and a CPU runs musicgen-small with clips of 2 s. Speed does not depend on the values of the weights.
Ours and ``generate`` alternate in every round; the tables show medians. docs/benchmarks.md says how
to read them.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # our folder has names of libraries

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict

import torch
import transformers

from benchmarks import arrivals, device, roofline, tables
from benchmarks.cells import Bench, Budget, Cell
from benchmarks.codec import measure_codec, windows_seconds
from benchmarks.loops import Stock
from benchmarks.musicgen_models import SHAPES
from benchmarks.tables import SECTIONS, Report
from dgx_music.inference.musicgen.devices import keep_float32

FROM_CELLS = {"throughput", "memory"}
"""The sections that show the same runs; that of the codec uses them if they are there."""
SHARES = {"cells": 1, "mixed": 5, "poisson": 3}
"""The share of the time that each measurement gets."""


def run(options: argparse.Namespace) -> None:
    bandwidth = roofline.read_bandwidth(options.device)
    header = (
        f"{device.describe(options.device)}; {options.dtype}, guidance 3, {options.rounds} "
        f"round{'s' if options.rounds > 1 else ''}, {bandwidth / 1e9:.3g} GB/s read"
    )
    report = Report(header, options.json)
    report.say(header)
    batches = options.batches if FROM_CELLS & set(options.only) else []
    shares = len(options.sizes) * len(batches) + sum(
        SHARES.get(section, 0) for section in options.only
    )
    budget = Budget(options.minutes, shares)
    cells: list[Cell] = []
    for number, size in enumerate(options.sizes):
        bench = Bench(size, options, bandwidth)
        report.say(f"{size} is built")
        for batch in batches:
            found = bench.throughput(batch, budget.take(SHARES["cells"]))
            cells += found
            report.keep("cells", [asdict(cell) for cell in cells])
            speeds = ", ".join(f"{cell.loop} {cell.audio_seconds_per_second:.3g}" for cell in found)
            report.say(f"{size}, batch {batch}, audio s/s: {speeds}")
        if number == 0:
            measure_arrivals(bench, options, budget, report)
        del bench
    add_cells(cells, options, report)
    report.show()


def measure_arrivals(
    bench: Bench, options: argparse.Namespace, budget: Budget, report: Report
) -> None:
    if "mixed" in options.only:
        longest, together = bench.mixed(budget.take(SHARES["mixed"]))
        durations = ", ".join(f"{share * longest:.2g}" for share in arrivals.SHARES)
        title = f"Mixed durations that arrive together ({bench.size}: {durations} s): seconds until done"
        report.add("mixed", title, tables.together_table(bench.stock, together))
        report.keep("mixed", [asdict(each) for each in together])
        report.say("mixed durations are done")
    if "poisson" in options.only:
        words, poisson = bench.poisson(budget.take(SHARES["poisson"]))
        report.add("poisson", f"Poisson arrivals ({words})", tables.poisson_table(poisson))
        report.keep("poisson", {"arrivals": words, "loops": [asdict(each) for each in poisson]})
        report.say("Poisson arrivals are done")


def add_cells(cells: Sequence[Cell], options: argparse.Namespace, report: Report) -> None:
    if "throughput" in options.only:
        report.add("throughput", "Throughput and latency", tables.throughput_table(cells))
    if "memory" in options.only:
        report.add(
            "memory",
            f"Peak memory ({device.memory_method(options.device)})",
            tables.memory_table(cells),
        )
    if "codec" in options.only:
        measured = measure_codec(options.sizes[0], options)
        ours = [cell for cell in cells if cell.loop != Stock.name]
        shown = tables.codec_table(measured)
        if ours:
            shown += "\n\n" + tables.codec_shares_table(ours, windows_seconds(measured))
        report.add("codec", "EnCodec alone, and its share of the time", shown)
        report.keep("codec", [asdict(each) for each in measured])


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--sizes", choices=SHAPES, nargs="+", help="arrivals are measured with the first alone"
    )
    parser.add_argument("--only", choices=SECTIONS, nargs="+", default=SECTIONS)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        "--weights", choices=("auto", "int8"), nargs="+", default=["auto"], help="ours only"
    )
    parser.add_argument(
        "--kernels", choices=("auto", "off"), nargs="+", default=["auto"], help="ours only"
    )
    parser.add_argument(
        "--seconds", type=float, help="of a clip, and of the longest of the mixed clips"
    )
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--rounds", type=int)
    parser.add_argument(
        "--minutes", type=float, help="shorten clips to end in about this time; 0: never"
    )
    parser.add_argument(
        "--room",
        type=float,
        default=30.0,
        help="seconds of audio that fit into a slot; 30 in the engine",
    )
    parser.add_argument(
        "--codec-seconds",
        type=float,
        nargs="+",
        default=[10.0, 60.0, 300.0],
        help="of the clips that EnCodec decodes by itself; one pass is left out if it does not fit",
    )
    parser.add_argument("--requests", type=int, help="how many arrive at random")
    parser.add_argument("--slots", type=int, help="how many of them run at a time")
    parser.add_argument(
        "--load", type=float, default=0.7, help="of what `generate` can do in full batches"
    )
    parser.add_argument(
        "--poisson-seconds", type=float, help="the longest clip of those that arrive at random"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; those that are not given have the defaults of the device."""
    options = _make_parser().parse_args(arguments)
    is_gpu = options.device.type == "cuda"
    defaults = {
        "sizes": ["small", "medium", "large"] if is_gpu else ["small"],
        "seconds": 10.0 if is_gpu else 2.0,
        "batches": [1, 4, 8, 16, 32],
        "rounds": 2 if is_gpu else 1,
        "minutes": 6.5 if is_gpu else 0.0,
        "requests": 64 if is_gpu else 24,
        "slots": 16 if is_gpu else 8,
        "poisson_seconds": 5.0 if is_gpu else 2.0,
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    if options.device.type == "cuda":
        keep_float32()  # as the engine does
    run(options)


if __name__ == "__main__":
    main()
