"""How much memory a long clip takes beside a short one, in the real worker.

    python -m benchmarks.resident                      10 and 300 s, with the true codec
    python -m benchmarks.resident --seconds 0.5 1      to see that it runs

A worker of its own makes each clip, in a folder of its own. The codec has its true size and the
language model the width of musicgen-small, but few layers, because the memory of a slot does not
depend on the length of a clip. The weights are random. Shown is the peak resident memory (VmHWM)
of the worker and of its engine's process.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import MusicgenForConditionalGeneration

from benchmarks.markdown import table
from benchmarks.musicgen_models import build_tokenizer, shortened_config

LOOK_SECONDS = 0.02
SAMPLE_BYTES = 32_000 * 4
"""Of a second of audio, in float32."""


@torch.no_grad()
def save_model(folder: Path, layers: int) -> None:
    """Write a model with the true codec, few layers and random weights."""
    model = MusicgenForConditionalGeneration(shortened_config(layers)).eval()
    for quantizer in model.audio_encoder.quantizer.layers:
        quantizer.codebook.embed.normal_()
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def measure(model: Path, seconds: float) -> tuple[int, int]:
    """Return the peak bytes of a worker and of its engine's process that make such a clip."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "DGX_MUSIC_DATABASE_URL": f"sqlite:///{folder}/queue.db",
            "DGX_MUSIC_OUTPUT": f"{folder}/audio",
            "DGX_MUSIC_MODEL": str(model),
            "DGX_MUSIC_SLOTS": "1",
        }
        command = [str(Path(sys.executable).with_name("dgx-music"))]
        request = ["enqueue", "lo-fi piano", "--duration", str(seconds), "--max-attempts", "1"]
        for arguments in (["db", "init"], request):
            subprocess.run([*command, *arguments], env=environment, check=True)
        worker = subprocess.Popen([*command, "worker", "--drain"], env=environment)
        peaks = watch(worker)
        if not list(Path(folder, "audio").rglob("*.wav")):
            raise RuntimeError(f"the worker made no clip of {seconds:g} s")
        return peaks


def watch(worker: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Return the peak bytes of the worker and of its largest child, after it has ended."""
    own, largest_child = 0, 0
    while worker.poll() is None:
        own = max(own, peak_bytes(worker.pid))
        largest_child = max([largest_child, *map(peak_bytes, children_of(worker.pid))])
        time.sleep(LOOK_SECONDS)
    return own, largest_child


def peak_bytes(pid: int) -> int:
    """Return a process's peak resident memory; 0 if it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1_024
    return 0


def children_of(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            yield from map(int, (task / "children").read_text().split())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, nargs="+", default=[10.0, 300.0])
    parser.add_argument("--layers", type=int, default=2, help="of the language model")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), options.layers)
        peaks = {seconds: measure(Path(folder), seconds) for seconds in options.seconds}
    rows = [
        (
            f"{seconds:g} s",
            *(f"{number / 1e6:.0f} MB" for number in (*pair, seconds * SAMPLE_BYTES)),
        )
        for seconds, pair in peaks.items()
    ]
    print(table(["clip", "worker", "engine", "the samples alone"], rows))


if __name__ == "__main__":
    main()
