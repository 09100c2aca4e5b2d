"""What can be chosen of a web server, apart from the settings of the library."""

from __future__ import annotations

from dataclasses import dataclass

JSON_BYTES = 2**20
"""The largest body of a request that is JSON."""
UPLOAD_BYTES = 100_000_000
"""The largest body of an upload, if nothing else is chosen; the library reads no larger file."""
MOST_DECODES = 4
"""How many uploads are decoded at a time; others wait."""
MOST_PREVIEWS = 32
"""How many may listen at a time to what is being made; each asks the database twice a second."""
MOST_TRANSCODES = 2
"""How many files are converted to another format at a time; others wait."""
TRANSCODED_BYTES = 256_000_000
"""How much of what was converted is kept, to be sent again."""
TRANSCODED_FILES = 100
MOST_ROWS = 200
"""The longest page."""
MOST_IN_A_BATCH = 1_000
MAX_PENDING = 10_000
"""How many generations may wait, if the setting of that name is not given."""
MAX_PENDING_PER_TENANT = 1_000


@dataclass(frozen=True, kw_only=True)
class WebOptions:
    """What can be chosen of a web server."""

    is_open: bool = False
    """Whether everybody may do everything until the first token is made: for loopback only."""
    allowed_hosts: frozenset[str] = frozenset()
    """The names, besides those of loopback, that a request's ``Host`` may have."""
    requests_per_second: float = 20.0
    """How many requests each token may make, and at once as many as in one second; 0: any."""
    most_streams: int = 2_000
    """How many streams of events may be open at a time."""
    upload_bytes: int = UPLOAD_BYTES
    """The largest body of an upload."""
