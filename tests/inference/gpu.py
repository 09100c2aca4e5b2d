"""What the tests on a GPU share."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def nobody_may_wait() -> Iterator[None]:
    """Raise an error if anything makes the host wait for the device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that this mode does not find everything
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
