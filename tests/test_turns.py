"""Turns: one piece of work in each turn of the event loop, in the order of arrival."""

import asyncio
from itertools import pairwise

import pytest

from dgx_music.worker.turns import Turns


async def note_each_turn(notes):
    while True:
        notes.append("other")
        await asyncio.sleep(0)


async def test_other_tasks_come_between_two_pieces_of_work():
    turns, notes = Turns(), []
    other = asyncio.create_task(note_each_turn(notes))
    await asyncio.gather(*(turns.do(lambda piece=piece: notes.append(piece)) for piece in range(5)))
    other.cancel()
    places = [notes.index(piece) for piece in range(5)]
    assert places == sorted(places)
    assert all("other" in notes[first:second] for first, second in pairwise(places))


async def test_a_wait_ends_after_the_work_that_came_before():
    turns, done = Turns(), []
    before = [asyncio.create_task(turns.do(lambda: done.append(1))) for _ in range(3)]
    await asyncio.sleep(0)
    await turns.wait()
    assert len(done) == 3
    await asyncio.gather(*before)


async def test_work_returns_its_value_and_an_error_is_its_callers_alone():
    turns = Turns()
    outcomes = await asyncio.gather(
        turns.do(lambda: 1 // 0), turns.do(lambda: 7), return_exceptions=True
    )
    assert isinstance(outcomes[0], ZeroDivisionError)
    assert outcomes[1] == 7


async def test_one_that_is_cancelled_in_line_is_left_out():
    turns, done = Turns(), []
    first, second, third = (
        asyncio.create_task(turns.do(lambda piece=piece: done.append(piece))) for piece in range(3)
    )
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    await asyncio.gather(first, third)
    assert done == [0, 2]
