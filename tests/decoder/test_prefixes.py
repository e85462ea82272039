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


def prefill(prefix: Prefix, ids: Sequence[int]) -> Prefix:
    """Prefill the rest of `ids` after the prefix, as a generation would."""
    rest = list(ids)[prefix.rewind(ids) :]
    numbers = mx.array(rest, mx.float32).reshape(1, 1, -1, 1)
    part = mx.broadcast_to(numbers, (1, 2, len(rest), 32))
    for cache in prefix.caches:
        cache.update(part, -part)
    return prefix


def new_pool(limit: int = 10**9, make: Callable[[], KVCache] = KVCache) -> Prefixes:
    return Prefixes(lambda: Prefix([make()]), limit)


def cached_ids(prefix: Prefix) -> list[float]:
    """The keys that are cached, as the ids they came from."""
    [cache] = prefix.caches
    return cache.arrays()[0][0, 0, : cache.offset, 0].tolist()  # type: ignore[return-value]


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix_length(one: list[int], other: list[int]):
    n = common(one, other)
    assert one[:n] == other[:n]
    assert n == min(len(one), len(other)) or one[n] != other[n]


def test_new_pool_is_empty():
    assert new_pool().take([1, 2, 3]).length == 0


def test_longest_common_prefix_is_taken():
    pool = new_pool()
    for ids in ([1, 2, 3, 4], [1, 2, 9, 9], [7, 7]):
        pool.put(prefill(pool.take([0]), ids), 10)
    assert pool.take([1, 2, 3, 5]).ids == [1, 2, 3, 4]
    assert len(pool) == 2
    assert pool.take([8]).ids == []


def test_taken_prefix_leaves_the_pool():
    pool = new_pool()
    pool.put(prefill(pool.take([0]), [1, 2, 3]), 3)
    assert pool.take([1, 2, 3, 4]).ids == [1, 2, 3]
    assert pool.take([1, 2, 3, 4]).ids == []


def test_shared_prefix_stays_in_the_pool():
    pool = new_pool()
    pool.put(prefill(pool.take([0]), [1, 2, 3]), 3)
    for last in (4, 5, 3):
        assert cached_ids(prefill(pool.take([1, 2, 3], shared=True), [1, 2, 3, last])) == [1, 2, 3, last]
    assert cached_ids(pool.take([1, 2, 3, 4])) == [1, 2, 3]
    assert pool.take([1, 2, 3], shared=True).ids == []


def test_prefix_that_matches_in_part_is_forked():
    """And neither affects the other."""
    pool = new_pool()
    first = [1, 2, *range(10, 30)]
    pool.put(prefill(pool.take([0]), first), 100)
    other = prefill(pool.take([1, 2, 50, 51]), [1, 2, 50, 51])
    assert cached_ids(other) == [1, 2, 50, 51]
    again = pool.take([*first, 30])
    assert again.ids == first
    assert cached_ids(again) == first


def test_put_keeps_only_the_given_length():
    pool = new_pool()
    long = list(range(1, 600))
    prefix = prefill(pool.take(long), long)
    assert prefix.nbytes == 3 * ROOM
    pool.put(prefix, 100)
    assert pool.nbytes == ROOM
    back = pool.take(long)
    assert back.ids == long[:100]
    assert cached_ids(back) == long[:100]


def test_shrunk_cache_can_grow_again():
    pool = new_pool()
    long = list(range(1, 600))
    pool.put(prefill(pool.take(long), long), 100)
    assert cached_ids(prefill(pool.take(long), long)) == long


def test_quantized_cache_shrinks_too():
    pool = new_pool(make=lambda: QuantizedKVCache(32))
    long = list(range(1, 600))
    prefix = prefill(pool.take(long), long)
    before = prefix.nbytes
    pool.put(prefix, 200)
    assert pool.nbytes == before // 3


def test_least_recently_used_is_evicted_first():
    pool = new_pool(limit=2 * ROOM)
    for ids in ([1, 1], [2, 2]):
        pool.put(prefill(pool.take(ids), ids), 2)
    pool.put(prefill(pool.take([1, 1, 1]), [1, 1, 1]), 3)  # now [2, 2] is the older one
    pool.put(prefill(pool.take([3, 3]), [3, 3]), 2)
    assert pool.nbytes <= pool.limit
    assert pool.take([2, 2]).ids == []
    assert pool.take([1, 1]).ids == [1, 1, 1]


def test_prefix_of_a_stored_prefix_is_not_stored():
    pool = new_pool()
    prefixes = [prefill(pool.take([1]), ids) for ids in ([1, 2, 3], [1, 2], [1, 2, 3, 4])]
    for prefix in prefixes:
        pool.put(prefix, 10)
    assert len(pool) == 1
    assert pool.take([1, 2]).ids == [1, 2, 3, 4]


@pytest.mark.parametrize("limit", [0, ROOM - 1])
def test_prefix_larger_than_the_limit_is_not_stored(limit: int):
    pool = new_pool(limit)
    pool.put(prefill(pool.take([1]), [1, 2]), 2)
    assert (len(pool), pool.nbytes) == (0, 0)


def test_clear():
    pool = new_pool()
    pool.put(prefill(pool.take([1]), [1, 2]), 2)
    pool.clear()
    assert pool.take([1, 2]).ids == []


def test_interrupted_prompt_keeps_what_every_layer_holds():
    pool = Prefixes(lambda: Prefix([KVCache(), KVCache()]), 10**9)
    prefix = prefill(pool.take([1]), [1, 2, 3, 4])
    prefix.caches[1].trim(2)
    pool.put(prefix, 4)
    back = pool.take([1, 2, 3, 4])
    assert back.ids == [1, 2]
    assert [cache.offset for cache in back.caches] == [2, 2]
