"""The loops that are compared: transformers' own ``generate``, and ours."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Protocol

import torch
from transformers import ByT5Tokenizer, GenerationConfig, MusicgenForConditionalGeneration

from benchmarks.device import now
from benchmarks.musicgen_models import DELAY, frames, steps
from dgx_music.inference.musicgen.batch import Row
from dgx_music.inference.musicgen.decoder import Decoder
from dgx_music.inference.musicgen.slots import Slots
from dgx_music.sampling import Sampling

PROMPTS = (
    "warm lo-fi piano",
    "a very fast and loud drum solo",
    "choir",
    "80s driving pop song with heavy drums",
)
LONGEST_TOKENS = max(len(prompt) for prompt in PROMPTS) + 1  # a byte each, and the end
PAD = 2048
WARM_UP_SECONDS = 0.1


@dataclass(frozen=True)
class Request:
    """A clip to make: the second at which it arrives, and its seconds of audio."""

    arrives_at: float
    seconds: float


class Loop(Protocol):
    """Makes tokens, from the prompts to codes on the host.

    The codec is measured elsewhere, since both loops share its cost.
    """

    name: str
    bytes_per_weight: float

    def open(self, batch: int) -> None:
        """Prepare for at most this many clips at a time."""

    def warm_up(self, durations: Sequence[float]) -> None:
        """Do the work that only the first clips of these durations cost."""

    def generate(self, durations: Sequence[float]) -> list[float]:
        """Generate clips that arrive together; return the seconds until each was done."""

    def close(self) -> None:
        """Release what ``open`` took."""


class Stock:
    """transformers' own loop, with its defaults."""

    name = "`generate`"

    def __init__(self, model: MusicgenForConditionalGeneration, tokenizer: ByT5Tokenizer) -> None:
        self._model, self._tokenizer = model, tokenizer
        self.bytes_per_weight = float(model.decoder.dtype.itemsize)
        silence = SimpleNamespace(audio_values=torch.zeros(1, 1, 1))
        model.audio_encoder.decode = lambda _codes, audio_scales: silence

    def open(self, batch: int) -> None: ...

    def warm_up(self, durations: Sequence[float]) -> None:
        self.generate([WARM_UP_SECONDS] * len(durations))

    def generate(self, durations: Sequence[float]) -> list[float]:
        """Generate one batch, as long as its longest clip; all clips are done at its end."""
        device = self._model.device
        prompts = [PROMPTS[index % len(PROMPTS)] for index in range(len(durations))]
        config = GenerationConfig(
            max_new_tokens=steps(max(durations)),
            guidance_scale=3.0,
            do_sample=True,
            top_k=250,
            bos_token_id=PAD,
            pad_token_id=PAD,
            decoder_start_token_id=PAD,
        )
        started = now(device)
        tokens = self._tokenizer(prompts, return_tensors="pt", padding=True).to(device)
        self._model.generate(**tokens, generation_config=config)
        return [now(device) - started] * len(durations)

    def close(self) -> None: ...


class Ours:
    """The slots. Only this class of the benchmark knows the engine."""

    def __init__(
        self,
        model: MusicgenForConditionalGeneration,
        tokenizer: ByT5Tokenizer,
        longest: float,
        weights: str,
        kernels: str,
    ) -> None:
        """Copy the language model; ``longest`` is the seconds of audio that fit into a slot."""
        self.bytes_per_weight = 1.0 if weights == "int8" else float(model.decoder.dtype.itemsize)
        self._device, self._tokenizer, self._text_encoder = (
            model.device,
            tokenizer,
            model.text_encoder,
        )
        self._max_steps = steps(longest)
        decoder, projection = copy.deepcopy(model.decoder), copy.deepcopy(model.enc_to_dec_proj)
        self._decoder = Decoder(decoder, projection, self._max_steps + 1)  # one position to spare
        is_on_gpu = self._device.type == "cuda"
        if kernels == "auto" and not is_on_gpu:
            self._decoder.build_kernels()
        if weights == "int8":
            self._decoder.quantise()
        self.name = "slots" if weights == "auto" else f"slots, {weights}"
        if not (is_on_gpu or self._decoder.has_native_kernels):
            self.name += ", plain torch"
        self._slots: Slots | None = None

    def open(self, batch: int) -> None:
        self._slots = Slots(self._decoder, batch, self._max_steps)

    def close(self) -> None:
        self._slots = None

    def warm_up(self, durations: Sequence[float]) -> None:
        """Make the whole clips on a GPU, and a few steps on a CPU.

        A GPU may record a graph for each batch and length.
        """
        self.generate(
            durations if self._device.type == "cuda" else [WARM_UP_SECONDS] * len(durations)
        )

    def generate(self, durations: Sequence[float]) -> list[float]:
        return self.serve([Request(0.0, seconds) for seconds in durations])

    def serve(self, requests: Sequence[Request]) -> list[float]:
        """Generate each clip after its arrival, as soon as a slot is free.

        Returns the second at which each was done.
        """
        slots = self._slots
        assert slots is not None, "open comes first"
        waiting = deque(enumerate(requests))
        running: dict[int, Row] = {}
        ends = [0.0] * len(requests)
        started = now(self._device)
        while waiting or running:
            spent = time.perf_counter() - started
            while waiting and slots.has_room and waiting[0][1].arrives_at <= spent:
                index, request = waiting.popleft()
                running[index] = self._row(PROMPTS[index % len(PROMPTS)], frames(request.seconds))
                slots.admit(running[index])
            if not running:
                time.sleep(waiting[0][1].arrives_at - spent)
                continue
            slots.step()
            for index in [index for index, row in running.items() if row.is_done]:
                row = running.pop(index)
                slots.codes(row).cpu()
                ends[index] = time.perf_counter() - started
                slots.retire(row)
        return ends

    @torch.inference_mode()
    def _row(self, prompt: str, frame_count: int) -> Row:
        tokens = self._tokenizer(prompt, return_tensors="pt").to(self._device)
        return Row(
            text=self._decoder.read_text(self._text_encoder(**tokens).last_hidden_state[0]),
            uniforms=torch.rand(frame_count + DELAY, self._decoder.codebook_count),
            frame_count=frame_count,
            sampling=Sampling(),
        )
