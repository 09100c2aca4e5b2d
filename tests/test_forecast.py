"""The arithmetic of estimates, against simulated fleets."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgx_music.forecast import Ahead, Range, Slot, Speedometer, earliest_start, latest_start

SPEEDS = st.tuples(st.floats(0.01, 100), st.floats(1, 5)).map(
    lambda pair: Range(pair[0], pair[0] * pair[1])
)
RESTS = st.tuples(st.floats(0, 1000), st.floats(0, 1000)).map(
    lambda pair: Range(pair[0], sum(pair))
)
SLOTS = st.lists(
    st.builds(Slot, SPEEDS, st.one_of(RESTS, st.just(Range(0.0, 0.0)))), min_size=1, max_size=6
)
DURATIONS = st.lists(st.floats(0.1, 120), max_size=30)
RANDOM = st.randoms(use_true_random=False)
TWO = [Slot(Range(1.0, 2.0)), Slot(Range(1.0, 2.0))]
NOBODY = Ahead(0, 0.0, 0.0)


def ahead_of(durations):
    return Ahead(len(durations), sum(durations), max(durations, default=0.0))


def simulate_start(slots, durations, rng):
    """Return when the generation after these starts, where each goes to the slot that is free first."""
    free_at = [rng.uniform(slot.free_in.low, slot.free_in.high) for slot in slots]
    for duration in durations:
        number = free_at.index(min(free_at))
        speed = slots[number].speed
        free_at[number] += duration * rng.choice(
            [speed.low, speed.high, rng.uniform(speed.low, speed.high)]
        )
    return min(free_at)


def measured_after(*ratios):
    speedometer = Speedometer()
    for ratio in ratios:
        speedometer.note("small", ratio * 8.0, 8.0)
    return speedometer.take().get("small")


@given(SLOTS, DURATIONS, RANDOM)
def test_the_start_in_a_simulated_fleet_is_within_the_range(slots, durations, rng):
    start = simulate_start(slots, durations, rng)

    assert earliest_start(slots, ahead_of(durations)) <= start * (1 + 1e-9)
    assert start <= latest_start(slots, ahead_of(durations)) * (1 + 1e-9)


@given(SPEEDS, RESTS, DURATIONS)
def test_one_slot_is_predicted_as_exactly_as_its_speed_is_known(speed, rest, durations):
    slots, ahead = [Slot(speed, rest)], ahead_of(durations)

    assert earliest_start(slots, ahead) == pytest.approx(rest.low + speed.low * ahead.audio_seconds)
    assert latest_start(slots, ahead) == pytest.approx(rest.high + speed.high * ahead.audio_seconds)


@given(SLOTS, DURATIONS, st.integers(2, 5))
def test_models_that_share_the_slots_only_delay_the_latest_start(slots, durations, sharers):
    shared = [Slot(slot.speed, slot.free_in, sharers) for slot in slots]
    ahead = ahead_of(durations)

    assert latest_start(shared, ahead) * (1 + 1e-9) >= latest_start(slots, ahead)
    assert earliest_start(shared, ahead) == earliest_start(slots, ahead)


def test_a_free_slot_for_each_that_is_ahead_and_one_more_means_now():
    assert (earliest_start(TWO, ahead_of([8.0])), latest_start(TWO, ahead_of([8.0]))) == (0.0, 0.0)
    assert latest_start(TWO, ahead_of([8.0, 8.0])) == 16.0


def test_nothing_starts_before_some_slot_is_free():
    busy = [Slot(Range(1.0, 2.0), Range(5.0, 10.0)), Slot(Range(1.0, 2.0), Range(7.0, 14.0))]

    assert (earliest_start(busy, NOBODY), latest_start(busy, NOBODY)) == (5.0, 10.0)


def test_a_free_slot_that_another_model_may_take_is_no_promise():
    shared = [Slot(Range(1.0, 2.0), sharers=2)] * 2

    assert (earliest_start(shared, ahead_of([8.0])), latest_start(shared, ahead_of([8.0]))) == (
        0.0,
        16.0,
    )


def test_two_models_that_take_turns_on_a_slot_take_twice_as_long_at_most():
    alone, shared = Slot(Range(1.0, 2.0)), Slot(Range(1.0, 2.0), sharers=2)

    assert (latest_start([alone], ahead_of([8.0])), latest_start([shared], ahead_of([8.0]))) == (
        16.0,
        32.0,
    )


def test_a_slot_that_is_taken_for_nobody_knows_how_long_is_not_counted_on():
    taken = Slot(Range(1.0, 2.0), Range(0.0, math.inf))

    assert latest_start([*TWO, taken], ahead_of([8.0, 8.0, 8.0])) == 24.0
    assert latest_start([taken], NOBODY) == math.inf


def test_too_few_measurements_say_only_how_many_they_are():
    assert measured_after(1.0) == pytest.approx((1.0, 1.0, 1.0, 1))
    assert measured_after(8.0, 1.0, 4.0, 2.0) == pytest.approx((1.0, 8.0**0.5, 8.0, 4))
    assert measured_after(*[1.0] * 5) == pytest.approx((1.0, 1.0, 1.0, 5))


def test_a_generation_that_took_no_time_says_nothing():
    assert measured_after(0.0, *[2.0] * 5) == pytest.approx((2.0, 2.0, 2.0, 5))


def test_a_generation_without_audio_says_nothing():
    speedometer = Speedometer()
    speedometer.note("small", 8.0, 0.0)

    assert speedometer.take() == {}


def test_the_typical_speed_is_the_middle_one():
    assert measured_after(16.0, 1.0, 4.0, 8.0, 2.0).typical == pytest.approx(4.0)


def test_only_the_last_generations_count():
    assert measured_after(*[9.0] * 30, *[1.0] * 50) == pytest.approx((1.0, 1.0, 1.0, 50))


def test_speeds_are_told_by_model_and_only_when_there_is_news():
    speedometer = Speedometer()
    for name in ("small", "large") * 5:
        speedometer.note(name, 2.0, 1.0)

    assert [*speedometer.take()] == ["large", "small"]
    assert speedometer.take() == {}
    speedometer.note("small", 2.0, 1.0)
    assert [*speedometer.take()] == ["small"]


@given(st.lists(st.floats(1e-6, 1e6), min_size=5, max_size=80))
def test_speeds_are_in_order_and_above_nothing(ratios):
    low, typical, high, count = measured_after(*ratios)

    assert 0 < low <= typical * (1 + 1e-9)
    assert typical <= high * (1 + 1e-9)
    assert count == min(len(ratios), 50)


@pytest.mark.parametrize("count", [5, 9, 50])
def test_about_eight_of_ten_generations_are_within_the_range_however_few_were_measured(count):
    rng, trials = random.Random(1), 2_000
    hits = 0
    for _ in range(trials):
        measured = measured_after(*(rng.lognormvariate(0.0, 0.5) for _ in range(count)))
        hits += measured.low <= rng.lognormvariate(0.0, 0.5) <= measured.high

    assert 0.7 <= hits / trials <= 0.9
