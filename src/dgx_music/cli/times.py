"""Times as people type them: ``yesterday``, ``2h``, ``2026-11-25``, or ISO 8601."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from dgx_music.errors import InvalidRequestError
from dgx_music.validation import check_run_at, shown

_AGO = re.compile(r"(\d{1,6}) ?(s|min|m|h|d|w) ?(?:ago)?")
_UNITS = {"s": "seconds", "min": "minutes", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_DAYS_AGO = {"today": 0, "yesterday": 1}


def read_time(text: str, field: str, now: datetime | None = None) -> tuple[datetime, bool]:
    """Return the moment, and whether it was said in local time.

    ``2h`` (or ``s``, ``min``, ``d``, ``w``) is so long ago. ``today``, ``yesterday`` and a date are
    the midnight at which the day begins. Raises ``InvalidRequestError``.
    """
    now = now or datetime.now(UTC)
    words = text.strip().lower()
    try:
        if found := _AGO.fullmatch(words):
            return now - timedelta(**{_UNITS[found[2]]: int(found[1])}), False
        if words in _DAYS_AGO:
            day = now.astimezone().date() - timedelta(days=_DAYS_AGO[words])
            return datetime(day.year, day.month, day.day).astimezone(), True
        moment = datetime.fromisoformat(text.strip())
        if moment.tzinfo is None:
            return moment.astimezone(), True
    except (ValueError, OverflowError):
        remedy = "use yesterday, 2h, 3d, 2026-01-31 or a time such as 2026-01-31T12:00:00Z"
        raise InvalidRequestError(field, f"is {shown(text)}", remedy) from None
    return check_run_at(moment, field), False


def local_words(moment: datetime) -> str:
    """Return the moment in local time, with its offset from UTC."""
    return f"{moment.astimezone():%Y-%m-%d %H:%M UTC%z}"
