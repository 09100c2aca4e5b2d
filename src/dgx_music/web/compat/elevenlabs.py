"""What the ``elevenlabs`` package calls: ``POST music``, ``music/stream`` and ``sound-generation``.

Each answers with the bytes of the audio, when it is finished.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from dgx_music.catalog import MAX_DURATION_SECONDS, MIN_DURATION_SECONDS
from dgx_music.client.content import Encoding
from dgx_music.errors import InvalidRequestError
from dgx_music.validation import MAX_PROMPT_CHARACTERS, check_between, check_integer
from dgx_music.web.access import MayEnqueue
from dgx_music.web.compat.encodings import DEFAULT_OUTPUT, OUTPUT_FORMATS, read_output_format
from dgx_music.web.compat.fields import body_of, check_absent, check_given, given, model_named
from dgx_music.web.compat.holding import answer_bytes, as_bytes
from dgx_music.web.filters import Parameter, read_flag, read_parameters
from dgx_music.web.route import MusicRoute

router = APIRouter(route_class=MusicRoute, tags=["for clients of ElevenLabs"])

_HOSTED_MODELS = ("music_v", "eleven_")
"""How the names of models begin that run nowhere but there: the server's own model stands for them."""
_SHORTEST_MS = round(MIN_DURATION_SECONDS * 1_000)
_LONGEST_MS = round(MAX_DURATION_SECONDS * 1_000)
_MOST_INFLUENCE = 1.0
_GUIDANCE_PER_INFLUENCE = 20 / 3
"""So that 0, the least influence, is no guidance, and their default of 0.3 is ours of 3."""
_NO_PLAN = "cannot be followed: there are no lyrics and no sections here"
_NO_FINETUNE = "is not known here"
_IMPOSSIBLE_IN_MUSIC = {
    "composition_plan": _NO_PLAN,
    "finetune_id": _NO_FINETUNE,
    "store_for_inpainting": "cannot be done here",
    "sign_with_c2pa": "cannot be done here",
}
_IMPOSSIBLE_IN_SOUNDS = {"loop": "cannot be made here"}
_NAMES = {"model": "model_id"}
_PARAMETERS = (
    Parameter(
        "output_format",
        {"enum": [*OUTPUT_FORMATS], "default": DEFAULT_OUTPUT},
        "Codec, sample rate and, if it has one, bit rate.",
    ),
    Parameter("enable_logging", {"type": "boolean"}, "Not false: what is made is kept.", read_flag),
)

_TEXT = {"type": "string", "maxLength": MAX_PROMPT_CHARACTERS}
_MODEL_ID = {"type": ["string", "null"], "description": "One of `GET models`; theirs mean ours."}
_FLAG = {"type": ["boolean", "null"]}
_NEVER = {"type": "null", "description": "Not possible here."}
_NOT_TRUE = {"enum": [False, None], "description": "True is not possible here."}

if TYPE_CHECKING:
    MusicRequest: TypeAlias = BaseModel
    SoundRequest: TypeAlias = BaseModel
else:
    MusicRequest = body_of(
        "MusicRequest",
        {"prompt": "lofi rain", "music_length_ms": 16_000},
        required=["prompt"],
        prompt=_TEXT,
        music_length_ms={
            "type": ["integer", "null"],
            "minimum": _SHORTEST_MS,
            "maximum": _LONGEST_MS,
            "description": "10 s if it is not given.",
        },
        model_id=_MODEL_ID,
        seed={"type": ["integer", "null"], "minimum": 0},
        force_instrumental={**_FLAG, "description": "Nobody sings in any case."},
        respect_sections_durations={**_FLAG, "description": "There are no sections."},
        composition_plan=_NEVER,
        finetune_id=_NEVER,
        store_for_inpainting=_NOT_TRUE,
        sign_with_c2pa=_NOT_TRUE,
    )
    SoundRequest = body_of(
        "SoundRequest",
        {"text": "rain on a window", "duration_seconds": 4},
        required=["text"],
        text=_TEXT,
        duration_seconds={
            "type": ["number", "null"],
            "minimum": MIN_DURATION_SECONDS,
            "maximum": MAX_DURATION_SECONDS,
            "description": "10 s if it is not given.",
        },
        prompt_influence={
            "type": ["number", "null"],
            "minimum": 0,
            "maximum": _MOST_INFLUENCE,
            "description": "0 is a `guidance_scale` of 1, 0.3 one of 3, and 1 one of 7.67.",
        },
        model_id=_MODEL_ID,
        loop=_NOT_TRUE,
    )


@router.post("/music", **as_bytes(*_PARAMETERS))
async def compose(body: MusicRequest, request: Request, access: MayEnqueue) -> Response:
    """Make music, and answer with its bytes when it is finished."""
    encoding = _read_encoding(request)
    fields = given(body)
    check_absent(fields, _IMPOSSIBLE_IN_MUSIC)
    check_given(fields, "prompt")
    options = {"prompt": fields["prompt"], **_model_of(fields)}
    if "seed" in fields:
        options["seed"] = fields["seed"]
    if "music_length_ms" in fields:
        wanted = fields["music_length_ms"]
        length = check_integer("music_length_ms", wanted, _SHORTEST_MS, _LONGEST_MS)
        options["duration"] = length / 1_000
    return await answer_bytes(options, request, access, encoding, _NAMES)


@router.post("/music/stream", **as_bytes(*_PARAMETERS))
async def stream_music(body: MusicRequest, request: Request, access: MayEnqueue) -> Response:
    """Make music, and answer with its bytes: like `POST music`, not sooner."""
    return await compose(body, request, access)


@router.post("/sound-generation", **as_bytes(*_PARAMETERS))
async def make_sound(body: SoundRequest, request: Request, access: MayEnqueue) -> Response:
    """Make what the text says, and answer with its bytes when it is finished."""
    encoding = _read_encoding(request)
    fields = given(body)
    check_absent(fields, _IMPOSSIBLE_IN_SOUNDS)
    check_given(fields, "text")
    options = {"prompt": fields["text"], **_model_of(fields)}
    if "duration_seconds" in fields:
        options["duration"] = fields["duration_seconds"]
    if "prompt_influence" in fields:
        wanted = fields["prompt_influence"]
        influence = check_between("prompt_influence", wanted, 0, _MOST_INFLUENCE)
        options["guidance_scale"] = 1 + influence * _GUIDANCE_PER_INFLUENCE
    names = {**_NAMES, "prompt": "text", "duration": "duration_seconds"}
    return await answer_bytes(options, request, access, encoding, names)


def _read_encoding(request: Request) -> Encoding:
    values = read_parameters(request, *_PARAMETERS)
    if values.get("enable_logging") is False:
        problem = "is false, and each generation is kept here until it is deleted"
        raise InvalidRequestError("enable_logging", problem, "leave it out")
    return read_output_format(values.get("output_format", DEFAULT_OUTPUT))


def _model_of(fields: Mapping[str, Any]) -> dict[str, str]:
    """Return the model that is asked for as an option; none for a model of theirs."""
    name = fields.get("model_id")
    if name is None or (isinstance(name, str) and name.startswith(_HOSTED_MODELS)):
        return {}
    return {"model": model_named("model_id", name)}
