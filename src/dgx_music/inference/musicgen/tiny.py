"""Toy MusicGen models with random weights: all parts of the real ones, built offline in a moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    ByT5Tokenizer,
    EncodecConfig,
    EncodecModel,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    MusicgenMelodyConfig,
    MusicgenMelodyDecoderConfig,
    MusicgenMelodyForConditionalGeneration,
    T5Config,
)

_SEED = 2023
_RMS = 0.1
_CODEBOOKS = 4  # of one channel
_BYTE_VOCABULARY = 259  # ByT5's: 256 bytes after pad, end and unknown


def build_tiny(channels: int = 1) -> tuple[MusicgenForConditionalGeneration, ByT5Tokenizer]:
    """Return the toy model in float32 and its byte tokenizer.

    The weights are the same in every process. Torch's global random state stays as it was.
    """
    with _seeded():
        config = _config(MusicgenConfig, MusicgenDecoderConfig, channels)
        model = MusicgenForConditionalGeneration(config).eval()
        _make_audible(model.audio_encoder)
    return model, ByT5Tokenizer(extra_ids=0)


def build_tiny_melody(
    channels: int = 1,
) -> tuple[MusicgenMelodyForConditionalGeneration, ByT5Tokenizer]:
    """Return the toy of a model that hears melodies, and its tokenizer, as ``build_tiny`` does."""
    config = _config(MusicgenMelodyConfig, MusicgenMelodyDecoderConfig, channels)
    with _seeded():
        model = MusicgenMelodyForConditionalGeneration(config).eval()
        _make_audible(model.audio_encoder)
        _make_heard(model)
    return model, ByT5Tokenizer(extra_ids=0)


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(_SEED)
        yield


def _config(family: type[Any], decoder: type[Any], channels: int) -> Any:
    """Return the toy's shape; rates, codebooks and delays are those of the real models.

    The weights vary so much that the logits depend on the prompt and on the tokens before.
    """
    return family(
        text_encoder=T5Config(
            vocab_size=_BYTE_VOCABULARY,
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
        ),
        audio_encoder=EncodecConfig(
            sampling_rate=32_000,
            upsampling_ratios=[8, 5, 4, 4],
            codebook_size=2_048,
            target_bandwidths=[2.2],  # kbit/s: 4 codebooks of 11 bits, 50 times a second
            num_filters=4,
            hidden_size=32,
            use_causal_conv=False,
            use_conv_shortcut=False,
        ),
        decoder=decoder(
            num_hidden_layers=2,
            hidden_size=64,
            num_attention_heads=2,
            ffn_dim=128,
            num_codebooks=_CODEBOOKS * channels,
            audio_channels=channels,
            initializer_factor=0.2,
        ),
        initializer_factor=0.2,
    )


def _make_heard(model: MusicgenMelodyForConditionalGeneration) -> None:
    """Make tokens matter after a long prefix; fill the projections' biases, which start as zeros."""
    for table in model.decoder.model.decoder.embed_tokens:
        table.weight *= 4
    for projection in (model.enc_to_dec_proj, model.audio_enc_to_dec_proj):
        projection.bias.normal_()


def _make_audible(codec: EncodecModel) -> None:
    """Make random codes sound like noise: fill the codebooks (zeros at first), scale the last layer.

    Biases would add a constant tone much louder than the codes.
    """
    for quantizer in codec.quantizer.layers:
        quantizer.codebook.embed.normal_()
    for name, parameter in codec.decoder.named_parameters():
        if "bias" in name:
            parameter.zero_()
    weight = codec.decoder.layers[-1].conv.parametrizations.weight
    scale, taps = weight.original0, weight.original1  # [1, 1, 1] or [out, 1, 1], and [out, in, tap]
    taps -= taps.mean(dim=-1, keepdim=True)  # taps that add up to zero remove a constant offset
    shape = (1, 1, _CODEBOOKS, 50)  # [chunk, batch, codebook, frame]
    codes = torch.randint(codec.config.codebook_size, shape)
    scale *= _RMS / codec.decode(codes, [None]).audio_values.std()
