"""The takes of one request: they differ in their seeds, and each has a row and a key of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from dgx_music import validation
from dgx_music.errors import InvalidRequestError
from dgx_music.sampling import CHOSEN_SEED_BITS, Sampling
from dgx_music.storage.schema import new_id

MAX_VARIATIONS = 16


def check_variations(count: int, sampling: Sampling, key: str | None) -> None:
    """Refuse variations that would all be the same, or whose seeds or keys are too long."""
    if sampling.temperature == 0:
        problem = "would all be the same with a temperature of 0"
        raise InvalidRequestError("variations", problem, "raise it, or leave variations out")
    if sampling.seed is not None:
        validation.check_seed(sampling.seed + count - 1, "the last variation's seed")
    if key is not None:
        validation.check_name("idempotency_key", _key_of(key, count))


def takes_of(row: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Return the columns of each take of a request, whose columns are given."""
    seed, key = row["sampling"]["seed"], row["idempotency_key"]
    first = new_seed(count) if seed is None else seed
    return [
        {
            **row,
            "id": row["id"] if take == 1 else new_id(),
            "take": take,
            "sampling": {**row["sampling"], "seed": first + take - 1},
            "idempotency_key": None if key is None else _key_of(key, take),
        }
        for take in range(1, count + 1)
    ]


def new_seed(count: int) -> int:
    """Return a random seed; it and the next ones, ``count`` in all, are below 2**53."""
    return int.from_bytes(os.urandom(8), "big") % ((1 << CHOSEN_SEED_BITS) - count + 1)


def _key_of(key: str, take: int) -> str:
    """Return the idempotency key of a take; the first one has that of the request."""
    return key if take == 1 else f"{key}#{take}"
