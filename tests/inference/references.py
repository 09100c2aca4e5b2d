"""References for our tokens: transformers' ``generate``, and a plain loop over its modules.

The loop is for what ``generate`` cannot do. Nothing here comes from our own inference code. The
loop computes everything anew at each step, so that nothing can go stale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    ByT5Tokenizer,
    GenerationConfig,
    MusicgenForConditionalGeneration,
    MusicgenMelodyForConditionalGeneration,
)

PAD = 2048

Model = MusicgenForConditionalGeneration | MusicgenMelodyForConditionalGeneration


def melody_inputs(
    tokenizer: ByT5Tokenizer, prompt: str | None, chroma: Tensor | None
) -> dict[str, Tensor]:
    """Return a processor's inputs of ``generate``; no prompt: its ``get_unconditional_inputs``."""
    inputs = dict(tokenizer(prompt or "", return_tensors="pt"))
    if prompt is None:
        inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])
    return inputs if chroma is None else {**inputs, "input_features": chroma[None]}


def generated_codes(model: Model, frames: int, guidance_scale: float, **inputs: Tensor) -> Tensor:
    """Return the codes ``[K, frame]`` that ``generate`` hands to the codec, greedily.

    A continuation's first codes ``[K, P]`` are its ``decoder_input_ids``.
    """
    heard: list[Tensor] = []
    decode_audio = model.audio_encoder.decode

    def listen(codes: Tensor, audio_scales: list[None]) -> Any:
        heard.append(codes[0, 0])
        return decode_audio(codes, audio_scales)

    given = inputs["decoder_input_ids"].shape[1] if "decoder_input_ids" in inputs else 0
    config = GenerationConfig(
        do_sample=False,
        guidance_scale=guidance_scale,
        max_new_tokens=frames + 3 - given,
        decoder_start_token_id=PAD,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.audio_encoder, "decode", listen)
        model.generate(**inputs, generation_config=config)
    return torch.stack(heard, dim=1).flatten(0, 1)  # stereo: left and right alternate


def melody_reference_codes(
    model: MusicgenMelodyForConditionalGeneration,
    tokenizer: ByT5Tokenizer,
    prompt: str | None,
    frames: int,
    guidance_scale: float,
    chroma: Tensor | None,
) -> Tensor:
    """Return the codes ``[K, frame]`` that ``generate`` makes greedily.

    It reads the prompt and the melody ``[frame, 12]``.
    """
    return generated_codes(
        model, frames, guidance_scale, **melody_inputs(tokenizer, prompt, chroma)
    )


