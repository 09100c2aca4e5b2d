"""The shapes of the published models, for those whose configuration is not on this machine."""

from __future__ import annotations

from typing import Any

from transformers import (
    EncodecConfig,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenMelodyConfig,
    MusicgenMelodyDecoderConfig,
    T5Config,
)

from dgx_music.catalog import ModelInfo

_SIZES = {"small": (24, 1024, 16), "medium": (48, 1536, 24), "large": (48, 2048, 32)}
"""Layers, hidden size and heads of the language model; a melody model without a size is medium."""
_CODEBOOKS = 4  # of one channel


def published_config(info: ModelInfo) -> Any:
    """Return the configuration of a model of the catalogue."""
    layers, hidden, heads = _SIZES.get(info.name.rpartition("-")[2], _SIZES["medium"])
    decoder = MusicgenMelodyDecoderConfig if info.hears_melody else MusicgenDecoderConfig
    family = MusicgenMelodyConfig if info.hears_melody else MusicgenConfig
    return family(
        text_encoder=T5Config(
            vocab_size=32_128, d_model=768, d_kv=64, d_ff=3_072, num_layers=12, num_heads=12
        ),
        audio_encoder=EncodecConfig(
            sampling_rate=info.sample_rate,
            upsampling_ratios=[8, 5, 4, 4],
            codebook_size=2_048,
            target_bandwidths=[2.2],
            num_filters=64,
            hidden_size=128,
            num_lstm_layers=2,
            use_causal_conv=False,
            use_conv_shortcut=False,
        ),
        decoder=decoder(
            num_hidden_layers=layers,
            hidden_size=hidden,
            num_attention_heads=heads,
            ffn_dim=4 * hidden,
            num_codebooks=_CODEBOOKS * info.channels,
            audio_channels=info.channels,
        ),
    )
