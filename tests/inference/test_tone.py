from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgx_music.audio.samples import Audio
from dgx_music.errors import (
    EngineReplacedError,
    EngineUnavailableError,
    GenerationCancelledError,
    GenerationRejectedError,
)
from dgx_music.inference import tone
from dgx_music.inference.tone import SCRIPT_VARIABLE, SPEED_VARIABLE, ToneEngine, pitch_hz
from tests.inference.conftest import WriteScript
from tests.inference.factories import QuietRun, make_request, make_settings

INSTANT = ToneEngine(1, None, None)


@settings(max_examples=30)
@given(st.floats(0.08, 3), st.integers(8_000, 48_000), st.integers(1, 2))
def test_the_audio_has_the_frames_and_channels_asked_for(
    duration: float, sample_rate: int, channels: int
) -> None:
    request = make_request(duration=duration, sample_rate=sample_rate, channels=channels)

    audio = INSTANT.generate(request, QuietRun())

    assert audio.samples.shape == (channels, round(duration * sample_rate))
    assert (audio.samples.dtype, audio.sample_rate) == (np.float32, sample_rate)


def test_the_same_request_sounds_the_same() -> None:
    first, second = (INSTANT.generate(make_request(), QuietRun()).samples for _ in range(2))

    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    "other", [{"attempt": 2}, {"generation_id": "g2"}, {"prompt": "x"}, {"seed": 1}]
)
def test_another_attempt_or_request_sounds_different(other: dict[str, object]) -> None:
    assert pitch_hz(make_request(**other)) != pitch_hz(make_request())


def test_it_is_a_sine_of_the_stated_pitch_at_half_amplitude() -> None:
    audio = INSTANT.generate(make_request(duration=2), QuietRun())

    spectrum = np.abs(np.fft.rfft(audio.samples[0]))
    assert spectrum.argmax() / 2 == pytest.approx(audio.facts["frequency_hz"], abs=0.5)
    assert audio.samples.max() == pytest.approx(0.5, abs=0.001)
    assert 110 <= audio.facts["frequency_hz"] <= 880


def test_the_facts_are_plain_json() -> None:
    facts = INSTANT.generate(make_request(seed=7), QuietRun()).facts

    assert json.loads(json.dumps(facts)) == facts
    assert (facts["engine"], facts["seed"], facts["is_untrained"]) == ("tone", 7, False)


