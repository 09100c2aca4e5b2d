"""The tone engine: sine waves at once, the same on every machine, without torch; for tests.

The pitch depends on the request's words and numbers, with the number of its attempt, so that two
attempts never sound alike. It does not depend on the clips. A continuation is played first,
unchanged; a melody is accepted and named in the facts, but not followed. Two environment variables
of the worker say how fast the engine is and which generations fail:

``DGX_MUSIC_TONE_SPEED``
    seconds of audio made in a second of wall time; instant if it is not set.

``DGX_MUSIC_TONE_SCRIPT``
    path of a JSON file. It is read anew for each generation, so that a test can change it while
    the worker runs. It holds a list of rules; the first that matches a generation is applied::

        [
          {"prompt": "storm", "attempts": [1], "do": "raise", "message": "no thunder today"},
          {"prompt": "^rain$", "do": "wait", "seconds": 2}
        ]

    ``prompt``     regular expression that is searched in the prompt; any prompt if missing
    ``attempts``   numbers of the attempts; any attempt if missing
    ``do``         ``wait``: succeed after ``seconds``
                   ``raise``: fail in a way that a retry may cure
                   ``reject``: fail for good
                   ``shrink``: halve the slots and give the generation back, as if memory ran out
                   ``exit``: end the process with ``exit_code``
                   ``kill``: end the process by SIGKILL
                   ``hang``: report progress for a moment, then never end, even if cancelled
    ``seconds``    how long the generation takes, or how long it runs before it fails; 0 if missing;
                   ``hang`` ignores it
    ``audio_seconds``
                   how long ``wait`` goes on after it has freed its slot; 0 if missing
    ``message``    what ``raise``, ``reject`` and ``shrink`` say; "scripted failure" if missing
    ``exit_code``  1 if missing
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from dgx_music.audio.samples import Audio, Samples
from dgx_music.catalog import TONE_NOTICE
from dgx_music.errors import (
    ConfigurationError,
    EngineReplacedError,
    EngineUnavailableError,
    GenerationRejectedError,
)
from dgx_music.inference.engine import EngineSettings, GenerationRequest, Run

SPEED_VARIABLE = "DGX_MUSIC_TONE_SPEED"
SCRIPT_VARIABLE = "DGX_MUSIC_TONE_SCRIPT"

_AMPLITUDE = 0.5
_LOWEST_HZ, _HIGHEST_HZ = 110.0, 880.0
_SLICE_SECONDS = 0.02
_HANG_REPORTS = 5
"""More than one, because a busy channel drops some."""


class Rule(BaseModel):
    """One rule of the script; the module's docstring explains the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    do: Literal["wait", "raise", "reject", "shrink", "exit", "kill", "hang"]
    prompt: re.Pattern[str] = re.compile("")
    attempts: frozenset[int] | None = None
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    audio_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    message: str = "scripted failure"
    exit_code: Annotated[int, Field(ge=0, le=255)] = 1

    def is_for(self, request: GenerationRequest) -> bool:
        """Return whether the rule matches this request."""
        has_attempt = self.attempts is None or request.attempt in self.attempts
        return has_attempt and self.prompt.search(request.prompt) is not None


_SCRIPT = TypeAdapter(tuple[Rule, ...])


