"""A cache holds what was fed, however it was split, trimmed or forked."""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_mlx.decoder.cache import STEP, KVCache, trim_all
from magistral_mlx.decoder.engine import prefill
from magistral_mlx.decoder.model import Transformer
from magistral_mlx.disk.checkpoint import load, open_checkpoint
from tests import models

CONFIG = replace(models.TINY, n_layers=2, dim=96, n_heads=4, n_kv_heads=1, hidden_dim=128)
IDS = np.random.default_rng(1).integers(0, CONFIG.vocab_size, size=600).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    path = models.write_hf(tmp_path_factory.mktemp("cache"), CONFIG)
    return load(open_checkpoint(path), mx.float32)


def feed(model: Transformer, ids: Sequence[int], caches: Sequence[KVCache], chunk: int = 2048) -> mx.array:
    steps = prefill(model, ids, caches, chunk=chunk)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def past(cache: KVCache) -> list[np.ndarray]:
    return [np.array(a[:, :, : cache.offset]) for a in cache.arrays()]


def assert_same(
    found: tuple[mx.array, Sequence[KVCache]], expected: tuple[mx.array, Sequence[KVCache]]
) -> None:
    """Logits and cache contents, to float32's rounding (another chunk shape selects another matmul)."""
    near(np.array(found[0]), np.array(expected[0]))
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert ours.offset == theirs.offset
        for a, b in zip(past(ours), past(theirs), strict=True):
            near(a, b)