@pytest.mark.parametrize(("channels", "rate"), [(1, 32_000), (2, 16_000)])
def test_a_continuation_is_played_first_at_its_own_rate(channels: int, rate: int) -> None:
    start = np.linspace(-1, 1, channels * rate, dtype=np.float32).reshape(channels, rate)

    audio = INSTANT.generate(
        make_request(duration=1.5, continuation=Audio(start, rate)), QuietRun()
    )

    assert (audio.samples.shape, audio.sample_rate) == ((channels, rate + rate // 2), rate)
    np.testing.assert_array_equal(audio.samples[:, :rate], start)
    assert np.abs(audio.samples[:, rate:]).max() == pytest.approx(0.5, abs=0.001)
    assert audio.facts["continuation_seconds"] == 1.0


def test_a_melody_is_told_of_and_changes_nothing() -> None:
    fields = {"model": "musicgen-melody", "duration": 1}
    heard = make_request(**fields, melody=Audio(np.zeros((1, 4_000), dtype=np.float32), 8_000))

    audio = INSTANT.generate(heard, QuietRun())

    assert audio.facts["melody_seconds"] == 0.5
    np.testing.assert_array_equal(
        audio.samples, INSTANT.generate(make_request(**fields), QuietRun()).samples
    )


def test_speed_is_audio_seconds_per_wall_second() -> None:
    run = QuietRun()
    began_at = time.monotonic()

    ToneEngine(1, 100, None).generate(make_request(duration=10), run)

    assert 0.1 <= time.monotonic() - began_at < 10
    assert len(run.progress) > 1
    assert run.progress == sorted(run.progress)


@pytest.mark.parametrize("engine", [INSTANT, ToneEngine(1, 0.001, None)])
def test_a_cancel_stops_it(engine: ToneEngine) -> None:
    with pytest.raises(GenerationCancelledError):
        engine.generate(make_request(), QuietRun(is_cancelled=True))


def test_the_environment_sets_speed_script_and_the_settings_set_slots(
    monkeypatch: pytest.MonkeyPatch, script: WriteScript
) -> None:
    script({"do": "raise"})
    monkeypatch.setenv(SPEED_VARIABLE, "2.5")

    engine = tone.load(make_settings(slots=3))

    assert (engine.slots, engine._speed) == (3, 2.5)
    with pytest.raises(RuntimeError, match="scripted failure"):
        engine.generate(make_request(), QuietRun())


def test_no_environment_means_instant_and_unscripted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (SPEED_VARIABLE, SCRIPT_VARIABLE):
        monkeypatch.delenv(name, raising=False)

    engine = tone.load(make_settings())

    assert engine.generate(make_request(duration=30), QuietRun()).duration == 30


@pytest.mark.parametrize("speed", ["quick", "0", "-1", "nan", "inf"])
def test_a_speed_that_is_no_speed_makes_it_unavailable(
    monkeypatch: pytest.MonkeyPatch, speed: str
) -> None:
    monkeypatch.setenv(SPEED_VARIABLE, speed)

    with pytest.raises(
        EngineUnavailableError, match=f"^{SPEED_VARIABLE} is '{speed}'; use a number above 0\\.$"
    ):
        tone.load(make_settings())


# the script


def test_the_first_rule_that_matches_wins(script: WriteScript) -> None:
    rules = [
        {"prompt": "snow", "do": "raise"},
        {"do": "reject", "message": "second"},
        {"do": "reject"},
    ]
    engine = ToneEngine(1, None, script(*rules))

    with pytest.raises(GenerationRejectedError, match=r"^second$"):
        engine.generate(make_request(prompt="lofi rain"), QuietRun())


@pytest.mark.parametrize(
    ("rule", "is_match"),
    [
        ({}, True),
        ({"prompt": "rain"}, True),
        ({"prompt": "^rain"}, False),
        ({"attempts": [1, 3]}, True),
        ({"attempts": [2]}, False),
        ({"attempts": []}, False),
        ({"prompt": "rain", "attempts": [2]}, False),
    ],
)
def test_a_rule_matches_prompt_and_attempt(
    script: WriteScript, rule: dict[str, object], is_match: bool
) -> None:
    (read,) = tone.read_script(script({"do": "wait", **rule}))

    assert read.is_for(make_request(prompt="lofi rain", attempt=1)) == is_match


def test_the_script_is_read_anew_for_each_generation(script: WriteScript) -> None:
    engine = ToneEngine(1, None, script())
    engine.generate(make_request(), QuietRun())

    script({"do": "raise", "message": "now"})

    with pytest.raises(RuntimeError, match=r"^now$"):
        engine.generate(make_request(), QuietRun())


@pytest.mark.parametrize("do", ["raise", "reject", "wait"])
def test_a_rule_takes_its_seconds(script: WriteScript, do: str) -> None:
    engine, run = ToneEngine(1, None, script({"do": do, "seconds": 0.1})), QuietRun()
    began_at = time.monotonic()
    try:
        engine.generate(make_request(), run)
    except (RuntimeError, GenerationRejectedError):
        assert max(run.progress) < 0.5
    assert time.monotonic() - began_at >= 0.1


MALFORMED = [
    ("{", "Invalid JSON"),
    ("7", "Input should be a valid tuple|array"),
    ('[{"do": "explode"}]', "rule 0 do: Input should be 'wait'"),
    ('[{"do": "wait"}, {}]', "rule 1 do: Field required"),
    ('[{"do": "wait", "secs": 1}]', "rule 0 secs: Extra inputs"),
    ('[{"do": "wait", "seconds": -1}]', "rule 0 seconds: "),
    ('[{"do": "wait", "prompt": "("}]', "rule 0 prompt: "),
    ('[{"do": "exit", "exit_code": 256}]', "rule 0 exit_code: "),
]


@pytest.mark.parametrize(("text", "problem"), MALFORMED)
def test_a_malformed_script_is_one_sentence(script: WriteScript, text: str, problem: str) -> None:
    path = script()
    engine = tone.load(make_settings())
    path.write_text(text)

    with pytest.raises(
        EngineUnavailableError, match=f"^The tone script .* is malformed: {problem}.*\\.$"
    ):
        tone.load(make_settings())
    with pytest.raises(
        GenerationRejectedError, match=f"^The tone script .* is malformed: {problem}.*\\.$"
    ):
        engine.generate(make_request(), QuietRun())


def test_a_missing_script_is_one_sentence(tmp_path: Path) -> None:
    engine = ToneEngine(1, None, tmp_path / "nothing.json")

    with pytest.raises(
        GenerationRejectedError, match=r"nothing\.json cannot be read: No such file or directory\.$"
    ):
        engine.generate(make_request(), QuietRun())


def test_a_slot_can_be_freed_before_the_audio_is_made_while_progress_goes_on(
    script: WriteScript,
) -> None:
    freed: list[float] = []

    class FreedRun(QuietRun):
        def free_slot(self) -> None:
            freed.append(self.progress[-1])

    engine, run = (
        ToneEngine(1, None, script({"do": "wait", "seconds": 0.05, "audio_seconds": 0.05})),
        FreedRun(),
    )
    engine.generate(make_request(), run)

    assert len(freed) == 1
    assert run.progress == sorted(run.progress)
    assert freed[0] < 0.5 <= run.progress[-1]


def test_slots_are_halved_at_no_generations_cost_and_one_is_left(script: WriteScript) -> None:
    engine = ToneEngine(5, None, script({"do": "shrink", "message": "too many"}))
    counts = []
    for _ in range(3):
        with pytest.raises(EngineReplacedError, match=r"^too many$"):
            engine.generate(make_request(), QuietRun())
        counts.append(engine.slots)

    assert counts == [2, 1, 1]


def test_slots_as_memory_allows_are_one() -> None:
    assert tone.load(make_settings(slots=None)).slots == 1
    assert tone.estimate_bytes(make_settings()) == 0
