"""Compares this machine's numbers with those that are publicly known of the real models.

The numbers are facts from the tests of ``transformers`` (huggingface/transformers, commit 01080c6,
``tests/models/musicgen/test_modeling_musicgen.py``): logits, and the first samples of a few frames
decoded greedily. Equal numbers show that the weights, the loader, the decoder, the slots, the text
encoder and the codec on this machine are right; an error in one of them, or a flipped bit, gives
other numbers. The worker's own engine computes them, as for a generation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dgx_music.inference.engine import EngineSettings, GenerationRequest
from dgx_music.inference.musicgen.batch import Row
from dgx_music.inference.musicgen.drift import decode
from dgx_music.inference.musicgen.engine import MusicGenEngine, build
from dgx_music.inference.musicgen.launches import Span

SOURCE = "transformers' tests/models/musicgen/test_modeling_musicgen.py"


class Question(NamedTuple):
    """A question to a model: its first logits, or the first samples of so many frames."""

    model: str
    what: Literal["logits", "samples"]
    prompt: str
    """Empty for unconditional music."""
    guidance_scale: float
    frame_count: int
    is_delayed: bool
    """False if ``generate`` leaves out the delay between the codebooks.

    It does so for very few frames; no generation is so short.
    """
    expected: tuple[tuple[float, ...], ...]
    """Logits: one row. Samples: one row for each channel."""

    def __str__(self) -> str:
        of = f"“{self.prompt}”" if self.prompt else "no prompt"
        return f"{self.what} of {of} at guidance {self.guidance_scale:g}"


QUESTIONS = (
    Question(
        *("musicgen-small", "logits", "80s music", 1.0, 1, True),
        (
            (
                *(-0.9708, -3.0149, -4.6415, -1.4754, -0.2786, -2.3523, -2.6049, -6.7467),
                *(-1.0206, -3.2984, -3.3968, -1.5108, -1.5786, -3.1493, -1.1503, -0.0545),
            ),
        ),
    ),
    Question(
        *("musicgen-small", "samples", "", 1.0, 5, False),
        (
            (
                *(0.0056, 0.0064, 0.0063, 0.0054, 0.0042, 0.0033, 0.0024, 0.0015),
                *(0.0015, 0.0010, 0.0004, -0.0012, -0.0036, -0.0055, -0.0067, -0.0071),
            ),
        ),
    ),
    Question(
        *("musicgen-small", "samples", "80s music", 1.0, 7, True),
        (
            (
                *(-1.1998e-04, -2.2302e-04, 4.6296e-04, 1.0524e-03, 2.4827e-04),
                *(-4.0288e-05, -1.2468e-04, 4.9846e-05, 7.1485e-04, 4.4197e-04),
            ),
        ),
    ),
    Question(
        *("musicgen-small", "samples", "80s music", 3.0, 7, True),
        (
            (
                *(0.0283, 0.0246, 0.0650, 0.0640, 0.0599, 0.0711, 0.0420, 0.0112),
                *(0.0511, 0.0746, 0.1363, 0.1213, 0.0185, -0.0578, -0.0908, 0.0443),
            ),
        ),
    ),
    Question(
        *("musicgen-stereo-small", "samples", "", 1.0, 9, True),
        (
            (
                *(0.0017, 0.0004, 0.0004, 0.0005, 0.0002, 0.0002, -0.0002, -0.0013),
                *(-0.0010, -0.0015, -0.0018, -0.0032, -0.0060, -0.0082, -0.0096, -0.0099),
            ),
            (
                *(0.0038, 0.0028, 0.0031, 0.0032, 0.0031, 0.0032, 0.0030, 0.0019),
                *(0.0021, 0.0015, 0.0009, -0.0008, -0.0040, -0.0067, -0.0087, -0.0096),
            ),
        ),
    ),
)

TOLERANCES = {
    "float32": {"logits": 1e-4, "samples": 1e-4},
    "float16": {"logits": 0.02},
    "bfloat16": {"logits": 0.15},
}
"""How far an answer may be off, absolutely plus relatively; for float32 as in transformers.

