"""Make a generation again, with another seed or other changes; or make music that goes on from it.

The new row has all that the request of the old one had, and refers to it by ``parent_id``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import anyio.to_thread

from dgx_music import validation
from dgx_music.catalog import find_model
from dgx_music.client.content import content_of, read_completed_row
from dgx_music.client.enqueue import read_clips_beside, store
from dgx_music.client.requests import Origin, plan
from dgx_music.client.transactions import transact
from dgx_music.client.variations import MAX_VARIATIONS
from dgx_music.errors import GenerationNotFoundError, InvalidRequestError
from dgx_music.inference.engine import seed_of
from dgx_music.sampling import Sampling
from dgx_music.storage import repository
from dgx_music.storage.clips import clips_of, read_clip_seconds
from dgx_music.storage.models import Generation
from dgx_music.storage.queue import AUDIO_KEY

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

    from dgx_music.audio.endings import Ending


@dataclass(frozen=True)
class Continuation:
    """The generations that go on from another one's audio, and how much of it they start with."""

    generations: list[Generation]
    clip_seconds: float
    """The length of their clip: the end of the audio, or all of it."""
    parent_seconds: float
    """The length of the audio."""

    @property
    def is_cut(self) -> bool:
        """True if the clip is only the end of the audio."""
        return self.clip_seconds < self.parent_seconds

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        rows = [row.to_dict() for row in self.generations]
        return {
            "generations": rows,
            "clip_seconds": self.clip_seconds,
            "parent_seconds": self.parent_seconds,
        }


async def again_generation(
    generation_id: str,
    *,
    seed: int | Literal["new", "same"] = "new",
    count: int = 1,
    idempotency_key: str | None = None,
    session: AsyncSession | None = None,
    **changes: Any,
) -> list[Generation]:
    """Add generations that repeat a request, ``count`` of them at most 16, and return their rows.

    They have the prompt, the options and the clips of the old one, except for ``changes``: its
    prompt and the options of ``enqueue``. A clip is left out by ``None``. Priority, start,
    attempts, title, notes, tags and star are not repeated. ``seed`` may be ``new``, ``same`` or a
    number; if there are several, their seeds follow each other, and they are a batch. The old one
    may have any status; the new ones refer to it as ``parent_id``.

    Raises ``GenerationNotFoundError``, and what ``enqueue`` raises.
    """
    parent = await _read(generation_id, session)
    wanted = {"seed": _seed(parent, seed), "variations": count, "idempotency_key": idempotency_key}
    return await _enqueue_from(parent, changes, wanted, session)


async def continue_generation(
    generation_id: str,
    *,
    duration: float,
    seed: int | Literal["new", "same"] = "new",
    count: int = 1,
    idempotency_key: str | None = None,
    session: AsyncSession | None = None,
    **changes: Any,
) -> Continuation:
    """Add generations that start with the audio of a completed one, and go on; return both.

    They start with the last 30 s of it, or with all of it if it is not longer. ``duration`` counts
    from the start of that clip. All else is as ``again_generation`` has it. Row and audio are read
    before the ``session`` is used, so that no transaction waits for the audio: what only that
    session has changed does not count.

    Raises ``GenerationNotFoundError``, ``NoAudioError`` if it is not completed, ``ArtifactError``
    if its audio cannot be read, and what ``enqueue`` raises.
    """
    parent = await read_completed_row(generation_id)
    ending = await _end_of_audio(parent)
    _check_goes_on(ending, duration)
    wanted = {
        "seed": _seed(parent, seed),
        "variations": count,
        "idempotency_key": idempotency_key,
        "duration": duration,
        "continuation": ending.data,
    }
    rows = await _enqueue_from(parent, changes, wanted, session)
    return Continuation(rows, ending.seconds, ending.whole_seconds)


async def _read(generation_id: str, session: AsyncSession | None) -> Generation:
    validation.check_name("generation_id", generation_id)
    read = partial(repository.get_generation, generation_id=generation_id)
    generation = await transact(session, read, read_only=True)
    if generation is None:
        raise GenerationNotFoundError(generation_id)
    return generation


