"""Measures the slots beside transformers' own ``generate``: the same random weights of the real sizes, the same dtype.

    python benchmarks/inference.py                        musicgen-small in bfloat16, clips of 10 s; prints Markdown
    python benchmarks/inference.py --seconds 2 --rounds 1 shorter clips, to see that it runs
    python benchmarks/inference.py --dtype float32

Speed does not depend on what the weights are. Ours and ``generate`` alternate in every round; the table shows medians. Both
are timed from the prompts to the last token, without the codec, whose cost they share.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import copy
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers import (
    ByT5Tokenizer,
    EncodecConfig,
    GenerationConfig,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    T5Config,
)

from dgx_music.inference.decoder import Decoder
from dgx_music.inference.loop import DecodingLoop
from dgx_music.inference.slots import Row, Slots

FRAME_RATE = 50
DELAY = 3
PROMPTS = ("warm lo-fi piano", "a very fast and loud drum solo", "choir", "80s driving pop song with heavy drums")
SIZES = {"small": (24, 1024, 16), "medium": (48, 1536, 24), "large": (48, 2048, 32)}  # layers, hidden, heads
MIXED = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 0.9, 1.0)
"""The durations of eight clips that arrive together, as shares of ``--seconds``."""


class QuietRun:
    """A ``Run`` that nobody watches."""

    def report_progress(self, progress: float) -> None: ...

    def check_cancelled(self) -> None: ...


class Stock:
    """transformers' own loop, as it comes."""

    def __init__(self, model: MusicgenForConditionalGeneration, tokenizer: ByT5Tokenizer) -> None:
        self._model, self._tokenizer = model, tokenizer
        silence = SimpleNamespace(audio_values=torch.zeros(1, 1, 1))
        model.audio_encoder.decode = lambda _codes, audio_scales: silence

    def generate(self, seconds: float, batch: int) -> None:
        """Generate clips of equal length in one batch: it knows no other."""
        prompts = [PROMPTS[index % len(PROMPTS)] for index in range(batch)]
        tokens = self._tokenizer(prompts, return_tensors="pt", padding=True)
        config = GenerationConfig(
            max_new_tokens=frames(seconds) + DELAY,
            guidance_scale=3.0,
            do_sample=True,
            top_k=250,
            bos_token_id=2048,
            pad_token_id=2048,
            decoder_start_token_id=2048,
        )
        self._model.generate(**tokens, generation_config=config)


class Ours:
    """The slots, driven as the engine drives them."""

    def __init__(self, model: MusicgenForConditionalGeneration, tokenizer: ByT5Tokenizer, seconds: float) -> None:
        self._text_encoder, self._tokenizer = model.text_encoder, tokenizer
        self._decoder = Decoder(model.decoder, model.enc_to_dec_proj, frames(seconds) + DELAY)
        self._slots = Slots(self._decoder, len(MIXED))

    def generate(self, durations: Sequence[float]) -> list[float]:
        """Generate clips that arrive together; return the seconds after which each was done."""
        loop = DecodingLoop(lambda: self._slots)
        started = time.perf_counter()

        def finish(index: int) -> float:
            loop.decode(self._row(PROMPTS[index % len(PROMPTS)], frames(durations[index])), QuietRun())
            return time.perf_counter() - started

        with ThreadPoolExecutor(len(durations)) as pool:
            return list(pool.map(finish, range(len(durations))))

    @torch.inference_mode()
    def _row(self, prompt: str, frame_count: int) -> Row:
        states = self._text_encoder(**self._tokenizer(prompt, return_tensors="pt")).last_hidden_state[0]
        return Row(
            text=self._decoder.read_text(states),
            uniforms=torch.rand(frame_count + DELAY, self._decoder.codebook_count),
            frame_count=frame_count,
        )


def frames(seconds: float) -> int:
    return round(seconds * FRAME_RATE)


def build(size: str, dtype: torch.dtype) -> tuple[MusicgenForConditionalGeneration, ByT5Tokenizer]:
    """Return a model of the real language model's shape. Its text encoder is T5-base's, its codec is never run."""
    layers, hidden, heads = SIZES[size]
    model = MusicgenForConditionalGeneration(
        MusicgenConfig(
            text_encoder=T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12, vocab_size=259),
            audio_encoder=EncodecConfig(num_filters=4, hidden_size=32),
            decoder=MusicgenDecoderConfig(
                num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, ffn_dim=4 * hidden
            ),
        )
    ).eval()
    model.decoder.to(dtype)
    model.enc_to_dec_proj.to(dtype)
    model.text_encoder.register_forward_hook(_hand_on(dtype))
    return model, ByT5Tokenizer(extra_ids=0)


def _hand_on(dtype: torch.dtype) -> Callable[[Any, Any, Any], None]:
    def convert(_module: Any, _args: Any, output: Any) -> None:
        output.last_hidden_state = output.last_hidden_state.to(dtype)

    return convert


def seconds_of(work: Callable[..., object], *arguments: object) -> float:
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def measure_batches(ours: Ours, stock: Stock, seconds: float, batches: Sequence[int], rounds: int) -> None:
    print("| batch | `generate`, audio s/s | slots, audio s/s | ratio |\n|---|---|---|---|", flush=True)
    for batch in batches:
        pairs = []
        for _ in range(rounds):
            theirs = seconds_of(stock.generate, seconds, batch)
            pairs.append((theirs, seconds_of(ours.generate, [seconds] * batch)))
        stock_speed = statistics.median(batch * seconds / theirs for theirs, _ in pairs)
        our_speed = statistics.median(batch * seconds / own for _, own in pairs)
        ratio = statistics.median(theirs / own for theirs, own in pairs)
        print(f"| {batch} | {stock_speed:.2f} | {our_speed:.2f} | {ratio:.2f} × |", flush=True)


def measure_mixed(ours: Ours, stock: Stock, seconds: float, rounds: int) -> None:
    """Eight clips of eight durations arrive together: when is each of them done, on average?"""
    durations = [share * seconds for share in MIXED]
    means = []
    for _ in range(rounds):
        ends, now = [], 0.0
        for duration in durations:
            now += seconds_of(stock.generate, duration, 1)
            ends.append(now)
        together = seconds_of(stock.generate, max(durations), len(durations))
        means.append((statistics.mean(ends), together, statistics.mean(ours.generate(durations))))
    one_by_one, one_batch, slots = (statistics.median(column) for column in zip(*means, strict=True))
    print(f"\nmixed durations ({', '.join(f'{duration:g}' for duration in durations)} s), mean seconds to finish:\n")
    print("| `generate`, one by one | `generate`, one batch as long as the longest | slots |\n|---|---|---|")
    print(f"| {one_by_one:.1f} | {one_batch:.1f} | {slots:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--mixed", action="store_true", help="also eight clips of mixed durations")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    model, tokenizer = build(options.size, getattr(torch, options.dtype))
    ours = Ours(copy.deepcopy(model), tokenizer, options.seconds)
    stock = Stock(model, tokenizer)
    print(
        f"{options.size}, {options.dtype}, clips of {options.seconds:g} s, guidance 3; {platform.machine()}, "
        f"{options.threads} threads, torch {torch.__version__}, transformers {transformers.__version__}\n"
    )
    stock.generate(0.1, 1)  # the first steps of a process are slow
    ours.generate([0.1])
    measure_batches(ours, stock, options.seconds, options.batches, options.rounds)
    if options.mixed:
        measure_mixed(ours, stock, options.seconds, options.rounds)


if __name__ == "__main__":
    main()
