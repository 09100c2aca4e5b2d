"""How a process that runs for long spends little time on the search for garbage."""

from __future__ import annotations

import gc


def spare_collections() -> None:
    """Keep what is there by now out of every later search for garbage.

    All that was imported is more than 100,000 objects. To search them takes 50 ms and more, in
    which nothing else is done.
    """
    gc.collect()
    gc.freeze()
