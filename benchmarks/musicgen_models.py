"""MusicGen models of the true shapes with random weights, made on the device and in the dtype.

Speed does not depend on the values of the weights, as long as they are ordinary numbers: zeros draw
less power on a GPU, and subnormal numbers are slow on a CPU. The language model has the shape of
facebook/musicgen-small, -medium or -large, the text encoder that of T5-base, the codec that of
facebook/encodec_32khz. ``toy`` is for trying the benchmark itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
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

FRAME_RATE = 50
DELAY = 3
"""The steps of a mono model after its last frame: the delay of the fourth codebook."""

_SPREAD = 0.03


@dataclass(frozen=True)
class Shape:
    """The shape of the language model."""

    layers: int
    hidden: int
    heads: int
    codebooks: int = 4
    vocabulary: int = 2048


SHAPES = {
    "toy": Shape(2, 64, 2),
    "small": Shape(24, 1024, 16),
    "medium": Shape(48, 1536, 24),
    "large": Shape(48, 2048, 32),
}


def frames(seconds: float) -> int:
    return max(1, round(seconds * FRAME_RATE))


def steps(seconds: float) -> int:
    """Return the number of forward passes that a clip takes."""
    return frames(seconds) + DELAY


@torch.no_grad()
def build_model(
    size: str, dtype: torch.dtype, device: torch.device
) -> MusicgenForConditionalGeneration:
    """Return the model, with a toy codec.

    As in the engine, T5 is in float32 whatever the dtype of the language model. No weight is held
    twice: the model is built without memory, and each weight is then made once, on the device.
    """
    model = _fill_model(MusicgenForConditionalGeneration, _config(size), dtype, device)
    model.text_encoder.register_forward_hook(_hand_on(dtype))
    return model


@torch.no_grad()
def build_codec(size: str, device: torch.device) -> EncodecModel:
    """Return a codec of the true shape, in float32, whose codebooks are random."""
    codec = EncodecModel(_codec_config(size)).eval()
    for quantizer in codec.quantizer.layers:
        quantizer.codebook.embed.normal_()
    return codec.to(device)


def build_tokenizer() -> ByT5Tokenizer:
    """Return a tokenizer that needs no file.

    It makes one token of each byte: three or four times as many tokens as T5's own.
    """
    return ByT5Tokenizer(extra_ids=0)


def shortened_config(layers: int) -> MusicgenConfig:
    """Return a model with the true codec and so many layers of the small model's width.

    Its text encoder is a toy that reads bytes.
    """
    config = _whole_config("small", channels=1)
    config.decoder.num_hidden_layers = layers
    return config


@torch.no_grad()
def build_whole(
    size: str, channels: int, dtype: torch.dtype, *, hears_melody: bool = False
) -> MusicgenForConditionalGeneration | MusicgenMelodyForConditionalGeneration:
    """Return a model on the host, with the true codec and a toy text encoder that reads bytes."""
    config = _whole_config(size, channels, hears_melody=hears_melody)
    family = (
        MusicgenMelodyForConditionalGeneration if hears_melody else MusicgenForConditionalGeneration
    )
    model = _fill_model(family, config, dtype, torch.device("cpu"))
    model.audio_encoder = build_codec("toy" if size == "toy" else "small", torch.device("cpu"))
    return model


def _fill_model(family: type[Any], config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Return the model with noise for weights; its language model and projections in the dtype."""
    with torch.device("meta"):
        model = family(config).eval()
    for name, part in model.named_children():
        if name == "decoder" or name.endswith("_proj"):
            part.to(dtype)
    model.to_empty(device=device)
    for parameter in model.parameters():
        _fill(parameter)
    positions = model.decoder.model.decoder.embed_positions
    positions.make_weights(positions.num_positions, positions.embedding_dim)
    return model


def _whole_config(size: str, channels: int, *, hears_melody: bool = False) -> Any:
    family = MusicgenMelodyConfig if hears_melody else MusicgenConfig
    decoder = MusicgenMelodyDecoderConfig if hears_melody else MusicgenDecoderConfig
    codec = _codec_config("toy" if size == "toy" else "small")
    return family(
        text_encoder=_text_config("toy"),
        audio_encoder=codec,
        decoder=_decoder_config(decoder, size, channels),
    )


def _config(size: str) -> MusicgenConfig:
    return MusicgenConfig(
        text_encoder=_text_config(size),
        audio_encoder=_codec_config("toy"),
        decoder=_decoder_config(MusicgenDecoderConfig, size, channels=1),
    )


def _text_config(size: str) -> T5Config:
    """Return the shape of T5-base, or of a toy that reads bytes."""
    if size == "toy":
        return T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=259)
    return T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32_128)


def _decoder_config(family: type[Any], size: str, channels: int) -> Any:
    shape = SHAPES[size]
    return family(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        ffn_dim=4 * shape.hidden,
        num_codebooks=shape.codebooks * channels,
        vocab_size=shape.vocabulary,
        audio_channels=channels,
    )


def _codec_config(size: str) -> EncodecConfig:
    return EncodecConfig(
        sampling_rate=32_000,
        upsampling_ratios=[8, 5, 4, 4],
        codebook_size=2_048,
        target_bandwidths=[2.2],  # kbit/s: 4 codebooks of 11 bits, 50 times a second
        num_filters=4 if size == "toy" else 64,
        hidden_size=32 if size == "toy" else 128,
        num_lstm_layers=2,
        use_causal_conv=False,
        use_conv_shortcut=False,
    )


def _fill(parameter: nn.Parameter) -> None:
    """Fill a matrix with noise, and a vector (a norm's weight or bias) with ones."""
    if parameter.ndim > 1:
        parameter.uniform_(-_SPREAD, _SPREAD)
    else:
        parameter.fill_(1.0)


def _hand_on(dtype: torch.dtype) -> Callable[[Any, Any, Any], None]:
    def convert(_module: Any, _args: Any, output: Any) -> None:
        output.last_hidden_state = output.last_hidden_state.to(dtype)

    return convert
