"""Requests that differ only in their prompts: what they share is checked and written once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dgx_music import validation
from dgx_music.client.requests import CheckedRequests, check_count, plan, rows_of
from dgx_music.errors import InvalidRequestError
from dgx_music.storage.new_rows import AlikeRows
from dgx_music.storage.schema import new_ids
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
    (shared,) = rows_of(plan(prompts[0], options))
    check_count(len(prompts))
    return CheckedRequests(AlikeRows(shared, new_ids(len(prompts)), prompts), {})
