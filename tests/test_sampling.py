"""The sampling fields: one list, from a request's options to the stored row and back."""

import inspect
from dataclasses import dataclass, fields

import pytest

from dgx_music import sampling
from dgx_music.errors import InvalidRequestError
from dgx_music.inference.engine import GenerationRequest
from dgx_music.sampling import Sampling, SamplingOptions
from dgx_music.validation import check_between

GIVEN = {
    "guidance_scale": 4.5,
    "temperature": 0.8,
    "top_k": 50,
    "top_p": 0.9,
    "seed": 7,
    "negative_prompt": "drums",
    "melody_kind": "mix",
}


def test_each_field_is_an_option_and_each_option_a_field():
    assert (
        [*inspect.signature(Sampling).parameters] == [*SamplingOptions.__annotations__] == [*GIVEN]
    )


def test_what_is_stored_makes_the_same_request_again():
    request = GenerationRequest(generation_id="g1", prompt="rain", duration=1, **GIVEN)

    assert request.sampling == Sampling(**GIVEN).sampling == GIVEN
    assert Sampling(**Sampling.pick(request.sampling)) == Sampling(**GIVEN)


def test_what_is_no_sampling_field_or_is_none_is_left_out():
    assert Sampling.pick({"prompt": "rain", "top_k": None, "top_p": None, "seed": 0}) == {"seed": 0}


@dataclass(frozen=True, kw_only=True)
class Extended(Sampling):
    """The sampling fields and a new one."""

    min_p: float = sampling._checked(0.0, check_between, low=0, high=1)


@pytest.fixture
def extended(monkeypatch):
    monkeypatch.setattr(sampling, "Sampling", Extended)


@pytest.mark.usefixtures("extended")
@pytest.mark.parametrize(
    ("given", "stored"), [({}, {}), ({"min_p": 0.0}, {}), ({"min_p": 0.1}, {"min_p": 0.1})]
)
def test_a_new_field_is_stored_only_if_it_differs_from_its_default(given, stored):
    plain = {"guidance_scale": 3.0, "temperature": 1.0, "top_k": 250, "top_p": None, "seed": None}

    assert Extended(**Extended.pick(given)).sampling == plain | stored


@pytest.mark.usefixtures("extended")
def test_a_new_field_is_checked():
    with pytest.raises(InvalidRequestError, match="min_p"):
        Extended(min_p=2)


def test_only_the_first_five_fields_are_always_stored():
    always = [each.name for each in fields(Sampling) if "is_always_stored" in each.metadata]

    assert always == ["guidance_scale", "temperature", "top_k", "top_p", "seed"]