def near(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


@given(st.data())
@settings(max_examples=40)
def test_split_and_chunk_size_change_nothing(model: Transformer, data: st.DataObject):
    ids = IDS[: data.draw(st.integers(2, 60), label="length")]
    split = data.draw(st.integers(1, len(ids) - 1), label="split")
    chunks = st.integers(1, 64)
    whole, parts = model.new_caches(), model.new_caches()
    expected = feed(model, ids, whole)
    feed(model, ids[:split], parts, data.draw(chunks, label="first chunk"))
    found = feed(model, ids[split:], parts, data.draw(chunks, label="second chunk"))
    assert_same((found, parts), (expected, whole))


@pytest.mark.parametrize("split", [1, STEP - 1, STEP, STEP + 1, 2 * STEP, 599])
def test_growth_changes_nothing(model: Transformer, split: int):
    whole, parts = model.new_caches(), model.new_caches()
    expected = feed(model, IDS, whole)
    feed(model, IDS[:split], parts, chunk=100)
    assert_same((feed(model, IDS[split:], parts, chunk=250), parts), (expected, whole))


def test_single_ids_across_a_growth_step(model: Transformer):
    whole, single = model.new_caches(), model.new_caches()
    feed(model, IDS[: STEP - 3], single)
    for position in range(STEP - 3, STEP + 3):
        found = feed(model, IDS[position : position + 1], single)
        assert {cache.offset for cache in single} == {position + 1}
    assert_same((found, single), (feed(model, IDS[: STEP + 3], whole), whole))


@given(st.data())
@settings(max_examples=30)
def test_trimmed_and_continued_equals_fresh(model: Transformer, data: st.DataObject):
    kept = data.draw(st.integers(0, 40), label="kept")
    wrong = data.draw(st.lists(st.integers(0, CONFIG.vocab_size - 1), min_size=1, max_size=40), label="wrong")
    right = IDS[kept : kept + data.draw(st.integers(1, 40), label="right")]
    trimmed, fresh = model.new_caches(), model.new_caches()
    feed(model, IDS[:kept] + wrong, trimmed)
    trim_all(trimmed, len(wrong))
    found = feed(model, right, trimmed)
    assert_same((found, trimmed), (feed(model, IDS[:kept] + right, fresh), fresh))


def test_trimmed_below_a_growth_step_and_grown_again(model: Transformer):
    trimmed, fresh = model.new_caches(), model.new_caches()
    feed(model, IDS[::-1][:300] + IDS[:5], trimmed)
    trim_all(trimmed, 305)
    found = feed(model, IDS[:400], trimmed, chunk=70)
    assert_same((found, trimmed), (feed(model, IDS[:400], fresh), fresh))


@pytest.mark.parametrize("first", ["origin", "fork"])
@pytest.mark.parametrize("evaluated", [True, False])
@pytest.mark.parametrize("length", [7, STEP])  # with spare capacity, and without
def test_fork_and_origin_are_independent(model: Transformer, first: str, evaluated: bool, length: int):
    origin = model.new_caches()
    feed(model, IDS[:length], origin)
    if evaluated:
        mx.eval([array for cache in origin for array in cache.arrays()])
    twin = [cache.fork() for cache in origin]
    endings = {"origin": (origin, IDS[300:310]), "fork": (twin, IDS[400:415])}
    order = [first, *(name for name in endings if name != first)]
    found = {name: feed(model, endings[name][1], endings[name][0]) for name in order}
    for name, (caches, ending) in endings.items():
        fresh = model.new_caches()
        assert_same((found[name], caches), (feed(model, IDS[:length] + ending, fresh), fresh))


def test_a_fork_keeps_what_its_origin_trims_and_overwrites(model: Transformer):
    origin, fresh = model.new_caches(), model.new_caches()
    feed(model, IDS[:20], origin)
    twin = [cache.fork() for cache in origin]
    trim_all(origin, 15)
    feed(model, IDS[200:230], origin)
    assert {cache.offset for cache in twin} == {20}
    found = feed(model, IDS[20:25], twin)
    assert_same((found, twin), (feed(model, IDS[:25], fresh), fresh))


def test_fork_and_size_of_an_empty_cache():
    cache = KVCache()
    twin = cache.fork()
    assert (twin.offset, twin.nbytes, twin.arrays()) == (0, 0, [])
    k = mx.ones((1, 2, 5, 4))
    keys, values = twin.update(k, 2 * k)
    assert keys.shape == values.shape == (1, 2, 5, 4)
    assert (cache.offset, twin.offset) == (0, 5)
    assert twin.nbytes == 2 * 2 * STEP * 4 * 4  # two arrays, two heads, one step of capacity, four float32
    assert values.tolist() == (2 * k).tolist()


def test_capacity_grows_by_whole_steps():
    cache, sizes = KVCache(), list[int]()
    for positions in (5, STEP - 5, 1, STEP - 1):  # filling a step to its end allocates no more
        k = mx.ones((1, 2, positions, 4))
        cache.update(k, k)
        sizes.append(cache.nbytes // (2 * 2 * 4 * 4))
    assert sizes == [STEP, STEP, 2 * STEP, 2 * STEP]


def test_the_example_in_the_docstring():
    cache, k = KVCache(), mx.zeros((1, 8, 5, 128))
    keys, _ = cache.update(k, k)
    assert (cache.offset, keys.shape) == (5, (1, 8, 5, 128))
    cache.trim(2)
    assert cache.offset == 3


def test_prefill_yields_the_number_of_ids_fed(model: Transformer):
    caches = model.new_caches()
    fed = list(prefill(model, IDS[:25], caches, chunk=10))
    assert fed == [10, 20]
    assert {cache.offset for cache in caches} == {25}


def test_cache_of_whole_steps_keeps_no_projection_alive(model: Transformer):
    before, caches = mx.get_active_memory(), model.new_caches()
    feed(model, IDS[:STEP], caches)
    mx.eval([array for cache in caches for array in cache.arrays()])
    assert mx.get_active_memory() - before <= 1.5 * sum(cache.nbytes for cache in caches)


def test_shrinking_to_whole_steps_releases_the_longer_arrays():
    before, cache = mx.get_active_memory(), KVCache()
    cache.update(*(mx.random.normal((1, 8, 8 * STEP, 64)) for _ in range(2)))
    mx.eval(cache.arrays())
    cache.trim(7 * STEP)
    cache.shrink()
    mx.eval(cache.arrays())
    assert mx.get_active_memory() - before <= 1.25 * cache.nbytes


def test_real_shape_takes_160_kib_per_token():
    magistral = replace(CONFIG, dim=5120, n_layers=40, n_heads=32, n_kv_heads=8, head_dim=128)
    assert magistral.kv_bytes_per_token(2) == 160 * 1024
    cache = KVCache()
    k = mx.zeros((1, 8, STEP - 1, 128), mx.bfloat16)
    cache.update(k, k)
    assert cache.nbytes * 40 == magistral.kv_bytes_per_token(2) * STEP