class ToneEngine:
    """Makes sine waves of amplitude 0.5.

    ``speed`` is in seconds of audio per second of wall time; ``None`` is instant.
    """

    device = "cpu"
    model_version = "tone"
    notice: str | None = TONE_NOTICE

    def __init__(self, slots: int, speed: float | None, script: Path | None) -> None:
        self.slots = slots
        self._speed = speed
        self._script = script

    def generate(self, request: GenerationRequest, run: Run) -> Audio:
        """Return the request's tone, unless the script makes it fail or hang, or ends the process.

        Raises ``GenerationRejectedError`` if the script says so or is malformed.
        """
        started_at = time.monotonic()
        rule = self._rule_for(request)
        if rule is None:
            _spend(request.duration / self._speed if self._speed else 0.0, run)
        elif rule.do == "wait":
            self._wait(rule, run)
        elif rule.do == "hang":
            _hang(run)
        else:
            _spend(rule.seconds, run, until=0.5)
            self._fail(rule)
        return _audio(request, time.monotonic() - started_at)

    def _wait(self, rule: Rule, run: Run) -> None:
        if rule.audio_seconds:
            _spend(rule.seconds, run, until=0.5)
            run.free_slot()
            _spend(rule.audio_seconds, run, since=0.5)
        else:
            _spend(rule.seconds, run)

    def _fail(self, rule: Rule) -> NoReturn:
        if rule.do == "shrink":
            self.slots = max(1, self.slots // 2)
            raise EngineReplacedError(rule.message)
        _fail(rule)

    def _rule_for(self, request: GenerationRequest) -> Rule | None:
        if self._script is None:
            return None
        try:
            rules = read_script(self._script)
        except ValueError as error:
            raise GenerationRejectedError(str(error)) from None
        return next((rule for rule in rules if rule.is_for(request)), None)


def load(settings: EngineSettings) -> ToneEngine:
    """Return the engine that the two environment variables describe.

    Raises ``EngineUnavailableError`` if one of them is malformed.
    """
    speed, script = os.environ.get(SPEED_VARIABLE), os.environ.get(SCRIPT_VARIABLE)
    try:
        if script:
            read_script(Path(script))
        return ToneEngine(
            settings.slots or 1,
            read_speed(speed) if speed else None,
            Path(script) if script else None,
        )
    except (ConfigurationError, ValueError) as error:
        raise EngineUnavailableError(str(error)) from None


def check_environment() -> None:
    """Raise ``ConfigurationError`` if ``load`` would refuse an environment variable.

    So a worker learns it before it starts the engine's process.
    """
    speed, script = os.environ.get(SPEED_VARIABLE), os.environ.get(SCRIPT_VARIABLE)
    if speed:
        read_speed(speed)
    try:
        if script:
            read_script(Path(script))
    except ValueError as error:
        sentence = str(error).rstrip(".")
        problem = f"is of no use: {sentence[0].lower()}{sentence[1:]}"
        remedy = "mend the script, or unset the variable"
        raise ConfigurationError(SCRIPT_VARIABLE, problem, remedy) from None


def estimate_bytes(settings: EngineSettings) -> int:
    """Return 0: a formula needs no memory worth counting."""
    return 0


def read_speed(text: str) -> float:
    """Return the speed; raises ``ConfigurationError`` if the text is not a number above 0."""
    try:
        speed = float(text)
    except ValueError:
        speed = 0.0
    if not 0 < speed < float("inf"):
        raise ConfigurationError(SPEED_VARIABLE, f"is {text!r}", "use a number above 0")
    return speed


def read_script(path: Path) -> tuple[Rule, ...]:
    """Return the rules of a script.

    Raises ``ValueError`` with one sentence if it cannot be read or is malformed.
    """
    try:
        return _SCRIPT.validate_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"The tone script {path} cannot be read: {error.strerror}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = " ".join(str(part) for part in first["loc"])
        problem = f"rule {place}: {first['msg']}" if place else first["msg"]
        raise ValueError(f"The tone script {path} is malformed: {problem}.") from None


def pitch_hz(request: GenerationRequest) -> float:
    """Return the tone's frequency, 110 to 880 Hz, spread evenly over all requests and attempts."""
    digest = hashlib.sha256(repr(request).encode()).digest()  # the repr is without the clips
    return _LOWEST_HZ + (_HIGHEST_HZ - _LOWEST_HZ) * int.from_bytes(digest[:8], "big") / 2**64


def _audio(request: GenerationRequest, run_seconds: float) -> Audio:
    frequency = pitch_hz(request)
    facts = {
        "engine": "tone",
        "seed": request.effective_seed,
        "frequency_hz": frequency,
        "device_seconds": run_seconds,
        "is_untrained": False,
        **_clip_seconds(request),
    }
    start = request.continuation
    if start is None:
        return Audio(_sine(request, frequency, request.sample_rate), request.sample_rate, facts)
    return Audio(_continued(request, start, frequency), start.sample_rate, facts)


def _clip_seconds(request: GenerationRequest) -> dict[str, float]:
    clips = {name: clip for name, clip in vars(request).items() if isinstance(clip, Audio)}
    return {f"{name}_seconds": clip.duration for name, clip in clips.items()}


def _sine(request: GenerationRequest, frequency: float, sample_rate: int) -> Samples:
    frame_count = round(request.duration * sample_rate)
    phase = np.arange(frame_count) * (2 * np.pi * frequency / sample_rate)
    wave = (_AMPLITUDE * np.sin(phase)).astype(np.float32)
    return np.tile(wave, (request.channels, 1))  # [channel, frame]


def _continued(request: GenerationRequest, clip: Audio, frequency: float) -> Samples:
    """Return the clip and then the rest of the tone, with the clip's sample rate and channels."""
    start = clip.samples  # [channel, frame]
    tone = _sine(request, frequency, clip.sample_rate)[:1, start.shape[1] :]
    return np.concatenate([start, np.repeat(tone, len(start), axis=0)], axis=1)


def _spend(seconds: float, run: Run, *, since: float = 0.0, until: float = 1.0) -> None:
    """Take so many seconds, and let the generation be cancelled every 20 ms.

    Its progress rises from ``since`` to ``until``.
    """
    started_at = time.monotonic()
    while (spent := time.monotonic() - started_at) < seconds:
        run.check_cancelled()
        run.report_progress(since + (until - since) * spent / seconds)
        time.sleep(min(_SLICE_SECONDS, seconds - spent))
    run.check_cancelled()


def _fail(rule: Rule) -> NoReturn:
    if rule.do == "raise":
        raise RuntimeError(rule.message)
    if rule.do == "reject":
        raise GenerationRejectedError(rule.message)
    if rule.do == "exit":
        os._exit(rule.exit_code)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable: nothing outlives SIGKILL")


def _hang(run: Run) -> NoReturn:
    for _ in range(_HANG_REPORTS):
        run.report_progress(0.5)
        time.sleep(_SLICE_SECONDS)
    while True:
        threading.Event().wait()
