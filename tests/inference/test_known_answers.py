"""The comparison with publicly known numbers, tried on a toy model.

Transformers' own tests are repeated here word for word, with the toy: so what our engine computes
is what they computed.
"""

import re

import pytest
import torch

from dgx_music.catalog import MODELS
from dgx_music.inference.musicgen import inventory, known_answers
from dgx_music.inference.musicgen.engine import build
from dgx_music.inference.musicgen.known_answers import (
    QUESTIONS,
    TOLERANCES,
    AnsweringEngine,
    check,
    compare,
)
from dgx_music.inference.musicgen.tiny import build_tiny
from tests.inference.factories import make_settings

SMALL = [question for question in QUESTIONS if question.model == "musicgen-small"]
STEREO = [question for question in QUESTIONS if question.model == "musicgen-stereo-small"]


@pytest.fixture(scope="module", params=[1])
def toy(request, tmp_path_factory):
    """A toy of so many channels: transformers' model, its tokenizer, and our engine of its files."""
    folder = tmp_path_factory.mktemp("toy")
    model, tokenizer = build_tiny(request.param)
    for saved in (model, tokenizer):
        saved.save_pretrained(folder)
    settings = make_settings(
        engine="musicgen", model=str(folder), device="cpu", dtype="float32", slots=1
    )
    return model, tokenizer, build(settings, AnsweringEngine)


def as_published(question, model, tokenizer):
    """Return what transformers' test computes: ``[1, V]`` or ``[channel, sample]``."""
    if question.what == "samples" and not question.prompt:
        inputs = model.get_unconditional_inputs(num_samples=1)
        steps = question.frame_count + (3 if question.is_delayed else 0)
        return model.generate(**inputs, do_sample=False, max_new_tokens=steps)[0]
    texts = tokenizer(["80s music", "Club techno"], padding=True, return_tensors="pt")
    if question.what == "samples":
        scale = None if question.guidance_scale == 1 else question.guidance_scale
        return model.generate(**texts, do_sample=False, guidance_scale=scale, max_new_tokens=10)[0]
    first = torch.ones((2 * model.decoder.num_codebooks, 1), dtype=torch.long) * 2048
    return model(**texts, decoder_input_ids=first).logits[0]


@pytest.mark.parametrize(
    ("toy", "question"),
    [(1, question) for question in SMALL] + [(2, question) for question in STEREO],
    indirect=["toy"],
)
@torch.no_grad()
def test_the_engine_computes_what_transformers_tests_compute(toy, question):
    model, tokenizer, engine = toy
    model.generation_config.update(decoder_start_token_id=2048, pad_token_id=2048)

    expected, found = as_published(question, model, tokenizer), engine.answer(question)

    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def asked_of(toy, question=SMALL[0]):
    """Return the question with the toy's own right answer."""
    answer = toy[2].answer(question)[:, :16]
    return question._replace(expected=tuple(tuple(row) for row in answer.tolist()))


def test_an_equal_answer_is_ok(toy):
    comparison = check(toy[2], asked_of(toy))

    assert comparison.verdict == "ok"
    assert comparison.detail.startswith(
        "musicgen-small in float32: logits of “80s music” at guidance 1 are those known"
    )


@pytest.mark.parametrize("change", [3e-4, float("nan")])
def test_an_answer_with_one_wrong_number_has_failed(toy, change):
    right = asked_of(toy, SMALL[1])
    first, *rest = right.expected[0]
    wrong = right._replace(expected=((first + change, *rest), *right.expected[1:]))

    comparison = check(toy[2], wrong)

    assert comparison.verdict == "failed"
    assert "are not those known (transformers' tests/" in comparison.detail


def test_a_model_without_known_numbers_is_not_loaded():
    (comparison,) = compare(make_settings(engine="musicgen", model="musicgen-large"))

    assert comparison.verdict == "warning"
    assert "but of musicgen-small and musicgen-stereo-small" in comparison.detail


def test_all_is_compared_in_float32_and_the_logits_in_the_workers_own_format(toy, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        known_answers, "QUESTIONS", [asked_of(toy, question) for question in QUESTIONS]
    )
    monkeypatch.setattr(
        known_answers,
        "build",
        lambda settings, kind: loaded.append(settings.dtype) or Answering(settings),
    )

    told = [
        comparison.detail
        for comparison in compare(make_settings(model="musicgen-small", dtype="bfloat16"))
    ]

    assert loaded == ["float32", "bfloat16"]
    assert [re.search(r"in (\w+): (\w+)", line).groups() for line in told] == [
        ("float32", "logits"),
        *[("float32", "samples")] * 3,
        ("bfloat16", "logits"),
    ]


class Answering:
    """An engine in a number format, without answers."""

    def __init__(self, settings):
        self.dtype_name = settings.dtype

    def answer(self, question):
        return torch.zeros(2, 2048)

    def close(self):
        pass


def test_every_format_of_a_worker_has_a_tolerance():
    assert set(TOLERANCES) == {"float32", "bfloat16", "float16"}


@pytest.mark.weights
@pytest.mark.parametrize("name", ["musicgen-small", "musicgen-stereo-small"])
def test_the_real_weights_give_the_numbers_that_are_publicly_known(name):
    model = MODELS[name]
    if not inventory.has_weights(model, None):
        pytest.skip(f"the Hugging Face cache of this machine does not hold the weights of {name}")

    comparisons = list(
        compare(make_settings(engine="musicgen", model=name, device="auto", dtype="auto"))
    )

    assert [comparison for comparison in comparisons if comparison.verdict != "ok"] == []
