"""How many drafts pay off: against the definition, with made-up timings."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magistral_mlx.decoder.pace import EXPIRY, LOSS_DECAY, MAX_LOSS, MIN_PLAIN, MIN_SPEEDUP, MOST, PAUSE, Pace


def measured_pace(costs: dict[int, float]) -> Pace:
    """A pace with enough passes of these costs recorded."""
    pace = Pace()
    for _ in range(MIN_PLAIN + 1):
        for drafts, seconds in costs.items():
            pace.record(drafts, seconds, math.ceil(seconds / costs[0]))  # enough ids to lose nothing
    return pace


def speed(chance: float, k: int, seconds: float) -> float:
    """Ids per second by enumeration: `at` drafts accepted and the next one rejected, or all accepted."""
    wrong = sum((at + 1) * chance**at * (1 - chance) for at in range(k))
    return (wrong + (k + 1) * chance**k) / seconds


@given(
    costs=st.lists(st.floats(0.5, 4), min_size=MOST, max_size=MOST),
    chance=st.floats(0.01, 1),
    most=st.integers(1, 20),
)
def test_best_is_the_fastest_measured_count(costs: list[float], chance: float, most: int):
    all_costs = {0: 1.0} | {k + 1: cost for k, cost in enumerate(costs)}
    chosen = measured_pace(all_costs).best(chance, most)
    assert 0 <= chosen <= min(most, MOST)
    speeds = {k: speed(chance, k, all_costs[k]) for k in range(min(most, MOST) + 1)}
    if chosen:
        assert speeds[chosen] >= max(speeds.values()) * (1 - 1e-9)
        assert speeds[chosen] > MIN_SPEEDUP * speeds[0]
    else:
        assert max(speeds.values()) <= MIN_SPEEDUP * speeds[0] * (1 + 1e-9)


@pytest.mark.parametrize("chance", [0.3, 0.6, 0.9, 1.0])
def test_no_drafts_if_each_row_costs_a_pass(chance: float):
    assert measured_pace({k: k + 1.0 for k in range(MOST + 1)}).best(chance) == 0


def test_most_drafts_if_rows_cost_nothing():
    pace = measured_pace(dict.fromkeys(range(MOST + 1), 1.0))
    assert pace.best(0.9) == MOST
    assert pace.best(0.01) == 0
    assert pace.best(0.9, most=3) == 3
    assert pace.best(0.0) == pace.best(0.9, most=0) == 0


def test_no_drafts_before_plain_passes_are_measured():
    pace = Pace()
    for _ in range(MIN_PLAIN):
        pace.record(0, 1.0)  # the first is not counted: it may compile kernels
        assert pace.best(1.0) == 0
    pace.record(0, 1.0)
    assert pace.best(1.0) > 0


def test_unmeasured_counts_are_tried_stepwise_and_only_at_a_high_chance():
    pace = measured_pace({0: 1.0})
    assert pace.best(0.5) == 0
    tried = list[int]()
    while not tried or tried[-1] < MOST:
        tried.append(pace.best(0.95))
        pace.record(tried[-1], 1.05, tried[-1])
    assert tried == [2, 2, 4, 4, 7]


def test_second_slow_pass_stops_drafting():
    pace = measured_pace({0: 1.0})
    pace.record(2, 4.0)
    assert pace.best(0.95) == 2  # compiling, perhaps
    pace.record(2, 3.0)
    assert pace.best(0.95) == 0


def test_expired_measurements_are_repeated():
    pace = measured_pace({0: 1.0, 1: 3.0, 2: 4.0})
    for _ in range(EXPIRY + 1):
        assert pace.best(1.0) == 0
        pace.record(0, 1.0)
    assert pace.best(1.0) == 2  # it may be faster now
    for _ in range(EXPIRY + 1):
        pace.record(2, 1.1, 2)
    assert pace.best(1.0) == 0  # and this needs a plain pass to compare with


def test_time_lost_by_drafting_is_bounded():
    """Drafts that are rated nearly certain and never right, passes that cost more than was measured."""
    pace, seconds, passes = measured_pace({0: 1.0, 1: 1.1, 2: 1.2}), 0.0, 20_000
    for _ in range(passes):
        drafts = pace.best(0.99)
        took = 1.0 + 1.5 * drafts
        pace.record(drafts, took, 1)
        seconds += took
    assert 0 < seconds - passes <= LOSS_DECAY * seconds + MAX_LOSS + 1.5 * MOST


def test_loss_decays():
    pace = measured_pace({0: 1.0, 1: 1.1})
    assert pace.best(0.95) > 0
    pace.record(2, MAX_LOSS + 3.0, 1)
    assert pace.best(0.95) == 0
    while not pace.best(0.95):
        pace.record(0, 1.0)


def test_slower_pass_after_drafts_counts_as_their_loss():
    pace = measured_pace({0: 1.0, 1: 1.1})
    for _ in range(20):
        pace.record(0, 1.5, steady=False)
    assert pace.best(0.95) == 0
    assert pace._plain == 1.0


def test_drafting_that_never_pays_pauses_and_is_tried_again():
    pace = measured_pace({k: k + 1.0 for k in range(MOST + 1)})
    assert [pace.pays() for _ in range(PAUSE)] == [False] * PAUSE
    assert pace.pays()  # all measurements are dropped
    for _ in range(MIN_PLAIN):
        pace.record(0, 1.0)
    assert pace.pays()  # and certain drafts may pay now
    assert pace.best(1.0) > 0
