"""The transitions of a generation, gathered; in the order of its life they are in these modules.

- insertion.py inserts the row: pending
- claims.py: ``claim``, of what due.py says is due: processing, with a lease
- leases.py: ``renew``, and who holds what
- completion.py: ``complete``: completed
- lease_end.py: ``fail`` and ``release``: pending again, failed, or cancelled
- rescue.py: ``rescue``, the same for the rows of lost workers
- by_hand.py: ``cancel`` and ``retry``, which people ask for
- retention.py deletes the row

Each transition is one guarded statement that says what it changed; none reads first and then writes.
Times are the database's: workers send durations. Each coroutine works in the session that it is
given and leaves the commit to whoever opened it.
"""

from dgx_music.storage.by_hand import cancel, retry
from dgx_music.storage.claims import Claim, check_schema, claim
from dgx_music.storage.completion import (
    Completion,
    complete,
    find_completable,
    find_completed,
)
from dgx_music.storage.lease_end import backoff_seconds, fail, release, release_all
from dgx_music.storage.leases import Held, Lease, find_cancel_requests, find_leases, renew
from dgx_music.storage.metadata import AUDIO_KEY
from dgx_music.storage.rescue import RESCUE_CHUNK, WORKER_LOST, Rescued, hasten, read_clock, rescue

__all__ = [
    "AUDIO_KEY",
    "RESCUE_CHUNK",
    "WORKER_LOST",
    "Claim",
    "Completion",
    "Held",
    "Lease",
    "Rescued",
    "backoff_seconds",
    "cancel",
    "check_schema",
    "claim",
    "complete",
    "fail",
    "find_cancel_requests",
    "find_completable",
    "find_completed",
    "find_leases",
    "hasten",
    "read_clock",
    "release",
    "release_all",
    "renew",
    "rescue",
    "retry",
]