@torch.inference_mode()
def plain_greedy(
    model: Model,
    tokenizer: ByT5Tokenizer,
    prompt: str | None,
    frames: int,
    guidance_scale: float,
    *,
    negative: str | None = None,
    forced: Tensor | None = None,
    chroma: Tensor | None = None,
) -> Tensor:
    """Return the likeliest codes ``[K, frame]`` of any model; the first are forced: ``[K, P]``.

    Without a prompt both passes read the same. ``chroma`` is for models that follow a melody.
    """
    conditions = _conditions(model, tokenizer, [prompt, negative], chroma)
    config = model.decoder.config
    delays = [codebook // config.audio_channels for codebook in range(config.num_codebooks)]
    given = torch.empty(len(delays), 0, dtype=torch.long) if forced is None else forced
    inputs = torch.full((len(delays), 1), PAD)  # [K, position]
    for position in range(frames + delays[-1]):
        logits = [  # each [K, V]
            model.decoder(inputs, encoder_hidden_states=states, use_cache=False).logits[:, -1]
            for states in conditions[: 2 if guidance_scale > 1 else 1]
        ]
        scores = (
            logits[0] if len(logits) == 1 else logits[1] + (logits[0] - logits[1]) * guidance_scale
        )
        tokens = scores.argmax(-1)
        for codebook, delay in enumerate(delays):
            frame = position - delay
            if not 0 <= frame < frames:
                tokens[codebook] = PAD
            elif frame < given.shape[1]:
                tokens[codebook] = given[codebook, frame]
        inputs = torch.cat([inputs, tokens[:, None]], dim=1)
    return torch.stack(
        [inputs[codebook, 1 + delay :][:frames] for codebook, delay in enumerate(delays)]
    )


def audiocraft_long_form(
    model: Model,
    tokenizer: ByT5Tokenizer,
    prompt: str | None,
    total: int,
    guidance_scale: float,
    *,
    window: int,
    stride: int,
    negative: str | None = None,
    forced: Tensor | None = None,
    chroma_at: Callable[[int], Tensor | None] = lambda offset: None,
) -> Tensor:
    """Return the codes ``[K, total]`` in audiocraft's windows (``_generate_tokens``).

    Each window is that of ``plain_greedy``.

    ``chroma_at`` gives the melody of the window that starts at this frame: audiocraft reads 30 s of
    its samples from there on, and repeats the melody at its end.
    """
    pieces = [] if forced is None else [forced]
    offset, given = 0, 0 if forced is None else forced.shape[1]
    while offset + given < total:
        codes = plain_greedy(
            model,
            tokenizer,
            prompt,
            min(total - offset, window),
            guidance_scale,
            negative=negative,
            forced=forced,
            chroma=chroma_at(offset),
        )
        pieces.append(codes[:, given:])
        forced = codes[:, stride:]
        given = forced.shape[1]
        offset += stride
    return torch.cat(pieces, dim=1)


@torch.inference_mode()
def long_form_shortfall(
    model: Model,
    tokenizer: ByT5Tokenizer,
    prompt: str | None,
    codes: Tensor,
    guidance_scale: float,
    *,
    window: int,
    stride: int,
    given: int = 0,
    chroma_at: Callable[[int], Tensor | None] = lambda offset: None,
) -> float:
    """Return by how much, in logits, the codes ``[K, total]`` fall short of the likeliest ones.

    0 says that they are those of ``audiocraft_long_form``, of which the first ``given`` frames were
    forced. Each window is read in one pass, so this takes a second for minutes of music. Two tokens
    that are as good as equally likely fall short by a rounding error.
    """
    offset, worst, total = 0, 0.0, codes.shape[1]
    while offset + given < total:
        own = codes[:, offset : offset + window]
        if given < own.shape[1]:
            conditions = _conditions(model, tokenizer, [prompt, None], chroma_at(offset))
            scores = _scores(model, own, conditions, guidance_scale)[:, given:]
            made = scores.gather(-1, own[:, given:, None])[..., 0]
            worst = max(worst, float((scores.amax(-1) - made).max()))
        given = own.shape[1] - stride
        offset += stride
    return worst


def _scores(model: Model, codes: Tensor, conditions: list[Tensor], guidance_scale: float) -> Tensor:
    """Return the guided logits ``[K, frame, V]`` of each frame, given the frames before it."""
    config = model.decoder.config
    delays = [codebook // config.audio_channels for codebook in range(config.num_codebooks)]
    frames = codes.shape[1]
    inputs = torch.full((len(delays), frames + delays[-1]), PAD)  # [K, position]
    for codebook, delay in enumerate(delays):
        end = min(frames, inputs.shape[1] - 1 - delay)
        inputs[codebook, 1 + delay : 1 + delay + end] = codes[codebook, :end]
    logits = [  # each [K, position, V]
        model.decoder(inputs, encoder_hidden_states=states, use_cache=False).logits
        for states in conditions
    ]
    scores = logits[1] + (logits[0] - logits[1]) * guidance_scale
    scores = scores[:, -inputs.shape[1] :]  # behind a melody model's prefix
    return torch.stack([scores[k, delay:][:frames] for k, delay in enumerate(delays)])


@torch.inference_mode()
def melody_prefix(
    model: MusicgenMelodyForConditionalGeneration,
    tokenizer: ByT5Tokenizer,
    prompts: list[str | None],
    chroma: Tensor | None,
) -> Tensor:
    """Return the prefixes ``[2, E, hidden]`` of two prompts, by transformers' own modules.

    The prompts are the prompt and the negative prompt.

    They are padded as one batch, and masked as ``generate`` masks padding: after the projection.
    """
    texts = tokenizer([prompt or "" for prompt in prompts], padding=True, return_tensors="pt")
    is_given = torch.tensor([[prompt is not None] for prompt in prompts])
    states = model.enc_to_dec_proj(model.text_encoder(**texts).last_hidden_state)
    states = states * (texts.attention_mask * is_given)[..., None]
    length = model.config.chroma_length
    null = torch.eye(12)[[0] * length]
    own = (
        null
        if chroma is None
        else torch.stack([chroma[index % len(chroma)] for index in range(length)])
    )
    return torch.cat([model.audio_enc_to_dec_proj(torch.stack([own, null])), states], dim=1)


def _conditions(
    model: Model, tokenizer: ByT5Tokenizer, prompts: list[str | None], chroma: Tensor | None
) -> list[Tensor]:
    """Return the decoder's input for both passes, ``[1, E, hidden]`` each.

    It is a prefix, or what cross-attention reads.
    """
    if isinstance(model, MusicgenMelodyForConditionalGeneration):
        return list(melody_prefix(model, tokenizer, prompts, chroma).split(1))
    return [_text(model, tokenizer, prompt) for prompt in prompts]


def _text(
    model: MusicgenForConditionalGeneration, tokenizer: ByT5Tokenizer, prompt: str | None
) -> Tensor:
    if prompt is None:
        return torch.zeros(1, 1, model.decoder.config.hidden_size)
    states = model.text_encoder(**tokenizer(prompt, return_tensors="pt")).last_hidden_state
    return model.enc_to_dec_proj(states)
