"""The pool of prefixes: which one a prompt gets, the memory they take, and eviction."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magistral_mlx.decoder.cache import KVCache, QuantizedKVCache
from magistral_mlx.decoder.prefix import Prefix, common
from magistral_mlx.decoder.prefixes import Prefixes

ROOM = 2 * 2 * 256 * 32 * 4  # keys and values, two heads, 256 positions of 32 numbers in 4 bytes


def read(prefix: Prefix, ids: Sequence[int]) -> Prefix:
    """Prefill the rest of `ids` behind the prefix, as a generation would."""
    rest = list(ids)[prefix.rewind(ids) :]
    numbers = mx.array(rest, mx.float32).reshape(1, 1, -1, 1)
    part = mx.broadcast_to(numbers, (1, 2, len(rest), 32))
    for cache in prefix.caches:
        cache.update(part, -part)
    return prefix


def kept(limit: int = 10**9, make: Callable[[], KVCache] = KVCache) -> Prefixes:
    return Prefixes(lambda: Prefix([make()]), limit)


def holds(prefix: Prefix) -> list[float]:
    """The keys that are cached, as the ids they came from."""
    [cache] = prefix.caches
    return cache.arrays()[0][0, 0, : cache.offset, 0].tolist()  # type: ignore[return-value]


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_the_common_beginning(one: list[int], other: list[int]):
    n = common(one, other)
    assert one[:n] == other[:n]
    assert n == min(len(one), len(other)) or one[n] != other[n]


def test_nothing_is_there_at_first():
    assert kept().take([1, 2, 3]).length == 0


def test_the_longest_common_beginning_wins():
    pool = kept()
    for ids in ([1, 2, 3, 4], [1, 2, 9, 9], [7, 7]):
        pool.put(read(pool.take([0]), ids), 10)
    assert pool.take([1, 2, 3, 5]).ids == [1, 2, 3, 4]
    assert len(pool) == 2
    assert pool.take([8]).ids == []


def test_what_is_taken_is_the_takers_alone():
    pool = kept()
    pool.put(read(pool.take([0]), [1, 2, 3]), 3)
    assert pool.take([1, 2, 3, 4]).ids == [1, 2, 3]
    assert pool.take([1, 2, 3, 4]).ids == []


def test_those_who_share_leave_it_for_others():
    pool = kept()
    pool.put(read(pool.take([0]), [1, 2, 3]), 3)
    for last in (4, 5, 3):
        assert holds(read(pool.take([1, 2, 3], shared=True), [1, 2, 3, last])) == [1, 2, 3, last]
    assert holds(pool.take([1, 2, 3, 4])) == [1, 2, 3]
    assert pool.take([1, 2, 3], shared=True).ids == []


def test_another_conversation_with_the_same_beginning_is_forked():
    """And neither affects the other."""
    pool = kept()
    first = [1, 2, *range(10, 30)]
    pool.put(read(pool.take([0]), first), 100)
    other = read(pool.take([1, 2, 50, 51]), [1, 2, 50, 51])
    assert holds(other) == [1, 2, 50, 51]
    again = pool.take([*first, 30])
    assert again.ids == first
    assert holds(again) == first


def test_only_what_will_come_again_is_kept_and_paid_for():
    pool = kept()
    long = list(range(1, 600))
    prefix = read(pool.take(long), long)
    assert prefix.nbytes == 3 * ROOM
    pool.put(prefix, 100)
    assert pool.nbytes == ROOM
    back = pool.take(long)
    assert back.ids == long[:100]
    assert holds(back) == long[:100]


def test_room_that_shrank_can_grow_again():
    pool = kept()
    long = list(range(1, 600))
    pool.put(read(pool.take(long), long), 100)
    assert holds(read(pool.take(long), long)) == long


def test_packed_room_shrinks_too():
    pool = kept(make=lambda: QuantizedKVCache(32))
    long = list(range(1, 600))
    prefix = read(pool.take(long), long)
    before = prefix.nbytes
    pool.put(prefix, 200)
    assert pool.nbytes == before // 3


def test_that_used_longest_ago_goes_first():
    pool = kept(limit=2 * ROOM)
    for ids in ([1, 1], [2, 2]):
        pool.put(read(pool.take(ids), ids), 2)
    pool.put(read(pool.take([1, 1, 1]), [1, 1, 1]), 3)  # now [2, 2] is the older one
    pool.put(read(pool.take([3, 3]), [3, 3]), 2)
    assert pool.nbytes <= pool.limit
    assert pool.take([2, 2]).ids == []
    assert pool.take([1, 1]).ids == [1, 1, 1]


def test_nothing_is_kept_twice():
    pool = kept()
    prefixes = [read(pool.take([1]), ids) for ids in ([1, 2, 3], [1, 2], [1, 2, 3, 4])]
    for prefix in prefixes:
        pool.put(prefix, 10)
    assert len(pool) == 1
    assert pool.take([1, 2]).ids == [1, 2, 3, 4]


@pytest.mark.parametrize("limit", [0, ROOM - 1])
def test_one_that_is_too_large_is_not_kept(limit: int):
    pool = kept(limit)
    pool.put(read(pool.take([1]), [1, 2]), 2)
    assert (len(pool), pool.nbytes) == (0, 0)


def test_clear():
    pool = kept()
    pool.put(read(pool.take([1]), [1, 2]), 2)
    pool.clear()
    assert pool.take([1, 2]).ids == []


def test_a_prompt_that_was_cut_off_keeps_what_every_layer_has_read():
    pool = Prefixes(lambda: Prefix([KVCache(), KVCache()]), 10**9)
    prefix = read(pool.take([1]), [1, 2, 3, 4])
    prefix.caches[1].trim(2)
    pool.put(prefix, 4)
    back = pool.take([1, 2, 3, 4])
    assert back.ids == [1, 2]
    assert [cache.offset for cache in back.caches] == [2, 2]
