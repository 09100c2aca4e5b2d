"""What the holder of a token may do; each role includes the ones before it."""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    """A role, from the weakest to the strongest."""

    READ = "read"
    ENQUEUE = "enqueue"
    OPERATE = "operate"

    def includes(self, other: Role) -> bool:
        """Return True if this role may do all that the other one may."""
        order = list(Role)
        return order.index(self) >= order.index(other)
