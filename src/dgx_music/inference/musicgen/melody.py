"""Melodies: what a MusicGen melody model reads before its tokens, instead of cross-attention.

The mathematics is that of ``transformers``' ``musicgen_melody``; the tests compare the two. The
prefix has as many embeddings as the model has for 30 s of melody, and then one for each token of
the text. Positions count from its start, and nothing in it is masked: to the model, a prompt that
is padded with zeros is another prompt.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import MusicgenMelodyForConditionalGeneration
from transformers.audio_utils import chroma_filter_bank

PITCH_CLASSES = 12
"""C, C sharp, …, B."""

WINDOW = 16_384
"""Samples that a frame is made of; the next frame begins ``_HOP`` of them later."""
_HOP = 4_096
_LONGEST_SECONDS = 30


def chroma(samples: Tensor, sample_rate: int) -> Tensor:
    """Return each frame's loudest pitch class, of mono samples ``[sample]``: one-hot ``[frame, 12]``.

    The result is in float32; a frame is 4096 samples. A clip longer than 30 s is cut; one shorter
    than a window of 16384 samples gets silence on both sides. Loudness does not matter. A silent
    frame is class 0, C, which also stands for no melody: all classes tie, and the lowest wins.

    The steps are those of transformers' ``MusicgenMelodyFeatureExtractor``, without its torchaudio.
    audiocraft, which trained the models, first removes drums and bass (it separates stems with
    demucs). Here nothing is removed, and a loud bass counts as the melody: see ``mix.py``.
    """
    strengths = spectrum(samples, sample_rate)  # [frequency, frame]
    energies = _filters(sample_rate).to(strengths.device) @ strengths.square()  # [class, frame]
    return one_hot(energies.argmax(dim=0))


def spectrum(samples: Tensor, sample_rate: int) -> Tensor:
    """Return how strong each frequency is in each frame: float32 ``[frequency, frame]``.

    The frequencies are evenly spaced, from 0 to half the sample rate. The samples are cut and
    padded as ``chroma`` says.
    """
    samples = samples[: _LONGEST_SECONDS * sample_rate].float()
    missing = max(0, WINDOW - len(samples))
    samples = functional.pad(samples, (missing // 2, missing - missing // 2))
    window = torch.hann_window(WINDOW, device=samples.device)
    return torch.stft(samples, WINDOW, _HOP, window=window, return_complex=True).abs()


def one_hot(classes: Tensor) -> Tensor:
    """Return the pitch classes ``[frame]`` in the form that a model reads: ``[frame, 12]``."""
    return functional.one_hot(classes, PITCH_CLASSES).float()


class MelodyReader:
    """Makes the prefixes of a loaded model from its projections; copies nothing, needs no layers."""

    def __init__(self, model: MusicgenMelodyForConditionalGeneration, device: torch.device) -> None:
        """Take over the projections, which are on the device already."""
        self.melody_length: int = model.config.chroma_length
        """How many embeddings of a prefix are melody; those of the text follow."""
        self._text_projection: nn.Linear | None = getattr(model, "enc_to_dec_proj", None)
        self._melody_projection: nn.Linear | None = getattr(model, "audio_enc_to_dec_proj", None)
        head = model.decoder.lm_heads[0].weight  # [V, hidden]
        self._hidden_size: int = head.shape[1]
        self._device = device  # the decoder's own weights may be on the host still
        self._dtype: torch.dtype = head.dtype

    @torch.no_grad()
    def prefix(self, text: Tensor | None, chroma: Tensor | None, negative: Tensor | None) -> Tensor:
        """Return the conditional and the unconditional pass's prefix: ``[2, E, hidden]``.

        It is in the decoder's number format, and made from the text encoder's states of the prompt
        ``[X, width]`` and of the negative prompt ``[Y, width]``, and from the melody
        ``[frame, 12]``, which is repeated or cut to the model's length: E = length + max(X, Y).
        Only the conditional pass has the melody; in the unconditional pass, and in both if there is
        no melody, all frames are of class 0.

        A missing text is a single zero, as long as transformers' ``get_unconditional_inputs``; the
        shorter text is padded with zeros. The zeros replace a projection's output, not its input,
        since the projection has a bias.
        """
        silence = functional.one_hot(torch.zeros(1, dtype=torch.long), PITCH_CLASSES)  # [1, 12]
        melodies = [
            self._read_melody(silence if chroma is None else chroma),
            self._read_melody(silence),
        ]
        texts = [self._read_text(text), self._read_text(negative)]
        padded = pad_sequence(texts, batch_first=True)  # [2, max(X, Y), hidden]
        return torch.cat([torch.stack(melodies), padded], dim=1)

    def _read_melody(self, chroma: Tensor) -> Tensor:
        embeddings = self._project(chroma, self._melody_projection)  # [frame, hidden]
        rounds = math.ceil(self.melody_length / len(chroma))
        return embeddings.repeat(rounds, 1)[: self.melody_length]

    def _read_text(self, states: Tensor | None) -> Tensor:
        if states is None:
            return torch.zeros(1, self._hidden_size, device=self._device, dtype=self._dtype)
        return self._project(states, self._text_projection)

    def _project(self, states: Tensor, projection: nn.Linear | None) -> Tensor:
        states = states.to(self._device, self._dtype)
        return states if projection is None else projection(states)


@cache
def _filters(sample_rate: int) -> Tensor:
    """Return how much each frequency adds to each pitch class: ``[class, frequency]``."""
    filters = chroma_filter_bank(
        num_frequency_bins=WINDOW,
        num_chroma=PITCH_CLASSES,
        sampling_rate=sample_rate,
    )
    return torch.from_numpy(filters).float()
