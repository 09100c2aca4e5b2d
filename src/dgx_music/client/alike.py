"""Requests that differ only in their prompts: what they share is checked and written once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dgx_music import validation
from dgx_music.client.requests import (
    CheckedRequests,
    as_canonical_json,
    check_count,
    plan,
    rows_of,
)
from dgx_music.errors import InvalidRequestError
from dgx_music.storage.schema import new_id
from dgx_music.validation import CLIP_FIELDS

_NOT_SHARED = (*CLIP_FIELDS, "variations", "idempotency_key", "metadata", "tags")
"""Options with clips to read, with takes or keys to make, or with values that rows may not share."""


def check_alike(requests: Sequence[object], options: Mapping[str, Any]) -> CheckedRequests | None:
    """Return these requests, checked, if they are prompts that have all options in common.

    ``None`` means that they are others, or that one is refused: who plans each alone names it.
    """
    prompts = [_prompt_of(request) for request in requests]
    is_shared = all(options.get(name) is None for name in _NOT_SHARED)
    if not is_shared or len(prompts) < 2 or None in prompts:
        return None
    try:
        return _checked([validation.check_prompt(prompt) for prompt in prompts], options)
    except InvalidRequestError:
        return None


def _prompt_of(request: object) -> str | None:
    if isinstance(request, Mapping) and len(request) == 1:
        request = request.get("prompt")
    return request if isinstance(request, str) else None


def _checked(prompts: Sequence[str], options: Mapping[str, Any]) -> CheckedRequests:
    first = plan(prompts[0], options)
    check_count(len(prompts))
    (shared,) = rows_of(first)
    hash_of = _hash_by_prompt(first.identity)
    rows = [
        {**shared, "id": new_id(), "prompt": prompt, "request_hash": hash_of(prompt)}
        for prompt in prompts
    ]
    return CheckedRequests(rows, {})


def _hash_by_prompt(identity: Mapping[str, Any]) -> Callable[[str], str]:
    """Return what gives the hash of this identity with another prompt.

    The canonical JSON has its names in order, so only the text in its middle differs.
    """
    before = as_canonical_json({name: identity[name] for name in identity if name < "prompt"})
    after = as_canonical_json({name: identity[name] for name in identity if name > "prompt"})
    start, end = f'{before[:-1]}, "prompt": ', f", {after[1:]}"

    def hash_of(prompt: str) -> str:
        text = f"{start}{as_canonical_json(prompt)}{end}"
        return hashlib.sha256(text.encode()).hexdigest()

    return hash_of
