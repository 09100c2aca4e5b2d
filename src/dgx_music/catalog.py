"""The models a generation may ask for, and what each one can do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

MIN_DURATION_SECONDS = 0.08
MAX_DURATION_SECONDS = 300.0
WINDOW_SECONDS = 30.0
"""The longest audio that a model hears at a time: the end of longer music, or a part of a tune."""
SAMPLE_RATE = 32_000
MUSICGEN_LICENCE = "CC-BY-NC 4.0"


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model without loading it.

    ``repository`` and ``revision`` are where its weights are on the Hugging Face hub, and at which
    commit; both are ``None`` for a model that has no weights there.
    """

    name: str
    channels: int = 1
    repository: str | None = None
    revision: str | None = None
    licence: str | None = None
    is_untrained: bool = False
    sample_rate: int = SAMPLE_RATE
    max_duration_seconds: float = MAX_DURATION_SECONDS
    hears_melody: bool | None = False
    """Whether it can follow a melody; ``None`` for a local folder, since only the engine knows."""

    def clip_channels(self, field: str) -> int | None:
        """Return the channels of the clip that it is given in this field.

        ``None`` are those of the file, 2 at most: a local folder's are not known here.
        """
        if field == "melody":
            return 1
        return None if self.hears_melody is None else self.channels


def _hub(
    name: str,
    revision: str | None = None,
    channels: int = 1,
    *,
    hears_melody: bool = False,
) -> ModelInfo:
    return ModelInfo(
        name, channels, f"facebook/{name}", revision, MUSICGEN_LICENCE, hears_melody=hears_melody
    )


MODELS: dict[str, ModelInfo] = {
    model.name: model
    for model in (
        _hub("musicgen-small", "4c8334b02c6ec4e8664a91979669a501ec497792"),
        _hub("musicgen-medium", "d3bd7b00761b78ad7a8a05145ee31e7832e9916c"),
        _hub("musicgen-large", "15ccdc92099879e47b6da12c350cdb71d4eab3ca"),
        _hub("musicgen-stereo-small", "3a110c0092820d470372c880c5ea06ce21a78ddd", channels=2),
        _hub("musicgen-stereo-medium", "2747e613fbaadc43b14257224326ef58c5c11b81", channels=2),
        _hub("musicgen-stereo-large", "bda8ec330c9c17e09728589eaf678f58f7d2d932", channels=2),
        _hub("musicgen-melody", "68d653a95788ec0d2b0abccab22c0b3a200c2d90", hears_melody=True),
        _hub(
            "musicgen-melody-large", "6fdf8d3d815995108c9bdb5183414ff464b171ac", hears_melody=True
        ),
        _hub(
            "musicgen-stereo-melody",
            "022c3bd20a7d77e7c014082f0391bcbcd3940a7a",
            channels=2,
            hears_melody=True,
        ),
        _hub(
            "musicgen-stereo-melody-large",
            "eea14861e6c29c47aea1055982a217468cd1634d",
            channels=2,
            hears_melody=True,
        ),
        ModelInfo("musicgen-tiny-untrained", is_untrained=True),
    )
}

DEFAULT_MODEL = "musicgen-small"
UNTRAINED_NOTICE = "untrained weights: the audio is noise"
TONE_NOTICE = "tone engine: sine waves for tests, not music"


def find_model(name: str) -> ModelInfo | None:
    """Return the model of this name or of this local folder (an absolute path), or ``None``."""
    if name not in MODELS and PurePath(name).is_absolute():
        # without the slash that a shell's completion adds
        return ModelInfo(str(PurePath(name)), hears_melody=None)
    return MODELS.get(name)


def short_name(name: str) -> str:
    """Return the name of a model, or of a local folder without the folders above it."""
    return PurePath(name).name or name


def is_untrained(name: str) -> bool:
    """Return True if the model has random weights, so that its audio is noise."""
    return name in MODELS and MODELS[name].is_untrained
