"""What the worker and its engine log: one line for each event, whatever an engine, a prompt or an error has put into it."""

from __future__ import annotations

import logging
import sys

from dgx_music.text import plain


class OneLine(logging.Formatter):
    """Formats each event in one line; the lines of a traceback are indented, so that none of them looks like an event."""

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
    """Log to stderr, one line for each event; only the daemon and its engine do this, the library never."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def _indented(text: str) -> str:
    return "\n".join(f"    {plain(line)}" for line in text.split("\n"))
