"""What the model reads of a request: its prompt, its negative prompt and its melody."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias

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
from dgx_music.inference.musicgen.stems import separate
from dgx_music.validation import MelodyKind

LONGEST_PREFIX_TEXT = 512
"""How many tokens of text a melody model can read: they take room in every slot."""


class Conditions(NamedTuple):
    """What a row reads, see ``batch.Row``."""

    text: Tensor | None
    negative: Tensor | None
    prefix: Tensor | None
    is_guided: bool
    """False if the conditional and the unconditional pass would read the same."""


ReadWindow: TypeAlias = Callable[[float], Conditions]
"""Returns what the window reads that begins at this second of the clip."""


class Conditioner:
    """Reads requests; the models that read work in one thread, whoever asks.

    Fast tokenizers are not safe in two threads at a time. On a GPU, libraries take memory for each
    thread that calls them: 64 threads took 5 GB of an H200. A cancel does not end the wait for that
    thread, which needs hundredths of a second for each request.
    """

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
        self._thread = ThreadPoolExecutor(1, "reading")
        # Started now: if there is no memory for it later, refused requests would stay in its queue.
        self._thread.submit(int)

    def close(self) -> None:
        """End the thread; nothing may be read any more."""
        self._thread.shutdown()

    def read(self, request: GenerationRequest) -> Conditions:
        """Return the conditions of a request of one window; raises as ``open`` does."""
        return self.open(request, is_long=False)(0)

    def open(self, request: GenerationRequest, *, is_long: bool) -> ReadWindow:
        """Return the request as its windows read it; what they have in common is read here, once.

        In each window of a long clip the melody begins where the window begins, and is repeated, as
        in audiocraft. Raises ``GenerationRejectedError`` if this model cannot read the request.
        """
        reader = self._melody
        if request.melody is not None and reader is None:
            other = "musicgen-melody" if self._decoder.channels == 1 else "musicgen-stereo-melody"
            raise GenerationRejectedError(
                f"The model {request.model} hears no melody; use {other}."
            )
        texts = request.prompt, request.negative_prompt or ""
        is_guided = any(texts) or request.melody is not None
        if reader is None:
            text, negative = self._thread.map(self._read_text, texts)
            return lambda _begin: Conditions(text, negative, None, is_guided)
        tune = None
        if request.melody is not None:
            tune = self._tune(request.melody, request.melody_kind, is_long=is_long)
        text, negative = self._thread.map(self._states, texts)

        def read_window(begin: float) -> Conditions:
            chroma = None if tune is None else tune.read_from(begin)
            # Without a name for the future: it and its error would keep each other alive.
            prefix = self._thread.submit(reader.prefix, text, chroma, negative).result()
            return Conditions(None, None, prefix, is_guided)

        return read_window

    def _tune(self, melody: Audio, kind: MelodyKind, *, is_long: bool) -> _Tune:
        if kind == "stems":
            heard = melody.samples if is_long else melody.samples[:, : _window(melody.sample_rate)]
            melody = separate(Audio(heard, melody.sample_rate), self._decoder.device)
            kind = "solo"
        samples = fit(melody, self._sample_rate, 1)[0]
        return _Tune(samples, self._sample_rate, kind, is_long=is_long)

    @torch.no_grad()
    def _read_text(self, text: str) -> Tensor | None:
        """Return cross-attention's keys and values ``[L, 2, H, X, D]``; ``None`` for no text."""
        states = self._states(text)
        return None if states is None else self._decoder.read_text(states)

    @torch.no_grad()
    def _states(self, text: str) -> Tensor | None:
        """Return the text encoder's states ``[token, width]``; ``None`` for no text.

        Having no text differs from encoding the text "".
        """
        if not text:
            return None
        tokens = self._tokenizer(text, return_tensors="pt").to(self._decoder.device)
        count = tokens.input_ids.shape[1]
        if self._melody is not None and count > LONGEST_PREFIX_TEXT:
            problem = f"A text of {count} tokens is too long for a model that hears melodies"
            raise GenerationRejectedError(f"{problem}; use at most {LONGEST_PREFIX_TEXT} tokens.")
        states: Tensor = self._text_encoder(**tokens).last_hidden_state[0]
        return states


class _Tune:
    """A melody, and the way to read it, which is chosen once and for all of it."""

    def __init__(
        self, samples: Tensor, sample_rate: int, kind: MelodyKind, *, is_long: bool
    ) -> None:
        window = _window(sample_rate)
        self._samples = samples if is_long else samples[:window]
        self._length = window if is_long else len(self._samples)
        self._sample_rate = sample_rate
        self._read = choose_reader(self._samples, sample_rate, kind)

    def read_from(self, begin: float) -> Tensor:
        """Return the pitch classes ``[frame, 12]`` of the window that begins at this second."""
        first = int(begin * self._sample_rate)
        heard = torch.arange(first, first + self._length) % len(self._samples)
        return self._read(self._samples[heard], self._sample_rate)


def _window(sample_rate: int) -> int:
    """Return the samples of the longest window."""
    return round(WINDOW_SECONDS * sample_rate)


def fit(clip: Audio, sample_rate: int, channels: int) -> Tensor:
    """Return the clip's samples ``[channel, sample]`` at that rate, in one channel or in two."""
    samples = match_channels(clip.samples, channels, clip.sample_rate)
    samples = resample(samples, clip.sample_rate, sample_rate)
    return torch.from_numpy(samples if samples.flags.writeable else samples.copy())
