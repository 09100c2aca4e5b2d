"""How far a decoder's distributions are from a better one's: teacher-forced, by Kullback-Leibler divergence.

Both decoders read the same tokens, so that they differ in their numbers alone, and not in what became of a first
difference. Nats for each token and codebook.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dgx_music.inference.decoder import Decoder, Text
from dgx_music.inference.slots import Row, Slots, delays

MOST_NATS = 0.02
"""What fewer bits may cost: by Pinsker's inequality at most one token in ten would have been drawn otherwise (the total
variation is at most sqrt(0.02 / 2))."""
_FRAMES = 24
_SEED = 2023


def measure_change(decoder: Decoder, texts: list[Tensor | None], change: Callable[[], None]) -> float:
    """Change the decoder, and return the divergence from what it was, of the worst codebook.

    Measured on what the model itself makes of the texts (see ``Decoder.read_text``; ``None`` for none) before the change.
    """
    passages = [own_tokens(decoder, text) for text in texts]
    before = [teacher_forced(decoder, tokens, text) for tokens, text in zip(passages, texts, strict=True)]
    change()
    after = [teacher_forced(decoder, tokens, text) for tokens, text in zip(passages, texts, strict=True)]
    return float(divergence(torch.cat(before), torch.cat(after)).max())


@torch.no_grad()
def own_tokens(decoder: Decoder, text: Tensor | None) -> Tensor:
    """Return what the decoder is fed, ``[step, K]``, as it makes a short clip of the text; always the same."""
    lags = delays(decoder.codebook_count, decoder.channels)
    random = torch.Generator().manual_seed(_SEED)
    uniforms = torch.rand(_FRAMES + lags[-1], len(lags), generator=random)
    row = Row(uniforms=uniforms, frame_count=_FRAMES, text=text, guidance_scale=1.0)
    slots = Slots(decoder, 1, row.step_count)
    slots.admit(row)
    while not row.is_done:
        slots.step()
    codes = slots.codes(row)  # [K, frame]
    tokens = torch.full((row.step_count, len(lags)), decoder.pad_token)
    for codebook, lag in enumerate(lags):
        fed = codes[codebook, : row.step_count - 1 - lag]
        tokens[lag + 1 : lag + 1 + len(fed), codebook] = fed
    return tokens


@torch.no_grad()
def teacher_forced(decoder: Decoder, tokens: Tensor, text: Tensor | None = None) -> Tensor:
    """Return the logits ``[step, half, K, V]`` after each of the tokens ``[step, K]``, in float32 on the CPU."""
    cache = decoder.empty_cache(1)
    read = None if text is None else Text(text[:, None], None, 1)
    steps = [
        decoder.forward(
            row[None].to(decoder.device),
            torch.tensor([at], device=decoder.device),
            cache,
            read,
            halves=2,
            filled=at + 1,
            is_ragged=False,
        ).cpu()
        for at, row in enumerate(tokens)
    ]
    return torch.cat(steps)


def divergence(exact: Tensor, other: Tensor) -> Tensor:
    """Return the divergence ``[K]`` of logits ``[step, half, K, V]`` from the exact ones, averaged over all else."""
    exact, other = exact.double().log_softmax(-1), other.double().log_softmax(-1)
    return (exact.exp() * (exact - other)).sum(-1).mean((0, 1))
