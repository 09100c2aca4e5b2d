"""What is kept of audio in other formats, for how long, and how much is made at a time."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from dgx_music.storage import Generation
from dgx_music.web import transcodes
from dgx_music.web.options import MOST_TRANSCODES
from dgx_music.web.transcodes import Transcode, Transcodes

TEN = b"0123456789"


def row(name):
    return Generation(id=name, prompt="a", model_name="x", sha256=name)


@pytest.fixture
def made(monkeypatch):
    """What was made so far, as ``(hash, format)``; each file has ten bytes."""
    calls = []

    async def content_of(row, audio_format):
        calls.append((row.sha256, audio_format))
        yield TEN

    monkeypatch.setattr(transcodes, "content_of", content_of)
    return calls


async def test_a_file_is_made_once_for_all_who_ask(made):
    kept = Transcodes()
    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(kept.get, row("a"), "mp3")
    await kept.get(row("a"), "flac")

    assert made == [("a", "mp3"), ("a", "flac")]


async def test_two_rows_of_the_same_bytes_have_a_file_each(made):
    kept, other = Transcodes(), row("a")
    other.id = "b"  # its tags name it
    for each in (row("a"), other):
        await kept.get(each, "mp3")

    assert made == [("a", "mp3")] * 2


async def test_what_was_used_longest_ago_is_forgotten_first(made):
    kept = Transcodes(most_bytes=25)
    for name in ("a", "b", "a", "c", "a", "b"):
        await kept.get(row(name), "mp3")

    assert [name for name, _ in made] == ["a", "b", "c", "b"]


async def test_who_reads_a_file_has_it_to_its_end_though_it_is_forgotten(made):
    kept = Transcodes(most_bytes=10)
    chunks = (await kept.get(row("a"), "mp3")).read(2, 5)
    await kept.get(row("b"), "mp3")

    assert [chunk async for chunk in chunks] == [b"23456"]


def test_a_file_ends_with_its_last_reader():
    before = len([*Path("/dev/fd").iterdir()])
    Transcode(TEN)

    assert len([*Path("/dev/fd").iterdir()]) == before


async def test_only_some_are_made_at_a_time(monkeypatch):
    running, most = 0, 0
    may_end = anyio.Event()

    async def content_of(_row, _format):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await may_end.wait()
        running -= 1
        yield TEN

    monkeypatch.setattr(transcodes, "content_of", content_of)
    kept = Transcodes()
    async with anyio.create_task_group() as group:
        for name in "abcdef":
            group.start_soon(kept.get, row(name), "mp3")
        await anyio.wait_all_tasks_blocked()
        may_end.set()

    assert most == MOST_TRANSCODES