In 16 bits the likeliest token may be another one, and then all samples differ: only the logits are
compared. With random weights of musicgen-small's size these were off by at most 0.067 (bfloat16)
and 0.0085 (float16) of their standard deviation.
"""


@dataclass(frozen=True)
class Comparison:
    """The result for a question: ``ok`` if equal, ``failed`` if not, ``warning`` if unknown."""

    verdict: Literal["ok", "warning", "failed"]
    detail: str


class AnsweringEngine(MusicGenEngine):
    """An engine that answers questions with the same parts that make music."""

    @property
    def dtype_name(self) -> str:
        """The language model's number format."""
        return str(self._decoder.dtype).removeprefix("torch.")

    def answer(self, question: Question) -> Tensor:
        """Return the first codebook's logits ``[1, V]``, or the samples ``[channel, sample]``."""
        if question.what == "logits":
            return decode(self._decoder, self._row_of(question)).logits[0, 0, :1]
        codes = (
            self._delayed_codes(question)
            if question.is_delayed
            else self._undelayed_codes(question)
        )
        return self._codec.decode(codes).finish()

    def _delayed_codes(self, question: Question) -> Tensor:
        return decode(self._decoder, self._row_of(question)).codes

    def _row_of(self, question: Question) -> Row:
        request = GenerationRequest(
            generation_id="answer",
            model=question.model,
            prompt=question.prompt,
            duration=1.0,
            guidance_scale=question.guidance_scale,
            temperature=0.0,
            seed=0,
        )
        conditions = self._conditioner.read(request)
        random = torch.Generator().manual_seed(0)
        return self._row(request, conditions, self._no_codes(), question.frame_count, random)

    @torch.no_grad()
    def _undelayed_codes(self, question: Question) -> Tensor:
        """Return the likeliest codes ``[codebook, frame]``, all codebooks of a frame at once.

        Uses neither text nor guidance.
        """
        decoder, cache = self._decoder, self._decoder.empty_cache(1)
        tokens = torch.full((1, decoder.codebook_count), decoder.pad_token, device=decoder.device)
        codes = []
        for position in range(question.frame_count):
            spans = (Span(0, 1, position + 1, is_masked=False),)
            positions = torch.tensor([position], device=decoder.device)
            logits = decoder.forward(
                tokens, positions, cache, None, passes=1, spans=spans, padded_rows=1
            )
            tokens = logits[:, 0].argmax(-1)  # [1, K]
            codes.append(tokens[0].cpu())
        return torch.stack(codes, dim=1)


def compare(settings: EngineSettings) -> Iterator[Comparison]:
    """Load the model and yield the result of each question: in float32 and in the worker's format.

    Raises ``EngineUnavailableError`` if the model cannot be loaded.
    """
    questions = [question for question in QUESTIONS if question.model == settings.model]
    if not questions:
        known = " and ".join(sorted({question.model for question in QUESTIONS}))
        yield Comparison(
            "warning", f"no numbers of {settings.model} are publicly known, but of {known}"
        )
        return
    settings = replace(settings, weights="full", kv_cache="full", slots=1)
    yield from _check_all(build(replace(settings, dtype="float32"), AnsweringEngine), questions)
    own = build(settings, AnsweringEngine)
    if own.dtype_name != "float32":
        yield from _check_all(own, questions)


def _check_all(engine: AnsweringEngine, questions: list[Question]) -> Iterator[Comparison]:
    comparable = TOLERANCES[engine.dtype_name]
    yield from (check(engine, question) for question in questions if question.what in comparable)
    engine.close()


def check(engine: AnsweringEngine, question: Question) -> Comparison:
    """Return how far the answer is off, and whether that is too far."""
    tolerance = TOLERANCES[engine.dtype_name][question.what]
    expected = torch.tensor(question.expected)
    found = engine.answer(question)[:, : expected.shape[1]].float().cpu()
    difference = (found - expected).abs()
    is_equal = bool((difference <= tolerance * (1 + expected.abs())).all())  # False for NaN
    subject = f"{question.model} in {engine.dtype_name}: {question} are"
    if is_equal:
        return Comparison("ok", f"{subject} those known, to within {difference.max():.2g}")
    error = f"off by {difference.max():.2g}, while {tolerance:g} is fine"
    return Comparison("failed", f"{subject} not those known ({SOURCE}): {error}")
