"""What the model reads of a request: its prompt, its negative prompt and its melody."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dgx_music.audio.conversion import match_channels, resample
from dgx_music.audio.samples import Audio
from dgx_music.catalog import WINDOW_SECONDS
from dgx_music.errors import GenerationRejectedError
from dgx_music.inference.engine import GenerationRequest
from dgx_music.inference.musicgen.decoder import Decoder
from dgx_music.inference.musicgen.melody import MelodyReader
from dgx_music.inference.musicgen.mix import choose_reader

LONGEST_PREFIX_TEXT = 512
"""How many tokens of text a melody model can read: they take room in every slot."""


class Conditions(NamedTuple):
    """What a row reads, see ``batch.Row``."""

    text: Tensor | None
    negative: Tensor | None
    prefix: Tensor | None
    is_guided: bool
    """False if the conditional and the unconditional pass would read the same."""


class Conditioner:
    """Reads requests, in one thread at a time: fast tokenizers are not safe in two."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        decoder: Decoder,
        sample_rate: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._text_encoder = model.text_encoder
        self._decoder = decoder
        self._sample_rate = sample_rate
        self._melody = None if decoder.reads_text else MelodyReader(model, decoder.device)
        self._reading = threading.Lock()

    @torch.no_grad()
    def read(self, request: GenerationRequest, melody_from: float | None = None) -> Conditions:
        """Return the request's conditions.

        ``melody_from`` is the second at which the window of a longer clip begins: its melody begins
        there as well and is repeated, as in audiocraft. Raises ``GenerationRejectedError`` if this
        model cannot read the request.
        """
        if request.melody is not None and self._melody is None:
            other = "musicgen-melody" if self._decoder.channels == 1 else "musicgen-stereo-melody"
            raise GenerationRejectedError(
                f"The model {request.model} hears no melody; use {other}."
            )
        texts = request.prompt, request.negative_prompt or ""
        is_guided = any(texts) or request.melody is not None
        if self._melody is None:
            return Conditions(self._read_text(texts[0]), self._read_text(texts[1]), None, is_guided)
        text, negative = map(self._states, texts)
        prefix = self._melody.prefix(text, self._chroma(request, melody_from), negative)
        return Conditions(None, None, prefix, is_guided)

    def _read_text(self, text: str) -> Tensor | None:
        """Return cross-attention's keys and values ``[L, 2, H, X, D]``; ``None`` for no text."""
        states = self._states(text)
        return None if states is None else self._decoder.read_text(states)

    def _chroma(self, request: GenerationRequest, begin: float | None) -> Tensor | None:
        """Return the melody's pitch classes ``[frame, 12]``; ``None`` if there is no melody."""
        if request.melody is None:
            return None
        samples = fit(request.melody, self._sample_rate, 1)[0]
        read = choose_reader(samples, self._sample_rate, request.melody_kind)
        if begin is not None:
            first = int(begin * self._sample_rate)
            last = first + round(WINDOW_SECONDS * self._sample_rate)
            samples = samples[torch.arange(first, last) % len(samples)]
        return read(samples, self._sample_rate)

    def _states(self, text: str) -> Tensor | None:
        """Return the text encoder's states ``[token, width]``; ``None`` for no text.

        Having no text differs from encoding the text "".
        """
        if not text:
            return None
        with self._reading:
            tokens = self._tokenizer(text, return_tensors="pt").to(self._decoder.device)
            count = tokens.input_ids.shape[1]
            if self._melody is not None and count > LONGEST_PREFIX_TEXT:
                problem = f"A text of {count} tokens is too long for a model that hears melodies"
                raise GenerationRejectedError(
                    f"{problem}; use at most {LONGEST_PREFIX_TEXT} tokens."
                )
            states: Tensor = self._text_encoder(**tokens).last_hidden_state[0]
        return states


def fit(clip: Audio, sample_rate: int, channels: int) -> Tensor:
    """Return the clip's samples ``[channel, sample]`` at that rate, in one channel or in two."""
    samples = match_channels(clip.samples, channels, clip.sample_rate)
    samples = resample(samples, clip.sample_rate, sample_rate)
    return torch.from_numpy(samples.copy())  # a request's own samples may be read-only
