"""The rows that viewers watch: who watches each of them, and how it was seen last."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from dgx_music.storage.watching import State
from dgx_music.web.viewers import ShownRow, Viewer

_ROWS_KEPT = 1_000
"""How many rows are remembered that nobody watches any more, for viewers who come again."""


@dataclass
class WatchedRow:
    """A row as it was seen last."""

    since: int
    """The number of the last event when it was seen first: later changes of it are events."""
    state: State | None
    """``None`` if there is no such row."""
    shown: ShownRow | None

    @property
    def is_live(self) -> bool:
        """True if the row is there and unfinished."""
        return self.shown is not None and not self.shown.row.is_finished


class WatchedRows:
    """The watched rows by id, and the last ones that nobody watches any more.

    Iterates over the ids that somebody watches; a new one has no row until it was seen.
    """

    def __init__(self) -> None:
        self._watchers: dict[str, set[Viewer]] = {}
        self._rows: dict[str, WatchedRow] = {}
        self._left: dict[str, None] = {}  # rows that nobody watches any more, oldest first

    def __iter__(self) -> Iterator[str]:
        return iter(self._watchers)

    def __getitem__(self, generation_id: str) -> WatchedRow:
        return self._rows[generation_id]

    def __setitem__(self, generation_id: str, row: WatchedRow) -> None:
        self._rows[generation_id] = row

    def get(self, generation_id: str) -> WatchedRow | None:
        """Return the row; ``None`` if it was not seen yet."""
        return self._rows.get(generation_id)

    def count_with(self, viewer: Viewer) -> int:
        """Return how many are watched if this viewer watches too."""
        return len(self._watchers) + sum(each not in self._watchers for each in viewer.ids)

    def watchers_of(self, generation_id: str) -> Collection[Viewer]:
        """Return who watches the row."""
        return self._watchers.get(generation_id, ())

    def join(self, viewer: Viewer) -> None:
        """Let the viewer watch its rows."""
        for each in viewer.ids:
            self._watchers.setdefault(each, set()).add(viewer)
            self._left.pop(each, None)

    def leave(self, viewer: Viewer) -> None:
        """Forget the viewer, and the rows that nobody has watched for the longest time."""
        for each in viewer.ids:
            self._watchers[each].discard(viewer)
            if not self._watchers[each]:
                del self._watchers[each]
                self._left[each] = None
        while len(self._left) > _ROWS_KEPT:
            oldest = next(iter(self._left))
            del self._left[oldest]
            self._rows.pop(oldest, None)
