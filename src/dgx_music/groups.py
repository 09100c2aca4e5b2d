"""Errors inside the groups that task groups raise."""

from __future__ import annotations

from collections.abc import Iterator

from dgx_music.errors import DgxMusicError


def unwrap(error: BaseException) -> BaseException:
    """Return the only error in a group, or the first if all are ``DgxMusicError``; else the group.

    Several tasks may notice at once that the database is lost: one message is enough.
    """
    leaves = list(_leaves(error))
    is_told_by_first = len(leaves) == 1 or all(isinstance(leaf, DgxMusicError) for leaf in leaves)
    return leaves[0] if is_told_by_first else error


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        yield error
        return
    for inner in error.exceptions:
        yield from _leaves(inner)
