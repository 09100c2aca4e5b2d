"""The log: one line for each event, whatever has been put into it."""

import io
import logging
import re

import pytest

from dgx_music.logs import OneLine
from tests.daemons import add, until

FORGED = "2026-01-01T00:00:00+0000 INFO generation 1 attempt 1: completed"
EVENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} (DEBUG|INFO|WARNING|ERROR) ")
BREAKS = ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"]


@pytest.fixture
def database_url(sqlite_url):
    """One kind of database will do: this is not about them."""
    return sqlite_url


@pytest.fixture
def log():
    """A logger of our format, and what it has written."""
    logger, written = logging.Logger("test"), io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(OneLine("%(levelname)s %(message)s"))
    logger.addHandler(handler)
    return logger, written


@pytest.mark.parametrize("character", BREAKS)
def test_no_message_starts_a_line_of_its_own(log, character):
    logger, written = log
    logger.warning("boom%s%s", character, FORGED)
    assert len(written.getvalue().splitlines()) == 1


def test_the_lines_of_a_traceback_are_indented(log):
    logger, written = log
    try:
        raise RuntimeError(f"boom\nERROR {FORGED}\r{FORGED}")
    except RuntimeError:
        logger.exception("one")
    first, *rest = written.getvalue().splitlines()
    assert first == "ERROR one"
    assert all(line.startswith("    ") for line in rest)


async def test_what_an_engine_says_of_its_trouble_is_no_event_of_the_workers_log(
    database, start, script
):
    message = f"boom\n{FORGED}\r{FORGED}\u2028{FORGED}"
    rule = {"prompt": "victim", "seconds": 0}
    daemon = start(script=script(rule | {"do": "raise", "message": message}))
    generation = await add(database, "victim", max_attempts=1)
    await until(database, generation, lambda row: row.status == "failed")
    await daemon.says("failed: RuntimeError: boom")
    lines = daemon.said().splitlines()
    assert FORGED in daemon.said()
    assert [line for line in lines if not EVENT.match(line) and not line.startswith("    ")] == []
    assert [line for line in lines if line.startswith(FORGED)] == []
