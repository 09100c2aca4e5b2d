"""The log of the worker and of its engine: one line for each event, whatever text is in it."""

from __future__ import annotations

import logging
import sys

from dgx_music.text import plain


class OneLine(logging.Formatter):
    """Formats each event in one line; only the lines of a traceback are indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name is logging's
        """Return the event's own line."""
        return plain(super().formatMessage(record))

    def formatException(self, ei: object) -> str:  # noqa: N802
        """Return the traceback's lines."""
        return _indented(super().formatException(ei))  # type: ignore[arg-type]  # logging's own alias is private

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        """Return the stack's lines."""
        return _indented(super().formatStack(stack_info))


def configure_logging(level: str) -> None:
    """Log to stderr, one line for each event: for the daemon and its engine, not the library."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def _indented(text: str) -> str:
    return "\n".join(f"    {plain(line)}" for line in text.split("\n"))
