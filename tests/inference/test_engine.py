from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest

from dgx_music.audio.samples import Audio
from dgx_music.catalog import is_untrained
from dgx_music.errors import InvalidRequestError
from dgx_music.inference.engine import GenerationRequest
from tests.inference.factories import make_request

SEED_OF_G1 = 3_978_609_110_993_362


def test_the_defaults_are_audiocrafts() -> None:
    request = GenerationRequest(generation_id="g1", prompt="rain", duration=1)

    assert (request.model, request.channels, request.sample_rate, request.attempt) == (
        "musicgen-small",
        1,
        32_000,
        0,
    )
    assert request.sampling == {
        "guidance_scale": 3.0,
        "temperature": 1.0,
        "top_k": 250,
        "top_p": None,
        "seed": None,
    }


def test_a_request_is_stored_in_its_normal_form() -> None:
    request = make_request(prompt="  rain\n", duration=2, guidance_scale=3, temperature=0, top_p=1)

    assert request.prompt == "rain"
    numbers = (request.duration, request.guidance_scale, request.temperature, request.top_p)
    assert [type(number) for number in numbers] == [float] * 4


def test_a_request_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        make_request().prompt = "snow"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", " "),
        ("prompt", None),
        ("prompt", "x" * 2_001),
        ("model", "musicgen-gigantic"),
        ("duration", 0.079),
        ("duration", 300.01),
        ("duration", float("nan")),
        ("channels", 0),
        ("channels", 3),
        ("sample_rate", 7_999),
        ("sample_rate", 192_001),
        ("sample_rate", 32_000.0),
        ("guidance_scale", 0.99),
        ("guidance_scale", 20.1),
        ("temperature", -0.01),
        ("temperature", 5.01),
        ("top_k", -1),
        ("top_k", 2_049),
        ("top_p", 0.009),
        ("top_p", 1.001),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", True),
    ],
)
def test_an_unacceptable_field_is_named(field: str, value: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        make_request(**{field: value})

    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field} ")


@pytest.mark.parametrize(
    "fields",
    [
        {"duration": 0.08, "channels": 1, "sample_rate": 8_000, "top_k": 0, "seed": 0},
        {"duration": 300, "channels": 2, "sample_rate": 192_000, "top_k": 2_048, "seed": 2**63 - 1},
        {"guidance_scale": 1, "temperature": 0, "top_p": 0.01},
        {"guidance_scale": 20, "temperature": 5, "top_p": 1},
    ],
)
def test_the_limits_are_acceptable(fields: dict[str, float]) -> None:
    request = make_request(**fields)

    assert {name: getattr(request, name) for name in fields} == fields


def clip(seconds: float = 1.0, channels: int = 1, fill: float = 0.0) -> Audio:
    return Audio(np.full((channels, round(seconds * 8_000)), fill, dtype=np.float32), 8_000)


def test_a_negative_prompt_is_part_of_what_is_stored_where_it_is_given_only() -> None:
    assert make_request(negative_prompt=" drums\n").sampling["negative_prompt"] == "drums"
    assert "negative_prompt" not in make_request().sampling


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ""},
        {"prompt": "", "negative_prompt": "drums"},
        {"duration": 31, "continuation": clip(30, 2)},
        {"duration": 0.09, "continuation": clip(0.08)},
        {"duration": 300, "melody": clip(300), "model": "musicgen-melody"},
        {"duration": 1, "melody": clip(50), "model": "musicgen-melody"},
        {"melody": clip(), "model": "/models/mine"},
        {
            "duration": 2,
            "melody": clip(),
            "continuation": clip(),
            "model": "musicgen-stereo-melody",
        },
    ],
)
def test_what_a_request_may_bring(fields: dict[str, Any]) -> None:
    request = make_request(**fields)

    assert {name: getattr(request, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("negative_prompt", {"negative_prompt": " "}),
        ("negative_prompt", {"negative_prompt": "drums", "guidance_scale": 1}),
        ("continuation", {"continuation": clip(2)}),
        ("continuation", {"continuation": clip(0.07)}),
        ("continuation", {"continuation": clip(30.1), "duration": 60}),
        ("continuation", {"continuation": clip(1, channels=3)}),
        ("continuation", {"continuation": Audio(np.zeros(8_000, dtype=np.float32), 8_000)}),
        ("continuation", {"continuation": clip(1, fill=float("nan"))}),
        ("continuation", {"continuation": clip(1, fill=float("inf"))}),
        ("melody", {"melody": clip()}),
        ("melody", {"melody": clip(300.1), "model": "musicgen-melody"}),
        ("melody", {"melody": clip(1, channels=2), "model": "musicgen-melody"}),
    ],
)
def test_what_a_request_may_not_bring(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        make_request(**{"duration": 2} | fields)

    assert caught.value.field == field


@pytest.mark.parametrize(
    "samples", [np.zeros((1, 0)), np.array([[0.0, -np.inf]] * 4_000).reshape(1, -1)]
)
def test_a_clip_without_frames_or_with_an_infinite_low_is_refused(samples: Any) -> None:
    with pytest.raises(
        InvalidRequestError, match=r"^continuation (has the shape \(1, 0\)|holds NaN or infinite)"
    ):
        make_request(duration=2, continuation=Audio(samples.astype(np.float32), 8_000))


def test_the_samples_of_a_clip_are_not_shown_with_the_request() -> None:
    assert "Audio" not in repr(
        make_request(duration=2, melody=clip(), continuation=clip(), model="musicgen-melody")
    )


def test_the_seed_asked_for_is_the_effective_one() -> None:
    assert make_request(seed=0).effective_seed == 0


def test_the_effective_seed_follows_from_the_id_for_ever() -> None:
    seeds = {
        make_request(generation_id="g1", attempt=attempt, prompt=f"p{attempt}").effective_seed
        for attempt in (1, 2)
    }

    assert seeds == {SEED_OF_G1}
    assert make_request(generation_id="g2").effective_seed != SEED_OF_G1
    assert 0 <= SEED_OF_G1 < 2**53


def test_the_duration_of_audio_is_that_of_its_frames() -> None:
    assert Audio(np.zeros((2, 16_000), dtype=np.float32), 32_000).duration == 0.5


@pytest.mark.parametrize(
    ("model", "expected"),
    [("musicgen-tiny-untrained", True), ("musicgen-small", False), ("/models/mine", False)],
)
def test_only_the_untrained_model_is_called_so(model: str, expected: bool) -> None:
    assert is_untrained(model) is expected