async def _end_of_audio(row: Generation) -> Ending:
    from dgx_music.audio.endings import end_of

    content = b"".join([chunk async for chunk in content_of(row)])
    return await anyio.to_thread.run_sync(end_of, content, str(row.file_path))


def _check_goes_on(ending: Ending, duration: object) -> None:
    """Refuse a duration that ends within the clip; whatever else is wrong is said later."""
    if isinstance(duration, int | float) and 0 < duration <= ending.seconds:
        clip = f"{validation.exactly(ending.seconds)} s of the audio that it starts with"
        problem = f"is {validation.exactly(duration)} s, and counts from the start of the {clip}"
        raise InvalidRequestError("duration", problem, "use a longer one")


async def _enqueue_from(
    parent: Generation,
    changes: Mapping[str, Any],
    wanted: Mapping[str, Any],
    session: AsyncSession | None,
) -> list[Generation]:
    """Add the generations of the parent's request with these changes, and return them."""
    validation.check_integer("count", wanted["variations"], 1, MAX_VARIATIONS)
    if "variations" in changes:
        raise InvalidRequestError("variations", "is called count here", "use count")
    for name in changes.keys() & wanted.keys():
        raise InvalidRequestError(name, "is given twice", "give it once")
    changes = {**changes, **wanted}
    kept = {name: sha256 for name, sha256 in clips_of(parent).items() if name not in changes}
    options = {**_options_of(parent, changes), **changes}
    planned = plan(options.pop("prompt"), options, origin=Origin(parent.id, kept))
    if "continuation" in kept:
        await _check_length(kept["continuation"], planned.identity["duration_seconds"], session)
    checked = await read_clips_beside([planned])
    return await store(checked.in_batch_if_many(), session=session)


def _options_of(parent: Generation, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the prompt and the options of the parent's request, without clips and circumstances."""
    metadata = {key: item for key, item in parent.get_metadata().items() if key != AUDIO_KEY}
    sampling = Sampling.pick(parent.sampling or {})
    if changes.get("melody", parent.melody_sha256) is None:
        sampling.pop("melody_kind", None)  # there is nothing that it could say something of
    return {
        "prompt": parent.prompt,
        "model": parent.model_name,
        "duration": parent.duration_seconds,
        **_form_of(parent, changes.get("model")),
        **sampling,
        "audio_format": parent.audio_format,
        "tenant": parent.tenant or None,
        "metadata": metadata or None,
    }


def _form_of(parent: Generation, model: object) -> dict[str, int]:
    """Return channels and sample rate; with another model those of the old one do not count."""
    form = {"channels": parent.channels, "sample_rate": parent.sample_rate}
    former = find_model(parent.model_name)
    if former is None or model in (None, former.name):
        return form
    return {name: value for name, value in form.items() if value != getattr(former, name)}


def _seed(parent: Generation, wanted: object) -> int | None:
    """Return the seed to ask for; ``None`` for a new one."""
    if wanted == "new":
        return None
    if wanted == "same":
        return seed_that_made(parent)
    if isinstance(wanted, str):
        shown = validation.shown(wanted)
        raise InvalidRequestError("seed", f"is {shown}", "use new, same, or a whole number")
    return validation.check_seed(wanted)


def seed_that_made(generation: Generation) -> int:
    """Return the seed of a generation: the one asked for, or the one that its engine chose."""
    facts = generation.get_metadata().get(AUDIO_KEY)
    noted = facts.get("seed") if isinstance(facts, dict) else None
    for seed in ((generation.sampling or {}).get("seed"), noted):
        if isinstance(seed, int):
            return seed
    return seed_of(generation.id)


async def _check_length(sha256: str, duration: float, session: AsyncSession | None) -> None:
    """Refuse a duration that is not longer than the continuation that is used again."""
    read = partial(read_clip_seconds, sha256s=[sha256])
    seconds = (await transact(session, read, read_only=True)).get(sha256)
    if seconds is not None:
        validation.check_continuation(seconds, duration)
