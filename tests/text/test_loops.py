"""The loop guard: planted loops are detected, other texts are not, and it costs little."""

import random
import sys

import pytest

from benchmarks.loop_guard import edited, first_alarm, measure_honest, measure_loops
from benchmarks.loop_texts import GENERATORS, from_files, generated, library
from magistral_mlx.text.loops import LONGEST, LoopGuard


def random_ids(rng: random.Random, size: int) -> list[int]:
    return [rng.randrange(1000, 131072) for _ in range(size)]


@pytest.mark.parametrize("period", [25, 60, 61, 100, 250, 399, LONGEST])
@pytest.mark.parametrize("start", [0, 1, 777, 5000])
def test_an_exact_loop_is_caught_within_four_periods(period: int, start: int):
    rng = random.Random(f"{period} {start}")
    ids = random_ids(rng, start) + random_ids(rng, period) * 10
    at = first_alarm(ids)
    assert at is not None
    assert start + 2 * period < at <= start + 4 * period


@pytest.mark.parametrize("period", [1, 2, 3, 5, 8, 12, 20])
def test_short_loops_need_more_repetitions(period: int):
    at = first_alarm(random_ids(random.Random(period), period) * 2000)
    assert at is not None
    assert 60 < at <= 1600


def test_most_loops_with_edits_are_caught_within_eight_periods():
    rng = random.Random(0)
    caught = 0
    for _ in range(30):
        body = random_ids(rng, rng.randint(60, 400))
        ids = random_ids(rng, 500)
        for _ in range(8):
            ids += edited(rng, body, 0.03, random_ids(rng, 100))
        caught += first_alarm(ids) is not None
    assert caught >= 28


def test_counting_is_no_loop():
    """The same sentence again and again, but with a number that increases."""
    rng = random.Random(0)
    before, after = random_ids(rng, 20), random_ids(rng, 20)
    ids = [token for n in range(1000) for token in (*before, *(int(digit) for digit in f"{n:03}"), *after)]
    assert first_alarm(ids) is None


def test_ids_that_never_repeat_are_no_loop():
    assert first_alarm(random_ids(random.Random(0), 20_000)) is None
    assert first_alarm(range(20_000)) is None


def test_alarm_lasts_until_reset():
    guard = LoopGuard()
    body = random_ids(random.Random(0), 50)
    answers = [guard.feed(token_id) for token_id in body * 8]
    assert all(answers[205:])
    assert not any(answers[:100])
    guard.reset()
    assert not any(guard.feed(token_id) for token_id in body * 2)


def test_memory_is_bounded():
    def size(guard: LoopGuard) -> int:
        return sum(sys.getsizeof(value) for value in vars(guard).values())

    rng = random.Random(0)
    guard = LoopGuard()
    for token_id in random_ids(rng, 20_000):
        guard.feed(token_id)
    early = size(guard)
    for token_id in random_ids(rng, 60_000):
        guard.feed(token_id)
    assert size(guard) < 2 * early
    assert size(guard) < 2_000_000


def test_the_same_ids_give_the_same_answers():
    ids = random_ids(random.Random(3), 300) + random_ids(random.Random(4), 90) * 6
    assert first_alarm(ids) == first_alarm(ids)


KINDS = (
    "proof by cases",
    "lines to write out",
    "digitwise addition",
    "bottles",
    "json records",
    "unified diff",
)


def test_no_alarm_in_a_few_ordinary_texts(full_tokenizer):
    texts = list(generated(full_tokenizer("v11"), KINDS, each=1, seed=1))
    assert not measure_honest(texts)["alarms"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_alarms_in_the_whole_corpus(full_tokenizer):
    tokenizer = full_tokenizer("v11")
    texts = [*generated(tokenizer, GENERATORS, each=8, seed=1), *from_files(tokenizer, "library", library())]
    assert len(texts) >= 500
    alarms = measure_honest(texts)["by_kind"]
    known = {"calendar"}  # see docs/decisions/0006: three months that differ only in their name
    assert not {kind for kind, (wrong, _) in alarms.items() if wrong} - known
    rows = {row["loops"]: row for row in measure_loops(texts, 1000, seed=1)}
    assert rows["1 to 400 evenly"]["in_8_periods_or_1600"] >= 0.9 * rows["1 to 400 evenly"]["planted"]
    assert rows["1 to 400 evenly"]["ever"] >= 0.95 * rows["1 to 400 evenly"]["planted"]
