"""The sampling fields: one list, from a request's options to the stored row and back."""

import inspect

from dgx_music.inference.engine import GenerationRequest
from dgx_music.sampling import Sampling, SamplingOptions

GIVEN = {
    "guidance_scale": 4.5,
    "temperature": 0.8,
    "top_k": 50,
    "top_p": 0.9,
    "seed": 7,
    "negative_prompt": "drums",
}


def test_each_field_is_an_option_and_each_option_a_field():
    assert [*inspect.signature(Sampling).parameters] == [*SamplingOptions.__annotations__] == [*GIVEN]


def test_what_is_stored_makes_the_same_request_again():
    request = GenerationRequest(generation_id="g1", prompt="rain", duration=1, **GIVEN)

    assert request.sampling == Sampling(**GIVEN).sampling == GIVEN
    assert Sampling(**Sampling.pick(request.sampling)) == Sampling(**GIVEN)


def test_what_is_no_sampling_field_or_is_none_is_left_out():
    assert Sampling.pick({"prompt": "rain", "top_k": None, "top_p": None, "seed": 0}) == {"seed": 0}
