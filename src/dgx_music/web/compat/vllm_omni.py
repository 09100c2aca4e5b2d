"""What clients of vLLM-Omni call: ``POST audio/generate``, which answers with the audio's bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, cast

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from dgx_music.catalog import MAX_DURATION_SECONDS, MIN_DURATION_SECONDS
from dgx_music.client.content import Codec, Encoding
from dgx_music.errors import InvalidRequestError
from dgx_music.validation import AUDIO_FORMATS, MAX_PROMPT_CHARACTERS, check_between, check_integer
from dgx_music.web.access import MayEnqueue
from dgx_music.web.compat.fields import body_of, check_given, check_one_of, given, model_named
from dgx_music.web.compat.holding import answer_bytes, as_bytes
from dgx_music.web.route import MusicRoute

router = APIRouter(route_class=MusicRoute, tags=["for clients of vLLM-Omni"])

RESPONSE_FORMATS = ("wav", "pcm", "flac", "mp3", "opus")
_OPTIONS = {
    "input": "prompt",
    "model": "model",
    "audio_length": "duration",
    "negative_prompt": "negative_prompt",
    "guidance_scale": "guidance_scale",
    "seed": "seed",
}
"""Their fields that are options of ours."""
_NAMES = {ours: theirs for theirs, ours in _OPTIONS.items()} | {"audio_format": "response_format"}
_MOST_STEPS = 10_000

if TYPE_CHECKING:
    AudioRequest: TypeAlias = BaseModel
else:
    AudioRequest = body_of(
        "AudioRequest",
        {"input": "lofi rain", "audio_length": 16, "response_format": "wav"},
        required=["input"],
        input={"type": "string", "maxLength": MAX_PROMPT_CHARACTERS},
        model={"type": ["string", "null"], "description": "One of `GET models`."},
        response_format={"enum": [*RESPONSE_FORMATS, None], "default": "wav"},
        audio_length={
            "type": ["number", "null"],
            "minimum": MIN_DURATION_SECONDS,
            "maximum": MAX_DURATION_SECONDS,
            "description": "In seconds; 10 if it is not given.",
        },
        negative_prompt={"type": ["string", "null"]},
        guidance_scale={"type": ["number", "null"], "minimum": 1, "maximum": 20},
        seed={"type": ["integer", "null"], "minimum": 0},
        num_inference_steps={
            "type": ["integer", "null"],
            "minimum": 1,
            "maximum": _MOST_STEPS,
            "description": "Changes nothing: these models make no such steps.",
        },
        speed={"enum": [1, None], "description": "No other one is possible."},
        audio_start={"enum": [0, None], "description": "No other one is possible."},
        stream_format={"enum": ["audio", None]},
    )


@router.post("/audio/generate", **as_bytes())
async def generate_audio(body: AudioRequest, request: Request, access: MayEnqueue) -> Response:
    """Make audio, and answer with its bytes when it is finished."""
    fields = given(body)
    check_given(fields, "input")
    wanted = check_one_of("response_format", fields.get("response_format", "wav"), RESPONSE_FORMATS)
    _check_possible(fields)
    options = {ours: fields[theirs] for theirs, ours in _OPTIONS.items() if theirs in fields}
    if "model" in fields:
        options["model"] = model_named("model", fields["model"])
    if wanted in AUDIO_FORMATS:
        options["audio_format"] = wanted  # so that nothing has to be encoded twice
    encoding = Encoding(cast("Codec", wanted))
    return await answer_bytes(options, request, access, encoding, _NAMES)


def _check_possible(fields: dict[str, Any]) -> None:
    """Raise ``InvalidRequestError`` for what MusicGen cannot do."""
    check_one_of("stream_format", fields.get("stream_format", "audio"), ("audio",))
    if "num_inference_steps" in fields:
        check_integer("num_inference_steps", fields["num_inference_steps"], 1, _MOST_STEPS)
    for name, usual in (("speed", 1), ("audio_start", 0)):
        if check_between(name, fields.get(name, usual), 0, MAX_DURATION_SECONDS) != usual:
            problem = f"is {fields[name]:g}, which cannot be done here"
            raise InvalidRequestError(name, problem, "leave it out")
